"""A replica's state before a resync, kept as a snapshot until the resync has ended.

From the first step of a resync to its end a replica is neither what it was nor what it will be.
Where its store can make snapshots, what it was can still be had.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from replfs.store.snapshots import BEFORE_RESYNC, Live, Snapshots

log = logging.getLogger(__name__)


class Keeper:
    """Keeps and releases the snapshot of one secondary's store."""

    def __init__(self, snapshots: Snapshots, is_inconsistent: Callable[[], bool]) -> None:
        self.provider = snapshots.provider
        self.can_keep = not isinstance(snapshots, Live)
        """Whether this store has snapshots at all."""
        self._snapshots = snapshots
        self._is_inconsistent = is_inconsistent
        self.place = snapshots.place(BEFORE_RESYNC)
        """Where the state before the resync is, below STORE; None: it was not kept.

        An attribute, because the status is told while STORE hangs, too.
        """
        self._turn = trio.Lock()
        self._released = trio.Event()

    async def keep(self) -> None:
        """Before the data becomes inconsistent. Data that already is has its snapshot, or none."""
        async with self._turn:
            if self._is_inconsistent():
                return
            try:
                await trio.to_thread.run_sync(self._snapshots.drop, BEFORE_RESYNC)
                await trio.to_thread.run_sync(self._snapshots.take, BEFORE_RESYNC)
                self.place = self._snapshots.place(BEFORE_RESYNC)
            except OSError as error:
                self.place = None
                log.warning("the state before the resync is not kept: %s", error.strerror)

    def release(self) -> None:
        """The data is consistent again, durably."""
        self._released.set()

    async def run(self) -> None:
        """Remove what was released, until cancelled."""
        if not self.can_keep:
            return
        while True:
            await self._released.wait()
            self._released = trio.Event()
            async with self._turn:
                if self._is_inconsistent():
                    continue
                try:
                    await trio.to_thread.run_sync(self._snapshots.drop, BEFORE_RESYNC)
                    self.place = None
                except OSError as error:
                    log.warning("the state before the resync is still there: %s", error.strerror)
