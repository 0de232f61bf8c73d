"""Compare two directory trees completely: what replfs promises to keep equal, and nothing else.

Walks both sides by descriptors (`*at()` calls), so paths longer than PATH_MAX and names in any
encoding are no problem, and never follows a symlink. Only the standard library; knows nothing of
replfs but the two things it keeps in a store: the directory `.replfs` and one hidden xattr.

atime and ctime are each side's own and are not compared; nor are directories' sizes and link
counts, which belong to the filesystem beneath.
"""

from __future__ import annotations

import errno
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

RESERVED = b".replfs"
HIDDEN_XATTRS = ("trusted.replfs", "user.replfs")
CHUNK = 1 << 20
DIFFERENCES_MAX = 50

Tree = str | bytes | os.PathLike[str] | os.PathLike[bytes]


@dataclass(frozen=True)
class Difference:
    """One thing that is not equal at `path` (relative to the roots; empty for the roots)."""

    path: bytes
    kind: str
    left: object
    right: object

    def __str__(self) -> str:
        """One line for a failure message."""
        return f"{os.fsdecode(self.path) or '.'!r}: {self.kind}: {self.left!r} != {self.right!r}"


@dataclass
class _Comparison:
    holes: int
    times: bool
    root_attributes: bool
    limit: int
    found: list[Difference] = field(default_factory=list)
    # Inode on the left -> inode on the right, and back: hard links must pair up one to one.
    rights: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    lefts: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)

    @property
    def is_full(self) -> bool:
        return len(self.found) >= self.limit

    def note(self, path: bytes, kind: str, left: object, right: object) -> None:
        if not self.is_full:
            self.found.append(Difference(path, kind, left, right))

    def directories(self, left: int, right: int, path: bytes) -> None:
        """Compare what is below two open directories; depth first without recursion."""
        pending = [(os.dup(left), os.dup(right), path, iter(self._names(left, right, path)))]
        try:
            while pending and not self.is_full:
                left, right, path, names = pending[-1]
                name = next(names, None)
                if name is None:
                    pending.pop()
                    os.close(left)
                    os.close(right)
                    continue
                below = path + b"/" + name if path else name
                if self.entry(left, right, name, below):
                    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                    with (
                        _vanishing(self, below),
                        opened(name, flags, left) as fd_left,
                        opened(name, flags, right) as fd_right,
                    ):
                        found = iter(self._names(fd_left, fd_right, below))
                        pending.append((os.dup(fd_left), os.dup(fd_right), below, found))
        finally:
            for fds in pending:
                os.close(fds[0])
                os.close(fds[1])

    def _names(self, left: int, right: int, path: bytes) -> list[bytes]:
        both = [set(map(os.fsencode, os.listdir(fd))) for fd in (left, right)]
        if not path:
            both = [names - {RESERVED} for names in both]
        for name in sorted(both[0] ^ both[1]):
            below = path + b"/" + name if path else name
            self.note(below, "existence", name in both[0], name in both[1])
        return sorted(both[0] & both[1])

    def entry(self, left: int, right: int, name: bytes, path: bytes) -> bool:
        """Compare one name on both sides; True if both are directories (to be descended)."""
        with _vanishing(self, path):
            stat_left = os.stat(name, dir_fd=left, follow_symlinks=False)
            stat_right = os.stat(name, dir_fd=right, follow_symlinks=False)
            kind_left, kind_right = stat.S_IFMT(stat_left.st_mode), stat.S_IFMT(stat_right.st_mode)
            if kind_left != kind_right:
                self.note(path, "type", _kind(kind_left), _kind(kind_right))
                return False
            self.attributes(stat_left, stat_right, path)
            self.xattrs(_proc(left, name), _proc(right, name), path)
            if kind_left == stat.S_IFDIR:
                return True
            if not self.pairs_up(stat_left, stat_right, path):
                return False  # compared under another of its names already
            if kind_left == stat.S_IFLNK:
                targets = [os.readlink(name, dir_fd=fd) for fd in (left, right)]
                if targets[0] != targets[1]:
                    self.note(path, "target", *targets)
            elif kind_left in (stat.S_IFBLK, stat.S_IFCHR):
                if stat_left.st_rdev != stat_right.st_rdev:
                    self.note(path, "device", _device(stat_left), _device(stat_right))
            elif kind_left == stat.S_IFREG:
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                with opened(name, flags, left) as a, opened(name, flags, right) as b:
                    self.contents(a, b, path)
        return False

    def attributes(self, left: os.stat_result, right: os.stat_result, path: bytes) -> None:
        modes = stat.S_IMODE(left.st_mode), stat.S_IMODE(right.st_mode)
        if modes[0] != modes[1]:
            self.note(path, "mode", oct(modes[0]), oct(modes[1]))
        owners = (left.st_uid, left.st_gid), (right.st_uid, right.st_gid)
        if owners[0] != owners[1]:
            self.note(path, "owner", *owners)
        if self.times and left.st_mtime_ns != right.st_mtime_ns:
            self.note(path, "mtime", left.st_mtime_ns, right.st_mtime_ns)
        if not stat.S_ISDIR(left.st_mode) and left.st_nlink != right.st_nlink:
            self.note(path, "nlink", left.st_nlink, right.st_nlink)

    def pairs_up(self, left: os.stat_result, right: os.stat_result, path: bytes) -> bool:
        """Note a hard link to something else; True if this pair of inodes is seen first."""
        key_left, key_right = (left.st_dev, left.st_ino), (right.st_dev, right.st_ino)
        known_right, known_left = self.rights.get(key_left), self.lefts.get(key_right)
        if known_right is None and known_left is None:
            self.rights[key_left] = key_right
            self.lefts[key_right] = key_left
            return True
        if known_right != key_right or known_left != key_left:
            self.note(path, "links", "linked" if known_right else "alone",
                      "linked" if known_left else "alone")  # fmt: skip
        return False

    def xattrs(self, left: bytes, right: bytes, path: bytes) -> None:
        both = [read_xattrs(left), read_xattrs(right)]
        for name in sorted(both[0].keys() | both[1].keys()):
            values = both[0].get(name), both[1].get(name)
            if values[0] != values[1]:
                self.note(path, f"xattr {name}", *values)

    def contents(self, left: int, right: int, path: bytes) -> None:
        """Compare sizes, then bytes where either side has data; the rest is zeros on both."""
        sizes = os.fstat(left).st_size, os.fstat(right).st_size
        if sizes[0] != sizes[1]:
            self.note(path, "size", *sizes)
            return
        segments = list(data_segments(left)), list(data_segments(right))
        for start, stop in _union(segments[0] + segments[1]):
            for offset in range(start, stop, CHUNK):
                length = min(CHUNK, stop - offset)
                data = os.pread(left, length, offset), os.pread(right, length, offset)
                if data[0] != data[1]:
                    first = offset + _first_difference(*data)
                    around = first - offset
                    shown = [part[around : around + 16] for part in data]
                    self.note(path, f"content at byte {first}", *shown)
                    return
        if self.holes:
            granules = [_granules(part, self.holes) for part in segments]
            if granules[0] != granules[1]:
                differ = sorted(granules[0] ^ granules[1])
                self.note(path, f"holes in units of {self.holes}",
                          [g for g in differ if g in granules[0]][:8],
                          [g for g in differ if g in granules[1]][:8])  # fmt: skip


