"""Words that conformance cases are written in: a place, kinds of objects, errnos, time stamps."""

from __future__ import annotations

import errno
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

AnyPath = str | bytes | os.PathLike[str] | os.PathLike[bytes]

NAME_MAX = 255
PATH_MAX = 4096
CLOCK_REALTIME_COARSE = 5
ESSENCE = (
    "st_ino", "st_mode", "st_nlink", "st_uid", "st_gid", "st_size", "st_mtime_ns", "st_ctime_ns"
)  # fmt: skip
OLD_NS = 1_234_567_890_123_456_789
BOTH_CACHES = pytest.mark.parametrize("cache", ["write-through", "write-back"])
"""For a module whose cases are to run on a mount with `writeback` as well."""


@dataclass(frozen=True)
class Tree:
    """A fresh directory for one case: on the mount, or in a plain directory.

    `primary` and `secondary` are the same directory in the two stores; None in a plain one.
    """

    path: Path
    primary: Path | None = None
    secondary: Path | None = None

    def __fspath__(self) -> str:
        """So that a Tree can be given wherever a path can."""
        return str(self.path)

    def __truediv__(self, name: str) -> Path:
        """`tree / "name"`."""
        return self.path / name

    @property
    def mounted(self) -> bool:
        """Whether this is a replfs mount."""
        return self.primary is not None

    def stores(self) -> list[Path]:
        """The directory in each store; none in a plain directory."""
        return [path for path in (self.primary, self.secondary) if path is not None]


def _socket(path: AnyPath, mode: int) -> None:
    # By mknod(2) rather than bind(2), whose path is limited to 107 bytes.
    os.mknod(path, stat.S_IFSOCK | mode)


def _file(path: AnyPath, mode: int) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, mode))


def _symlink(path: AnyPath, _mode: int) -> None:
    os.symlink("target that is not there", path)


MAKERS: Mapping[str, Callable[[AnyPath, int], None]] = {
    "file": _file,
    "directory": lambda path, mode: os.mkdir(path, mode),
    "fifo": lambda path, mode: os.mkfifo(path, mode),
    "block": lambda path, mode: os.mknod(path, stat.S_IFBLK | mode, os.makedev(7, 200)),
    "character": lambda path, mode: os.mknod(path, stat.S_IFCHR | mode, os.makedev(1, 3)),
    "socket": _socket,
    "symlink": _symlink,
}
KINDS = tuple(MAKERS)
NOT_SYMLINK = tuple(kind for kind in KINDS if kind != "symlink")
NOT_DIRECTORY = tuple(kind for kind in KINDS if kind != "directory")
TYPES = {
    "file": stat.S_IFREG,
    "directory": stat.S_IFDIR,
    "fifo": stat.S_IFIFO,
    "block": stat.S_IFBLK,
    "character": stat.S_IFCHR,
    "socket": stat.S_IFSOCK,
    "symlink": stat.S_IFLNK,
}


def make(kind: str, path: AnyPath, mode: int = 0o644) -> None:
    """Make a new object of a kind; the umask applies."""
    MAKERS[kind](path, mode)


def make_owned(kind: str, path: AnyPath, uid: int, gid: int, mode: int = 0o644) -> None:
    """Make a new object with exactly this owner and mode."""
    make(kind, path)
    os.chown(path, uid, gid, follow_symlinks=False)
    if kind != "symlink":
        os.chmod(path, mode)


def remove(path: AnyPath) -> None:
    """Remove whatever this is, if it is empty."""
    if stat.S_ISDIR(os.lstat(path).st_mode):
        os.rmdir(path)
    else:
        os.unlink(path)


def mode_of(path: AnyPath) -> int:
    """Permission bits, not following a symlink."""
    return stat.S_IMODE(os.lstat(path).st_mode)


def type_of(path: AnyPath) -> int:
    """The file type bits, not following a symlink."""
    return stat.S_IFMT(os.lstat(path).st_mode)


def owner_of(path: AnyPath) -> tuple[int, int]:
    """(uid, gid), not following a symlink."""
    status = os.lstat(path)
    return status.st_uid, status.st_gid


def exists(path: AnyPath) -> bool:
    """Whether the name exists; a dangling symlink does."""
    return os.path.lexists(path)


