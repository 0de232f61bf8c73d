"""Writing back what a resync brings while it is still coming.

A resync ends when all of it is on the disk. The kernel would begin to write only then, or half a
minute after it got the data.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final

import trio

from replfs.node.replica.later import Later
from replfs.store import syscalls
from replfs.store.inode import Inode

log = logging.getLogger(__name__)

_EVERY: Final = 8 << 20
"""Bytes of a file between two times that its writing is begun."""
_ENOUGH: Final = 1 << 20
"""Bytes of a file that are worth it at its end; smaller ones are left to the end of the resync."""
_FILES_MAX: Final = 64
"""Files of which is counted what they got; more are not written to at a time."""
_SMALL_FILES: Final = 1 << 11
"""Small files, placed together, between two times that everything is flushed: asking for each of
them would cost as much as to make it."""
_AT_ONCE: Final = 2
"""Threads: a disk that is slower than the network is not to be queued up at."""


class Writeback:
    """Has the files of one replica written back."""

    def __init__(self, later: Later, flush: Callable[[], Awaitable[None]]) -> None:
        """*flush* flushes everything; it raises OSError, and remembers that it did."""
        self._later = later
        self._flush = flush
        self._small = 0
        """Small files that were placed since everything was flushed last."""
        self._flushing = False
        self._counts: dict[bytes, int] = {}
        """Bytes that a file got since, by object id."""
        self._running = 0

    def wrote(self, inode: Inode, fd: int, count: int) -> None:
        """*count* bytes were written to a file by *fd*."""
        counts = self._counts
        total = counts.pop(inode.id, 0) + count
        if total < _EVERY or not self._begin(fd):
            counts[inode.id] = total
            if len(counts) > _FILES_MAX:
                del counts[next(iter(counts))]

    def is_due(self, inode: Inode) -> bool:
        """Whether a file, of which all has come, is worth `finished`."""
        return self._counts.get(inode.id, 0) >= _ENOUGH

    def finished(self, inode: Inode, fd: int) -> None:
        """All of a file has come, and nothing more is written by *fd* for now."""
        if self._counts.pop(inode.id, 0) >= _ENOUGH:
            self._begin(fd)

    def placed(self, count: int) -> None:
        """So many small files were placed together."""
        self._small += count
        if self._small >= _SMALL_FILES and not self._flushing:
            self._flushing = self._later.start(self._flush_all)

    async def _flush_all(self) -> None:
        self._small = 0
        try:
            # What failed is remembered, and told at the end.
            with contextlib.suppress(OSError):
                await self._flush()
        finally:
            self._flushing = False

    def _begin(self, fd: int) -> bool:
        if self._running >= _AT_ONCE:
            return False
        own = os.dup(fd)
        if not self._later.start(partial(self._write_back, own)):
            os.close(own)
            return False
        self._running += 1
        return True

    async def _write_back(self, fd: int) -> None:
        try:
            await trio.to_thread.run_sync(syscalls.start_writing, fd, limiter=self._later.flushes)
        except OSError as error:
            # It only was to be early; whether all of it can be written is found out at the end.
            log.debug("cannot begin to write back: %s", error.strerror)
        finally:
            os.close(fd)
            self._running -= 1
