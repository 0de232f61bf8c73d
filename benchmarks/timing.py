"""Timed loops. How long one goes on is bounded by time, so that a slow target costs no more."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Timed:
    """Operations done one after another."""

    latencies_s: list[float]
    """Of each, at least one."""

    @property
    def count(self) -> int:
        """How many operations were done."""
        return len(self.latencies_s)

    @property
    def rate(self) -> float:
        """Operations a second."""
        return self.count / sum(self.latencies_s)

    def percentile_us(self, percent: float) -> float:
        """The latency that so many percent do not exceed, in microseconds."""
        ordered = sorted(self.latencies_s)
        return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))] * 1e6


def repeat(action: Callable[[int], object], most: int, seconds: float) -> Timed:
    """Call *action* with 0, 1, ... *most* times, or until *seconds* have passed."""
    clock = time.perf_counter
    stamps = [clock()]
    end = stamps[0] + seconds
    for index in range(most):
        action(index)
        stamps.append(clock())
        if stamps[-1] > end:
            break
    return Timed([after - before for before, after in itertools.pairwise(stamps)])


def once(action: Callable[[], object]) -> float:
    """How long it takes, in seconds."""
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def as_a_child() -> None:
    """A process forked for measuring ends with a signal, and only by its parent's."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def together(work: Callable[..., Timed], arguments: list[tuple[Any, ...]]) -> float:
    """Call *work* in a process for each of *arguments* at the same time; the sum of their rates."""
    with multiprocessing.get_context("fork").Pool(len(arguments), as_a_child) as pool:
        return sum(timed.rate for timed in pool.starmap(work, arguments, chunksize=1))