def compare_trees(
    left: Tree,
    right: Tree,
    *,
    holes: int = 0,
    times: bool = True,
    root_attributes: bool = True,
    limit: int = DIFFERENCES_MAX,
) -> list[Difference]:
    """Compare two directories and everything below them.

    Args:
        left: one root, by convention what is right.
        right: the other root, by convention what is to be judged.
        holes: bytes; compare which units of this size hold data (the coarser block size of the
            two filesystems, or more). 0: holes and zeros are the same.
        times: compare mtimes, to the nanosecond.
        root_attributes: compare the two roots' own attributes, too.
        limit: stop after this many differences.

    Returns:
        The differences in the order of the walk (byte order of names); empty if equal.
    """
    comparison = _Comparison(holes, times, root_attributes, limit)
    flags = os.O_RDONLY | os.O_DIRECTORY
    with opened(os.fsencode(left), flags) as a, opened(os.fsencode(right), flags) as b:
        if root_attributes:
            comparison.attributes(os.fstat(a), os.fstat(b), b"")
            comparison.xattrs(_proc(a, b"."), _proc(b, b"."), b"")
        comparison.directories(a, b, b"")
    return comparison.found


def wait_equal(
    left: Tree,
    right: Tree,
    *,
    timeout_s: float = 10.0,
    holes: int = 0,
    times: bool = True,
    root_attributes: bool = True,
) -> None:
    """Compare until the trees are equal, for what may arrive a moment later (an mtime).

    Raises:
        AssertionError: still different after `timeout_s`; lists the differences.
    """
    deadline = time.monotonic() + timeout_s
    pause = 0.002
    while True:
        found = compare_trees(
            left, right, holes=holes, times=times, root_attributes=root_attributes
        )
        if not found:
            return
        if time.monotonic() >= deadline:
            raise AssertionError(describe(left, right, found))
        time.sleep(pause)
        pause = min(pause * 2, 0.2)


