"""System calls that Python 3.11 does not offer, or whose arguments it hides.

Each raises OSError as `os` does. Structures are those of 64-bit Linux.
"""

from __future__ import annotations

import ctypes
import os

AT_FDCWD = -100
AT_SYMLINK_NOFOLLOW = 0x100
AT_SYMLINK_FOLLOW = 0x400
AT_EMPTY_PATH = 0x1000
RENAME_NOREPLACE = 1
RENAME_EXCHANGE = 2
RENAME_WHITEOUT = 4
FALLOC_FL_KEEP_SIZE = 1
FALLOC_FL_PUNCH_HOLE = 2
FALLOC_FL_ZERO_RANGE = 16
UTIME_NOW = (1 << 30) - 1
UTIME_OMIT = (1 << 30) - 2
CLONE_NEWUSER = 0x10000000
XATTR_CREATE = 1
XATTR_REPLACE = 2
FS_IOC_GETFLAGS = 0x80086601
FICLONE = 0x40049409

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]

_libc = ctypes.CDLL(None, use_errno=True)
for _name in ("telldir", "lseek"):
    getattr(_libc, _name).restype = ctypes.c_long
for _name in ("getxattr", "listxattr", "readlink"):
    getattr(_libc, _name).restype = ctypes.c_ssize_t
_libc.opendir.restype = ctypes.c_void_p
_libc.readdir.restype = ctypes.c_void_p


class _Timespec(ctypes.Structure):
    _fields_ = [
        ("seconds", ctypes.c_int64),
        ("nanoseconds", ctypes.c_int64),
    ]


class _DirectoryEntry(ctypes.Structure):
    _fields_ = [
        ("ino", ctypes.c_uint64),
        ("offset", ctypes.c_int64),
        ("length", ctypes.c_uint16),
        ("kind", ctypes.c_uint8),
        ("name", ctypes.c_char * 256),
    ]


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def renameat2(source: Path, target: Path, flags: int) -> None:
    """Rename with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT."""
    _checked(_libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags))


def linkat(dir_fd: int, source: Path, target: Path, flags: int) -> None:
    """linkat(2) with its flags."""
    _checked(_libc.linkat(dir_fd, os.fsencode(source), AT_FDCWD, os.fsencode(target), flags))


def utimensat(
    path: Path, atime: tuple[int, int], mtime: tuple[int, int], *, follow: bool = True
) -> None:
    """utimensat(2): times are (seconds, nanoseconds), the latter also UTIME_NOW or UTIME_OMIT."""
    times = (_Timespec * 2)(_Timespec(*atime), _Timespec(*mtime))
    flags = 0 if follow else AT_SYMLINK_NOFOLLOW
    _checked(_libc.utimensat(AT_FDCWD, os.fsencode(path), times, flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """fallocate(2), without the emulation that posix_fallocate(3) has."""
    _checked(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def faccessat(path: Path, mode: int) -> None:
    """access(2) that raises with its errno instead of answering False."""
    _checked(_libc.access(os.fsencode(path), mode))


def getxattr_into(path: Path, name: str, size: int) -> int:
    """getxattr(2) with a buffer of `size` bytes; returns the length."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    return _checked(_libc.getxattr(os.fsencode(path), name.encode(), buffer, size))


def listxattr_into(path: Path, size: int) -> int:
    """listxattr(2) with a buffer of `size` bytes; returns the length."""
    buffer = ctypes.create_string_buffer(max(size, 1))
    return _checked(_libc.listxattr(os.fsencode(path), buffer, size))


def readlink_into(path: Path, size: int) -> bytes:
    """readlink(2) with a buffer of `size` bytes."""
    buffer = ctypes.create_string_buffer(size)
    length = _checked(_libc.readlink(os.fsencode(path), buffer, size))
    return buffer.raw[:length]


def unshare(flags: int) -> None:
    """unshare(2)."""
    _checked(_libc.unshare(flags))


def sync_file_range(fd: int, offset: int, length: int, flags: int) -> None:
    """sync_file_range(2)."""
    _checked(_libc.sync_file_range(fd, ctypes.c_int64(offset), ctypes.c_int64(length), flags))


class Directory:
    """A directory stream of opendir(3), with its positions."""

    def __init__(self, path: Path) -> None:
        address = _libc.opendir(os.fsencode(path))
        if not address:
            _checked(-1)
        self._stream = ctypes.c_void_p(address)

    def read(self) -> tuple[bytes, int, int] | None:
        """The next entry as (name, inode number, d_type), or None at the end."""
        ctypes.set_errno(0)
        address = _libc.readdir(self._stream)
        if not address:
            if ctypes.get_errno():
                _checked(-1)
            return None
        entry = ctypes.cast(address, ctypes.POINTER(_DirectoryEntry)).contents
        return bytes(entry.name), int(entry.ino), int(entry.kind)

    def names(self) -> list[bytes]:
        """All that is left, without `.` and `..`."""
        found = []
        while (entry := self.read()) is not None:
            found.append(entry[0])
        return [name for name in found if name not in (b".", b"..")]

    def tell(self) -> int:
        """The position, for `seek`."""
        return int(_libc.telldir(self._stream))

    def seek(self, position: int) -> None:
        """Go on from a position that `tell` gave."""
        _libc.seekdir(self._stream, ctypes.c_long(position))

    def rewind(self) -> None:
        """Start again and see what has changed."""
        _libc.rewinddir(self._stream)

    def close(self) -> None:
        """Close the stream."""
        _checked(_libc.closedir(self._stream))
