"""How many bytes a second something in the background may take."""

from __future__ import annotations

import time
from typing import Final

import trio

_BURST_S: Final = 0.1
"""Seconds' worth of what was not taken that may be taken later at once."""


class Rate:
    """A limit of *bytes_a_second*; 0: none."""

    def __init__(self, bytes_a_second: int) -> None:
        self.limit = bytes_a_second
        self._paid = 0.0

    async def spend(self, count: int) -> None:
        """Take *count* bytes; waits until they may be taken."""
        if not self.limit:
            return
        now = time.monotonic()
        self._paid = max(self._paid, now - _BURST_S) + count / self.limit
        if self._paid > now:
            await trio.sleep(self._paid - now)
