"""fsync: both disks at the same time, nobody else waits for them, and both must have done it."""

from __future__ import annotations

import errno
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from replfs.core import ops
from replfs.core.policy import Ack, Policy
from replfs.node.mounted.volume import Volume
from replfs.node.pacing import flush
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.store.activity import ActivityLog

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="writes hidden attributes")


class Peer:
    """In sync; answers what it is sent when it is told to, and all but flushes at once."""

    live = True
    diverged = False
    log = settling = SimpleNamespace(is_empty=True)
    unawaited = landed = 0

    def __init__(self) -> None:
        self.link: Any = SimpleNamespace(has_room=lambda *_: True, pump=lambda: False)
        self.syncs: list[Any] = []
        self.durable = trio.Event()
        self.durable.set()
        self.failures: list[int] = []

    def send(self, op: ops.AnyOp, payload: bytes | None, flight: Any, start: int, _: int) -> bool:
        flight.sent(self, op, start)
        if isinstance(op, ops.Sync):
            self.syncs.append(flight)
        else:
            flight.answered(self.link, ops.Done(0, len(payload or b"")))
        return True

    def answer(self, number: int = 0) -> None:
        self.syncs.pop(0).answered(self.link, ops.Done(number))

    def failed(self, _op: ops.AnyOp, number: int, **_: int) -> None:
        self.failures.append(number)

    async def marks_durable(self) -> None:
        await self.durable.wait()


class Disk:
    """This side's flushes, each under way until `finish`."""

    def __init__(self) -> None:
        self.begun = 0
        self.done = trio.Event()
        self.error = 0

    def begin(self, _fd: int, *, data_only: bool) -> Disk:
        del data_only
        self.begun += 1
        return self

    async def wait(self) -> None:
        await self.done.wait()
        if self.error:
            raise OSError(self.error, os.strerror(self.error))

    def finish(self) -> None:
        self.done.set()


class Place:
    """A volume with two files, both open, and the two sides of a flush."""

    def __init__(self, tree: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.disk = Disk()
        monkeypatch.setattr(flush, "begin", self.disk.begin)
        policies = Policies(
            tree, Policy.SYNC, Ack.OP, used=False, on_used=lambda: None, generation=lambda: b""
        )
        pipeline = Pipeline(tree, ActivityLog(str(tmp_path / "activity"), b"n" * 16), policies)
        self.peer = Peer()
        pipeline.peers.append(self.peer)  # type: ignore[arg-type]
        self.volume = Volume(pipeline, dict, None)  # type: ignore[arg-type]  # not of the root
        self.handles = []
        for name in ("one", "other"):
            (tmp_path / "store" / name).touch()
            inode = self.volume.lookup(1, name.encode())[0]
            self.handles.append(self.volume.open_handle(inode, os.O_RDWR).number)
        self.result: Any = None

    async def fsync(self) -> None:
        try:
            await self.volume.fsync(self.handles[0], data_only=False)
        except OSError as error:
            self.result = error.errno
        else:
            self.result = "done"


@pytest.fixture
def place(tree, tmp_path, monkeypatch):
    return Place(tree, tmp_path, monkeypatch)


@pytest.mark.parametrize("first", ["here", "there"])
async def test_both_disks_flush_at_the_same_time_and_both_are_awaited(place, first):
    steps = [place.disk.finish, place.peer.answer]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.fsync)
        await wait_all_tasks_blocked()
        assert place.disk.begun == len(place.peer.syncs) == 1
        for step in steps if first == "here" else reversed(steps):
            assert place.result is None
            step()
            await wait_all_tasks_blocked()
        assert place.result == "done"


async def test_nobody_else_waits_for_the_disks(place):
    """Neither who writes to another file, nor who writes to the same one."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.fsync)
        await wait_all_tasks_blocked()
        with trio.fail_after(5):
            for handle in place.handles:
                assert await place.volume.write(handle, 0, b"data") == 4
        assert place.result is None
        place.disk.finish()
        place.peer.answer()
    assert place.result == "done"


async def test_it_returns_only_when_what_the_peer_lacks_is_durable(place):
    place.peer.durable = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.fsync)
        await wait_all_tasks_blocked()
        place.disk.finish()
        place.peer.answer()
        await wait_all_tasks_blocked()
        assert place.result is None
        place.peer.durable.set()
    assert place.result == "done"


@pytest.mark.parametrize("here", [0, errno.EIO])
async def test_an_error_there_is_recorded_whatever_comes_of_it_here(place, here):
    """The kernel tells of it once: nobody would know that the peer's disk does not have it."""
    place.disk.error = here
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.fsync)
        await wait_all_tasks_blocked()
        place.disk.finish()
        place.peer.answer(errno.ENOSPC)
    assert place.result == (here or "done")
    assert place.peer.failures == [errno.ENOSPC]


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
async def test_what_failed_to_be_written_here_is_never_called_stable_again(place, error):
    """The kernel tells of it once, and what it dropped is not what the peer has."""
    place.disk.error = error
    place.disk.finish()
    unwritten = place.volume.pipeline.unwritten
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.fsync)
        await wait_all_tasks_blocked()
        place.peer.answer()
    assert place.result == unwritten.number == error
    place.disk.error = place.result = 0
    await place.fsync()
    assert place.result == error
    assert place.disk.begun == 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(place.volume.fsync, place.handles[1], data_only=False))
        await wait_all_tasks_blocked()
        place.peer.answer()
    assert place.disk.begun == 2


async def test_what_cannot_be_flushed_at_all_has_not_failed(place):
    place.disk.error = errno.EINVAL
    place.disk.finish()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(place.fsync)
        await wait_all_tasks_blocked()
        place.peer.answer()
    assert place.result == errno.EINVAL
    assert not place.volume.pipeline.unwritten.number


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC])
async def test_a_synchronous_write_is_flushed_on_both_sides_before_it_returns(place, flags):
    inode = place.volume.lookup(1, b"one")[0]
    handle = place.volume.open_handle(inode, os.O_WRONLY | flags).number
    written = []

    async def write() -> None:
        written.append(await place.volume.write(handle, 0, b"data"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        assert place.disk.begun == len(place.peer.syncs) == 1
        place.disk.finish()
        await wait_all_tasks_blocked()
        assert not written
        place.peer.answer()
    assert written == [4]


@pytest.mark.parametrize("is_whole", [True, False])
async def test_an_fsync_of_the_root_tells_apart_who_may_lack_something(place, is_whole):
    """Before it promises everything: a killed process had something in flight, say."""
    steps = []

    async def checkpoint() -> None:
        steps.append("checkpoint")

    place.volume.checkpoint = checkpoint
    place.peer.log = SimpleNamespace(is_empty=is_whole)
    place.peer.begin_divergence = partial(steps.append, "generation")
    root = place.volume.opendir(1)
    await place.volume.fsyncdir(root.number, data_only=False)
    assert steps == (["checkpoint"] if is_whole else ["generation", "checkpoint"])
