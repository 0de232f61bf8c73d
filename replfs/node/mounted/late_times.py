"""With `-o writeback` the kernel owns the mtimes of files: what it said last is kept right.

The kernel notes when an application writes, sends the pages later, and then, in a setattr, the
time it noted. A page that comes after the setattr it belongs to would leave the time of its
arrival behind, in the store and on the peers, while the kernel shows its own for as long as it
remembers the file. Nor is there a setattr where the time did not change, as in one tick of the
clock. So when a file is closed or flushed, and all pages have come, the time that the kernel said
last, or that the file had before they came, is set again.
"""

from __future__ import annotations

import os

from replfs.store.inode import Inode


class LateTimes:
    """Of the files that are open through the mount."""

    def __init__(self) -> None:
        self._said: dict[Inode, int] = {}
        self._late: set[Inode] = set()

    def said(self, inode: Inode, mtime: int) -> None:
        """The kernel has set the file's mtime, nanoseconds."""
        if inode.is_open:
            self._said[inode] = mtime
            self._late.discard(inode)

    def came(self, inode: Inode, fd: int) -> None:
        """Pages of the file, open as *fd*, are about to be written."""
        if inode not in self._said:
            self._said[inode] = os.fstat(fd).st_mtime_ns
        self._late.add(inode)

    def due(self, inode: Inode) -> int | None:
        """At close and fsync: the mtime that is to be set again."""
        if inode not in self._late:
            return None
        self._late.remove(inode)
        return self._said[inode]

    def forget(self, inode: Inode) -> None:
        """It is closed."""
        if not inode.is_open:
            self._said.pop(inode, None)
            self._late.discard(inode)
