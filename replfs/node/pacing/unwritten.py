"""What this node's disk could not write: the kernel tells of it once, so it is remembered here.

Relies on: after a write to the disk has failed, fsync(2) and syncfs(2) say so once to each open
file, and later ones succeed without what could not be written. Linux keeps that in memory only for
as long as it pleases, and then reads what the disk has instead.

So one failure counts for as long as this process lives, whichever role it has, unless all that may
be missing is brought by another node.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

import trio

from replfs.store import syscalls

_NO_FLUSH: Final = frozenset({errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS})
"""What says that such an object cannot be flushed at all."""


class Unwritten:
    """Of one node. For the event loop's thread, but for `number`."""

    def __init__(self, note: Callable[[int], None] = lambda _: None) -> None:
        """*note* is told of the errno when there was no failure before."""
        self.number = 0
        """The errno of a flush that failed; 0: none has."""
        self.count = 0
        """Flushes that failed, ever."""
        self._note = note
        self._objects: set[bytes] = set()

    async def flush(self, fd: int, threads: trio.CapacityLimiter | None = None) -> None:
        """Flush the file system that *fd* is on, in a thread, one of *threads*.

        Always by the same open file, opened before anything was written: what another one is not
        told is lost on it.

        Raises:
            OSError: that failed, and is remembered.
        """
        own = os.dup(fd)
        try:
            await trio.to_thread.run_sync(syscalls.syncfs, own, limiter=threads)
        except OSError as error:
            self.failed(error)
            raise
        finally:
            os.close(own)

    def failed(self, error: OSError) -> None:
        """A flush of everything failed."""
        self.count += 1
        first = not self.number
        self.number = error.errno or errno.EIO
        if first:
            self._note(self.number)

    def failed_for(self, object_id: bytes, error: OSError) -> None:
        """A flush of one object failed, whatever it was that could not be written of it.

        Empty: it has no id, and then no object can be flushed any more.
        """
        if error.errno not in _NO_FLUSH:
            self._objects.add(object_id)
            self.failed(error)

    def check(self, object_id: bytes) -> None:
        """Raises OSError where a flush of this object failed: none that succeeds says anything."""
        if object_id in self._objects or b"" in self._objects:
            raise OSError(self.number, os.strerror(self.number))

    def mended(self) -> None:
        """Another node has brought anew all that may be missing, and it was flushed."""
        self.number = 0
        self._objects.clear()
