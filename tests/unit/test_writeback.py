"""What a resync brings goes to the disk while the rest is coming."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest
import trio
import trio.testing

from replfs.core import ops
from replfs.node.replica import writeback
from replfs.node.replica.later import Later
from replfs.node.replica.writeback import Writeback
from replfs.store import syscalls
from replfs.store.inode import Inode

MIB = 1 << 20


@pytest.fixture
def begun(monkeypatch):
    """Files of which the writing was begun, by inode number."""
    found: list[int] = []
    monkeypatch.setattr(syscalls, "start_writing", lambda fd: found.append(os.fstat(fd).st_ino))
    return found


@pytest.fixture
async def later():
    later = Later()
    async with trio.open_nursery() as nursery:
        await nursery.start(later.run)
        yield later
        nursery.cancel_scope.cancel()


@pytest.fixture
def make(tmp_path):
    opened: list[int] = []

    def make(number: int) -> tuple[Inode, int]:
        fd = os.open(tmp_path / f"{number}", os.O_RDWR | os.O_CREAT)
        opened.append(fd)
        inode = Inode(os.fstat(fd).st_ino, 0o100000)
        inode.id = bytes([number]) * ops.OBJECT_ID_SIZE
        return inode, fd

    yield make
    for fd in opened:
        os.close(fd)


async def nothing():
    """Flushes everything, which is nothing."""


def test_the_call_itself(tmp_path):
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(MIB))
        file.flush()
        syscalls.start_writing(file.fileno())
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        syscalls.start_writing(1 << 20)


async def test_it_begins_every_few_mib_and_at_the_end(later, make, begun):
    one = Writeback(later, nothing)
    large, large_fd = make(1)
    small, small_fd = make(2)
    for _ in range(7):
        one.wrote(large, large_fd, MIB)
    one.wrote(small, small_fd, MIB - 1)
    await later.idle()
    assert begun == []
    one.wrote(large, large_fd, MIB)
    await later.idle()
    assert begun == [large.ino]
    assert not one.is_due(small)
    assert not one.is_due(large)  # all of it is on its way
    one.finished(small, small_fd)
    one.wrote(large, large_fd, 2 * MIB)
    assert one.is_due(large)
    one.finished(large, large_fd)
    await later.idle()
    assert begun == [large.ino] * 2


async def test_few_at_a_time_and_none_is_forgotten(later, make, begun, monkeypatch):
    entered, ending = trio.Event(), trio.Event()

    async def slow(call: Callable[[int], None], fd: int, **_: object) -> None:
        entered.set()
        await ending.wait()
        call(fd)

    monkeypatch.setattr(trio.to_thread, "run_sync", slow)
    one = Writeback(later, nothing)
    files = [make(number) for number in range(4)]
    for inode, fd in files:
        one.wrote(inode, fd, 8 * MIB)
    await entered.wait()
    ending.set()
    await later.idle()
    assert set(begun) == {inode.ino for inode, _ in files[:2]}
    for inode, fd in files[2:]:
        one.wrote(inode, fd, 1)
    await later.idle()
    assert sorted(begun) == sorted(inode.ino for inode, _ in files)


async def test_a_failure_is_for_the_end_to_tell(later, make, monkeypatch):
    def fails(_fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "start_writing", fails)
    one = Writeback(later, nothing)
    inode, fd = make(1)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        one.wrote(inode, fd, 8 * MIB)
        await later.idle()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_memory_is_bounded(later, make, begun):
    one = Writeback(later, nothing)
    for number in range(200):
        inode = Inode(number, 0o100000)
        inode.id = bytes([number]) * ops.OBJECT_ID_SIZE
        one.wrote(inode, -1, MIB)
    assert len(one._counts) == writeback._FILES_MAX


def test_before_it_runs_nothing_is_begun(make, begun):
    one = Writeback(Later(), nothing)
    inode, fd = make(1)
    one.wrote(inode, fd, 16 * MIB)
    assert begun == []


async def test_small_files_are_flushed_all_together_while_more_of_them_come(later):
    flushed: list[int] = []
    placed, ending = 0, trio.Event()

    async def flush():
        flushed.append(placed)
        await ending.wait()

    one = Writeback(later, flush)
    for _ in range(64):
        placed += 64
        one.placed(64)
        await trio.testing.wait_all_tasks_blocked()
    assert flushed == [2048]  # one at a time
    ending.set()
    await later.idle()
    placed += 64
    one.placed(64)
    await later.idle()
    assert flushed == [2048, 4160]


async def test_a_flush_that_fails_is_none_but_others_follow(later):
    failed: list[int] = []

    async def flush():
        failed.append(1)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    one = Writeback(later, flush)
    for _ in range(2):
        one.placed(2048)
        await later.idle()
    assert len(failed) == 2
