"""Waiting without sleeping, as long as it pays.

Waking an idle core costs tens of microseconds, more than half of a round trip on loopback. So
whoever expects something within that time looks for it again and again. Between two looks it
yields: the answer may need this core.

It pays only while what is waited for comes soon and nobody else wants the core. Relies on: Linux
6.18 and later take the rest of its turn from a task that yields, so that beside a busy process
each yield may cost milliseconds, where a task that sleeps is woken at once.
"""

from __future__ import annotations

import os
import time
from typing import Final

MISSES_MAX: Final = 16
"""Vain waits in a row after which it sleeps at once, until something has come soon again."""
CONTENDED_NS: Final = 250_000
"""A yield that took longer was to somebody who needs the core."""
REST_NS: Final = 20_000_000
"""How long it then sleeps instead."""


class Spin:
    """One waiter's judgement. Neither shared nor thread-safe.

        if spin.begin():
            while not there():
                if not spin.go_on():
                    break
            else:
                spin.paid()

    Args:
        limit_ns: how long one wait may take; 0: none is ever begun.
    """

    __slots__ = ("_end", "_misses", "_rests_until", "limit_ns")

    def __init__(self, limit_ns: int) -> None:
        # With a single core the one that is waited for could not run meanwhile.
        self.limit_ns = limit_ns if len(os.sched_getaffinity(0)) > 1 else 0
        self._misses = 0
        self._end = 0
        self._rests_until = 0

    def begin(self) -> bool:
        """Whether to wait without sleeping now."""
        if self._misses >= MISSES_MAX or not self.limit_ns:
            return False
        now = time.monotonic_ns()
        self._end = now + self.limit_ns
        return now >= self._rests_until

    def go_on(self) -> bool:
        """Yield the core; whether to look again."""
        before = time.monotonic_ns()
        if before >= self._end:
            self._misses += 1
            return False
        os.sched_yield()
        after = time.monotonic_ns()
        if after - before > CONTENDED_NS:
            self._rests_until = after + REST_NS
        return True

    def paid(self) -> None:
        """What was waited for has come."""
        self._misses = 0

    def slept(self, duration_ns: int) -> None:
        """It slept instead, and what it waited for came after *duration_ns*."""
        if duration_ns < self.limit_ns:
            self._misses = 0
