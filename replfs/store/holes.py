"""Where a file has data, and where nothing was ever written."""

from __future__ import annotations

import errno
import os


def segments(fd: int, start: int, stop: int) -> list[tuple[int, int, bool]]:
    """[start, stop) of a file cut into (start, stop, is a hole).

    Source: lseek(2), SEEK_DATA and SEEK_HOLE; where they are not known, all is data.
    """
    found: list[tuple[int, int, bool]] = []
    at = start
    while at < stop:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), stop)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return [(start, stop, False)]
            data = stop
        if data > at:
            found.append((at, data, True))
            at = data
            continue
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), stop)
        found.append((at, hole, False))
        at = hole
    return found
