"""One node's disk, and what of a store a loss of power takes.

The store is a real directory on tmpfs, and every system call on it is a real one. Beside it stands
a journal of what was changed and is not durable yet, each change with what undoes it. A loss of
power keeps a part, as ext4 (data=ordered) and xfs do:

- Names, attributes, xattrs and sizes go to the disk in the order in which they were made: what is
  left is the state after some change that is no earlier than the last one that was flushed.
  fsync(2) flushes up to the last change of that object (as xfs does; ext4 flushes more),
  fdatasync(2) up to its last change that is not of times only, syncfs(2) everything.
- Bytes that were written go in any order, page by page, whatever became of the times and of other
  files: each page is what it was at the last flush of that file, or is new. Pages past the size at
  that time are zeros, or the file ends earlier.
- `state.db` is as after some commit that is no earlier than the last one that was hardened.

Inodes and their handles outlive all this, as on a disk: what is unlinked is moved to a graveyard
beside the store until its removal is durable, and looked at as if it had a link less.
"""

from __future__ import annotations

import contextlib
import os
import random
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from replfs.store import syscalls

PAGE = 4096
AT_FDCWD = -100
"""Of open(2): a path is relative to the working directory."""
_NOT_JOURNALED = (b"/.replfs.new", b"/.replfs/state.db", b"/.replfs/lock", b"/.replfs/reserve")
"""What the database does for itself, or what is remade."""
_WAL = b"/.replfs/state.db-wal"
_PROC = b"/proc/self/fd/"
_FIRST_BIRTH = 2

graves: dict[int, int] = {}
"""Inode numbers, and how many of the inode's links are in a graveyard."""
births: dict[int, int] = {}
"""Inode numbers of what was made, in the order in which it was: this machine's clock does not tell
moments apart between which the simulation lets hours pass."""

_stat, _lstat, _fstat = os.stat, os.lstat, os.fstat
_unlink, _rmdir, _rename, _link = os.unlink, os.rmdir, os.rename, os.link
_open, _close, _pread, _pwrite = os.open, os.close, os.pread, os.pwrite
_readlink, _ftruncate, _listdir = os.readlink, os.ftruncate, os.listdir
_getxattr, _setxattr, _removexattr = os.getxattr, os.setxattr, os.removexattr
_chmod, _chown, _utime = os.chmod, os.chown, os.utime
_renameat2 = syscalls.renameat2

Times = tuple[bytes, int, int]
"""A path, its access and its modification time."""


@dataclass(eq=False)
class Change:
    """One change in the journal."""

    undo: Callable[[], None]
    times: tuple[Times, ...] = ()
    """To be put back after the change is undone."""


@dataclass(eq=False)
class Written:
    """A change of a file's contents that is not flushed."""

    index: int
    """In the journal."""
    start: int
    """Page-aligned."""
    old: bytes
    """From there, up to the end of the page or of the file."""
    size: int
    """The file's size before."""
    new_size: int = -1
    """Of a truncation; -1: it is a write."""
    stop: int = 0
    is_flushed: bool = False
    """The bytes are durable, the times may not be."""


@dataclass(eq=False)
class _File:
    changes: list[Written] = field(default_factory=list)
    path: bytes = b""


