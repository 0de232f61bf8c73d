"""The local tree: every change and every look at STORE, by *at() calls beneath one descriptor.

Primary and secondary use the same calls; what differs (who decides mode and owner, what is sent)
is decided above. All calls are short and made inline in the event loop; what can block on a device
(fsync, cold reads) is the caller's to put in a thread. Names are bytes. Failures are OSError with
the system call's errno.

How an object is reached stands in `reach`, what describes it in `describe`; here is what changes
names.
"""

from __future__ import annotations

import contextlib
import os
import stat as _stat
import time
from typing import Final

from replfs.errors import HalfDone
from replfs.store import record as _record
from replfs.store import syscalls
from replfs.store.describe import PERMISSIONS, SET_ID, Described
from replfs.store.inode import Inode, proc_path
from replfs.store.permitted import permitted
from replfs.store.record import Record

_CHANGE: Final = _stat.S_IWUSR | _stat.S_IXUSR
"""What a directory must permit for a name in it to be changed."""
_NEW_FILE_FLAGS: Final = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CLOCK_REALTIME_COARSE: Final = 5
"""Of clock_gettime(2), Linux; not in Python's time module."""


class Tree(Described):
    """One STORE's tree of objects."""

    def __init__(self, root_fd: int) -> None:
        """Take over *root_fd*, a descriptor of STORE opened before anything covered it.

        Raises:
            StoreError: it cannot be used as one.
        """
        super().__init__(root_fd)
        self._latest = 0
        self._umask = os.umask(0)
        os.umask(self._umask)

    # Time ----------------------------------------------------------------------------------------

    def now(self) -> int:
        """The time a change of contents is stamped with on both sides, ns since the epoch.

        The kernel's own coarse clock, so that what is written before another object is made never
        looks newer; and no earlier than a time the kernel has given, which may be finer.
        """
        coarse = time.clock_gettime_ns(_CLOCK_REALTIME_COARSE)
        return max(self._latest, coarse)

    def _saw(self, ns: int) -> None:
        if ns > self._latest and ns < time.time_ns():
            self._latest = ns

    # Names ---------------------------------------------------------------------------------------

    def set_umask(self, umask: int) -> None:
        """The umask for what is made next.

        The kernel then does what it would do for the caller: it masks the mode, or, where the
        parent has a default ACL, inherits that instead (umask(2), acl(5)).
        """
        if umask != self._umask:
            os.umask(umask)
            self._umask = umask

    def make(
        self,
        parent: Inode,
        name: bytes,
        mode: int,
        *,
        rdev: int = 0,
        target: bytes = b"",
        owner: tuple[int, int],
    ) -> tuple[Inode, os.stat_result, os.stat_result, int]:
        """A new object: itself, its attributes, its parent's, and a descriptor if it is a file.

        *owner* becomes its owner and group, but where the parent has the set-group-ID bit, the
        group stays the parent's. An id is written with it. A failure leaves nothing behind, but may
        have changed the parent's times: `HalfDone`.
        """
        above = self.directory_fd(parent)
        fd = _create(above, name, mode, rdev, target)
        try:
            parent_found = os.fstat(above)
            found = _own_new(
                above, name, fd, owner, keep_group=bool(parent_found.st_mode & _stat.S_ISGID)
            )
            record = Record(self.new_id(), 0, 0, 0)
            self._record_new(above, name, fd, found, record)
            # Again: the record changed the ctime.
            found = _look(above, name, fd)
        except OSError as error:
            _unmake(above, name, mode, fd)
            raise HalfDone(error.errno, error.strerror) from error
        self._saw(found.st_ctime_ns)
        return self._know_new(parent, name, found, record), found, parent_found, fd

    def make_like(
        self,
        parent: Inode,
        name: bytes,
        mode: int,
        *,
        rdev: int = 0,
        target: bytes = b"",
        owner: tuple[int, int],
        object_id: bytes,
        flags: int = 0,
    ) -> tuple[Inode, int, int]:
        """What another store has: itself, its mode here, and a descriptor if it is a file.

        *owner* becomes its owner and group, whatever the parent has. Failures as of `make`.
        """
        above = self.directory_fd(parent)
        fd = _create(above, name, mode, rdev, target)
        try:
            found = _own_new(above, name, fd, owner, keep_group=False)
            record = Record(object_id, flags, 0, 0)
            self._record_new(above, name, fd, found, record)
        except OSError as error:
            _unmake(above, name, mode, fd)
            raise HalfDone(error.errno, error.strerror) from error
        return self._know_new(parent, name, found, record), found.st_mode, fd

    def _record_new(
        self, above: int, name: bytes, fd: int, found: os.stat_result, record: Record
    ) -> None:
        value = _record.pack(record, found.st_ino)
        if fd >= 0:
            self._write_record(fd, value)
        elif _record.can_carry(_stat.S_IFMT(found.st_mode)):
            self._write_record(proc_path(above, name), value, follow=False)

    def _know_new(self, parent: Inode, name: bytes, found: os.stat_result, record: Record) -> Inode:
        inode = Inode(found.st_ino, _stat.S_IFMT(found.st_mode))
        inode.id = record.object
        inode.recorded = True
        inode.flags = record.flags
        inode.size = found.st_size
        inode.privileges = None if found.st_mode & SET_ID else False
        inode.add_name(parent, name)
        self.table.add(inode)
        return inode

    def link(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """One more name."""
        above = self.directory_fd(parent)
        old = inode.parent

        def do() -> None:
            if old is not None:
                os.link(
                    inode.name,
                    name,
                    src_dir_fd=self.directory_fd(old),
                    dst_dir_fd=above,
                    follow_symlinks=False,
                )
            else:
                os.link(
                    proc_path(self._own_fd(inode)), name, dst_dir_fd=above, follow_symlinks=True
                )

        permitted(above, _CHANGE, do)
        if old is None:
            inode.gone = False
        inode.add_name(parent, name)

    def unlink(
        self, parent: Inode, name: bytes, inode: Inode, *, directory: bool, links: int
    ) -> None:
        """Remove a name of *inode*, which has *links*.

        An object that someone still uses keeps a descriptor when its last known name goes, so
        that it stays reachable and its inode number is not given to another one meanwhile.
        """
        above = self.directory_fd(parent)
        if directory:
            if inode.fd < 0 and inode.lookups:
                self.directory_fd(inode)
            permitted(above, _CHANGE, lambda: os.rmdir(name, dir_fd=above))
        else:
            if inode.fd < 0 and not inode.more and (inode.lookups or inode.pins):
                inode.fd = os.open(name, _PATH_FLAGS, dir_fd=above)
            try:
                permitted(above, _CHANGE, lambda: os.unlink(name, dir_fd=above))
            except OSError:
                self._release_spare(inode)
                raise
        self.name_removed(inode, parent, name, last=directory or links <= 1)

    def rename(
        self,
        parent: Inode,
        name: bytes,
        new_parent: Inode,
        new_name: bytes,
        flags: int,
        *,
        inode: Inode,
        replaced: Inode | None,
        replaced_links: int,
    ) -> None:
        """Rename, replace or exchange.

        With `RENAME_WHITEOUT` a new object stands under the old name, not known yet.
        """
        old_fd = self.directory_fd(parent)
        new_fd = self.directory_fd(new_parent)
        exchange = bool(flags & syscalls.RENAME_EXCHANGE)
        keep = replaced is not None and not exchange and replaced is not inode
        if keep and replaced is not None and replaced.fd < 0:
            if replaced.is_directory:
                if replaced.lookups:
                    self.directory_fd(replaced)
            elif not replaced.more and (replaced.lookups or replaced.pins):
                replaced.fd = os.open(new_name, _PATH_FLAGS, dir_fd=new_fd)

        def do() -> None:
            if flags:
                syscalls.renameat2(old_fd, name, new_fd, new_name, flags)
            else:
                os.rename(name, new_name, src_dir_fd=old_fd, dst_dir_fd=new_fd)

        try:
            permitted(old_fd, _CHANGE, lambda: permitted(new_fd, _CHANGE, do))
        except OSError:
            if keep and replaced is not None:
                self._release_spare(replaced)
            raise
        if replaced is inode:
            pass  # two names of one object: rename(2) does nothing and says success
        elif exchange and replaced is not None:
            inode.drop_name(parent, name)
            replaced.drop_name(new_parent, new_name)
            inode.add_name(new_parent, new_name)
            replaced.add_name(parent, name)
        else:
            if replaced is not None:
                last = replaced.is_directory or replaced_links <= 1
                self.name_removed(replaced, new_parent, new_name, last=last)
            inode.drop_name(parent, name)
            inode.add_name(new_parent, new_name)

    def readlink(self, inode: Inode) -> bytes:
        """A symlink's target."""
        if inode.parent is not None:
            return os.readlink(inode.name, dir_fd=self.directory_fd(inode.parent))
        return os.readlink(b"", dir_fd=self._own_fd(inode))


def _create(above: int, name: bytes, mode: int, rdev: int, target: bytes) -> int:
    """Make an object of any type; a descriptor of it if it is a file, else -1."""

    def create() -> int:
        file_type = _stat.S_IFMT(mode)
        if file_type == _stat.S_IFREG:
            return os.open(name, _NEW_FILE_FLAGS, mode & PERMISSIONS, dir_fd=above)
        if file_type == _stat.S_IFDIR:
            os.mkdir(name, mode & PERMISSIONS, dir_fd=above)
        elif file_type == _stat.S_IFLNK:
            os.symlink(target, name, dir_fd=above)
        else:
            os.mknod(name, mode, rdev, dir_fd=above)
        return -1

    return permitted(above, _CHANGE, create)


def _unmake(above: int, name: bytes, mode: int, fd: int) -> None:
    """What `_create` made could not be completed."""
    if fd >= 0:
        os.close(fd)
    remove = os.rmdir if _stat.S_ISDIR(mode) else os.unlink
    with contextlib.suppress(OSError):
        permitted(above, _CHANGE, lambda: remove(name, dir_fd=above))


def _own_new(
    above: int, name: bytes, fd: int, owner: tuple[int, int], *, keep_group: bool
) -> os.stat_result:
    """Give a new object its owner, if it is another one; its attributes then."""
    found = _look(above, name, fd)
    uid, gid = owner
    if keep_group:
        gid = found.st_gid
    if found.st_uid == uid and found.st_gid == gid:
        return found
    if fd >= 0:
        os.fchown(fd, uid, gid)
    else:
        os.chown(name, uid, gid, dir_fd=above, follow_symlinks=False)
    if found.st_mode & SET_ID and not _stat.S_ISLNK(found.st_mode):
        # chown(2) clears the bits that the call asked for.
        if fd >= 0:
            os.fchmod(fd, found.st_mode & PERMISSIONS)
        else:
            os.chmod(name, found.st_mode & PERMISSIONS, dir_fd=above)
    return _look(above, name, fd)


def _look(directory: int, name: bytes, fd: int) -> os.stat_result:
    """Attributes by descriptor where there is one, else by name."""
    return os.fstat(fd) if fd >= 0 else os.stat(name, dir_fd=directory, follow_symlinks=False)
