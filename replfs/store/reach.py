"""How each object of STORE is reached: by which name, and by which descriptor.

All calls are *at() calls beneath one descriptor. Never more than `_DIRECTORIES_OPEN_MAX` directory
descriptors are cached; a directory whose descriptor was evicted is found again through its parent.
Nothing is ever followed through a symlink. An object that nobody needs is forgotten, and what
needs it keeps it by being counted: the kernel's references, open handles, pins, what is below it.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as _stat
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from replfs.store import record as _record
from replfs.store import syscalls
from replfs.store.inode import Handle, Inode, Root, Table, close_quietly, proc_path
from replfs.store.permitted import permitted
from replfs.store.syscalls import failure

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
_DIRECTORY_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FOREIGN: Final = 1 << 61
"""Keeps the inode numbers of other file systems mounted inside the store apart."""
_WARNINGS_MAX: Final = 100


def is_aside(inode: Inode) -> bool:
    """Whether it stands in the reserved directory: moved aside, or kept."""
    top = inode
    while (above := top.parent) is not None and above.parent is not None:
        top = above
    return top.name == RESERVED


class Reach:
    """The objects of one STORE, as far as they are known."""

    def __init__(self, root_fd: int) -> None:
        """Take over *root_fd*, a descriptor of STORE opened before anything covered it."""
        self.root_fd = root_fd
        found = os.fstat(root_fd)
        self.device = found.st_dev
        root = Root(found.st_ino)
        root.fd = root_fd
        self.table = Table(root)
        self.root: Inode = root
        self._directories: OrderedDict[Inode, None] = OrderedDict()
        """Those of which a descriptor is cached, the one used last at the end."""
        self._files: OrderedDict[Inode, int] = OrderedDict()
        self._held: dict[Inode, int] = {}
        self._warned: set[bytes] = set()
        """Mounts inside STORE that were told of."""

    # Where an object is --------------------------------------------------------------------------

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
            raise failure(errno.EXDEV)
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
                raise failure(errno.ENOENT)
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
        raise failure(errno.ESTALE)

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
            raise failure(errno.ENOENT)
        if parent.foreign:
            raise failure(errno.ENOENT)
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

    def displace(self, ino: int) -> None:
        """A new object has this number: what is known by it was removed behind the node's back."""
        inode = self.table.find(ino)
        if inode is not None:
            self._vanished(inode)

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
            raise failure(errno.EPERM)
        if parent.foreign:
            raise failure(errno.EXDEV)

    # Descriptors of files ------------------------------------------------------------------------

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
            raise failure(errno.EINVAL)
        fd = self.open(inode, os.O_RDWR)
        self.keep_data_fd(inode, fd)
        return fd

    def keep_data_fd(self, inode: Inode, fd: int) -> None:
        """Cache *fd*, just opened for reading and writing, for `data_fd`; it is the tree's now."""
        files = self._files
        files[inode] = fd
        if len(files) > _FILES_OPEN_MAX:
            oldest, old_fd = files.popitem(last=False)
            os.close(old_fd)
            self.drop_unused(oldest)

    def take_data_fd(self, inode: Inode) -> int:
        """The cached descriptor of a file, which is the caller's now; -1 where there is none."""
        return self._files.pop(inode, -1)

    # Forgetting ----------------------------------------------------------------------------------

    def close(self, handle: Handle) -> None:
        """The handle's descriptor and, where it was the last need, the inode are let go."""
        close_quietly(handle.fd)
        self.drop_unused(handle.inode)

    def drop_unused(self, inode: Inode) -> None:
        """Forget an inode that nobody needs, and close what it held."""
        if inode.lookups > 0 or inode.is_open or inode.pins or inode.children:
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
