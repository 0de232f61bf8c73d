"""Waiting for the disk in the event loop, as long as it is a quick one.

A thread that waits instead has to be woken, and to wake the loop, which costs more than a small
read from a solid-state disk takes. A disk that turns, or is busy, keeps everybody waiting.
"""

from __future__ import annotations

import time
from typing import Final

SMALL: Final = 16 << 10
"""Bytes up to which a read is worth it: of a larger one the disk's own time is the most."""
SLOW_NS: Final = 500_000
"""A wait that took longer was too long."""
_REST: Final = 200
"""For so many times as long nobody waits in the loop then: half a percent of the time is lost."""


class Disk:
    """One store's disk, as it has been of late."""

    def __init__(self) -> None:
        self._slow_until = 0

    def is_quick(self) -> bool:
        """Whether to wait for it in the event loop now."""
        return time.monotonic_ns() >= self._slow_until

    def took(self, began: int) -> None:
        """A wait for it, which began then (monotonic ns), is over."""
        ended = time.monotonic_ns()
        if ended - began > SLOW_NS:
            self._slow_until = ended + _REST * (ended - began)