def describe(left: Tree, right: Tree, found: list[Difference]) -> str:
    """The differences as text, one a line."""
    head = f"{os.fsdecode(left)} and {os.fsdecode(right)} differ:"
    return "\n  ".join([head, *map(str, found)])


def read_xattrs(path: bytes) -> dict[str, bytes]:
    """All xattrs of `path` (not followed) but the ones replfs keeps for itself."""
    found: dict[str, bytes] = {}
    try:
        names = os.listxattr(path, follow_symlinks=False)
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return found
    for name in names:
        if not name.startswith(HIDDEN_XATTRS):
            found[name] = os.getxattr(path, name, follow_symlinks=False)
    return found


def data_segments(fd: int) -> Iterator[tuple[int, int]]:
    """Half-open byte ranges of `fd` that hold data, in order (SEEK_DATA, SEEK_HOLE)."""
    offset, size = 0, os.fstat(fd).st_size
    while offset < size:
        try:
            start = os.lseek(fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            return  # only a hole up to the end
        offset = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, offset


@contextmanager
def opened(name: bytes, flags: int, dir_fd: int | None = None) -> Iterator[int]:
    """A descriptor for the length of a block; reading it does not touch atime if permitted."""
    try:
        fd = os.open(name, flags | os.O_NOATIME | os.O_CLOEXEC, dir_fd=dir_fd)
    except PermissionError:
        fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=dir_fd)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def _vanishing(comparison: _Comparison, path: bytes) -> Iterator[None]:
    """A name that goes away during the comparison is a difference, not an error."""
    try:
        yield
    except FileNotFoundError:
        comparison.note(path, "existence", "changes during the comparison", "")


def _proc(dir_fd: int, name: bytes) -> bytes:
    # Relies on: proc(5), /proc/self/fd/N resolves to the directory itself; there is no *at()
    # form of the xattr calls in this Python.
    return b"/proc/self/fd/%d/%b" % (dir_fd, name)


def _kind(mode: int) -> str:
    return stat.filemode(mode)[0]


def _device(status: os.stat_result) -> str:
    return f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"


def _union(segments: list[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(segments):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return iter(joined)


def _granules(segments: list[tuple[int, int]], size: int) -> set[int]:
    return {
        unit for start, stop in segments for unit in range(start // size, (stop + size - 1) // size)
    }


def _first_difference(left: bytes, right: bytes) -> int:
    differ: Callable[[int], bool] = lambda end: left[:end] != right[:end]  # noqa: E731
    low, high = 0, max(len(left), len(right))
    while low + 1 < high:  # bisect: equal up to low, different up to high
        middle = (low + high) // 2
        low, high = (low, middle) if differ(middle) else (middle, high)
    return low
