"""A peer that answers, but keeps callers waiting for long, is left behind for a while.

A caller's wait of more than `SLOW_S` counts, and is the fault of the peer that answered last. When
such waits make up the time of `slow-peer`, the session is given up, so that the callers go on;
what the peer misses is recorded, and after a back-off the link comes back and the resync carries
it. A peer that is congested again soon is left alone for longer. While strict changes are made
nothing of this happens: they would fail.
"""

from __future__ import annotations

import time
from typing import Final

import trio

from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline

SLOW_S: Final = 1.0
"""A wait that is longer counts; at most a tenth of `slow-peer`."""
_BACK_OFF_MIN_S: Final = 1.0
_BACK_OFF_MAX_S: Final = 600.0
_AGAIN: Final = 5.0
"""Congested again within so many back-offs, the next one is twice as long."""


class Held:
    """How long callers have been held up, of late: a bucket that time without waits empties."""

    def __init__(self, limit_ns: int) -> None:
        self._limit = limit_ns
        self._level = 0
        self._end = 0

    def add(self, began: int, ended: int) -> bool:
        """A caller waited from *began* to *ended*, in ns. Waits at the same time count once.

        True: that is enough; it begins anew.
        """
        self._level = max(0, self._level - max(0, began - self._end))
        self._level += max(0, ended - max(began, self._end))
        self._end = max(self._end, ended)
        if self._level < self._limit:
            return False
        self._level = 0
        return True


class Congestion:
    """Watches the waits for one peer."""

    def __init__(self, pipeline: Pipeline, peer: Peer, slow_peer_s: float) -> None:
        """*slow_peer_s*: seconds of waits that are enough; 0: never."""
        self._pipeline = pipeline
        self._peer = peer
        self._threshold_s = slow_peer_s
        self._held = Held(int(slow_peer_s * 1e9))
        self._full = trio.Event()
        self._back_off_s = max(slow_peer_s, _BACK_OFF_MIN_S)
        self._ended = 0.0
        self.slow_ns = int(min(SLOW_S, slow_peer_s / 10) * 1e9) if slow_peer_s else 1 << 62
        """Waits that are longer are to be told."""
        if slow_peer_s:
            pipeline.slow_ns = self.slow_ns
            peer.waited = self.waited

    def waited(self, began: int, ended: int) -> None:
        """A caller waited for this peer, monotonic ns."""
        if ended - began > self.slow_ns and self._peer.live and self._held.add(began, ended):
            self._full.set()

    async def run(self) -> None:
        """Leave the peer behind when it is too slow, until cancelled."""
        peer = self._peer
        while True:
            await self._full.wait()
            self._full = trio.Event()
            now = time.monotonic()
            if not peer.live or now - self._pipeline.strict_at < self._threshold_s:
                continue
            if now - self._ended < self._back_off_s * _AGAIN and self._ended:
                self._back_off_s = min(self._back_off_s * 2, _BACK_OFF_MAX_S)
            else:
                self._back_off_s = max(self._threshold_s, _BACK_OFF_MIN_S)
            peer.congest(
                f"congested: callers waited for it for {self._threshold_s:g} s; it is tried again "
                f"in {self._back_off_s:g} s"
            )
            with trio.move_on_after(self._back_off_s):
                await peer.wait_hurry()
            peer.end_congestion()
            self._ended = time.monotonic()
