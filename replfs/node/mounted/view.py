"""Looking at the tree through a mount: every operation of class LOCAL.

A secondary's read-only mount is this and nothing more; a primary's adds the changes
(`node.mounted.volume`). Nothing here waits for a peer. What may wait for the disk (a read of data
that is not cached) goes to a thread.
"""

from __future__ import annotations

import errno
import json
import os
import stat as _stat
import time
from collections.abc import Callable, Sequence
from typing import Any

import trio

from replfs.node.pacing.disk import SMALL, Disk
from replfs.store.inode import Handle, Inode
from replfs.store.syscalls import failure
from replfs.store.tree import Tree

VIRTUAL_PREFIX = b"user.replfs"

Found = tuple[Inode, os.stat_result]


class View:
    """The local operations of a mount of *tree*."""

    def __init__(self, tree: Tree, status: Callable[[], dict[str, Any]] | None = None) -> None:
        self.tree = tree
        self.table = tree.table
        self._status = status or dict
        self._readers = trio.CapacityLimiter(8)
        self._disk = Disk()

    # Inodes ------------------------------------------------------------------------------------

    def inode(self, nodeid: int) -> Inode:
        """The inode the kernel means; ESTALE where it is not known (any more)."""
        try:
            return self.table.by_nodeid[nodeid]
        except KeyError:
            raise failure(errno.ESTALE) from None

    def handle(self, number: int) -> Handle:
        """The open handle the kernel means."""
        try:
            return self.table.handles[number]
        except KeyError:
            raise failure(errno.EBADF) from None

    def lookup(self, parent: int, name: bytes) -> Found:
        """One more reference of the kernel's to what *name* stands for."""
        above = self.inode(parent)
        if name in {b".", b".."} and not above.named:
            # By a handle: what the kernel has forgotten nobody has open.
            raise failure(errno.ESTALE)
        if name == b".":
            found = above, self.tree.stat(above)
        elif name == b"..":
            up = above.parent or above
            found = up, self.tree.stat(up)
        else:
            found = self.tree.lookup(above, name)
        found[0].lookups += 1
        return found

    def forget(self, references: Sequence[tuple[int, int]]) -> list[int]:
        """The kernel gives references back; to which of these inodes it has none any more.

        Whether before or after what the kernel has asked since makes no difference.
        """
        by_nodeid = self.table.by_nodeid
        forgotten: list[int] = []
        for nodeid, count in references:
            inode = by_nodeid.get(nodeid)
            if inode is None:
                continue
            inode.lookups -= count
            if inode.lookups <= 0:
                inode.lookups = 0
                forgotten.append(nodeid)
                self.tree.drop_unused(inode)
        return forgotten

    def getattr(self, nodeid: int) -> Found:
        """Attributes as the store has them."""
        inode = self.inode(nodeid)
        return inode, self.tree.stat(inode)

    def readlink(self, nodeid: int) -> bytes:
        """A symlink's target."""
        return self.tree.readlink(self.inode(nodeid))

    def statfs(self) -> os.statvfs_result:
        """The file system STORE is on."""
        return os.fstatvfs(self.tree.root_fd)

    # Directories -------------------------------------------------------------------------------

    def opendir(self, nodeid: int) -> Handle:
        """A handle on a directory."""
        inode = self.inode(nodeid)
        if not inode.is_directory:
            raise failure(errno.ENOTDIR)
        return self.table.open(inode, -1)

    def entries(self, number: int, start: int) -> list[bytes]:
        """All names, as they were when reading began; *start* 0 begins anew.

        A position is an index into this list, so it stays good while the directory changes.
        """
        handle = self.handle(number)
        if start == 0:
            names = [] if handle.inode.gone else self.tree.names(handle.inode)
            handle.entries = [b".", b"..", *names]
        return handle.entries

    def entry(self, number: int, name: bytes) -> Found | None:
        """What a name read before stands for now, without a reference; None if it is gone."""
        directory = self.handle(number).inode
        if name == b".":
            return directory, self.tree.stat(directory)
        if name == b"..":
            above = directory.parent or directory
            return above, self.tree.stat(above)
        try:
            return self.tree.lookup(directory, name)
        except FileNotFoundError:
            return None

    @staticmethod
    def referenced(inode: Inode) -> None:
        """The kernel holds one more reference, from reading a directory."""
        inode.lookups += 1

    def releasedir(self, number: int) -> None:
        """A directory's handle is closed."""
        self._close(number)

    def _close(self, number: int) -> None:
        handle = self.table.close(number)
        if handle.fd >= 0:
            self.tree.close(handle)
        else:
            self.tree.drop_unused(handle.inode)

    # Files -------------------------------------------------------------------------------------

    def open_handle(self, inode: Inode, flags: int) -> Handle:
        """A handle on a file, in the access mode of *flags*."""
        if inode.foreign:
            raise failure(errno.EXDEV)
        fd = self.tree.open(inode, flags)
        handle = self.table.open(inode, fd)
        handle.writable = (flags & os.O_ACCMODE) != os.O_RDONLY
        handle.synchronous = os.O_SYNC if flags & os.O_SYNC == os.O_SYNC else flags & os.O_DSYNC
        inode.size = os.fstat(fd).st_size
        return handle

    @staticmethod
    def begin_to_read(handle: Handle) -> None:
        """Have the disk begin with a small file, while the kernel takes in that it is open.

        Where the kernel may have its contents already, this only takes memory.
        """
        size = handle.inode.size
        if 0 < size <= SMALL and not handle.writable:
            os.posix_fadvise(handle.fd, 0, size, os.POSIX_FADV_WILLNEED)

    async def open(self, nodeid: int, flags: int) -> Handle:
        """Open for reading."""
        if flags & os.O_ACCMODE != os.O_RDONLY or flags & os.O_TRUNC:
            raise failure(errno.EROFS)
        handle = self.open_handle(self.inode(nodeid), flags)
        self.begin_to_read(handle)  # the kernel of a replica keeps no contents
        return handle

    async def read(self, number: int, offset: int, size: int) -> bytes | bytearray | memoryview:
        """Bytes of the store, never waiting for a peer.

        Cached ones at once; for a few others the loop waits while the disk is quick, else a thread.

        Source: preadv2(2), RWF_NOWAIT.
        """
        fd = self.handle(number).fd
        buffer = bytearray(size)
        try:
            got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            got = -1
        except OSError as error:
            if error.errno not in {errno.EOPNOTSUPP, errno.EINVAL}:
                raise
            got = -1
        if got == size or got == 0:
            return buffer if got else b""
        if got > 0 and offset + got >= os.fstat(fd).st_size:
            return memoryview(buffer)[:got]
        # Part of it is not cached.
        if size <= SMALL and self._disk.is_quick():
            began = time.monotonic_ns()
            try:
                return os.pread(fd, size, offset)
            finally:
                self._disk.took(began)
        # A descriptor of its own outlives a close meanwhile.
        own = os.dup(fd)
        try:
            return await trio.to_thread.run_sync(os.pread, own, size, offset, limiter=self._readers)
        finally:
            os.close(own)

    async def flush(self, number: int) -> None:
        """Nothing is owed at close: nothing was changed here."""

    async def release(self, number: int) -> None:
        """A file's handle is closed."""
        self.close(number)

    @property
    def closes_at_once(self) -> bool:
        """Whether `close` does the same as `release`: nothing is awaited."""
        return True

    def close(self, number: int) -> None:
        """A file's handle is closed, and nothing is owed."""
        self._close(number)

    # Extended attributes -----------------------------------------------------------------------

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        """An attribute of the object, or one of the virtual `user.replfs.*`."""
        inode = self.inode(nodeid)
        if name.startswith(VIRTUAL_PREFIX):
            if inode.type not in {_stat.S_IFREG, _stat.S_IFDIR}:
                raise failure(errno.ENODATA)
            return self.virtual_xattr(inode, name)
        return self.tree.get_xattr(inode, name)

    def virtual_xattr(self, inode: Inode, name: bytes) -> bytes:
        """What replfs says of an object; ENODATA for names it does not know."""
        if name == b"user.replfs.status":
            return json.dumps(self._status(), separators=(",", ":"), default=str).encode()
        raise failure(errno.ENODATA)

    def listxattr(self, nodeid: int) -> list[bytes]:
        """The object's own attributes; the virtual ones are never listed."""
        return self.tree.list_xattrs(self.inode(nodeid))


async def _refuse(*_args: object, **_keywords: object) -> Any:
    raise failure(errno.EROFS)


class ReadOnlyView(View):
    """A secondary's mount: every change is EROFS, and an fsync has nothing to do."""

    def __init__(
        self,
        tree: Tree,
        status: Callable[[], dict[str, Any]] | None = None,
        policy: Callable[[Inode, bytes], bytes | None] = lambda _inode, _name: None,
    ) -> None:
        """*policy*: the value of a policy xattr; None for names that are not about policy."""
        super().__init__(tree, status)
        self._policy = policy

    def virtual_xattr(self, inode: Inode, name: bytes) -> bytes:
        """Policies as the primary set them, and whether this replica follows it."""
        answer = self._policy(inode, name)
        if answer is not None:
            return answer
        if name == b"user.replfs.state":
            state = str(self._status().get("state"))
            return {"in-sync": b"in-sync", "inconsistent": b"resync"}.get(state, b"out-of-sync")
        return super().virtual_xattr(inode, name)

    setattr = make = create = unlink = rmdir = rename = link = write = _refuse
    setxattr = removexattr = _refuse

    async def fsync(self, number: int, *, data_only: bool) -> None:
        """Nothing was written through this mount."""

    fsyncdir = fsync
