"""Whether the event loop waits for the disk itself."""

import os
import threading
import time
from pathlib import Path

import pytest
from helpers.replicas import Store

from replfs.node.mounted.view import ReadOnlyView
from replfs.node.pacing import disk
from replfs.node.pacing.disk import SLOW_NS, Disk


@pytest.fixture
def clock(monkeypatch):
    """The time, in ns, to be set."""
    now = [10**9]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    return now


def test_after_a_long_wait_there_is_none_for_much_longer(clock):
    one = Disk()
    assert one.is_quick()
    began = clock[0]
    clock[0] += SLOW_NS
    one.took(began)
    assert one.is_quick()
    began = clock[0]
    clock[0] += SLOW_NS + 1
    one.took(began)
    ended = clock[0]
    clock[0] = ended + 199 * SLOW_NS
    assert not one.is_quick()
    clock[0] = ended + 201 * SLOW_NS
    assert one.is_quick()


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
