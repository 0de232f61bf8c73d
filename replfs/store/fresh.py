"""Reading many small files of a directory in one go, for somebody who has none of them yet.

For a thread: nothing here knows of the tree. A file that has no id gets one, so that what is read
can be told by it; that nobody gave it another one meanwhile is for the caller to see.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from replfs.store import record as records
from replfs.store.record import Record

_FLAGS: Final = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOATIME
)
_BLOCK: Final = 512
"""The unit of st_blocks, stat(2)."""


class Fresh(NamedTuple):
    """All there is to a file."""

    name: bytes
    found: os.stat_result
    record: Record
    xattrs: dict[bytes, bytes]
    contents: bytes


def file_names(directory: int, hidden: bytes = b"") -> tuple[list[bytes], list[bytes]]:
    """The files in a directory, in the order of their inodes, and all else but *hidden*.

    Raises:
        OSError: it cannot be listed.
    """
    files: list[tuple[int, bytes]] = []
    others: list[bytes] = []
    with os.scandir(directory) as entries:
        for entry in entries:
            name = os.fsencode(entry.name)
            if entry.is_file(follow_symlinks=False):
                files.append((entry.inode(), name))
            elif name != hidden:
                others.append(name)
    # As they lie on the disk, on most file systems.
    files.sort()
    return [name for _, name in files], others


def read_fresh(
    directory: int,
    names: Sequence[bytes],
    size_max: int,
    limit: int,
    new_id: Callable[[], bytes],
) -> tuple[list[Fresh], int]:
    """The files at *names*, and how many of these were looked at: at least one.

    The first one that would bring all contents, or all extended attributes, to more than *limit*
    bytes is left to the next call. Left out for good is what is no file of at most *size_max*
    bytes, has holes or other names, is of another file system, is said to be incomplete, or cannot
    be read or given an id.
    """
    read: list[Fresh] = []
    device = os.fstat(directory).st_dev
    left = xattrs_left = limit
    for count, name in enumerate(names):
        try:
            one = _read(directory, name, device, size_max, new_id)
        except OSError:
            continue  # why is found out where it is read alone
        if one is None:
            continue
        xattrs = sum([len(key) + len(value) for key, value in one.xattrs.items()])
        if len(one.contents) > left or xattrs > xattrs_left:
            if read:
                return read, count
            continue
        left -= len(one.contents)
        xattrs_left -= xattrs
        read.append(one)
    return read, len(names)


def _read(
    directory: int, name: bytes, device: int, size_max: int, new_id: Callable[[], bytes]
) -> Fresh | None:
    fd = os.open(name, _FLAGS, dir_fd=directory)
    try:
        found = os.fstat(fd)
        size = found.st_size
        if (
            not _stat.S_ISREG(found.st_mode)
            or found.st_nlink != 1
            or size > size_max
            or found.st_dev != device
            or (found.st_blocks * _BLOCK < size and _has_holes(fd, size))
        ):
            return None
        data = os.pread(fd, size + 1, 0) if size else b""
        if len(data) != size:
            return None
        record: Record | None = None
        xattrs: dict[bytes, bytes] = {}
        for key in map(os.fsencode, os.listxattr(fd)):
            if key == records.XATTR:
                record = records.unpack(os.getxattr(fd, key), found.st_ino)
                if record is None or not record.object or record.flags & records.INCOMPLETE:
                    return None
            elif not key.startswith(records.HIDDEN_PREFIXES):
                xattrs[key] = os.getxattr(fd, key)
        if record is None:
            record = Record(new_id(), 0, 0, 0)
            value = records.pack(record, found.st_ino)
            os.setxattr(fd, records.XATTR, value, os.XATTR_CREATE)
        return Fresh(name, found, record, xattrs, data)
    finally:
        os.close(fd)


def _has_holes(fd: int, size: int) -> bool:
    try:
        return os.lseek(fd, 0, os.SEEK_HOLE) < size
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False  # the file system does not know of any
