"""Ranges of a file: written whole, digested, and read with the holes told apart."""

from __future__ import annotations

import os
from typing import Final

import xxhash

from replfs.core import ops
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
