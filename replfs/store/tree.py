"""The local tree: every change and every look at STORE, by *at() calls beneath one descriptor.

Primary and secondary use the same calls; what differs (who decides mode and owner, what is sent)
is decided above. All calls are short and made inline in the event loop; what can block on a device
(fsync, cold reads) is the caller's to put in a thread. Names are bytes. Failures are OSError with
the system call's errno.

Never more than `_DIRECTORIES_OPEN_MAX` directory descriptors are cached; a directory whose
descriptor was evicted is found again through its parent. Nothing is ever followed through a
symlink.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as _stat
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from replfs.errors import StoreError
from replfs.store import record as _record
from replfs.store import syscalls
from replfs.store.inode import Handle, Inode, Root, Table, close_quietly, proc_path
from replfs.store.permitted import permitted
from replfs.store.record import ROOT_ID, IdSource, Record

log = logging.getLogger(__name__)

RESERVED: Final = b".replfs"
"""The one name in the root that users cannot see: durable state, limbo, kept objects."""
LIMBO: Final = b"limbo"
KEPT: Final = b"kept"

KEEP_PIN: Final = 4
"""In `Inode.pins`: needed by this process itself (1 and 2 are the peer's two streams)."""
_HOLD_PIN: Final = 8
"""In `Inode.pins`: `hold` was called."""

_DIRECTORIES_OPEN_MAX: Final = 1024
_FILES_OPEN_MAX: Final = 512
_CHANGE: Final = _stat.S_IWUSR | _stat.S_IXUSR
"""What a directory must permit for a name in it to be changed."""
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_CLOCK_REALTIME_COARSE: Final = 5
"""Of clock_gettime(2), Linux; not in Python's time module."""
_FOREIGN: Final = 1 << 61
"""Keeps the inode numbers of other file systems mounted inside the store apart."""
_SET_ID: Final = _stat.S_ISUID | _stat.S_ISGID
_PERMISSIONS: Final = 0o7777
_CAPABILITY: Final = b"security.capability"
_DAMAGE: Final = frozenset({errno.EIO, errno.ENOMEM, errno.EUCLEAN, errno.EBADMSG})
"""Errors that say nothing about what was asked."""
_WARNINGS_MAX: Final = 100
_ACLS: Final = (b"system.posix_acl_access", b"system.posix_acl_default")


class Tree:
    """One STORE's tree of objects."""

    def __init__(self, root_fd: int) -> None:
        """Take over *root_fd*, a descriptor of STORE opened before anything covered it."""
        self.root_fd = root_fd
        found = os.fstat(root_fd)
        self.device = found.st_dev
        root = Root(found.st_ino)
        root.fd = root_fd
        self.table = Table(root)
        self.root: Inode = root
        self.new_id = IdSource()
        self._directories: OrderedDict[Inode, None] = OrderedDict()
        """Those of which a descriptor is cached, the one used last at the end."""
        self._files: dict[Inode, int] = {}
        self._held: dict[Inode, int] = {}
        self._latest = 0
        self._warned: set[bytes] = set()
        """Mounts inside STORE that were told of."""
        self._umask = os.umask(0)
        os.umask(self._umask)
        self._check_xattrs()
        self._read_root_record()

    def _check_xattrs(self) -> None:
        try:
            os.getxattr(self.root_fd, _record.XATTR)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise StoreError(
                    "STORE has no extended attributes, which replfs needs: use another file system."
                ) from error

    def _read_root_record(self) -> None:
        root = self.root
        root.recorded = True
        try:
            value = os.getxattr(self.root_fd, _record.XATTR)
        except OSError:
            return
        found = _record.unpack(value, root.ino)
        if found is not None and found.object == ROOT_ID:
            root.flags, root.policy, root.ack = found.flags, found.policy, found.ack

    # Time --------------------------------------------------------------------------------------

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

    # Where an object is ------------------------------------------------------------------------

    def directory_fd(self, inode: Inode) -> int:
        """A descriptor of a directory, valid until three others are asked for.

        Never to be kept over an await. Only the directory's own is cached, however deep it is:
        so what was asked for last is never closed for it.
        """
        cached = self._directories
        if inode.fd >= 0:
            if inode in cached:
                cached.move_to_end(inode)
            return inode.fd
        if inode.foreign:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        inode.fd = self._open_directory(inode)
        cached[inode] = None
        if len(cached) > _DIRECTORIES_OPEN_MAX:
            oldest, _ = cached.popitem(last=False)
            if not oldest.gone:
                os.close(oldest.fd)
                oldest.fd = -1
        return inode.fd

    @staticmethod
    def _open_directory(inode: Inode) -> int:
        """Open it from the nearest ancestor that is open, a name at a time."""
        chain = []
        one = inode
        while one.fd < 0:
            if one.parent is None:
                raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
            chain.append(one.name)
            one = one.parent
        fd = above = one.fd
        for name in reversed(chain):
            try:
                fd = os.open(name, _DIRECTORY_FLAGS, dir_fd=above)
            finally:
                if above != one.fd:
                    os.close(above)
            above = fd
        return fd

    def _path(self, inode: Inode) -> bytes:
        """A path for calls without an `at` form; the last component is not to be followed."""
        if inode.parent is not None:
            return proc_path(self.directory_fd(inode.parent), inode.name)
        return proc_path(self._own_fd(inode))

    def _own_fd(self, inode: Inode) -> int:
        """What keeps an object without names reachable."""
        if inode.fd >= 0:
            return inode.fd
        for handle in self.table.handles.values():
            if handle.inode is inode:
                return handle.fd
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def stat(self, inode: Inode) -> os.stat_result:
        """Attributes of an object, with or without names."""
        if inode.fd >= 0:
            found = os.fstat(inode.fd)
        elif inode.parent is not None:
            found = os.stat(
                inode.name, dir_fd=self.directory_fd(inode.parent), follow_symlinks=False
            )
        else:
            found = os.fstat(self._own_fd(inode))
        inode.size = found.st_size
        return found

    def lookup(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """The object a name stands for; ENOENT where there is none, or the name is reserved."""
        if parent is self.root and name == RESERVED:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        if parent.foreign:
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT))
        found = os.stat(name, dir_fd=self.directory_fd(parent), follow_symlinks=False)
        return self.known(parent, name, found), found

    def lookup_or_none(self, parent: Inode, name: bytes) -> Inode | None:
        """As `lookup`; None where that fails."""
        try:
            return self.lookup(parent, name)[0]
        except OSError:
            return None

    def at(self, path: bytes) -> Inode | None:
        """The inode at a path relative to the root, which is the empty one; None: not there."""
        inode: Inode | None = self.root
        for part in path.split(b"/") if path else ():
            if inode is None:
                return None
            inode = self.lookup_or_none(inode, part)
        return inode

    def known(self, parent: Inode, name: bytes, found: os.stat_result) -> Inode:
        """The inode of what was just seen as *name*."""
        foreign = found.st_dev != self.device
        ino = found.st_ino | _FOREIGN if foreign else found.st_ino
        inode = self.table.find(ino)
        if inode is not None and inode.type != _stat.S_IFMT(found.st_mode):
            self._vanished(inode)
        if inode is None or inode.gone:
            if _stat.S_ISDIR(found.st_mode) and not foreign:
                # A bind mount from the same file system has its device number.
                foreign = syscalls.is_mountpoint(self.directory_fd(parent), name)
                if foreign:
                    ino |= _FOREIGN
                    inode = self.table.find(ino)
                    if inode is not None and not inode.gone:
                        return inode
            inode = Inode(ino, _stat.S_IFMT(found.st_mode))
            inode.foreign = foreign
            if foreign:
                self._warn_of(parent, name)
            inode.add_name(parent, name)
            self.table.add(inode)
        elif inode.is_directory and (inode.parent is not parent or inode.name != name):
            return self._known_elsewhere(inode, parent, name, found)
        else:
            inode.add_name(parent, name)
        inode.size = found.st_size
        return inode

    def _warn_of(self, parent: Inode, name: bytes) -> None:
        place = b"/".join(part for part in (parent.path(), name) if part)
        if place not in self._warned and len(self._warned) < _WARNINGS_MAX:
            self._warned.add(place)
            log.warning(
                "/%s is another file system mounted inside STORE: it is shown empty, and not "
                "replicated",
                place.decode(errors="backslashreplace"),
            )

    def _vanished(self, inode: Inode) -> None:
        """It was removed behind the node's back, and its number has another object now."""
        inode.gone = True
        inode.pins = 0
        parents = [parent for parent, _ in inode.names()]
        for parent, name in list(inode.names()):
            inode.drop_name(parent, name)
        self.drop_unused(inode)
        for parent in parents:
            self.drop_unused(parent)

    def _known_elsewhere(
        self, inode: Inode, parent: Inode, name: bytes, found: os.stat_result
    ) -> Inode:
        """A directory seen under a second name: one of the two is a bind mount inside STORE."""
        if inode is not self.root and not syscalls.is_mountpoint(self.directory_fd(parent), name):
            inode.add_name(parent, name)
            return inode
        ino = found.st_ino | _FOREIGN
        other = self.table.find(ino)
        if other is None or other.gone:
            other = Inode(ino, _stat.S_IFDIR)
            other.foreign = True
            other.add_name(parent, name)
            self.table.add(other)
        return other

    def reserved_directory(self, name: bytes) -> Inode:
        """A directory inside the reserved one, made if it is not there; known for good."""
        above = self.root
        for part in (RESERVED, name):
            fd = self.directory_fd(above)
            try:
                os.mkdir(part, 0o700, dir_fd=fd)
            except FileExistsError:
                pass
            above = self.known(above, part, os.stat(part, dir_fd=fd, follow_symlinks=False))
            above.recorded = True
            above.pins |= KEEP_PIN
        return above

    def names(self, directory: Inode) -> list[bytes]:
        """All names in a directory, without `.`, `..` and the reserved one."""
        if directory.foreign:
            return []
        found = [os.fsencode(name) for name in os.listdir(self.directory_fd(directory))]
        if directory is self.root and RESERVED in found:
            found.remove(RESERVED)
        return found

    def check_name(self, parent: Inode, name: bytes) -> None:
        """EPERM where the reserved name is to be made, EXDEV beneath another file system."""
        if parent is self.root and name == RESERVED:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        if parent.foreign:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    # Ids and records ---------------------------------------------------------------------------

    def read_record(self, inode: Inode) -> None:
        """Learn id, policy and flags from the object, once."""
        if inode.recorded or inode.foreign:
            return
        inode.recorded = True
        path, follow = self._path(inode), inode.parent is None

        def read() -> bytes:
            return os.getxattr(path, _record.XATTR, follow_symlinks=follow)

        try:
            value = permitted(path, _stat.S_IRUSR, read, follow=follow)
        except OSError as error:
            if error.errno in _DAMAGE:
                # Not to be taken for an object that has no id, or no policy.
                inode.recorded = False
                raise
            return
        found = _record.unpack(value, inode.ino)
        if found is None:
            return
        holder = self.table.by_id.get(found.object)
        if holder is not None and holder is not inode:
            return  # two claim one id: this one came later, and gets a new id when it needs one
        inode.flags, inode.policy, inode.ack = found.flags, found.policy, found.ack
        self.table.identify(inode, found.object)

    def is_object(self, inode: Inode, object_id: bytes) -> bool:
        """Whether *inode* is that object, as its record says.

        What can have no record is whatever is said to stand at its name.
        """
        if inode.id != object_id and not _record.can_carry(inode.type):
            self.table.identify(inode, object_id)
        return inode.id == object_id

    def ensure_id(self, inode: Inode) -> bytes:
        """The object's id, made and written now if it has none."""
        if not inode.id:
            self.read_record(inode)
            if not inode.id:
                self.set_record(inode, Record(self.new_id(), inode.flags, inode.policy, inode.ack))
        return inode.id

    def set_record(self, inode: Inode, new: Record) -> None:
        """Write the record, and remember it."""
        value = _record.pack(new, inode.ino)
        if _record.can_carry(inode.type):
            path, follow = self._path(inode), inode.parent is None
            self._write_record(path, value, follow=follow)
        inode.recorded = True
        inode.flags, inode.policy, inode.ack = new.flags, new.policy, new.ack
        if inode.id != new.object:
            self.table.identify(inode, new.object)

    @staticmethod
    def _write_record(path: bytes | int, value: bytes, *, follow: bool = True) -> None:
        def write() -> None:
            os.setxattr(path, _record.XATTR, value, follow_symlinks=follow)

        permitted(path, _stat.S_IWUSR, write, follow=follow)

    def set_policy(self, inode: Inode, policy: int, ack: int) -> None:
        """Write the object's own policy."""
        self.ensure_id(inode)
        self.set_record(inode, Record(inode.id, inode.flags, policy, ack))

    # Names -------------------------------------------------------------------------------------

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
        inherit_group: bool = True,
        object_id: bytes = b"",
        flags: int = 0,
    ) -> tuple[Inode, os.stat_result, os.stat_result, int]:
        """A new object: itself, its attributes, its parent's, and a descriptor if it is a file.

        *owner* becomes its owner and group, but where *inherit_group* and the parent has the
        set-group-ID bit, the group stays the parent's. The id is written with it. A failure
        leaves nothing behind.
        """
        above = self.directory_fd(parent)
        file_type = _stat.S_IFMT(mode)

        def create() -> int:
            if file_type == _stat.S_IFREG:
                return os.open(
                    name,
                    os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC,
                    mode & _PERMISSIONS,
                    dir_fd=above,
                )
            if file_type == _stat.S_IFDIR:
                os.mkdir(name, mode & _PERMISSIONS, dir_fd=above)
            elif file_type == _stat.S_IFLNK:
                os.symlink(target, name, dir_fd=above)
            else:
                os.mknod(name, mode, rdev, dir_fd=above)
            return -1

        fd = permitted(above, _CHANGE, create)
        try:
            parent_found = os.fstat(above)
            found = self._own_new(
                above, name, fd, owner, inherit_group and bool(parent_found.st_mode & _stat.S_ISGID)
            )
            inode = Inode(found.st_ino, file_type)
            new = Record(object_id or self.new_id(), flags, 0, 0)
            value = _record.pack(new, inode.ino)
            if fd >= 0:
                self._write_record(fd, value)
            elif _record.can_carry(file_type):
                self._write_record(proc_path(above, name), value, follow=False)
            # Again: the record changed the ctime.
            found = _look(above, name, fd)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            remove = os.rmdir if file_type == _stat.S_IFDIR else os.unlink
            permitted(above, _CHANGE, lambda: remove(name, dir_fd=above))
            raise
        self._saw(found.st_ctime_ns)
        inode.id = new.object
        inode.recorded = True
        inode.flags = flags
        inode.size = found.st_size
        inode.privileges = None if found.st_mode & _SET_ID else False
        inode.add_name(parent, name)
        self.table.add(inode)
        return inode, found, parent_found, fd

    @staticmethod
    def _own_new(
        above: int, name: bytes, fd: int, owner: tuple[int, int], keep_group: bool
    ) -> os.stat_result:
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
        if found.st_mode & _SET_ID and not _stat.S_ISLNK(found.st_mode):
            # chown(2) clears the bits that the call asked for.
            if fd >= 0:
                os.fchmod(fd, found.st_mode & _PERMISSIONS)
            else:
                os.chmod(name, found.st_mode & _PERMISSIONS, dir_fd=above)
        return _look(above, name, fd)

    def link(
        self, inode: Inode, parent: Inode, name: bytes
    ) -> tuple[os.stat_result, os.stat_result]:
        """One more name: the object's attributes and the parent's."""
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
        return self.stat(inode), os.fstat(above)

    def unlink(
        self, parent: Inode, name: bytes, inode: Inode, *, directory: bool, links: int
    ) -> os.stat_result:
        """Remove a name of *inode*, which has *links*; the parent's attributes.

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
        return os.fstat(above)

    def _release_spare(self, inode: Inode) -> None:
        """Close what kept an object reachable, now that it has a name again."""
        if inode.fd >= 0 and not inode.is_directory and inode.parent is not None:
            os.close(inode.fd)
            inode.fd = -1

    def name_removed(self, inode: Inode, parent: Inode, name: bytes, *, last: bool) -> None:
        """A name of *inode* is gone; with *last*, its last one."""
        inode.drop_name(parent, name)
        if last:
            inode.gone = True
            self._directories.pop(inode, None)
            file_fd = self._files.pop(inode, None)
            if file_fd is not None:
                close_quietly(file_fd)
            self.drop_unused(inode)

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
    ) -> tuple[os.stat_result, os.stat_result]:
        """Rename, replace or exchange; the attributes of both parents afterwards.

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
        above = os.fstat(old_fd)
        return above, above if new_fd == old_fd else os.fstat(new_fd)

    def readlink(self, inode: Inode) -> bytes:
        """A symlink's target."""
        if inode.parent is not None:
            return os.readlink(inode.name, dir_fd=self.directory_fd(inode.parent))
        return os.readlink(b"", dir_fd=self._own_fd(inode))

    # Data --------------------------------------------------------------------------------------

    def open(self, inode: Inode, flags: int) -> int:
        """A descriptor for an application's handle.

        Of the flags only the access mode is kept: the kernel above gives offsets, so O_APPEND
        must not; O_DIRECT would want aligned buffers; O_TRUNC and O_SYNC are done by the caller.
        """
        mode = flags & os.O_ACCMODE
        if _record.PRIVILEGED:
            return self._open(inode, mode)
        path, follow = self._path(inode), inode.parent is None
        both = _stat.S_IRUSR | _stat.S_IWUSR
        return permitted(path, both, lambda: self._open(inode, mode), follow=follow)

    def _open(self, inode: Inode, mode: int) -> int:
        if inode.parent is not None:
            return os.open(
                inode.name,
                mode | os.O_NOFOLLOW | os.O_CLOEXEC,
                dir_fd=self.directory_fd(inode.parent),
            )
        return os.open(proc_path(self._own_fd(inode)), mode | os.O_CLOEXEC)

    def data_fd(self, inode: Inode) -> int:
        """A cached read-write descriptor of a file, valid until the next call."""
        fd = self._files.get(inode)
        if fd is not None:
            return fd
        if inode.type != _stat.S_IFREG:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fd = self.open(inode, os.O_RDWR)
        self.keep_data_fd(inode, fd)
        return fd

    def keep_data_fd(self, inode: Inode, fd: int) -> None:
        """Cache *fd*, just opened for reading and writing, for `data_fd`; it is the tree's now."""
        files = self._files
        files[inode] = fd
        if len(files) > _FILES_OPEN_MAX:
            oldest = next(iter(files))
            os.close(files.pop(oldest))
            self.drop_unused(oldest)

    def truncate(self, inode: Inode, size: int) -> None:
        """Set a file's size."""
        os.ftruncate(self.data_fd(inode), size)
        inode.size = size

    def must_clear_privileges(self, inode: Inode) -> bool:
        """Whether a change of contents takes away set-id bits or capabilities; cached."""
        if inode.privileges is None:
            mode = self.stat(inode).st_mode
            privileged = bool(mode & _stat.S_ISUID) or (
                mode & (_stat.S_ISGID | _stat.S_IXGRP) == (_stat.S_ISGID | _stat.S_IXGRP)
            )
            if not privileged:
                try:
                    os.getxattr(
                        self._path(inode), _CAPABILITY, follow_symlinks=inode.parent is None
                    )
                    privileged = True
                except OSError:
                    privileged = False
            inode.privileges = privileged
        return inode.privileges

    # Attributes --------------------------------------------------------------------------------

    def set_mode(self, inode: Inode, mode: int) -> None:
        """chmod, of anything but a symlink."""
        if inode.type == _stat.S_IFLNK:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        if inode.parent is not None:
            os.chmod(inode.name, mode & _PERMISSIONS, dir_fd=self.directory_fd(inode.parent))
        else:
            os.chmod(self._path(inode), mode & _PERMISSIONS)
        inode.privileges = None

    def set_owner(self, inode: Inode, uid: int, gid: int) -> None:
        """chown; -1 leaves one as it is."""
        os.chown(self._path(inode), uid, gid, follow_symlinks=inode.parent is None)
        inode.privileges = None

    def set_times(self, inode: Inode, atime: int | None, mtime: int | None) -> None:
        """Access and modification time, ns since the epoch; None leaves one as it is."""
        if inode.parent is not None:
            syscalls.utimensat(self.directory_fd(inode.parent), inode.name, atime, mtime)
        elif inode.is_directory:
            syscalls.utimens(self.directory_fd(inode), atime, mtime)
        else:
            found = self.stat(inode)
            os.utime(
                proc_path(self._own_fd(inode)),
                ns=(
                    found.st_atime_ns if atime is None else atime,
                    found.st_mtime_ns if mtime is None else mtime,
                ),
            )

    def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        """One extended attribute; ENODATA for the hidden ones."""
        if name.startswith(_record.HIDDEN_PREFIXES):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        if inode.privileges is False and name == _CAPABILITY:
            # The kernel asks before the first write to each file.
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return os.getxattr(self._path(inode), name, follow_symlinks=inode.parent is None)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Set one extended attribute, whether it exists or not."""
        if name.startswith(_record.HIDDEN_PREFIXES):
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        os.setxattr(self._path(inode), name, value, follow_symlinks=inode.parent is None)
        inode.privileges = None

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove one extended attribute; ENODATA where there is none."""
        if name.startswith(_record.HIDDEN_PREFIXES):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        os.removexattr(self._path(inode), name, follow_symlinks=inode.parent is None)
        inode.privileges = None

    def list_xattrs(self, inode: Inode, fd: int = -1) -> list[bytes]:
        """The names of the extended attributes, without the hidden ones.

        *fd*, where there is one, is a descriptor of the object: that is faster.
        """
        if fd >= 0:
            found = os.listxattr(fd)
        else:
            found = os.listxattr(self._path(inode), follow_symlinks=inode.parent is None)
        return [
            name for name in map(os.fsencode, found) if not name.startswith(_record.HIDDEN_PREFIXES)
        ]

    def acls(self, inode: Inode, fd: int = -1) -> tuple[bytes, bytes]:
        """The access and the default ACL as extended attributes; empty where there is none.

        *fd* as for `list_xattrs`.
        """
        if inode.type == _stat.S_IFLNK:
            return b"", b""
        names = self.list_xattrs(inode, fd)
        access, default = (self.get_xattr(inode, name) if name in names else b"" for name in _ACLS)
        return access, default

    def set_acls(self, inode: Inode, access: bytes, default: bytes, fd: int = -1) -> bool:
        """Make the ACLs exactly these; whether that changed anything, perhaps the mode too.

        *fd* as for `list_xattrs`.
        """
        if inode.type == _stat.S_IFLNK:
            return False
        names = self.list_xattrs(inode, fd)
        changed = False
        for name, value in zip(_ACLS, (access, default), strict=True):
            if value:
                self.set_xattr(inode, name, value)
                changed = True
            elif name in names:
                self.remove_xattr(inode, name)
                changed = True
        return changed

    # Forgetting --------------------------------------------------------------------------------

    def close(self, handle: Handle) -> None:
        """The handle's descriptor and, where it was the last need, the inode are let go."""
        close_quietly(handle.fd)
        self.drop_unused(handle.inode)

    def drop_unused(self, inode: Inode) -> None:
        """Forget an inode that nobody needs, and close what it held."""
        if inode.lookups > 0 or inode.opens or inode.pins or inode.children:
            return
        if inode in self._files:
            return  # forgotten when its cached descriptor is
        for one in self.table.drop_unused(inode):
            self._directories.pop(one, None)
            if one.fd >= 0:
                close_quietly(one.fd)
                one.fd = -1

    def hold(self, inode: Inode) -> None:
        """Keep an inode known until `release`, whatever becomes of its names: needed over awaits.

        What only the table knows may be forgotten as soon as something below it is.
        """
        self._held[inode] = self._held.get(inode, 0) + 1
        inode.pins |= _HOLD_PIN

    def release(self, inode: Inode) -> None:
        """End one `hold`."""
        count = self._held[inode] - 1
        if count:
            self._held[inode] = count
            return
        del self._held[inode]
        inode.pins &= ~_HOLD_PIN
        self.drop_unused(inode)

    @contextmanager
    def held(self, inode: Inode) -> Iterator[None]:
        """`hold` for as long as the block lasts."""
        self.hold(inode)
        try:
            yield
        finally:
            self.release(inode)

    def close_all(self) -> None:
        """Close every descriptor but the root's."""
        for fd in self._files.values():
            close_quietly(fd)
        self._files.clear()
        for handle in self.table.handles.values():
            close_quietly(handle.fd)
        self.table.handles.clear()
        for inode in self.table.by_nodeid.values():
            if inode.fd >= 0 and inode is not self.root:
                close_quietly(inode.fd)
                inode.fd = -1
        self._directories.clear()


def _look(directory: int, name: bytes, fd: int) -> os.stat_result:
    """Attributes by descriptor where there is one, else by name."""
    return os.fstat(fd) if fd >= 0 else os.stat(name, dir_fd=directory, follow_symlinks=False)
