"""What a store that gave up its role had, and its successor has not: kept beside, not thrown away.

While such a store has *suspects* (what it may have on its own), a resync from its successor would
overwrite or remove them. Before the first time that happens to one of them, its old version goes to
`STORE/.replfs/kept/NODE-TIME/PATH`: the contents of a file that is about to become different, by
reflink where the file system can, and whatever stood under a suspect name and is not wanted there.
Nothing of it is ever removed by replfs.

Whenever power is lost, one of the two is on the disk. A copy is flushed before its original may
change. What is removed gets another name first, and no bytes of it move.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import logging
import os
import stat as _stat
from collections.abc import Callable, Iterator
from typing import Final

import trio

from replfs.core.dirty import DirtyLog
from replfs.store import locators, syscalls
from replfs.store.inode import Inode
from replfs.store.reach import KEPT, LIMBO
from replfs.store.record import HIDDEN_PREFIXES, ROOT_ID
from replfs.store.tree import Tree

log = logging.getLogger(__name__)

_FICLONE: Final = 0x40049409
_CHUNK: Final = 8 << 20


class Beside:
    """Keeps the suspects of one store."""

    def __init__(
        self, tree: Tree, suspects: DirtyLog, label: str, told: Callable[[str], None]
    ) -> None:
        """*label* names the directory; *told* hears the path, below STORE, of each that is kept."""
        self._tree = tree
        self._suspects = suspects
        self._label = label.encode()
        self._told = told
        root = suspects.marks(ROOT_ID)
        self._everything = root is not None and root.deep
        self._paths: dict[int, bytes] = {}
        """Where what was taken aside stood, by inode number."""
        self._whole: set[int] = set()
        """What was taken from a suspect name: with all that is in it, it may be here alone."""
        self._top = tree.reserved_directory(KEPT).parent or tree.root
        self._note_left()
        self._kept: set[bytes] = set()
        self.count = 0

    # Questions -----------------------------------------------------------------------------------

    def holds_contents(self, inode: Inode) -> bool:
        """Whether a file's contents may be this store's alone, and are not kept yet."""
        if inode.id in self._kept or inode.type != _stat.S_IFREG:
            return False
        marks = self._suspects.marks(inode.id)
        return (marks is not None and marks.data) or self._is_unknown_from(inode.parent)

    def is_suspect(self, inode: Inode) -> bool:
        """Whether anything of an object may be this store's alone, and its primary not know that.

        What it could not find under the name that the object has here, it did not mark. It marked
        everything where it was told of everything.
        """
        if self._everything:
            return False
        return self._suspects.marks(inode.id) is not None or self._is_unknown_from(inode.parent)

    def is_suspect_name(self, parent: Inode, name: bytes) -> bool:
        """Whether what stands at a name may stand there in this store alone."""
        return not self._suspects.name_is_clean(parent.id, name) or self._is_unknown_from(parent)

    def _is_unknown_from(self, directory: Inode | None) -> bool:
        """Whether all in a directory may be this store's alone: nobody has looked into it."""
        if self._everything:
            return True
        one = directory
        while one is not None:
            marks = self._suspects.marks(one.id)
            if marks is not None and marks.deep:
                return True
            one = one.parent
        return False

    def differs(self, inode: Inode, start: int, stop: int) -> bool:
        """Whether zeros at [start, stop) would change a file."""
        fd = self._tree.data_fd(inode)
        try:
            return os.lseek(fd, start, os.SEEK_DATA) < stop
        except OSError:
            return False  # nothing but a hole follows, or the end

    def made(self, object_id: bytes) -> None:
        """An object was made by the resync: what is in it is the successor's, and is not kept."""
        self._kept.add(object_id)

    # What was taken aside ------------------------------------------------------------------------

    def moving(self, inode: Inode) -> None:
        """It is about to get another name: what is not known of it stays so there.

        Raises:
            OSError: that cannot be recorded.
        """
        if self._everything or not self._is_unknown_from(inode.parent):
            return
        marks = self._suspects.marks(inode.id)
        if marks is not None and (marks.deep if inode.is_directory else marks.data):
            return
        if inode.is_directory or inode.type == _stat.S_IFREG:
            self._suspects.mark_unknown(
                self._tree.ensure_id(inode),
                directory=inode.is_directory,
                deep=True,
                handle=locators.of(self._tree, inode),
            )

    def taken(self, parent: Inode, name: bytes, inode: Inode) -> None:
        """It was *name* in *parent*, and is about to be taken aside, perhaps for good.

        Raises:
            OSError: as `moving`.
        """
        self.moving(inode)
        is_suspect = self.is_suspect_name(parent, name)
        if inode.is_directory or is_suspect or self.holds_contents(inode):
            above = parent.path()
            self._paths[inode.ino] = above + b"/" + name if above else name
        if is_suspect:
            self._whole.add(inode.ino)

    def _note_left(self) -> None:
        """What an earlier process took aside; nobody knows any more where it stood."""
        directory = self._tree.directory_fd(self._tree.reserved_directory(LIMBO))
        with os.scandir(directory) as entries:
            for entry in entries:
                self._paths[entry.inode()] = os.fsencode(entry.name)
                self._whole.add(entry.inode())

    def path_of(self, inode: Inode) -> bytes:
        """Where an object stood that was taken aside, alone or with a directory above it.

        Empty where it was not, or where nobody noted it.
        """
        parts: list[bytes] = []
        one: Inode | None = inode
        while one is not None:
            known = self._paths.get(one.ino)
            if known is not None:
                return b"/".join([known, *reversed(parts)])
            parts.append(one.name)
            one = one.parent
        return b""

    def wants(self, parent: Inode, name: bytes, inode: Inode) -> bool:
        """Whether an object that is about to be removed for good is to be kept."""
        if inode.is_directory:
            return False
        if self.holds_contents(inode):
            return True
        one: Inode | None = inode
        while one is not None:
            if one.ino in self._whole:
                return True
            one = one.parent
        return self.is_suspect_name(parent, name)

    # Keeping -------------------------------------------------------------------------------------

    def keep_removed(self, parent: Inode, name: bytes, inode: Inode, path: bytes) -> None:
        """Give the object a name in the kept directory; its old one is the caller's to remove.

        Relies on: names go to the disk in the order in which they are made and removed, as with
        ext4, xfs and btrfs, so that no flush is needed between the two.

        Raises:
            OSError: it cannot be kept.
        """
        directory, free = self._place(path or name)
        try:
            os.link(
                name,
                free,
                src_dir_fd=self._tree.directory_fd(parent),
                dst_dir_fd=directory,
                follow_symlinks=False,
            )
        finally:
            os.close(directory)
        self._note(inode, path or name)

    async def keep_contents(self, inode: Inode) -> None:
        """Copy a file as it is now; the copy is on stable storage when this returns.

        Raises:
            OSError: it cannot be kept (ENOSPC): then it must not be overwritten.
        """
        path = self.path_of(inode) or inode.path()
        directory, free = self._place(path)
        source = -1
        try:
            source = self._tree.open(inode, os.O_RDONLY)
            found = os.fstat(source)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            target = os.open(free, flags, 0o600, dir_fd=directory)
            try:
                await trio.to_thread.run_sync(_copy, source, target)
                os.fchown(target, found.st_uid, found.st_gid)
                os.fchmod(target, _stat.S_IMODE(found.st_mode))
                _copy_xattrs(source, target)
                syscalls.utimens(target, found.st_atime_ns, found.st_mtime_ns)
                await trio.to_thread.run_sync(self._harden, target, directory)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.unlink(free, dir_fd=directory)
                raise
            finally:
                os.close(target)
        finally:
            os.close(directory)
            if source >= 0:
                os.close(source)
        self._note(inode, path)

    def _harden(self, target: int, directory: int) -> None:
        """Flush a new file and all directories from its own up to the reserved one.

        Each may have got its name just now; where it did not, there is nothing to be flushed.
        """
        os.fsync(target)
        fd = os.dup(directory)
        try:
            while os.fstat(fd).st_ino != self._top.ino:
                os.fsync(fd)
                above = os.open("..", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=fd)
                os.close(fd)
                fd = above
            os.fsync(fd)
        finally:
            os.close(fd)

    def _note(self, inode: Inode, path: bytes) -> None:
        if inode.id:
            self._kept.add(inode.id)
        self.count += 1
        shown = path.decode(errors="backslashreplace")
        log.warning("kept beside, since the new primary has something else: %s", shown)
        self._told(f".replfs/kept/{self._label.decode()}/{shown}")

    def _place(self, path: bytes) -> tuple[int, bytes]:
        """A descriptor of the directory for *path* among what is kept, and a free name in it."""
        *above, name = path.split(b"/")
        fd = os.dup(self._tree.directory_fd(self._tree.reserved_directory(KEPT)))
        for part in (self._label, *above):
            try:
                deeper = _enter(part, fd)
            finally:
                os.close(fd)
            fd = deeper
        return fd, next(one for one in _names_like(name) if not _exists(one, fd))


