"""FUSE as the kernel speaks it on /dev/fuse: requests taken apart, replies put together.

No descriptors and no loop here: bytes in, values out, and the other way round. What is left out
(locks, access, ioctl, fallocate, lseek, copy_file_range, poll) the kernel does by itself when it
has been told ENOSYS once.

Source: fuse(4), linux/fuse.h (protocol 7.23 and later).
"""

from __future__ import annotations

import functools
import struct
from typing import Any, Final, NamedTuple

import msgspec

RECEIVE_BYTES: Final = (1 << 20) + 4096
"""What the kernel wants to have room for: the largest write and its header."""
WRITE_MAX: Final = 1 << 20
_PAGES_MAX: Final = WRITE_MAX >> 12
_MAJOR: Final = 7
_MINOR: Final = 38
_MINOR_MIN: Final = 23
"""Before, the layouts were others."""

# Operations ---------------------------------------------------------------------------------

LOOKUP: Final = 1
FORGET: Final = 2
GETATTR: Final = 3
SETATTR: Final = 4
READLINK: Final = 5
SYMLINK: Final = 6
MKNOD: Final = 8
MKDIR: Final = 9
UNLINK: Final = 10
RMDIR: Final = 11
RENAME: Final = 12
LINK: Final = 13
OPEN: Final = 14
READ: Final = 15
WRITE: Final = 16
STATFS: Final = 17
RELEASE: Final = 18
FSYNC: Final = 20
SETXATTR: Final = 21
GETXATTR: Final = 22
LISTXATTR: Final = 23
REMOVEXATTR: Final = 24
FLUSH: Final = 25
_INIT: Final = 26
OPENDIR: Final = 27
READDIR: Final = 28
RELEASEDIR: Final = 29
FSYNCDIR: Final = 30
CREATE: Final = 35
INTERRUPT: Final = 36
BATCH_FORGET: Final = 42
READDIRPLUS: Final = 44
RENAME2: Final = 45

# What is agreed in INIT -----------------------------------------------------------------------

ASYNC_READ: Final = 1 << 0
ATOMIC_O_TRUNC: Final = 1 << 3
EXPORT_SUPPORT: Final = 1 << 4
BIG_WRITES: Final = 1 << 5
DONT_MASK: Final = 1 << 6
AUTO_INVAL_DATA: Final = 1 << 12
DO_READDIRPLUS: Final = 1 << 13
READDIRPLUS_AUTO: Final = 1 << 14
ASYNC_DIO: Final = 1 << 15
WRITEBACK_CACHE: Final = 1 << 16
PARALLEL_DIROPS: Final = 1 << 18
HANDLE_KILLPRIV: Final = 1 << 19
POSIX_ACL: Final = 1 << 20
ABORT_ERROR: Final = 1 << 21
MAX_PAGES: Final = 1 << 22
CACHE_SYMLINKS: Final = 1 << 23
HANDLE_KILLPRIV_V2: Final = 1 << 28

ALWAYS: Final = (
    ASYNC_READ
    | ATOMIC_O_TRUNC
    | BIG_WRITES
    | DONT_MASK  # else default ACLs come out wrong
    | DO_READDIRPLUS
    | READDIRPLUS_AUTO
    | ASYNC_DIO
    | PARALLEL_DIROPS  # else lookups in one directory come one at a time
    | HANDLE_KILLPRIV
    | ABORT_ERROR
    | MAX_PAGES
    | CACHE_SYMLINKS
    | HANDLE_KILLPRIV_V2  # else `security.capability` is asked for before every write
)
"""Wanted wherever the kernel offers it."""

# What is said of an open file ------------------------------------------------------------------

OPEN_DIRECT_IO: Final = 1 << 0
OPEN_KEEP_CACHE: Final = 1 << 1
OPEN_CACHE_DIR: Final = 1 << 3
OPEN_NOFLUSH: Final = 1 << 5

# Layouts -----------------------------------------------------------------------------------------

