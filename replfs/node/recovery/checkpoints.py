"""Common checkpoints: both sides flush, and then both know what a power loss cannot take.

A checkpoint is an operation in the live stream: what comes before it is what the peer flushes, and
this side flushes at the same time, in threads. Applications go on. When all have flushed and the
marks are on stable storage, what was unstable before is forgotten on both sides (`core.unstable`);
a peer that is not in sync all the while goes on remembering, because its data also comes over the
bulk stream, which has an order of its own.

Every `checkpoint-interval` while something is unstable, and when applications rest; a barrier
(`fsync` of the root, `replfs sync`, the end of a node) takes one at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from replfs.core import ops
from replfs.core.messages import LIVE
from replfs.core.relationship import State
from replfs.errors import PeerLost
from replfs.node.pacing.commit import GroupCommit
from replfs.node.replication import summaries
from replfs.node.replication.flight import describe
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.transport.link import Link

log = logging.getLogger(__name__)

_REST_S: Final = 0.5
"""Applications rest if they have not begun anything for as long as this."""


class _Flush:
    """One peer's part in a checkpoint."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self.number = errno.ETIMEDOUT
        """The peer's errno; ETIMEDOUT if the session ended before its answer."""
        self.done = trio.Event()
        self._changes = peer.changes if peer.state is State.IN_SYNC else -1

    def answered(self, link: Link, answer: ops.AnyAnswer) -> None:
        """It has flushed, or could not."""
        del link
        self.number = answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
        self.done.set()

    def lost(self, link: Link) -> None:
        """It is gone."""
        del link
        self.done.set()

    @property
    def is_common(self) -> bool:
        """The peer was in sync all the while, and has flushed."""
        return not self.number and self.peer.live and self.peer.changes == self._changes


class Checkpoints:
    """The common checkpoints of one primary. `take` is a barrier; `run` takes them at times."""

    def __init__(
        self,
        pipeline: Pipeline,
        interval_s: float,
        make_durable: Callable[[], Awaitable[None]],
        on_taken: Callable[[int], None],
    ) -> None:
        """*make_durable* hardens marks and generation.

        *on_taken* is called before that, with the time in ns when what is stable now was begun.
        """
        self._pipeline = pipeline
        self._interval_s = interval_s
        self._make_durable = make_durable
        self._on_taken = on_taken
        self.take = GroupCommit(self._take)
        """Everything acknowledged so far is stable, here and on all peers in sync. Raises OSError
        where it cannot be flushed here, and ever after: see `Unwritten`."""
        self.count = 0
        self._taken_at = -1
        """Operations begun before the last one."""

    async def run(self) -> None:
        """Take them at times, until cancelled."""
        last = trio.current_time()
        seen = -1
        while True:
            await trio.sleep(min(_REST_S, self._interval_s))
            admitted = self._pipeline.scheduler.admitted
            rests = admitted == seen
            seen = admitted
            if not self._is_wanted() or not (
                rests or trio.current_time() - last >= self._interval_s
            ):
                continue
            try:
                await self.take()
            except OSError as error:
                log.warning("no checkpoint: %s", error.strerror)
                await trio.sleep(self._interval_s)
            last = trio.current_time()

    def _is_wanted(self) -> bool:
        peers = self._pipeline.peers
        if not peers:
            return False
        if self._pipeline.scheduler.admitted != self._taken_at:
            return True
        return any(map(_lacks_checkpoint, peers))

    async def _take(self) -> None:
        pipeline = self._pipeline
        for peer in pipeline.peers:
            if peer.live and not peer.link.has_room():
                await peer.wait_room()
        # From here to the flush nothing is awaited: what was applied before is flushed on all.
        began = time.time_ns()
        admitted = pipeline.scheduler.admitted
        everyone = pipeline.peers
        flushes = [flush for peer in everyone if (flush := _ask(peer, pipeline)) is not None]
        absent = [peer for peer in everyone if not peer.live]
        with contextlib.suppress(OSError):  # it is remembered there
            await pipeline.unwritten.flush(pipeline.tree.root_fd)
        for flush in flushes:
            await flush.done.wait()
        if failure := pipeline.unwritten.number:
            self._settle(flushes, everyone)
            raise OSError(failure, os.strerror(failure))
        for peer in absent:
            if not peer.live:
                peer.set_apart()
        self._on_taken(began)
        await self._make_durable()
        self._settle(flushes, everyone)
        self._taken_at = admitted
        self.count += 1

    def _settle(self, flushes: list[_Flush], everyone: list[Peer]) -> None:
        everywhere = len(flushes) == len(everyone) and all(one.is_common for one in flushes)
        for flush in flushes:
            peer = flush.peer
            if not flush.number:
                if self._pipeline.unwritten.number:
                    continue  # it is on one disk only: what is lost here is to be had there
                if flush.is_common:
                    peer.tell(ops.Stable(everywhere))
                peer.unstable.settle(everywhere=True)
            elif flush.number != errno.ETIMEDOUT:
                peer.flush_failed(describe(flush.number))


def _lacks_checkpoint(peer: Peer) -> bool:
    if not peer.live:
        return not peer.apart
    # One taken before the peer was in sync was none for the peer.
    told = peer.knows_stable or peer.state is not State.IN_SYNC
    return not (told and peer.unstable.is_empty)


def _ask(peer: Peer, pipeline: Pipeline) -> _Flush | None:
    flush = _Flush(peer)
    if not peer.live:
        return None
    try:
        # Before what it covers is forgotten: where the two disagree, that is compared.
        summaries.begin(peer, LIVE, pipeline.changes)
    except PeerLost:
        return None
    generation = pipeline.policies.generation()
    return flush if peer.begin_checkpoint(ops.Checkpoint(generation), flush) else None
