"""Writing back what a resync brings while it is still coming.

A resync ends when all of it is on the disk. The kernel would begin to write only then, or half a
minute after it got the data.
"""

from __future__ import annotations

import logging
import os
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
_AT_ONCE: Final = 2
"""Threads: a disk that is slower than the network is not to be queued up at."""


class Writeback:
    """Has the files of one replica written back."""

    def __init__(self, later: Later) -> None:
        self._later = later
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
