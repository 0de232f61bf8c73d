"""Names and attributes are changed here and on the peers at the same time: sent first, then done.

What fails here after it was sent is recorded, and is sent first no more until it has succeeded.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from replfs.core import ops
from replfs.core.policy import Ack, Policy
from replfs.node.mounted.volume import Volume
from replfs.node.replication.flight import Flight
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.store import syscalls
from replfs.store.activity import ActivityLog
from replfs.store.syscalls import failure

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="without root it is done here first")

EVERYTHING = SimpleNamespace(is_empty=True)
KINDS = ["unlink", "rename", "replace", "link", "chmod", "chown"]
CALLS = {
    "unlink": "unlink", "rename": "rename", "replace": "rename", "link": "link", "chmod": "chmod",
    "chown": "chown",
}  # fmt: skip
"""What each of them is of os."""


class FakePeer:
    """A peer that is in sync; it sees what is here when it is sent something, and answers late."""

    live = diverged = is_whole = True
    log = settling = EVERYTHING
    unawaited = landed = 0

    def __init__(self, look: Callable[[], object]) -> None:
        self.link: Any = SimpleNamespace(has_room=lambda: True, pump=self.pump)
        self.waited: Callable[[int, int], None] = lambda _began, _ended: None
        self.look = look
        self.flights: list[Flight] = []
        self.sent: list[tuple[ops.AnyOp, object]] = []
        """And what was here by then."""
        self.failures: list[tuple[ops.AnyOp, int]] = []
        self.marked: list[ops.AnyOp] = []
        self.touched: list[object] = []
        self.removed: list[bytes] = []
        self.answer = ops.Done(0)

    def send(self, op: ops.AnyOp, _payload: object, flight: Flight, start: int, _: int) -> bool:
        self.sent.append((op, self.look()))
        flight.sent(self, op, start)
        self.flights.append(flight)
        trio.lowlevel.spawn_system_task(self._answer)
        return True

    async def _answer(self) -> None:
        await trio.lowlevel.checkpoint()  # however long whoever awaits it looks for it by itself
        self.pump()

    def pump(self) -> None:
        while self.flights:
            self.flights.pop().answered(self.link, self.answer)

    def failed(self, op: ops.AnyOp, number: int, **_: object) -> None:
        self.failures.append((op, number))

    def mark(self, op: ops.AnyOp) -> None:
        self.marked.append(op)

    def mark_touched(self, touched: object) -> None:
        self.touched.append(touched)

    def object_removed(self, inode: Any, *_: object) -> None:
        self.removed.append(inode.id)

    def moving(self, *_: object) -> None:
        """Nothing is marked."""

    moved = links_changed = moving


class Place:
    """A volume with the files `file` and `other` and the directory `dir` with `dir/in` in it."""

    def __init__(self, tree: Any, tmp_path: Any, policy: Policy, ack: Ack) -> None:
        self.store = tmp_path / "store"
        for name in ("file", "other"):
            (self.store / name).touch()
            (self.store / name).chmod(0o644)
        (self.store / "dir").mkdir()
        (self.store / "dir/in").touch()
        policies = Policies(
            tree, policy, ack, used=False, on_used=lambda: None, generation=lambda: b""
        )
        pipeline = Pipeline(tree, ActivityLog(str(tmp_path / "activity"), b"n" * 16), policies)
        self.peer = FakePeer(self.look)
        pipeline.peers.append(self.peer)  # type: ignore[arg-type]
        self.volume = Volume(pipeline, dict, None)  # type: ignore[arg-type]  # no fsync here
        self.file = self.volume.lookup(1, b"file")[0]

    def look(self) -> object:
        """All that the calls may change."""
        return {
            path.name: (found.st_ino, found.st_mode, found.st_uid, found.st_nlink)
            for path in self.store.rglob("*")
            if (found := path.lstat())
        }

    def call(self, kind: str) -> Awaitable[object]:
        volume = self.volume
        every = dict.fromkeys(("size", "mode", "uid", "gid", "atime", "mtime"))
        match kind:
            case "unlink":
                return volume.unlink(1, b"file")
            case "rename":
                return volume.rename(1, b"file", 1, b"new", 0)
            case "replace":
                return volume.rename(1, b"file", 1, b"other", 0)
            case "link":
                return volume.link(self.file.nodeid, 1, b"new")
            case "chmod":
                return volume.setattr(self.file.nodeid, None, **{**every, "mode": 0o4600})
            case _:
                return volume.setattr(self.file.nodeid, None, **{**every, "uid": 7})


@pytest.fixture(params=["awaited", "ack=close", "async"])
def place(request, tree, tmp_path):
    policy = Policy.ASYNC if request.param == "async" else Policy.SYNC
    return Place(tree, tmp_path, policy, Ack.CLOSE if request.param == "ack=close" else Ack.OP)


@pytest.mark.parametrize("kind", KINDS)
async def test_it_is_sent_before_it_is_done(place, kind):
    before = place.look()
    await place.call(kind)
    place.peer.pump()
    ((op, here),) = place.peer.sent
    assert here == before
    assert place.look() != before
    assert (place.peer.failures, place.peer.marked) == ([], [])
    if not isinstance(op, ops.SetAttr):
        assert place.store.stat().st_mtime_ns == op.parent_mtime


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("number", [errno.EPERM, errno.EIO])
async def test_what_fails_here_is_recorded(place, kind, number, monkeypatch):
    before = place.look()

    def fail(*_: object, **__: object) -> None:
        raise failure(number)

    with monkeypatch.context() as patch:
        patch.setattr(os, CALLS[kind], fail)
        with pytest.raises(OSError, match=os.strerror(number)):
            await place.call(kind)
        place.peer.pump()
        ((op, _),) = place.peer.sent
        assert place.peer.failures == [(op, number)]
        assert bool(place.peer.touched) == (number == errno.EIO)
        # Once is enough: whatever is wrong with the store, the peers do no more of it.
        with pytest.raises(OSError, match=os.strerror(number)):
            await place.call(kind)
        assert len(place.peer.sent) == 1
    assert place.look() == before
    assert place.peer.removed == []
    await place.call(kind)
    ((_, _), (_, here)) = place.peer.sent
    assert here == place.look() != before
    place.peer.pump()
    assert len(place.peer.failures) == 1


async def test_after_a_success_the_next_is_sent_first_again(place, monkeypatch):
    def fail(*_: object, **__: object) -> None:
        raise failure(errno.EROFS)

    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", fail)
        with pytest.raises(OSError, match="Read-only"):
            await place.call("unlink")
    await place.call("unlink")
    before = place.look()
    await place.volume.unlink(1, b"other")
    assert place.peer.sent[-1][1] == before
    place.peer.pump()


async def test_what_a_store_may_well_refuse_is_done_here_first(place):
    """A directory may have something in it here that the peers do not have, as what is `none`."""
    volume, peer = place.volume, place.peer
    with pytest.raises(OSError, match=os.strerror(errno.ENOTEMPTY)):
        await volume.rmdir(1, b"dir")
    assert peer.sent == []
    await volume.rename(1, b"dir", 1, b"moved", 0)
    directory, _ = volume.lookup(1, b"moved")
    await volume.unlink(directory.nodeid, b"in")
    await volume.rmdir(1, b"moved")
    peer.pump()
    (_, renamed), _, (_, removed) = peer.sent
    assert "moved" in renamed
    assert removed == place.look()
    assert peer.failures == []


async def test_what_has_lost_its_name_meanwhile_is_not_sent(place):
    """Else the peers would be told of one object, and another one would go here."""
    volume, peer = place.volume, place.peer
    turn = volume.pipeline.turn

    async def late(*arguments: Any) -> object:
        volume.pipeline.turn = turn
        await volume.rename(1, b"other", 1, b"file", 0)
        peer.sent.clear()
        return await turn(*arguments)

    volume.pipeline.turn = late
    with pytest.raises(FileNotFoundError):
        await place.call("unlink")
    assert peer.sent == []
    assert (place.store / "file").exists()
    peer.pump()


async def test_a_mode_that_became_another_one_is_recorded(place, monkeypatch):
    set_mode = place.volume.tree.set_mode
    monkeypatch.setattr(
        place.volume.tree, "set_mode", lambda inode, mode: set_mode(inode, mode & 0o777)
    )
    await place.call("chmod")
    place.peer.pump()
    assert place.peer.sent[0][0] == ops.SetAttr(place.file.id, 0o4600)
    assert place.peer.marked == [ops.SetAttr(place.file.id)]


async def test_a_chown_whose_mode_is_not_certain_is_sent_when_it_is(place):
    (place.store / "file").chmod(0o2644)  # without x for the group chown(2) may leave it
    place.file.privileges = None
    before = place.look()
    await place.call("chown")
    place.peer.pump()
    ((op, here),) = place.peer.sent
    assert here == place.look() != before
    assert op.mode == (place.store / "file").stat().st_mode & 0o7777


@pytest.mark.parametrize("kind", ["unlink", "rename", "link"])
async def test_a_directory_whose_time_cannot_be_set_is_recorded(place, kind, monkeypatch):
    """The caller's change is made: told that it failed, the kernel would go on from that."""

    def fail(*_: object) -> None:
        raise failure(errno.EIO)

    before = place.look()
    monkeypatch.setattr(syscalls, "utimens", fail)
    await place.call(kind)
    place.peer.pump()
    assert place.look() != before
    assert place.peer.marked == [ops.SetAttr(place.volume.tree.root.id)]
