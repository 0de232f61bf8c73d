"""Flushes that the kernel does by itself, and the threads that take over where it does not."""

import errno
import os
from pathlib import Path

import pytest
import trio

from replfs.node.pacing import flush
from replfs.store.aio import KernelFlushes


@pytest.fixture
def written() -> int:
    fd = os.memfd_create("written")
    os.write(fd, b"x" * 5000)
    return fd


@pytest.fixture(params=["kernel", "thread"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "thread":
        monkeypatch.setattr(flush, "_kernel", lambda: None)
    return str(request.param)


async def test_the_kernel_does_it(written: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", None)
    monkeypatch.setattr(os, "fdatasync", None)
    for data_only in (False, True):
        begun = flush.begin(written, data_only=data_only)
        await begun.wait()
    os.close(written)


async def test_it_may_be_closed_meanwhile(written: int, way: str) -> None:
    begun = flush.begin(written, data_only=False)
    os.close(written)
    await begun.wait()


async def test_many_at_once(written: int, way: str) -> None:
    """More than the kernel takes at once: the rest goes to threads."""
    async with trio.open_nursery() as nursery:
        for number in range(200):
            os.pwrite(written, b"y", number * 4096)
            nursery.start_soon(flush.begin(written, data_only=number % 2 == 0).wait)
    os.close(written)


async def test_a_directory(tmp_path: Path, way: str) -> None:
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    await flush.begin(fd, data_only=False).wait()
    os.close(fd)


async def test_what_cannot_be_flushed_says_so(way: str) -> None:
    ends = os.pipe()
    with pytest.raises(OSError) as caught:
        await flush.begin(ends[0], data_only=False).wait()
    assert caught.value.errno == errno.EINVAL
    for end in ends:
        os.close(end)


async def test_a_result_is_taken_whoever_looks_first(written: int) -> None:
    """The results of all come in one queue, in any order."""
    kernel = KernelFlushes()
    signals = [kernel.begin(written, data_only=False) for _ in range(3)]
    for signal in reversed(signals):
        await trio.lowlevel.wait_readable(signal)
        kernel.end(signal)
    assert kernel.begin(written, data_only=False) in signals
    os.close(written)


async def test_it_is_not_cancelled(written: int, way: str) -> None:
    """Whoever begins one knows what became of it, and its descriptor can be used again."""
    is_through = False
    with trio.CancelScope() as scope:
        scope.cancel()
        await flush.begin(written, data_only=False).wait()
        is_through = True
    assert is_through
    await flush.begin(written, data_only=False).wait()
    os.close(written)
