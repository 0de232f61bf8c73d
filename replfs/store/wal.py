"""What a killed process leaves as the log of its database, and what it cannot have left.

SQLite takes a log up to the first frame that is not right, and what comes after it for the rest of
an earlier use. That is so after a kill or a loss of power. But marks are what is in it: where the
machine has not lost power, nothing that was committed may be missing.

Source: https://www.sqlite.org/fileformat2.html, "The Write-Ahead Log".
"""

from __future__ import annotations

import array
import os
import struct
import sys
from typing import Final

_HEADER: Final = struct.Struct(">4I8s2I")
"""Magic, format, page size, sequence number, salts, checksums."""
_FRAME: Final = struct.Struct(">2I8s2I")
"""Page number, size of the database after a commit (else 0), salts, checksums."""
_MAGIC: Final = 0x377F0682
_MASK: Final = 0xFFFFFFFF
_SUMMED: Final = 8
"""Bytes of a frame's head that its checksum covers."""


def _sum(data: bytes, one: int, two: int, *, big: bool) -> tuple[int, int]:
    words = array.array("I", data)
    if big != (sys.byteorder == "big"):
        words.byteswap()
    values = iter(words)
    for first, second in zip(values, values, strict=True):
        one = (one + first + two) & _MASK
        two = (two + second + one) & _MASK
    return one, two


def problem(fd: int, size_min: int = 0) -> str:
    """Why the log open on *fd* is not what a process leaves that was killed; empty: it may be.

    It had committed something, and the log was *size_min* bytes long when it had done so last.
    Reads all of it: 4,000 frames take a quarter of a second.
    """
    size = os.fstat(fd).st_size
    head = os.pread(fd, _HEADER.size, 0)
    if len(head) < _HEADER.size:
        return "its log, state.db-wal, is missing or empty"
    magic, _, page, _, salts, *sums = _HEADER.unpack(head)
    big = bool(magic & 1)
    if magic & ~1 != _MAGIC or list(_sum(head[:24], 0, 0, big=big)) != sums:
        return "its log, state.db-wal, is not one"
    step = _FRAME.size + page
    if (size - _HEADER.size) % step not in {0, _FRAME.size} or size < size_min:
        return "its log, state.db-wal, is cut short"
    at = _HEADER.size
    one, two = sums
    while at + step <= size:
        frame = os.pread(fd, step, at)
        _, _, own, *found = _FRAME.unpack_from(frame)
        if own != salts:
            break
        one, two = _sum(frame[:_SUMMED], one, two, big=big)
        one, two = _sum(frame[_FRAME.size :], one, two, big=big)
        if [one, two] != found:
            break
        at += step
    # The next one may be half written. Whatever is behind it was there before, in an earlier use.
    while (at := at + step) + step <= size:
        _, commits, own, *_ = _FRAME.unpack(os.pread(fd, _FRAME.size, at))
        if own == salts and commits:
            return "its log, state.db-wal, is damaged"
    return ""