def _names_like(name: bytes) -> Iterator[bytes]:
    """The name itself, then with numbers."""
    yield name
    for number in itertools.count(1):
        yield b"%s.~%d" % (name[:240], number)


def _enter(name: bytes, directory: int) -> int:
    """A directory of that name, made where there is none; where a file has the name, beside it.

    Raises:
        OSError: it cannot be made or opened.
    """
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    names = _names_like(name)
    while True:
        free = next(names)
        with contextlib.suppress(FileExistsError):
            os.mkdir(free, 0o700, dir_fd=directory)
        with contextlib.suppress(NotADirectoryError):
            return os.open(free, flags, dir_fd=directory)


def _exists(name: bytes, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _copy_xattrs(source: int, target: int) -> None:
    """All but the record: ACLs, which agree with the mode, capabilities, what users set."""
    for name in map(os.fsencode, os.listxattr(source)):
        if not name.startswith(HIDDEN_PREFIXES):
            os.setxattr(target, name, os.getxattr(source, name))


def _copy(source: int, target: int) -> None:
    """The whole contents, shared where the file system can."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
    else:
        return
    size = os.fstat(source).st_size
    at = 0
    while at < size:
        count = os.copy_file_range(source, target, min(_CHUNK, size - at), at, at)
        if not count:
            break
        at += count
    os.ftruncate(target, size)