def write(path: AnyPath, data: bytes) -> None:
    """Create or replace a file's content."""
    with open(path, "wb") as file:
        file.write(data)


def read(path: AnyPath) -> bytes:
    """A file's whole content."""
    with open(path, "rb") as file:
        return file.read()


def error_name(code: int) -> str:
    """`EACCES` for 13; `ok` for 0."""
    if code == errno.EOPNOTSUPP:
        return "EOPNOTSUPP"  # one number with ENOTSUP here
    return errno.errorcode.get(code, str(code)) if code else "ok"


def outcome(function: Callable[..., object], *arguments: object) -> str:
    """The name of the errno a call fails with, or `ok`. A descriptor it returns is closed."""
    try:
        result = function(*arguments)
    except OSError as error:
        return error_name(error.errno or 0)
    if isinstance(result, int) and not isinstance(result, bool) and result > 2:
        os.close(result)
    return "ok"


@contextmanager
def fails(*codes: int) -> Iterator[None]:
    """The block must fail with an OSError of (one of) these errnos."""
    wanted = " or ".join(map(error_name, codes))
    try:
        yield
    except OSError as error:
        if error.errno in codes:
            return
        raise AssertionError(f"{error_name(error.errno or 0)}, not {wanted}") from error
    raise AssertionError(f"success, not {wanted}")


def tick(*paths: AnyPath) -> None:
    """Wait until a time stamp made from now on is later than the ones these objects have.

    Waits for the kernel's coarse clock, a few milliseconds: time stamps are taken from it.
    """
    latest = max((os.lstat(path).st_ctime_ns for path in paths), default=0)
    latest = max(latest, time.clock_gettime_ns(time.CLOCK_REALTIME))
    while time.clock_gettime_ns(CLOCK_REALTIME_COARSE) <= latest:
        time.sleep(0.001)


@contextmanager
def stamps(
    expected: Mapping[AnyPath, str], moved: Mapping[AnyPath, AnyPath] | None = None
) -> Iterator[None]:
    """The block changes exactly these time stamps of these objects.

    Args:
        expected: path -> which change: a string of `m` (mtime) and `c` (ctime); symlinks are not
            followed. All others of these objects must keep their mtime and ctime.
        moved: path before -> path afterwards.
    """
    tick(*expected)
    before = {path: os.lstat(path) for path in expected}
    yield
    for path, letters in expected.items():
        status = os.lstat((moved or {}).get(path, path))
        changed = "".join(
            letter
            for letter, old, new in (
                ("m", before[path].st_mtime_ns, status.st_mtime_ns),
                ("c", before[path].st_ctime_ns, status.st_ctime_ns),
            )
            if old != new
        )
        went_back = (
            status.st_ctime_ns < before[path].st_ctime_ns
            or status.st_mtime_ns < before[path].st_mtime_ns
        )
        assert not went_back, f"{path!r}: a time stamp went back"
        assert changed == letters, f"{path!r}: changed {changed!r}, must change {letters!r}"


@contextmanager
def unchanged(*paths: AnyPath) -> Iterator[None]:
    """The block changes nothing of these objects that stat(2) shows, but atime."""
    tick(*paths)
    before = [os.lstat(path) for path in paths]
    yield
    changes = [
        f"{path!r}: {name} {getattr(old, name)} -> {getattr(new, name)}"
        for path, old, new in zip(paths, before, map(os.lstat, paths), strict=True)
        for name in ESSENCE
        if getattr(old, name) != getattr(new, name)
    ]
    assert not changes, "\n".join(changes)


@contextmanager
def fd_of(path: AnyPath, flags: int = os.O_RDONLY, mode: int = 0o644) -> Iterator[int]:
    """An open descriptor for the length of the block."""
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def in_directory(path: AnyPath) -> Iterator[None]:
    """The working directory for the length of the block."""
    before = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
    os.chdir(path)
    try:
        yield
    finally:
        os.fchdir(before)
        os.close(before)


def bound_socket(path: AnyPath) -> socket.socket:
    """A listening AF_UNIX socket bound to `path`, however long its directory's name is."""
    server = socket.socket(socket.AF_UNIX)
    directory, name = os.path.split(os.fsencode(path))
    with in_directory(directory):
        server.bind(name)
    server.listen()
    return server