class Disk:
    """One node's."""

    def __init__(self, path: bytes, graveyard: bytes) -> None:
        self.path = path
        self.graveyard = graveyard
        self._below, self._buried_below = path + b"/", graveyard + b"/"
        self._not_journaled = tuple(path + name for name in _NOT_JOURNALED)
        self.boot = 1
        self.losses = 0
        self._first = 0
        """Number of the first change in the journal; all before are durable."""
        self._journal: list[Change] = []
        self._last: dict[int, int] = {}
        """By inode number: the number behind its last change."""
        self._last_untimed: dict[int, int] = {}
        """The same, without changes of times only."""
        self._files: dict[int, _File] = {}
        self._buried = 0
        self._graves: dict[bytes, int] = {}
        """Path and inode number."""
        self._commits: list[int] = []
        """Sizes of the database's log when it was hardened, and after each commit since."""
        os.makedirs(graveyard, exist_ok=True)

    def forget(self) -> None:
        """The store was replaced by another, durably."""
        self._first += len(self._journal)
        self._journal.clear()
        self._clear_graveyard()
        self._files.clear()
        self._commits.clear()

    @property
    def pending(self) -> int:
        """Changes that are not durable."""
        return len(self._journal)

    @property
    def _next(self) -> int:
        return self._first + len(self._journal)

    # Paths ------------------------------------------------------------------------------------

    @staticmethod
    def where(path: Any, dir_fd: int | None = None) -> bytes:
        """The path as it is now."""
        if isinstance(path, int):
            return _readlink(b"/proc/self/fd/%d" % path)
        name = os.fsencode(path).rstrip(b"/")
        if dir_fd is not None:
            return _readlink(b"/proc/self/fd/%d" % dir_fd) + b"/" + name
        if name.startswith(_PROC):
            number, _, rest = name[len(_PROC) :].partition(b"/")
            above = _readlink(_PROC + number)
            return above + b"/" + rest if rest else above
        return name

    @staticmethod
    def _times_of(path: bytes) -> Times:
        found = _lstat(path)
        return path, found.st_atime_ns, found.st_mtime_ns

    def _above(self, path: bytes) -> tuple[Times, int]:
        directory = path[: path.rindex(b"/")]
        found = _lstat(directory)
        return (directory, found.st_atime_ns, found.st_mtime_ns), found.st_ino

    def _is_ours(self, path: bytes) -> bool:
        return (
            path.startswith((self._below, self._buried_below))
            and not path.startswith(self._not_journaled)
            and not path.endswith(b" (deleted)")
        )

    def _add(self, change: Change, *inos: int, times_only: bool = False) -> int:
        self._journal.append(change)
        number = self._next
        for ino in inos:
            self._last[ino] = number
            if not times_only:
                self._last_untimed[ino] = number
        return number - 1

    # Names ------------------------------------------------------------------------------------

    def make(self, call: Callable[..., Any], path: bytes, *args: Any, **keywords: Any) -> Any:
        """mkdir, mknod, symlink, link, open with O_CREAT: *path* is what is made."""
        if not self._is_ours(path) or os.path.lexists(path):
            return call(*args, **keywords)
        above, above_ino = self._above(path)
        result = call(*args, **keywords)
        found = _lstat(path)
        births.setdefault(found.st_ino, len(births) + _FIRST_BIRTH)
        remove = _rmdir if stat.S_ISDIR(found.st_mode) else _unlink
        self._add(Change(lambda: remove(path), (above,)), found.st_ino, above_ino)
        return result

    def _bury(self, path: bytes) -> bytes:
        self._buried += 1
        grave = self.graveyard + b"/%d" % self._buried
        _rename(path, grave)
        ino = _lstat(grave).st_ino
        self._graves[grave] = ino
        graves[ino] = graves.get(ino, 0) + 1
        return grave

    def _exhume(self, grave: bytes, path: bytes) -> None:
        _rename(grave, path)
        _forget_grave(self._graves.pop(grave))

    def _clear_graveyard(self) -> None:
        # Not before: what is open has its path there, and changes of it are in the journal.
        for grave, ino in self._graves.items():
            (_rmdir if stat.S_ISDIR(_lstat(grave).st_mode) else _unlink)(grave)
            _forget_grave(ino)
        self._graves.clear()

    def remove(self, call: Callable[..., Any], path: bytes, *args: Any, **keywords: Any) -> None:
        """unlink, rmdir."""
        try:
            found = _lstat(path)
        except OSError:
            call(*args, **keywords)
            return
        is_directory = stat.S_ISDIR(found.st_mode)
        wants_directory = call is _rmdir
        if is_directory != wants_directory or (is_directory and _listdir(path)):
            call(*args, **keywords)  # for its error
            return
        above, above_ino = self._above(path)
        grave = self._bury(path)
        undo = Change(lambda: self._exhume(grave, path), (above,))
        self._add(undo, found.st_ino, above_ino)

    def rename(self, call: Callable[[], Any], old: bytes, new: bytes) -> None:
        """rename(2), by *call*."""
        source = target = None
        with contextlib.suppress(OSError):
            source, target = _lstat(old), _lstat(new)
        if (
            source is not None
            and target is not None
            and (
                source.st_ino == target.st_ino
                or stat.S_ISDIR(source.st_mode) != stat.S_ISDIR(target.st_mode)
                or (stat.S_ISDIR(target.st_mode) and _listdir(new))
                or new.startswith(old + b"/")
            )
        ):
            call()  # nothing happens, or it fails
            return
        (above, above_ino), (new_above, new_ino) = self._above(old), self._above(new)
        times = (above, new_above)
        if source is None or target is None:
            call()
            ino = _lstat(new).st_ino
            self._add(Change(lambda: _rename(new, old), times), ino, above_ino, new_ino)
            return
        _renameat2(AT_FDCWD, old, AT_FDCWD, new, syscalls.RENAME_EXCHANGE)
        grave = self._bury(old)
        ino = target.st_ino

        def undo() -> None:
            _rename(new, old)
            self._exhume(grave, new)

        self._add(Change(undo, times), source.st_ino, ino, above_ino, new_ino)

    def exchange(self, call: Callable[[], Any], old: bytes, new: bytes) -> None:
        """renameat2(2) with RENAME_EXCHANGE: *call* does and undoes it."""
        (above, above_ino), (new_above, new_ino) = self._above(old), self._above(new)
        call()
        inos = (_lstat(old).st_ino, _lstat(new).st_ino)
        aside = self.graveyard + b"/aside"

        def undo() -> None:
            _rename(old, aside)
            _rename(new, old)
            _rename(aside, new)

        self._add(Change(undo, (above, new_above)), *inos, above_ino, new_ino)

    # Attributes -------------------------------------------------------------------------------

    def attributes(
        self, call: Callable[..., Any], path: bytes, *args: Any, times_only: bool = False, **kw: Any
    ) -> Any:
        """chmod, chown, utimensat."""
        if not self._is_ours(path):
            return call(*args, **kw)
        before = _lstat(path)
        result = call(*args, **kw)
        times = ((path, before.st_atime_ns, before.st_mtime_ns),)
        undo = (lambda: None) if times_only else (lambda: _put_back(path, before))
        self._add(Change(undo, times), before.st_ino, times_only=times_only)
        return result

    def xattr(
        self, call: Callable[..., Any], path: bytes, name: Any, *args: Any, **keywords: Any
    ) -> Any:
        """setxattr, removexattr."""
        before = _lstat(path)
        value: bytes | None = None
        with contextlib.suppress(OSError):
            value = _getxattr(path, name, follow_symlinks=False)
        result = call(*args, **keywords)

        def undo() -> None:
            if value is not None:
                _setxattr(path, name, value, follow_symlinks=False)
            else:
                with contextlib.suppress(OSError):
                    _removexattr(path, name, follow_symlinks=False)
            _put_back(path, before)

        times = ((path, before.st_atime_ns, before.st_mtime_ns),)
        self._add(Change(undo, times), before.st_ino)
        return result

    # Contents ---------------------------------------------------------------------------------

    def contents(self, call: Callable[..., Any], fd: int, start: int, stop: int, *args: Any) -> Any:
        """pwrite and punched holes, from *start* to *stop*."""
        path = self.where(fd)
        if not self._is_ours(path):
            return call(*args)
        before = _fstat(fd)
        low = start - start % PAGE
        high = stop + -stop % PAGE
        old = _read(fd, path, high - low, low) if low < before.st_size else b""
        result = call(*args)
        self._note_contents(before, path, Written(0, low, old, before.st_size, stop=high))
        return result

    def truncate(self, call: Callable[..., Any], fd: int, size: int) -> Any:
        """ftruncate."""
        path = self.where(fd)
        if not self._is_ours(path):
            return call(fd, size)
        before = _fstat(fd)
        low = size - size % PAGE
        old = _read(fd, path, before.st_size - low, low) if low < before.st_size else b""
        result = call(fd, size)
        self._note_contents(before, path, Written(0, low, old, before.st_size, size))
        return result

    def _note_contents(self, before: os.stat_result, path: bytes, change: Written) -> None:
        def undo() -> None:
            if change.is_flushed:
                return
            fd = _open(path, os.O_RDWR | os.O_CLOEXEC)
            try:
                if change.new_size >= 0 and change.size > change.new_size:
                    _ftruncate(fd, change.size)
                _write(fd, change.old, change.start)
                _ftruncate(fd, change.size)
            finally:
                _close(fd)

        ino = before.st_ino
        times = ((path, before.st_atime_ns, before.st_mtime_ns),)
        in_place = change.new_size < 0 and change.stop <= before.st_size
        change.index = self._add(Change(undo, times), ino, times_only=in_place)
        self._files.setdefault(ino, _File()).changes.append(change)

    # Flushes ----------------------------------------------------------------------------------

    def fsync(self, fd: int, *, data_only: bool) -> None:
        """fsync, fdatasync."""
        path = self.where(fd)
        if path.endswith(_WAL):
            self._commits = self._commits[-1:]
            return
        ino = _fstat(fd).st_ino
        for change in self._files.pop(ino, _File()).changes:
            change.is_flushed = True
        last = self._last_untimed if data_only else self._last
        self._durable_up_to(last.get(ino, 0))

    def syncfs(self) -> None:
        """Everything."""
        self._files.clear()
        self._commits = self._commits[-1:]
        self._durable_up_to(self._next)

    def _durable_up_to(self, number: int) -> None:
        count = number - self._first
        if count <= 0:
            return
        del self._journal[:count]
        self._first = number

    # The state --------------------------------------------------------------------------------

    def committing(self, wal: int) -> None:
        """The database is about to commit; *wal* is a descriptor of its log."""
        if not self._commits:
            self.committed(wal)

    def committed(self, wal: int) -> None:
        """The database has committed."""
        self._commits.append(_fstat(wal).st_size)

    def closed(self) -> None:
        """The database was closed: all of it is durable."""
        self._commits.clear()

    def keep_state(self) -> Callable[[], None]:
        """Read the state's files as a killed process leaves them; what puts them back."""
        found = {}
        for name in (b"state.db", b"state.db-wal"):
            with contextlib.suppress(FileNotFoundError), open(self._reserved(name), "rb") as file:
                found[name] = file.read()

        def put_back() -> None:
            with contextlib.suppress(FileNotFoundError):
                _unlink(self._reserved(b"state.db-shm"))
            for name, data in found.items():
                with open(self._reserved(name), "wb") as file:
                    file.write(data)

        return put_back

    def _reserved(self, name: bytes) -> bytes:
        return self.path + b"/.replfs/" + name

    # Loss of power ----------------------------------------------------------------------------

    def lose_power(self, rng: random.Random) -> str:
        """Nobody uses the store: what was not flushed goes, in part. What happened, for a trace."""
        self.boot += 1
        self.losses += 1
        total = len(self._journal)
        kept = rng.choice((0, total, rng.randint(0, total), rng.randint(0, total)))
        latest = {ino: self._latest(ino) for ino in self._files}
        while len(self._journal) > kept:
            self._undo(self._journal.pop())
        border = self._next
        pages = 0
        for ino, file in self._files.items():
            pages += self._mix(ino, file, border, latest[ino], rng)
        commits = self._lose_commits(rng)
        self._files.clear()
        self._durable_up_to(border)
        self._clear_graveyard()
        self._last.clear()
        self._last_untimed.clear()
        return f"{kept} of {total} changes kept, {pages} pages lost, {commits} commits lost"

    def _undo(self, change: Change) -> None:
        change.undo()
        for path, atime, mtime in change.times:
            _utime(path, ns=(atime, mtime), follow_symlinks=False)

    def _lose_commits(self, rng: random.Random) -> int:
        if len(self._commits) < 2:
            return 0
        kept = rng.choice((0, len(self._commits) - 1, rng.randrange(len(self._commits))))
        os.truncate(self._reserved(b"state.db-wal"), self._commits[kept])
        lost = len(self._commits) - 1 - kept
        self._commits = self._commits[kept : kept + 1]
        return lost

    def _latest(self, ino: int) -> bytes:
        path = self._find(ino)
        if path is None:
            return b""
        with open(path, "rb") as file:
            return file.read()

    def _find(self, ino: int) -> bytes | None:
        """Where a file is now, beneath the store."""
        for directory, names, files in os.walk(self.path):
            names.sort()
            for name in files:
                path = directory + b"/" + name
                if _lstat(path).st_ino == ino:
                    return path
        return None

    def _mix(self, ino: int, file: _File, border: int, latest: bytes, rng: random.Random) -> int:
        """Pages of a file are old or new; how many became old."""
        path = self._find(ino)
        if path is None:
            return 0
        before = _stat(path)
        with open(path, "r+b") as opened:
            now = bytearray(opened.read())
            old, low = _durable_pages(file.changes, border, len(now))
            share = rng.choice((0.0, 0.5, 1.0))
            lost = [page for page in sorted(old) if rng.random() < share]
            for page in lost:
                start = page * PAGE
                stop = min(start + PAGE, len(now))
                now[start:stop] = old[page][: stop - start].ljust(stop - start, b"\0")
            if lost and len(now) > low and rng.random() < 0.5:
                # The file ends behind the last page that was written.
                end = len(now)
                while end > low and (end - 1) // PAGE in set(lost):
                    end = max(low, (end - 1) // PAGE * PAGE)
                del now[end:]
            _take_later(now, file.changes, border, latest, rng)
            opened.seek(0)
            opened.write(now)
            opened.truncate(len(now))
        _utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        return len(lost)


def _durable_pages(changes: list[Written], border: int, size: int) -> tuple[dict[int, bytes], int]:
    """What pages that were written up to *border* were when last flushed, and the size then."""
    old: dict[int, bytes] = {}
    low = changes[0].size
    cut = False
    for change in changes:
        if change.index >= border:
            break
        if change.new_size >= 0:
            low = change.new_size
            cut = True
            for page in [one for one in old if one * PAGE >= change.new_size]:
                del old[page]
            continue
        for page in range(change.start // PAGE, change.stop // PAGE):
            at = page * PAGE - change.start
            if page * PAGE < size:
                # Past a truncation there is nothing older than zeros.
                old.setdefault(page, b"" if cut and page * PAGE >= low else change.old[at:][:PAGE])
    return old, min(low, size)


def _take_later(
    now: bytearray, changes: list[Written], border: int, latest: bytes, rng: random.Random
) -> None:
    """Bytes that were written in place may be there although their time is not."""
    later = [change for change in changes if change.index >= border]
    if any(change.new_size >= 0 for change in later):
        return
    share = rng.choice((0.0, 0.5, 1.0))
    for change in later:
        for start in range(change.start, min(change.stop, len(now)), PAGE):
            stop = min(start + PAGE, len(now))
            if rng.random() < share and stop <= len(latest):
                now[start:stop] = latest[start:stop]


def _forget_grave(ino: int) -> None:
    graves[ino] -= 1
    if not graves[ino]:
        del graves[ino]


def _put_back(path: bytes, before: os.stat_result) -> None:
    _chown(path, before.st_uid, before.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(before.st_mode):
        _chmod(path, stat.S_IMODE(before.st_mode))


def _read(fd: int, path: bytes, size: int, offset: int) -> bytes:
    """Also from what is open for writing only."""
    try:
        return _pread(fd, size, offset)
    except OSError:
        own = _open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return _pread(own, size, offset)
        finally:
            _close(own)


def _write(fd: int, data: bytes, offset: int) -> None:
    if data:
        written = _pwrite(fd, data, offset)
        assert written == len(data)


def birth_ns(path: bytes, *, follow: bool) -> int:
    """`syscalls.birth_ns`; of what was there before the first process, the first moment."""
    found = _stat(path) if follow else _lstat(path)
    return births.get(found.st_ino, _FIRST_BIRTH - 1)


def looked_at(found: os.stat_result) -> os.stat_result:
    """As if what is in a graveyard were gone."""
    buried = graves.get(found.st_ino)
    if buried is None:
        return found
    fields, more = cast("tuple[tuple[Any, ...], dict[str, Any]]", found.__reduce__()[1])
    return os.stat_result((*fields[:3], found.st_nlink - buried, *fields[4:]), more)
