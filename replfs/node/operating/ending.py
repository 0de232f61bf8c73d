"""How a node ends, and what those who asked it to end are told.

Draining is waiting for what is in flight. A peer that does not answer until the time is over is
cut off: what it did not confirm is recorded, as when its link is lost, and the end is clean all the
same.
Only what cannot be flushed or recorded here makes it unclean; the next start then compares it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final, Protocol

import trio

from replfs.core.relationship import State
from replfs.errors import NotInSync
from replfs.node.replication.peer import Peer
from replfs.node.roles.primary import Primary

log = logging.getLogger(__name__)

DRAIN_S: Final = 60.0
"""How long what is in flight may take, unless whoever ends the node says otherwise."""
_CUT_OFF_S: Final = 10.0
"""How long recording takes what is cut off, at most."""

_TELL_S: Final = 10.0
"""How long umount(2) takes to forget what the kernel knew of the mount, at most."""
_LOOK_S: Final = 0.001


class Ended(Protocol):
    """What is drained and flushed."""

    async def drained(self) -> None:
        """Wait until nothing is in flight."""

    async def flushed(self) -> str:
        """Flush this side, and the peers that are in sync; what was flushed, in words."""

    def cut_off(self) -> None:
        """Wait for no peer any more."""

    def left(self) -> str:
        """What is in flight now, in words."""


class Ending:
    """The end of one node: who asked for it, how long it may take, how it went."""

    def __init__(self) -> None:
        self.wanted = trio.Event()
        self.drain_s = DRAIN_S
        self.is_clean = False
        self.message = "not ended cleanly; the log says why"
        self._over = trio.Event()
        self._asking = 0

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """Somebody is at work who will `ask`: the process does not end under them."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1

    async def ask(self, drain_s: float) -> dict[str, Any]:
        """End the node, and wait until it has ended but for its process.

        Raises:
            NotInSync: it ended, but not cleanly.
        """
        self.drain_s = drain_s
        self.wanted.set()
        with self.asking():
            await self._over.wait()
        if not self.is_clean:
            raise NotInSync(self.message)
        return {"stopping": True, "message": self.message}

    async def drain(self, node: Ended, began: float) -> None:
        """Drain and flush *node*, which has been at it since *began* (monotonic seconds)."""
        until = trio.current_time() + began + self.drain_s - time.monotonic()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._cut_off, node, until)
                with trio.fail_at(until + _CUT_OFF_S):
                    await node.drained()
                    flushed = await node.flushed()
                nursery.cancel_scope.cancel()
        except* trio.TooSlowError:
            self._failed(f"it ended with {node.left()}")
        except* (OSError, NotInSync) as group:
            reasons = ", ".join(map(_reason, group.exceptions))
            self._failed(f"it is drained, but could not be flushed: {reasons}")
        else:
            self.is_clean = True
            self.message = f"drained, {flushed}"
            log.info("%s (%.1f s)", self.message, time.monotonic() - began)

    async def _cut_off(self, node: Ended, until: float) -> None:
        await trio.sleep_until(until)
        log.warning("not drained after %.0f s: %s", self.drain_s, node.left())
        node.cut_off()

    def note(self, save: Callable[[], None]) -> None:
        """If the end is clean, the state is to say so; *save* does that, and may raise OSError."""
        if not self.is_clean:
            return
        try:
            save()
        except OSError as error:
            self._failed(f"it is flushed, but that cannot be noted: {_reason(error)}")

    def _failed(self, what: str) -> None:
        self.is_clean = False
        self.message = f"not ended cleanly: {what}; the next start compares what was in flight"
        log.error("%s", self.message)

    async def tell(self) -> None:
        """Nothing more can go wrong: those who asked get their answer, before this returns."""
        self._over.set()
        with trio.move_on_after(_TELL_S):
            while self._asking:
                await trio.sleep(_LOOK_S)


class EndOfPrimary:
    """A primary as it is drained."""

    def __init__(self, primary: Primary) -> None:
        self._primary = primary

    async def drained(self) -> None:
        """Wait until nothing of an application is in flight."""
        await self._primary.pipeline.drained()

    async def flushed(self) -> str:
        """A checkpoint: peers that are not in sync have no part in it."""
        await self._primary.checkpoint()
        peers = self._primary.pipeline.peers
        lacking = "; ".join(text for text in map(_lacking, peers) if text)
        if lacking:
            return f"this side is flushed; {lacking}: recorded, and carried when both run again"
        return "both sides are flushed" if peers else "flushed"

    def cut_off(self) -> None:
        """What is not answered is recorded."""
        for peer in self._primary.pipeline.peers:
            peer.link.fail("the node ends")

    def left(self) -> str:
        """What is in flight now."""
        pipeline = self._primary.pipeline
        count = max(pipeline.scheduler.in_flight - pipeline.background, pipeline.flights)
        parts = [_many(count, "operation") + " in flight"]
        parts += [
            f"{peer.name} has not answered {waiting}"
            for peer in pipeline.peers
            if (waiting := peer.link.statistics().outstanding)
        ]
        return ", ".join(parts)


class EndOfSecondary:
    """A secondary as it is drained: what it was sent and has not confirmed is its primary's."""

    def __init__(self, flush: Callable[[], Awaitable[None]]) -> None:
        self._flush = flush

    async def drained(self) -> None:
        """There is nothing to wait for."""

    async def flushed(self) -> str:
        """What was applied is on stable storage."""
        await self._flush()
        return "flushed"

    def cut_off(self) -> None:
        """There is nobody."""

    def left(self) -> str:
        """Nothing."""
        return "nothing in flight"


def _reason(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return ", ".join(map(_reason, error.exceptions))
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _lacking(peer: Peer) -> str:
    dirty = peer.log
    parts = []
    if dirty.dirty_files:
        parts.append(_many(dirty.dirty_files, "file"))
    if dirty.dirty_names:
        parts.append(_many(dirty.dirty_names, "name"))
    if not parts and (len(dirty) or peer.state is not State.IN_SYNC or not peer.live):
        parts.append("changes" if len(dirty) else "nothing that is known")
    return f"{peer.name} lacks {' and '.join(parts)}" if parts else ""


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
