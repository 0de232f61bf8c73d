"""System calls that Python's os module does not offer, or not with what is needed here.

Thin: each function is one call, raises OSError with the call's own errno, and keeps the GIL
released as ctypes does. Sources: the man page of the same name, section 2.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from typing import Final

_libc: Final = ctypes.CDLL(None, use_errno=True)

AT_SYMLINK_NOFOLLOW: Final = 0x100
AT_EMPTY_PATH: Final = 0x1000
RENAME_NOREPLACE: Final = 1
RENAME_EXCHANGE: Final = 2
RENAME_WHITEOUT: Final = 4
FALLOC_FL_KEEP_SIZE: Final = 1
FALLOC_FL_PUNCH_HOLE: Final = 2
UTIME_OMIT: Final = (1 << 30) - 2
_SYNC_FILE_RANGE_WRITE: Final = 2
HANDLE_BYTES_MAX: Final = 128

_SECOND: Final = 1_000_000_000

_renameat2 = _libc.renameat2
_renameat2.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_uint,
)
_utimensat = _libc.utimensat
_utimensat.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_int)
_futimens = _libc.futimens
_futimens.argtypes = (ctypes.c_int, ctypes.c_void_p)
_fallocate = _libc.fallocate
_fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_syncfs = _libc.syncfs
_syncfs.argtypes = (ctypes.c_int,)
_sync_file_range = _libc.sync_file_range
_sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
_name_to_handle_at = _libc.name_to_handle_at
_name_to_handle_at.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)
_open_by_handle_at = _libc.open_by_handle_at
_open_by_handle_at.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_int)

_AT_FDCWD: Final = -100
_STATX_BTIME: Final = 0x800
_statx = _libc.statx
_statx.argtypes = (
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.c_int,
    ctypes.c_uint,
    ctypes.c_void_p,
)

_times = ctypes.create_string_buffer(32)
_times_address = ctypes.addressof(_times)
_pack_times = struct.Struct("qqqq").pack_into
_handle_head = struct.Struct("=Ii")
_handle_memory = ctypes.create_string_buffer(8 + HANDLE_BYTES_MAX)
_handle_address = ctypes.addressof(_handle_memory)
_handle = memoryview(_handle_memory).cast("B")
_mount_id = ctypes.c_int()
_mount_id_address = ctypes.addressof(_mount_id)


_syscall = _libc.syscall
_syscall.restype = ctypes.c_long
_SYS_OPENAT2: Final = 437
_RESOLVE_NO_XDEV: Final = 1
_NO_CROSSING: Final = ctypes.create_string_buffer(
    struct.pack("QQQ", os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, 0, _RESOLVE_NO_XDEV)
)


def failure(number: int) -> OSError:
    """The error with this errno."""
    return OSError(number, os.strerror(number))


def birth_ns(path: bytes, *, follow: bool) -> int:
    """When the file was made, in ns since 1970; 0 where the filesystem does not say: statx."""
    answer = ctypes.create_string_buffer(256)
    flags = 0 if follow else AT_SYMLINK_NOFOLLOW
    if _statx(_AT_FDCWD, path, flags, _STATX_BTIME, answer) != 0:
        raise failure(ctypes.get_errno())
    # struct statx: stx_mask first, stx_btime at 80.
    (mask,) = struct.unpack_from("=I", answer, 0)
    seconds, nanoseconds = struct.unpack_from("=qI", answer, 80)
    return seconds * _SECOND + nanoseconds if mask & _STATX_BTIME else 0


def is_mountpoint(directory: int, name: bytes) -> bool:
    """Whether something is mounted on *name*, a bind mount included.

    False where the kernel has no openat2(2) (before 5.6): then only device numbers tell.
    """
    fd = _syscall(
        ctypes.c_long(_SYS_OPENAT2),
        ctypes.c_int(directory),
        ctypes.c_char_p(name),
        _NO_CROSSING,
        ctypes.c_size_t(24),
    )
    if fd >= 0:
        os.close(fd)
        return False
    return ctypes.get_errno() == errno.EXDEV


def _fail() -> OSError:
    return failure(ctypes.get_errno())


def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
    """Rename with flags (`RENAME_NOREPLACE`, `RENAME_EXCHANGE`, `RENAME_WHITEOUT`)."""
    if _renameat2(old_dir, old, new_dir, new, flags):
        raise _fail()


def utimens(fd: int, atime: int | None, mtime: int | None) -> None:
    """Set an open file's times, in ns since the epoch; None leaves one as it is.

    Only the event loop's thread may call this and `utimensat`: they share one buffer.
    """
    _fill_times(atime, mtime)
    if _futimens(fd, _times_address):
        raise _fail()


def utimensat(directory: int, name: bytes, atime: int | None, mtime: int | None) -> None:
    """As `utimens`, by name, not following a symlink."""
    _fill_times(atime, mtime)
    if _utimensat(directory, name, _times_address, AT_SYMLINK_NOFOLLOW):
        raise _fail()


def _fill_times(atime: int | None, mtime: int | None) -> None:
    if mtime is None:
        m_sec, m_nsec = 0, UTIME_OMIT
    else:
        m_sec, m_nsec = divmod(mtime, _SECOND)
    if atime is None:
        _pack_times(_times, 0, 0, UTIME_OMIT, m_sec, m_nsec)
    else:
        a_sec, a_nsec = divmod(atime, _SECOND)
        _pack_times(_times, 0, a_sec, a_nsec, m_sec, m_nsec)


def punch_hole(fd: int, start: int, length: int) -> None:
    """Make a hole; the size stays."""
    if _fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, start, length):
        raise _fail()


def syncfs(fd: int) -> None:
    """Flush the file system that *fd* is on to stable storage. Blocks: call it in a thread."""
    if _syncfs(fd):
        raise _fail()


def start_writing(fd: int) -> None:
    """Have the kernel begin to write what is dirty of a file to the disk. May block for a while.

    Relies on: sync_file_range(2) with SYNC_FILE_RANGE_WRITE alone waits for no write and takes no
    error away from a later fsync or syncfs.
    """
    if _sync_file_range(fd, 0, 0, _SYNC_FILE_RANGE_WRITE):
        raise _fail()


def name_to_handle(fd: int, name: bytes = b"") -> bytes:
    """A handle that finds the object again however it is renamed, and never another one.

    Type (int) and bytes, as `open_by_handle` takes it. With no name, the object of *fd* itself.

    Only the event loop's thread may call this: there is one buffer, for every new file is asked.
    """
    _handle_head.pack_into(_handle, 0, HANDLE_BYTES_MAX, 0)
    flags = 0 if name else AT_EMPTY_PATH
    if _name_to_handle_at(fd, name, _handle_address, _mount_id_address, flags):
        raise _fail()
    size, _ = _handle_head.unpack_from(_handle)
    return bytes(_handle[4 : 8 + size])


def open_by_handle(mount_fd: int, handle: bytes, flags: int) -> int:
    """Open an object by its handle; ESTALE if it is gone. Needs CAP_DAC_READ_SEARCH."""
    body = handle[4:]
    (kind,) = struct.unpack_from("=i", handle)
    buffer = ctypes.create_string_buffer(_handle_head.pack(len(body), kind) + body)
    fd = int(_open_by_handle_at(mount_fd, buffer, flags | os.O_CLOEXEC))
    if fd < 0:
        raise _fail()
    return fd
