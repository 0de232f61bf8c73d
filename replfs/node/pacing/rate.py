"""How many bytes a second something in the background may take.

Leave is asked for *before* claims are taken: what waits for the claims waits for one transfer,
never for the rate. How much is needed is known only afterwards; the difference is given back.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

import trio

_BURST_S: Final = 0.1
"""Seconds' worth of what was not taken that may be taken later at once."""


class Allowance:
    """Bytes that may be taken now; who takes them counts down `left`, below zero if need be."""

    __slots__ = ("left",)

    def __init__(self, count: int) -> None:
        self.left = count


class Rate:
    """A limit of *bytes_a_second*; 0: none."""

    def __init__(self, bytes_a_second: int) -> None:
        self.limit = bytes_a_second
        self._paid_at = 0.0
        """When all that was taken is paid for, monotonic seconds."""
        self._queue = trio.Lock()
        self._given_back = trio.Event()

    async def spend(self, count: int) -> None:
        """Take *count* bytes, as soon as all that was taken before is paid for."""
        if not self.limit:
            return
        async with self._queue:
            while (debt_s := self._paid_at - time.monotonic()) > 0:
                with trio.move_on_after(debt_s):
                    await self._given_back.wait()
            self._take(count)

    @asynccontextmanager
    async def allowance(self, count: int, *, at_once: bool = False) -> AsyncIterator[Allowance]:
        """Take *count* bytes for the block; what it leaves of them is given back.

        *at_once*: without waiting; others pay for it.
        """
        if at_once:
            self._take(count)
        else:
            await self.spend(count)
        allowance = Allowance(count)
        try:
            yield allowance
        finally:
            self._take(-allowance.left)

    def _take(self, count: int) -> None:
        if not self.limit:
            return
        self._paid_at = max(self._paid_at, time.monotonic() - _BURST_S) + count / self.limit
        if count < 0:
            self._given_back.set()
            self._given_back = trio.Event()
