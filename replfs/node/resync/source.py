"""Where a baseline reads large files from: a snapshot of STORE, where STORE can make one.

What is read from a snapshot needs no turn among the application's writes, so these never wait for
it. It counts only if the file is still what it was: a file whose ctime is another, or no older than
the snapshot, is read where it is in use. Only the id that an object gets in a baseline, which
changes its ctime too, is allowed for.
"""

from __future__ import annotations

import logging
import os
import time
from typing import Final

import trio

from replfs.core import ops
from replfs.store.inode import Inode
from replfs.store.snapshots import BASELINE, Live, Snapshots
from replfs.store.tree import Tree

log = logging.getLogger(__name__)

_TICK_NS: Final = 100_000_000
"""A ctime is taken from a clock that lags behind the real one by up to a tick of the kernel."""


class Source:
    """The snapshot of one peer's baseline."""

    def __init__(self, tree: Tree, snapshots: Snapshots, peer: str) -> None:
        self._tree = tree
        self._snapshots = snapshots
        self._name = f"{BASELINE}-{peer}"
        self._root = -1
        self._device = 0
        self._taken_ns = 0
        self._named: dict[int, tuple[int, int]] = {}
        """ctimes before and after an object got its id, by inode number, of large files."""

    async def begin(self) -> None:
        """Make it, in place of one that an earlier run has left."""
        if isinstance(self._snapshots, Live):
            return
        await self.end()
        self._taken_ns = time.time_ns()
        try:
            await trio.to_thread.run_sync(self._snapshots.take, self._name)
            self._root = self._snapshots.open(self._name) or -1
        except OSError as error:
            log.warning("the baseline is read without a snapshot: %s", error.strerror)
            return
        if self._root >= 0:
            self._device = os.fstat(self._root).st_dev

    async def end(self) -> None:
        """Remove it, if there is one."""
        if isinstance(self._snapshots, Live):
            return
        if self._root >= 0:
            os.close(self._root)
            self._root = -1
        self._named.clear()
        try:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._snapshots.drop, self._name)
        except OSError as error:
            log.warning("snapshot %s is still there: %s", self._name, error.strerror)

    def ensure_id(self, inode: Inode) -> None:
        """Give an object its id, so that a large file still counts as unchanged. Raises OSError."""
        if inode.id or self._root < 0 or inode.size <= ops.PAYLOAD_MAX:
            self._tree.ensure_id(inode)
            return
        before = self._tree.stat(inode).st_ctime_ns
        self._tree.ensure_id(inode)
        self._named[inode.ino] = before, self._tree.stat(inode).st_ctime_ns

    def open(self, inode: Inode) -> int:
        """A descriptor of the file in the snapshot, the caller's to close; -1: read it in use."""
        if self._root < 0:
            return -1
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            fd = os.open(inode.path(), flags, dir_fd=self._root)
        except OSError:
            return -1
        if self.is_same(inode, fd):
            return fd
        os.close(fd)
        return -1

    def is_same(self, inode: Inode, fd: int) -> bool:
        """Whether the file in use still is what it is in the snapshot. Raises OSError.

        Relies on: a btrfs snapshot keeps inode numbers, and has a device number of its own.
        """
        then, now = os.fstat(fd), self._tree.stat(inode).st_ctime_ns
        return (
            (then.st_dev, then.st_ino) == (self._device, inode.ino)
            and then.st_ctime_ns < self._taken_ns - _TICK_NS
            and (now == then.st_ctime_ns or self._named.get(inode.ino) == (then.st_ctime_ns, now))
        )
