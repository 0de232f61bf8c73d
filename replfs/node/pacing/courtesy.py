"""What is in the background gives way to applications.

A resync shares the event loop of both nodes with the operations of applications, which wait for
whatever is being done there. So while applications are at work it does little at a time: few
messages on their way at once, small ones, a pause after each, and no long turn of the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

import trio

TASKS: Final = 8
"""Items worked on at a time while nobody else is at work."""
_BUSY_NS: Final = 100_000_000
"""An application that did something so long ago is still at work."""
_ACTIVE_NS: Final = 2_000_000
"""So long ago: it is about to do the next thing."""
_REST_S: Final = 0.001
_SLICE_NS: Final = 300_000
_ROUND_TRIP_NS: Final = 1_000_000
"""Round trips that are longer need more items on their way, and leave the loop more time."""


class Applications:
    """What they are doing; kept by the pipeline."""

    def __init__(self, waiting: Callable[[], int]) -> None:
        """*waiting*: how many operations await a peer's answer."""
        self._waiting = waiting
        self.last_ns = 0
        """When an operation ended last, monotonic nanoseconds."""

    @property
    def are_busy(self) -> bool:
        """Whether they are at work."""
        return self._waiting() > 0 or time.monotonic_ns() - self.last_ns < _BUSY_NS

    async def give_way(self) -> None:
        """Leave the loop to them for a moment, where they need it. Nothing may be claimed."""
        if self._waiting() or time.monotonic_ns() - self.last_ns < _ACTIVE_NS:
            await trio.sleep(_REST_S)


class Slice:
    """One task's share of a turn of the event loop."""

    def __init__(self) -> None:
        self._end = time.monotonic_ns() + _SLICE_NS

    async def breathe(self) -> None:
        """Let others run, if this task has run for 0.3 ms."""
        if time.monotonic_ns() >= self._end:
            await trio.lowlevel.checkpoint()
            self._end = time.monotonic_ns() + _SLICE_NS


class Turns:
    """Lets few work at a time: `TASKS`, or as few as keep the link busy while applications work."""

    def __init__(self, applications: Applications, rtt_ns: int, haste: int = 0) -> None:
        """*rtt_ns*: the link's round trip, nanoseconds. *haste*: so many more all the same."""
        self._applications = applications
        self._few = min(TASKS, 1 + rtt_ns // _ROUND_TRIP_NS + haste)
        self._running = 0
        self._waiting = trio.lowlevel.ParkingLot()

    async def acquire(self) -> None:
        """Wait for a turn."""
        while self._running >= (self._few if self._applications.are_busy else TASKS):
            await self._waiting.park()
        self._running += 1

    def release(self) -> None:
        """Give it back."""
        self._running -= 1
        self._waiting.unpark()
