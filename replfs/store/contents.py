"""Contents of a file: written whole, set with their time, digested, read with holes told apart."""

from __future__ import annotations

import errno
import os
from typing import Final

import xxhash

from replfs.core import ops
from replfs.store import syscalls
from replfs.store.holes import segments

PIECE: Final = 256 << 10
"""Bytes written with one call.

Relies on: the page cache holds what one call wrote in folios of up to that size (ext4 since Linux
6.16, XFS). One of 1 MiB may take memory that was not used for long, or never: on a virtual machine
ten times as long as the copy. A small write later looks at all blocks of the folio it falls into.
"""


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """pwrite all of *data*; fewer bytes only where the disk takes no more, never an error then.

    Raises:
        OSError: nothing was written.
    """
    size = len(data)
    written = os.pwrite(fd, data if size <= PIECE else memoryview(data)[:PIECE], offset)
    while written < size:
        try:
            more = os.pwrite(fd, memoryview(data)[written : written + PIECE], offset + written)
        except OSError:
            return written
        if not more:
            break
        written += more
    return written


def put(fd: int, data: bytes | memoryview, offset: int, mtime: int) -> ops.Done:
    """Write *data*, and set the mtime (ns): what a write is, here and on every peer.

    What became of it: errno 0, and how much was written; or the errno of a write of which nothing
    was, but that the mtime is *mtime* all the same; or EIO, and nobody knows.
    """
    failed = written = 0
    try:
        written = write_all(fd, data, offset)
    except OSError as error:
        # The kernel changes the mtime before it looks for room.
        failed = error.errno or errno.EIO
    return _timed(fd, mtime, ops.Done(failed, written))


def resize(fd: int, size: int, mtime: int) -> ops.Done:
    """Set the size, and the mtime (ns): what a truncation is, and what became of it, as `put`."""
    failed = 0
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        failed = error.errno or errno.EIO
    return _timed(fd, mtime, ops.Done(failed))


def _timed(fd: int, mtime: int, done: ops.Done) -> ops.Done:
    try:
        syscalls.utimens(fd, None, mtime)
    except OSError:
        return ops.Done(errno.EIO, done.written)
    return done


def digest_regions(fd: int, start: int, count: int, size: int) -> bytes:
    """xxh3_128 of each of *count* regions of *size* bytes from *start*; the last may be short."""
    return b"".join(
        xxhash.xxh3_128_digest(os.pread(fd, size, start + index * size)) for index in range(count)
    )


def read_range(fd: int, offset: int, length: int) -> ops.Fetched:
    """Up to *length* bytes from *offset*, the holes among them told apart."""
    size = os.fstat(fd).st_size
    parts = []
    holes = []
    for start, stop, is_hole in segments(fd, offset, min(offset + length, size)):
        if is_hole:
            holes.append((start, stop))
        else:
            parts.append(os.pread(fd, stop - start, start))
    return ops.Fetched(b"".join(parts), holes, size)