HEADER: Final = struct.Struct("=IIQQIIIHH")
"""length, operation, unique, node id, uid, gid, pid, extensions, padding"""
BODY: Final = HEADER.size
_REPLY: Final = struct.Struct("=IiQ")
_REPLY_BYTES: Final = _REPLY.size
_INIT_IN: Final = struct.Struct("=IIII")
_INIT_OUT: Final = struct.Struct("=IIIIHHIIHHI")
_INIT_OUT_BYTES: Final = 64
_ATTRIBUTES: Final = struct.Struct("=QQQqqqIIIIIIIIII")
_ENTRY: Final = struct.Struct("=QQQQII")
_NO_ENTRY: Final = struct.Struct("=QQQQII88x")
_VALID: Final = struct.Struct("=QII")
_OPENED: Final = struct.Struct("=QIi")
_STATFS: Final = struct.Struct("=QQQQQIIII24x")
_DIRENT: Final = struct.Struct("=QQII")
_PADDING: Final = tuple(bytes(size) for size in range(8))
_FORGET_ONE: Final = struct.Struct("=QQ")
_INVAL_INODE: Final = struct.Struct("=Qqq")
_INVAL_ENTRY: Final = struct.Struct("=QII")
_NOTIFY_INVAL_INODE: Final = 2
_NOTIFY_INVAL_ENTRY: Final = 3

_SETATTR_IN: Final = struct.Struct("=IIQQQqqqIIIIIIII")
_SET_MODE: Final = 1 << 0
_SET_UID: Final = 1 << 1
_SET_GID: Final = 1 << 2
_SET_SIZE: Final = 1 << 3
_SET_ATIME: Final = 1 << 4
_SET_MTIME: Final = 1 << 5
_SET_HANDLE: Final = 1 << 6
_SET_ATIME_NOW: Final = 1 << 7
_SET_MTIME_NOW: Final = 1 << 8

NUMBER: Final = struct.Struct("=Q")
"""A node id, handle or count at the beginning of a body."""
PAIR: Final = struct.Struct("=II")
"""OPEN: flags; MKDIR: mode, umask; SETXATTR: size, flags; GETXATTR, LISTXATTR: size."""
QUAD: Final = struct.Struct("=IIII")
"""CREATE: flags, mode, umask; MKNOD: mode, device, umask."""
RENAME2_IN: Final = struct.Struct("=QII")
"""new directory, flags"""
READ_IN: Final = struct.Struct("=QQI")
"""READ, READDIR: handle, offset, size"""
WRITE_IN: Final = struct.Struct("=QQIIQII")
"""handle, offset, size"""
FSYNC_IN: Final = struct.Struct("=QI")
"""handle, 1 for data only"""

_SECOND: Final = 1_000_000_000

Reply = bytes | bytearray | memoryview
_U32: Final = 0xFFFFFFFF


class Context(msgspec.Struct, frozen=True, gc=False):
    """Who asks. `umask` is the caller's where something is made, else 0."""

    uid: int
    gid: int
    pid: int
    umask: int = 0


# INIT --------------------------------------------------------------------------------------------


def is_init(request: bytes) -> bool:
    """Whether *request*, as read from /dev/fuse, is an INIT of a protocol that is known here."""
    if len(request) < BODY + _INIT_IN.size:
        return False
    length, operation, *_ = HEADER.unpack_from(request)
    major, minor, *_ = _INIT_IN.unpack_from(request, BODY)
    is_known = major == _MAJOR and minor >= _MINOR_MIN
    return bool(length == len(request) and operation == _INIT and is_known)


