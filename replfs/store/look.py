"""Looking at many objects of a directory in one go, and telling by a digest whether two are equal.

For a thread: nothing here knows of the tree or of what is known of an object, all of it is read by
one descriptor of the directory. So what is seen may be changed already when it is told. Whoever
compares must know why that does no harm.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
import struct
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from xxhash import xxh3_128_digest

from replfs.store import record as records
from replfs.store.inode import proc_path
from replfs.store.record import PRIVILEGED, Record

DIGEST_SIZE: Final = 16
CONTENTS_MAX: Final = 1 << 20
"""Bytes: a larger file has no digest."""
SMALL_DIRECTORY: Final = 256 << 10
"""Bytes: the names in a larger one are read in a thread."""
_READ_MAX: Final = 16 << 20
_SECONDS_MAX: Final = 0.5
"""After so many bytes, or seconds, of one look the rest is left to the next one."""
_ATTRIBUTES: Final = struct.Struct("<IIIQQBB")
_U64_MAX: Final = (1 << 64) - 1
_LENGTHS: Final = struct.Struct("<II")
_FLAGS: Final = (
    os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOATIME
)
_NO_RECORD: Final = Record(b"", 0, 0, 0)


class Seen(NamedTuple):
    """What stands at a name."""

    name: bytes
    found: os.stat_result
    record: Record
    """Without an id where it has no record of its own, and for a directory."""
    digest: bytes
    """Of attributes, extended attributes, and contents or target; empty where there is none."""


def look(directory: int, names: Sequence[bytes], *, digests: bool) -> tuple[dict[bytes, Seen], int]:
    """What stands at *names*, and how many of them were looked at: at least one, if there is one.

    With *digests*, a file has one that is not too large and has no holes, and a symlink, if it has
    a record: where two are equal, so are the objects.

    Raises:
        OSError: something cannot be read.
    """
    seen: dict[bytes, Seen] = {}
    until = time.monotonic() + _SECONDS_MAX
    device = os.fstat(directory).st_dev
    read = 0
    for count, name in enumerate(names, 1):
        try:
            one = _look_at(directory, name, device, digests=digests)
        except FileNotFoundError:
            continue
        seen[name] = one
        if one.digest:
            read += one.found.st_size
        if read > _READ_MAX or time.monotonic() > until:
            return seen, count
    return seen, len(names)


def sorted_names(directory: int, hidden: bytes = b"") -> list[bytes]:
    """All names in a directory but *hidden*, in byte order. Raises OSError."""
    return sorted(name for name in map(os.fsencode, os.listdir(directory)) if name != hidden)


class Whole(NamedTuple):
    """All there is to an object."""

    found: os.stat_result
    xattrs: dict[bytes, bytes]
    contents: bytes
    """Of a file; of a symlink, its target."""


def read_whole(
    directory: int, wanted: Sequence[tuple[bytes, int]], limit: int
) -> dict[bytes, Whole]:
    """Files, symlinks and directories, (name, inode number), that nobody changes meanwhile.

    What has holes or other names, or is another object, is left out; so is what would bring all
    contents to more than *limit* bytes, or all extended attributes.
    """
    found: dict[bytes, Whole] = {}
    left = xattrs_left = limit
    for name, ino in wanted:
        try:
            one = _read_one(directory, name, ino, left)
        except OSError:
            continue  # why it cannot be read is found out where it is read alone
        if one is None:
            continue
        xattrs = sum(len(key) + len(value) for key, value in one.xattrs.items())
        if xattrs > xattrs_left:
            continue
        xattrs_left -= xattrs
        if _stat.S_ISREG(one.found.st_mode):
            left -= len(one.contents)
        found[name] = one
    return found


def _read_one(directory: int, name: bytes, ino: int, limit: int) -> Whole | None:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if found.st_ino != ino:
        return None
    if _stat.S_ISDIR(found.st_mode):
        return Whole(found, dict(_xattrs(proc_path(directory, name), follow=False)), b"")
    if found.st_nlink != 1:
        return None
    if _stat.S_ISLNK(found.st_mode):
        xattrs = _xattrs(proc_path(directory, name), follow=False)
        return Whole(found, dict(xattrs), os.readlink(name, dir_fd=directory))
    if not _stat.S_ISREG(found.st_mode) or found.st_size > limit:
        return None
    fd = os.open(name, _FLAGS, dir_fd=directory)
    try:
        contents = _contents(fd, found.st_size)
        return None if contents is None else Whole(found, dict(_xattrs(fd, follow=True)), contents)
    finally:
        os.close(fd)


def directory_digest(fd: int, record: Record) -> bytes:
    """Of a directory's own attributes. Raises OSError."""
    found = os.fstat(fd)
    return _digest(found, 0, record, _xattrs(fd, follow=True), b"")


