"""Whether the event loop waits for the disk itself, and when the disk begins to read."""

import os
import threading
import time
from pathlib import Path

import pytest
from helpers.replicas import Store

from replfs.core.policy import Ack, Policy
from replfs.node.mounted.view import ReadOnlyView
from replfs.node.mounted.volume import Volume
from replfs.node.pacing import disk
from replfs.node.pacing.disk import LOST_NS, REST, SLOW_NS, Disk
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.store.activity import ActivityLog
from replfs.store.tree import Tree


@pytest.fixture
def clock(monkeypatch):
    """The time, in ns, to be set."""
    now = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    return now


def wait(one: Disk, clock: list[int], ns: int) -> None:
    """Wait for the disk for so long."""
    began = clock[0]
    clock[0] += ns
    one.took(began)


def test_short_waits_cost_nothing(clock):
    one = Disk()
    for _ in range(2 * LOST_NS // SLOW_NS):
        wait(one, clock, SLOW_NS)
        assert one.is_quick()
    wait(one, clock, LOST_NS)
    assert one.is_quick()


def test_long_waits_now_and_then_cost_nothing(clock):
    one = Disk()
    for _ in range(10):
        wait(one, clock, LOST_NS)
        assert one.is_quick()
        clock[0] += LOST_NS * REST


def test_after_many_long_waits_there_is_none_until_they_are_made_up_for(clock):
    one = Disk()
    count = 0
    while one.is_quick():
        wait(one, clock, 2 * SLOW_NS)
        count += 1
    assert count == LOST_NS // (2 * SLOW_NS) + 1
    began = clock[0]
    while not one.is_quick():
        clock[0] += SLOW_NS
    wait(one, clock, 2 * SLOW_NS)
    assert not one.is_quick()
    # From now on, half a percent of the time.
    while not one.is_quick():
        clock[0] += SLOW_NS
    assert clock[0] - began >= 2 * SLOW_NS * REST


@pytest.mark.parametrize("is_quick", [True, False])
@pytest.mark.parametrize("size", [disk.SMALL, disk.SMALL + 1])
async def test_a_few_bytes_from_a_quick_disk_need_no_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_quick: bool, size: int
) -> None:
    store = Store(tmp_path / "store")
    store.make(5, b"file")
    store.write(5, 0, b"x" * 100)
    view = ReadOnlyView(store.tree)
    handle = await view.open(view.lookup(1, b"file")[0].nodeid, os.O_RDONLY)
    read_in: set[int] = set()
    real = os.pread

    def pread(*arguments: int) -> bytes:
        read_in.add(threading.get_ident())
        return real(*arguments)

    def not_cached(*_: object) -> int:
        raise BlockingIOError

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(os, "preadv", not_cached)
    monkeypatch.setattr(view._disk, "is_quick", lambda: is_quick)
    assert bytes(await view.read(handle.number, 0, size)) == b"x" * 100
    assert (read_in == {threading.get_ident()}) is (is_quick and size == disk.SMALL)
    await view.release(handle.number)
    store.close()


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How much of a file the disk was told to begin with, each time that it was."""
    sizes: list[int] = []

    def fadvise(_fd: int, start: int, size: int, advice: int) -> None:
        assert (start, advice) == (0, os.POSIX_FADV_WILLNEED)
        sizes.append(size)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    return sizes


@pytest.mark.parametrize(
    ("flags", "size", "is_read"),
    [
        (os.O_RDONLY, 1, True),
        (os.O_RDONLY, disk.SMALL, True),
        (os.O_RDONLY, disk.SMALL + 1, False),
        (os.O_RDONLY, 0, False),
        (os.O_WRONLY, 1, False),
        (os.O_RDWR, 1, False),
    ],
)
async def test_the_first_open_has_a_small_file_read(
    tree: Tree, tmp_path: Path, advised: list[int], flags: int, size: int, is_read: bool
) -> None:
    policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=False, on_used=lambda: None, generation=lambda: b""
    )
    pipeline = Pipeline(tree, ActivityLog(str(tmp_path / "activity"), b"n" * 16), policies)
    volume = Volume(pipeline, dict, None)  # type: ignore[arg-type]  # no fsync here
    (tmp_path / "store/file").write_bytes(b"x" * size)
    for _ in range(2):
        handle = await volume.open(volume.lookup(1, b"file")[0].nodeid, flags)
        await volume.release(handle.number)
    # The kernel keeps contents from one open to the next.
    assert advised == [size] * is_read


async def test_a_replica_has_it_read_at_each_open(
    tree: Tree, tmp_path: Path, advised: list[int]
) -> None:
    view = ReadOnlyView(tree)
    (tmp_path / "store/file").write_bytes(b"x")
    for _ in range(2):
        handle = await view.open(view.lookup(1, b"file")[0].nodeid, os.O_RDONLY)
        await view.release(handle.number)
    assert advised == [1, 1]