def init_reply(request: bytes, wanted: int, max_background: int) -> bytes:
    """The answer to INIT: of the flags *wanted* those that the kernel offers.

    *max_background*: asynchronous requests outstanding at most, 1 to 65535.
    """
    unique = HEADER.unpack_from(request)[2]
    _, minor, read_ahead, offered = _INIT_IN.unpack_from(request, BODY)
    body = _INIT_OUT.pack(
        _MAJOR,
        min(minor, _MINOR),
        read_ahead,
        wanted & offered,
        max_background,
        max(1, max_background * 3 // 4),
        WRITE_MAX,
        1,
        _PAGES_MAX,
        0,
        0,
    )
    return reply(unique, body.ljust(_INIT_OUT_BYTES, b"\0"))


# Replies -----------------------------------------------------------------------------------------


def reply_head(unique: int, size: int) -> bytes:
    """What stands before *size* bytes of a successful reply."""
    return _REPLY.pack(_REPLY_BYTES + size, 0, unique)


def reply(unique: int, body: Reply) -> bytes:
    """A successful reply."""
    return _REPLY.pack(_REPLY_BYTES + len(body), 0, unique) + body


def error_reply(unique: int, number: int) -> bytes:
    """A request failed with this errno."""
    return _REPLY.pack(_REPLY.size, -number, unique)


class Entry(msgspec.Struct, frozen=True, gc=False):
    """An object that was looked up or made. A `nodeid` of 0 says that nothing has that name."""

    nodeid: int
    found: Any
    """As stat(2) gives it; None where there is nothing."""
    entry_timeout: float
    attr_timeout: float
    """Seconds for which the kernel may trust it."""
    generation: int = 0
    """Tells objects apart that have had the same node id, where they are found by handles."""


class Opened(msgspec.Struct, frozen=True, gc=False):
    """A handle that was opened."""

    handle: int
    flags: int


def entry(one: Entry) -> bytes:
    """The reply to whatever looks up or makes a name."""
    valid, valid_ns = _timeout(one.entry_timeout)
    if not one.nodeid:
        return _NO_ENTRY.pack(0, 0, valid, 0, valid_ns, 0)
    attr_valid, attr_valid_ns = _timeout(one.attr_timeout)
    head = _ENTRY.pack(one.nodeid, one.generation, valid, attr_valid, valid_ns, attr_valid_ns)
    return head + _attributes(one.nodeid, one.found)


def attributes(one: Entry) -> bytes:
    """The reply to what asks for, or changes, attributes."""
    valid, valid_ns = _timeout(one.attr_timeout)
    return _VALID.pack(valid, valid_ns, 0) + _attributes(one.nodeid, one.found)


def opened(one: Opened) -> bytes:
    """The reply to an open."""
    return _OPENED.pack(one.handle, one.flags, 0)


@functools.lru_cache(maxsize=16)
def _timeout(seconds: float) -> tuple[int, int]:
    whole = int(seconds)
    return whole, int((seconds - whole) * _SECOND)


def _attributes(nodeid: int, found: Any) -> bytes:
    atime, mtime, ctime = found.st_atime_ns, found.st_mtime_ns, found.st_ctime_ns
    return _ATTRIBUTES.pack(
        nodeid,
        found.st_size,
        found.st_blocks,
        atime // _SECOND,
        mtime // _SECOND,
        ctime // _SECOND,
        atime % _SECOND,
        mtime % _SECOND,
        ctime % _SECOND,
        found.st_mode,
        found.st_nlink,
        found.st_uid,
        found.st_gid,
        found.st_rdev & _U32,
        found.st_blksize,
        0,
    )


def statfs(found: Any) -> bytes:
    """The reply to statfs, from what statvfs(3) says."""
    return _STATFS.pack(
        found.f_blocks,
        found.f_bfree,
        found.f_bavail,
        found.f_files,
        found.f_ffree,
        found.f_bsize,
        found.f_namemax,
        found.f_frsize,
        0,
    )


class Listing:
    """The reply to a READDIR, or with *plus* to a READDIRPLUS: at most *room* bytes of entries."""

    __slots__ = ("_parts", "_room", "plus")

    def __init__(self, room: int, *, plus: bool) -> None:
        self._room = room
        self._parts: list[bytes] = []
        self.plus = plus
        """The kernel takes a reference to each entry but `.` and `..`."""

    def add(self, name: bytes, one: Entry, position: int) -> bool:
        """One more; False where there is no room for it. *position*: where to go on behind it."""
        size = len(name)
        padding = -size % 8
        total = _DIRENT.size + size + padding
        if self.plus:
            total += _ENTRY.size + _ATTRIBUTES.size
        if total > self._room:
            return False
        self._room -= total
        parts = self._parts
        if self.plus:
            parts.append(entry(one))
        kind = one.found.st_mode >> 12 & 15
        parts.append(_DIRENT.pack(one.nodeid, position, size, kind))
        parts.append(name + _PADDING[padding])
        return True

    def packed(self) -> bytes:
        """The body of the reply."""
        return b"".join(self._parts)


# Requests ----------------------------------------------------------------------------------------


class Changes(NamedTuple):
    """What a setattr wants; None leaves one as it is. Times in ns since the epoch.

    It is read like pyfuse3's attributes, and like its fields that say which of them count.
    """

    handle: int | None
    st_size: int | None
    st_mode: int | None
    st_uid: int | None
    st_gid: int | None
    st_atime_ns: int | None
    st_mtime_ns: int | None

    @property
    def update_size(self) -> bool:
        """Whether the size changes."""
        return self.st_size is not None

    @property
    def update_mode(self) -> bool:
        """Whether the mode changes."""
        return self.st_mode is not None

    @property
    def update_uid(self) -> bool:
        """Whether the owner changes."""
        return self.st_uid is not None

    @property
    def update_gid(self) -> bool:
        """Whether the group changes."""
        return self.st_gid is not None

    @property
    def update_atime(self) -> bool:
        """Whether the time of the last access changes."""
        return self.st_atime_ns is not None

    @property
    def update_mtime(self) -> bool:
        """Whether the time of the last change changes."""
        return self.st_mtime_ns is not None


def changes(request: bytes, now_ns: int) -> Changes:
    """Take a setattr apart."""
    fields = _SETATTR_IN.unpack_from(request, BODY)
    (valid, _, handle, size, _, atime, mtime, _, atime_ns, mtime_ns, _, mode, _, uid, gid, _) = (
        fields
    )

    def time_of(explicit: int, current: int, seconds: int, ns: int) -> int | None:
        if valid & current:
            return now_ns
        return seconds * _SECOND + ns if valid & explicit else None

    return Changes(
        handle if valid & _SET_HANDLE else None,
        size if valid & _SET_SIZE else None,
        mode if valid & _SET_MODE else None,
        uid if valid & _SET_UID else None,
        gid if valid & _SET_GID else None,
        time_of(_SET_ATIME, _SET_ATIME_NOW, atime, atime_ns),
        time_of(_SET_MTIME, _SET_MTIME_NOW, mtime, mtime_ns),
    )


def name_at(request: bytes, start: int) -> bytes:
    """The name that begins there and ends with a zero byte."""
    return request[start : request.index(0, start)]


def names_at(request: bytes, start: int) -> tuple[bytes, bytes]:
    """Two names, one behind the other."""
    end = request.index(0, start)
    return request[start:end], name_at(request, end + 1)


def forgotten(request: bytes) -> list[tuple[int, int]]:
    """The node ids, and how many references each, of a FORGET or BATCH_FORGET."""
    _, operation, _, nodeid, *_ = HEADER.unpack_from(request)
    if operation == FORGET:
        return [(nodeid, NUMBER.unpack_from(request, BODY)[0])]
    count, _ = PAIR.unpack_from(request, BODY)
    start = BODY + PAIR.size
    return list(_FORGET_ONE.iter_unpack(request[start : start + count * _FORGET_ONE.size]))


# What the daemon tells by itself -----------------------------------------------------------------


def invalidate_inode(nodeid: int, *, attr_only: bool = False) -> bytes:
    """Attributes, and unless *attr_only* pages too, are not to be trusted any more."""
    body = _INVAL_INODE.pack(nodeid, -1 if attr_only else 0, 0)
    return _REPLY.pack(_REPLY.size + len(body), _NOTIFY_INVAL_INODE, 0) + body


def invalidate_entry(parent: int, name: bytes) -> bytes:
    """A name is not to be trusted any more."""
    body = _INVAL_ENTRY.pack(parent, len(name), 0) + name + b"\0"
    return _REPLY.pack(_REPLY.size + len(body), _NOTIFY_INVAL_ENTRY, 0) + body