def _look_at(directory: int, name: bytes, device: int, *, digests: bool) -> Seen:
    found = os.stat(name, dir_fd=directory, follow_symlinks=False)
    if _stat.S_ISDIR(found.st_mode) or found.st_dev != device:
        return Seen(name, found, _NO_RECORD, b"")
    if digests and PRIVILEGED and _stat.S_ISREG(found.st_mode) and found.st_size <= CONTENTS_MAX:
        return _look_into(directory, name, found)
    path = proc_path(directory, name)
    record = _read_record(path, found.st_ino, follow=False)
    digest = b""
    if digests and record.object and _stat.S_ISLNK(found.st_mode):
        target = os.readlink(name, dir_fd=directory)
        digest = _digest(found, 0, record, _xattrs(path, follow=False), target)
    return Seen(name, found, record, digest)


def _look_into(directory: int, name: bytes, found: os.stat_result) -> Seen:
    """A file: by a descriptor, so that all of it is the same one's."""
    try:
        fd = os.open(name, _FLAGS, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise
        record = _read_record(proc_path(directory, name), found.st_ino, follow=False)
        return Seen(name, found, record, b"")
    try:
        found = os.fstat(fd)
        record = _read_record(fd, found.st_ino, follow=True)
        digest = b""
        if record.object and _stat.S_ISREG(found.st_mode):
            contents = _contents(fd, found.st_size)
            if contents is not None:
                digest = _digest(found, found.st_size, record, _xattrs(fd, follow=True), contents)
        return Seen(name, found, record, digest)
    finally:
        os.close(fd)


def _contents(fd: int, size: int) -> bytes | None:
    """All data of a file; None where it has holes, is too large, or was changed meanwhile."""
    if size > CONTENTS_MAX:
        return None
    if not size:
        return b""
    try:
        if os.lseek(fd, 0, os.SEEK_HOLE) < size:
            return None
    except OSError as error:
        if error.errno != errno.EINVAL:  # the file system does not know: there are none
            return None
    data = os.pread(fd, size + 1, 0)
    return data if len(data) == size else None


def _read_record(path: bytes | int, ino: int, *, follow: bool) -> Record:
    try:
        value = os.getxattr(path, records.XATTR, follow_symlinks=follow)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.EACCES, errno.EPERM}:
            return _NO_RECORD
        raise
    return records.unpack(value, ino) or _NO_RECORD


def _xattrs(path: bytes | int, *, follow: bool) -> list[tuple[bytes, bytes]]:
    found = []
    for name in map(os.fsencode, os.listxattr(path, follow_symlinks=follow)):
        if name.startswith(records.HIDDEN_PREFIXES):
            continue
        try:
            found.append((name, os.getxattr(path, name, follow_symlinks=follow)))
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    return sorted(found)


def _digest(
    found: os.stat_result,
    size: int,
    record: Record,
    xattrs: list[tuple[bytes, bytes]],
    contents: bytes,
) -> bytes:
    parts = [
        _ATTRIBUTES.pack(
            found.st_mode, found.st_uid, found.st_gid, size, found.st_mtime_ns & _U64_MAX,
            record.policy, record.ack,
        ),
        xxh3_128_digest(contents),
    ]  # fmt: skip
    for name, value in xattrs:
        parts += (_LENGTHS.pack(len(name), len(value)), name, value)
    return xxh3_128_digest(b"".join(parts))
