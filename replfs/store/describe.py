"""What an object of STORE is besides its names and its data.

Its record (id, policy, flags: an extended attribute that users do not see), mode, owner, times,
extended attributes and ACLs; and whether a change of its contents takes privileges away.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
from typing import Final

from replfs.errors import StoreError
from replfs.store import record as _record
from replfs.store import syscalls
from replfs.store.inode import Inode, proc_path
from replfs.store.permitted import permitted
from replfs.store.reach import Reach, is_aside
from replfs.store.record import INCOMPLETE, ROOT_ID, IdSource, Record
from replfs.store.syscalls import failure

PERMISSIONS: Final = 0o7777
"""The bits of a mode that chmod(2) sets."""
SET_ID: Final = _stat.S_ISUID | _stat.S_ISGID
"""Those that chown(2) and write(2) may clear."""
_CAPABILITY: Final = b"security.capability"
_DAMAGE: Final = frozenset({errno.EIO, errno.ENOMEM, errno.EUCLEAN, errno.EBADMSG})
"""Errors that say nothing about what was asked."""
_DEFAULT_ACL: Final = b"system.posix_acl_default"
_ACLS: Final = (b"system.posix_acl_access", _DEFAULT_ACL)


class Described(Reach):
    """The objects of one STORE, with what describes them."""

    def __init__(self, root_fd: int) -> None:
        """Take over *root_fd*. Raises StoreError: it keeps no extended attributes."""
        super().__init__(root_fd)
        self.new_id = IdSource()
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

    # Ids and records -----------------------------------------------------------------------------

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
        inode.flags, inode.policy, inode.ack = found.flags, found.policy, found.ack
        holder = self.table.by_id.get(found.object)
        if holder is not None and holder is not inode:
            # Two claim one id: one was made anew before the other was found. This one gets a new
            # id when it needs one, or that one does.
            if self._stays(holder, inode) or not self._is_younger(inode, holder):
                return
            self.table.disown(holder)
        self.table.identify(inode, found.object)

    @staticmethod
    def _stays(holder: Inode, other: Inode) -> bool:
        """Whether an object keeps its id whatever else claims it.

        What a primary was told of under that id does, and what is not moved aside against what is:
        it may have been there before it got the id.
        """
        return not is_aside(holder) and (holder.pins > 0 or is_aside(other))

    def _is_younger(self, inode: Inode, other: Inode) -> bool:
        """Whether it was made after the other one.

        Where the filesystem does not say, or has not told the two moments apart, it is what a
        resync has not finished: that makes what it makes anew, and seldom what was there before.
        """
        mine, theirs = self._born_ns(inode), self._born_ns(other)
        if mine and theirs and mine != theirs:
            return mine > theirs
        return inode.flags & INCOMPLETE > other.flags & INCOMPLETE

    def _born_ns(self, inode: Inode) -> int:
        try:
            return syscalls.birth_ns(self._path(inode), follow=inode.parent is None)
        except OSError:
            return 0

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

    def set_whole(self, inode: Inode) -> None:
        """It has all that it shall have. Raises OSError."""
        if inode.flags & _record.INCOMPLETE:
            flags = inode.flags & ~_record.INCOMPLETE
            self.set_record(inode, Record(inode.id, flags, inode.policy, inode.ack))

    def set_policy(self, inode: Inode, policy: int, ack: int) -> None:
        """Write the object's own policy."""
        self.ensure_id(inode)
        self.set_record(inode, Record(inode.id, inode.flags, policy, ack))

    # Size, mode, owner, times --------------------------------------------------------------------

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

    def set_mode(self, inode: Inode, mode: int) -> None:
        """chmod, of anything but a symlink."""
        if inode.type == _stat.S_IFLNK:
            raise failure(errno.EOPNOTSUPP)
        if inode.parent is not None:
            os.chmod(inode.name, mode & PERMISSIONS, dir_fd=self.directory_fd(inode.parent))
        else:
            os.chmod(self._path(inode), mode & PERMISSIONS)
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

    # Extended attributes and ACLs ----------------------------------------------------------------

    def get_xattr(self, inode: Inode, name: bytes) -> bytes:
        """One extended attribute; ENODATA for the hidden ones."""
        if name.startswith(_record.HIDDEN_PREFIXES):
            raise failure(errno.ENODATA)
        if inode.privileges is False and name == _CAPABILITY:
            # The kernel asks before the first write to each file.
            raise failure(errno.ENODATA)
        return os.getxattr(self._path(inode), name, follow_symlinks=inode.parent is None)

    def set_xattr(self, inode: Inode, name: bytes, value: bytes) -> None:
        """Set one extended attribute, whether it exists or not."""
        if name.startswith(_record.HIDDEN_PREFIXES):
            raise failure(errno.EOPNOTSUPP)
        inode.privileges = inode.bequeaths = None
        os.setxattr(self._path(inode), name, value, follow_symlinks=inode.parent is None)

    def remove_xattr(self, inode: Inode, name: bytes) -> None:
        """Remove one extended attribute; ENODATA where there is none."""
        if name.startswith(_record.HIDDEN_PREFIXES):
            raise failure(errno.ENODATA)
        inode.privileges = inode.bequeaths = None
        os.removexattr(self._path(inode), name, follow_symlinks=inode.parent is None)

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

    def inherits_acl(self, directory: Inode) -> bool:
        """Whether what is made in *directory* may get an ACL from it (acl(5)); cached."""
        if directory.bequeaths is None:
            try:
                os.getxattr(self.directory_fd(directory), _DEFAULT_ACL)
            except OSError as error:
                # Anything else says nothing: what is made there is looked at itself.
                directory.bequeaths = error.errno not in (errno.ENODATA, errno.EOPNOTSUPP)
            else:
                directory.bequeaths = True
        return directory.bequeaths

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
