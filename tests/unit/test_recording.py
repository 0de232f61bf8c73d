"""Where it cannot be recorded what a peer lacks: the caller learns, and everybody else gets it."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core import ops
from replfs.core.policy import Ack, Policy
from replfs.errors import HalfDone, NotRecorded
from replfs.node.mounted.volume import Volume
from replfs.node.replication.flight import Flight
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.store.activity import ActivityLog
from replfs.store.record import PRIVILEGED

EVERYTHING = SimpleNamespace(is_empty=True)


class FakePeer:
    """A peer that gets all that is sent; one that is away lacks it, and its log is on a full disk.

    What is done to it, by the name of the method, can be made to fail.
    """

    diverged = False
    log = settling = EVERYTHING
    unawaited = landed = 0

    def __init__(self, name: str, *, away: bool = False) -> None:
        self.name = name
        self.live = not away
        self.link: Any = SimpleNamespace(has_room=lambda: True, pump=lambda: None)
        self.sent: list[type] = []
        self.recorded: list[str] = []
        self.doubted: list[OSError] = []
        self.fails: set[str] = set()

    def send(self, op: ops.AnyOp, _payload: object, flight: Flight, *_: object) -> bool:
        if self.live:
            self.sent.append(type(op))
            flight.sent(self, op, 0)
            flight.answered(self.link, ops.Done(0, flight.length))
        return self.live

    @property
    def gets_all(self) -> bool:
        return self.live

    def is_whole(self, _queue_bytes: int) -> bool:
        return self.live

    def doubt_all(self, error: OSError) -> OSError:
        self.doubted.append(error)
        return error

    def __getattr__(self, name: str) -> Any:
        if name not in RECORDS:
            raise AttributeError(name)

        def record(*_: object, **__: object) -> None:
            if name in self.fails:
                raise NotRecorded(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.recorded.append(name)

        return record


RECORDS = {
    "begin_divergence", "check_recordable", "failed", "links_changed", "mark", "mark_policy_change",
    "mark_touched", "moved", "moving",
}  # fmt: skip


@pytest.fixture(params=[Ack.OP, Ack.CLOSE], ids=["awaited", "ack=close"])
def volume(request, tree, tmp_path):
    """One whose first peer is away, with a file, `file`, and a directory, `dir`."""
    policies = Policies(
        tree, Policy.SYNC, request.param, used=False, on_used=lambda: None, generation=lambda: b""
    )
    pipeline = Pipeline(tree, ActivityLog(str(tmp_path / "activity"), b"n" * 16), policies)
    pipeline.peers += [FakePeer("a", away=True), FakePeer("b")]  # type: ignore[list-item]
    pipeline.peers[0].live = False
    (tmp_path / "store/file").touch()
    (tmp_path / "store/dir").mkdir()
    return Volume(pipeline, dict, None)  # type: ignore[arg-type]  # no fsync here


@pytest.mark.parametrize("what", ["mark", "begin_divergence"])
async def test_a_name(volume, tmp_path, what):
    away, there = volume.pipeline.peers
    away.fails = {what}
    with pytest.raises(HalfDone):
        await volume.make(1, b"new", 0o40755, owner=(os.geteuid(), os.getegid()), kind="mkdir")
    assert (tmp_path / "store/new").is_dir()
    assert there.sent == [ops.Make]
    assert [error.errno for error in away.doubted] == [errno.ENOSPC]
    assert there.doubted == []


async def test_contents(volume, tmp_path):
    away, there = volume.pipeline.peers
    away.fails = {"mark"}
    inode, _ = volume.lookup(1, b"file")
    handle = await volume.open(inode.nodeid, os.O_RDWR)
    with pytest.raises(HalfDone):
        await volume.write(handle.number, 0, b"data")
    assert (tmp_path / "store/file").read_bytes() == b"data"
    with pytest.raises(HalfDone):
        await volume.truncate(inode, 2, None, handle.fd)
    assert (tmp_path / "store/file").read_bytes() == b"da"
    assert there.sent == [ops.Write, ops.Truncate]
    assert len(away.doubted) == 2
    await volume.release(handle.number)


@pytest.mark.parametrize("also", [set(), {"mark_touched"}], ids=["a moment", "for long"])
async def test_what_is_recorded_beside_a_change_that_is_made_already(volume, tmp_path, also):
    """What it touched is recorded for all of them, whatever they were sent before."""
    away, there = volume.pipeline.peers
    away.fails = {"moved"} | also
    volume.lookup(1, b"file")
    with pytest.raises(NotRecorded):
        await volume.rename(1, b"file", 1, b"renamed", 0)
    assert (tmp_path / "store/renamed").exists()
    assert there.sent == ([ops.Rename] if PRIVILEGED else [])
    assert "mark_touched" in there.recorded
    assert "mark_touched" in away.recorded or len(away.doubted) == 1


async def test_a_policy(volume):
    away, there = volume.pipeline.peers
    away.fails = {"mark_policy_change"}
    inode, _ = volume.lookup(1, b"dir")
    with pytest.raises(HalfDone):
        await volume.set_policy(inode, Policy.NONE, Ack.INHERIT)
    assert there.recorded == ["mark_policy_change"]
    assert len(away.doubted) == 1
