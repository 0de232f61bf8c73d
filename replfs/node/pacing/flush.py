"""Flushing a file while everything else goes on: by the kernel itself, else in a thread."""

from __future__ import annotations

import functools
import os
from typing import Protocol

import trio

from replfs.store.aio import KernelFlushes


class Flush(Protocol):
    """A flush that has been begun."""

    async def wait(self) -> None:
        """Wait until what was written before it began is on stable storage; to be called once.

        Raises:
            OSError: as fsync(2).

        Cancellation: none.
        """


def begin(fd: int, *, data_only: bool, threads: trio.CapacityLimiter | None = None) -> Flush:
    """Begin to flush *fd*, which may be closed afterwards; with *data_only*, as fdatasync(2).

    Where the kernel does not take it, a thread does, one of *threads*.

    Raises:
        OSError: no descriptor is left to do it with.
    """
    kernel = _kernel()
    if kernel is not None:
        try:
            return _ByKernel(kernel, kernel.begin(fd, data_only=data_only))
        except OSError:
            pass  # too many at once, or a filesystem for which only the plain call works
    return _InThread(os.dup(fd), data_only=data_only, threads=threads)


@functools.cache
def _kernel() -> KernelFlushes | None:
    """The one context of this process, made when it is first needed."""
    try:
        return KernelFlushes()
    except OSError:
        return None


class _ByKernel:
    def __init__(self, kernel: KernelFlushes, signal: int) -> None:
        self._kernel = kernel
        self._signal = signal

    async def wait(self) -> None:
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(self._signal)
        self._kernel.end(self._signal)


class _InThread:
    def __init__(self, fd: int, *, data_only: bool, threads: trio.CapacityLimiter | None) -> None:
        self._fd = fd
        self._call = os.fdatasync if data_only else os.fsync
        self._threads = threads

    async def wait(self) -> None:
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._call, self._fd, limiter=self._threads)
        finally:
            os.close(self._fd)
