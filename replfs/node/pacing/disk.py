"""Waiting for the disk in the event loop, as long as it is a quick one.

A thread that waits instead has to be woken, and to wake the loop, which costs more than a small
read from a solid-state disk takes. A disk that turns, or is busy, keeps everybody waiting.
"""

from __future__ import annotations

import time
from typing import Final

SMALL: Final = 64 << 10
"""Bytes up to which a read is worth it: of a larger one the disk's own time is the most."""
SLOW_NS: Final = 500_000
"""A wait that took longer was too long."""
REST: Final = 200
"""How much longer it takes to make up for one: half a percent of the time may be lost."""
LOST_NS: Final = 5_000_000
"""So much may be lost before that is made up for: any disk is slow now and then. More would be seen
by whoever writes meanwhile."""


class Disk:
    """One store's disk, as it has been of late."""

    def __init__(self) -> None:
        self._paid_at = 0
        """When all that was lost is made up for, monotonic ns."""

    def is_quick(self) -> bool:
        """Whether to wait for it in the event loop now."""
        return self._paid_at - time.monotonic_ns() <= LOST_NS * REST

    def took(self, began: int) -> None:
        """A wait for it, which began then (monotonic ns), is over."""
        ended = time.monotonic_ns()
        lost = ended - began
        if lost > SLOW_NS:
            self._paid_at = max(self._paid_at, ended) + lost * REST
