"""Emptying a peer's dirty region log, while applications go on.

Everything a peer may lack is in its log: a baseline is the mark "every name in the root is
unknown", a changed region a mark on that region. So there is one machine for the first time and
for every interruption:

1. *expand*: a directory of which everything is unknown is listed on both sides, and each name that
   may differ is marked. A few directories at a time, so that memory is bounded by them.
2. *gather*: what stands under a dirty name on the peer and is not wanted there goes to limbo.
3. *place*: under each dirty name the peer gets the object that is there here: out of limbo, by a
   link, adopted as it stands, or new. Parents first. This moves a renamed tree in one step. Small
   new files go together, many of a directory with one message. In a baseline, directories that
   are empty there are *filled*: nothing is marked in them but what cannot go so.
4. *data*: dirty regions are sent; where the peer may have them already, only those whose digests
   differ.
5. *finish*: attributes, extended attributes and size, exactly.

Names are compared, never replayed: the steps converge from any state of the peer, and can be
interrupted anywhere. What a step works on it claims like any other operation, so an application
waits for at most one region's transfer; and a mark is cleared only after the peer's answer, and
only if nothing marked it again meanwhile.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Final, TypeVar

import trio

from replfs.core import ops
from replfs.core.relationship import Event, State
from replfs.errors import PeerLost, ProtocolError
from replfs.node.asking import suspects
from replfs.node.pacing.courtesy import Turns
from replfs.node.pacing.rate import Rate
from replfs.node.replication import summaries
from replfs.node.replication.flight import describe
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.resync.batch import Batches
from replfs.node.resync.contents import Contents
from replfs.node.resync.fill import Filling, can_fill
from replfs.node.resync.names import Names
from replfs.node.resync.source import Source
from replfs.node.resync.work import RETRY_MAX_S, RETRY_MIN_S, Progress, Work
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.snapshots import Live, Snapshots

log = logging.getLogger(__name__)

_REST_S: Final = 0.02
_URGENT_RETRY_S: Final = 0.02
_SETTLE_S: Final = 0.5

T = TypeVar("T")


class Resync:
    """The resync of one peer."""

    def __init__(
        self,
        pipeline: Pipeline,
        peer: Peer,
        rate_bytes: int = 0,
        snapshots: Snapshots | None = None,
    ) -> None:
        """*rate_bytes*: payload bytes a second at most; 0: as fast as it goes."""
        self._source = Source(pipeline.tree, snapshots or Live(), peer.name)
        self.work = Work(pipeline, peer, self._source)
        self._tree = pipeline.tree
        self._peer = peer
        self._log = peer.log
        rate = Rate(rate_bytes)
        self._names = Names(self.work, rate, partial(can_fill, self.work))
        self._contents = Contents(self.work, self._names, rate)
        self._filling = Filling(self.work, self._names, rate, self._contents.finish_held)
        self._batches = Batches(self.work, self._names, rate)
        self._passing = False
        """The peer knows that a resync is going on, so that it may be sent anything of it."""

    async def run(self) -> None:
        """Resync whenever there is something to, until cancelled."""
        await self._source.end()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._serve_urgent)
                nursery.start_soon(self._settle_at_times)
                await self._serve()
        finally:
            self._names.forget()

    async def _serve(self) -> None:
        peer = self._peer
        while True:
            await peer.wait_work()
            while peer.live and not (self._log.is_empty and peer.state is State.IN_SYNC):
                try:
                    if peer.state is State.BASELINE:
                        await self._baseline()
                    else:
                        await self._resync()
                except PeerLost:
                    # Or the peer is there, but could not do something: once more.
                    await trio.lowlevel.checkpoint()
                except OSError as error:
                    log.warning("peer %s: the resync starts again: %s", peer.name, error)
                    await trio.sleep(RETRY_MIN_S)

    async def _settle_at_times(self) -> None:
        """What was carried is sent live from when the disk here says that the peer has it."""
        while True:
            await trio.sleep(_SETTLE_S)
            if not self._peer.settling.is_empty:
                await self.work.settle()

    async def _baseline(self) -> None:
        await self._source.begin()
        try:
            await self._resync()
        finally:
            await self._source.end()

    async def _resync(self) -> None:
        """One run, from the first mark to in sync."""
        peer = self._peer
        self.work.progress = Progress()
        self.work.stuck.clear()
        peer.advance(Event.STARTED)
        await self._begin()
        if not peer.is_asked:
            suspicion = await suspects.ask(peer.ask, everywhere=True)
            is_known = suspects.mark(self._tree, self._log, suspicion)
            log.info(
                "peer %s: what it has on its own is %s",
                peer.name,
                "known" if is_known else "not known: everything is compared",
            )
            peer.asked()
        while True:
            if peer.unflushed:
                # What it is brought stands for what its disk failed to write only where that is
                # what a resync brings that began later.
                await self._begin()
            if peer.unrecorded:
                self._log.mark_unknown(ROOT_ID, directory=True, deep=True)
                peer.unrecorded = False
            self._passing = True
            try:
                while not self._log.is_empty:
                    peer.wake_urgent()
                    await self._pass()
            finally:
                self._passing = False
            peer.check_told()
            while not await self._tell(ops.EmptyLimbo(), again=errno.EAGAIN):
                pass
            peer.diverged = False
            await peer.align(lambda: self.work.pipeline.changes)
            lineage = peer.home.lineage()
            # It may have it from here on, whether that is confirmed or not: that, and the
            # generation, must not be forgotten here. This store would look outdated after a loss
            # of power, or begin no other generation before what the peer does not get.
            peer.home.may_have(peer, lineage.generation)
            await peer.home.make_durable()
            if self._lacks_something() or peer.diverged:
                # It failed to apply a change meanwhile, or was not sent one, which it then does not
                # count. Told now that it has everything, it would pass for a whole replica of a
                # generation of which it lacks something.
                continue
            await self._tell(ops.Phase(False, *lineage))
            if self._lacks_something() or lineage != peer.home.lineage():
                continue
            agrees = await summaries.agree(peer, lambda: self.work.pipeline.changes)
            if agrees and not self._lacks_something() and lineage == peer.home.lineage():
                break
        self._names.forget()
        peer.advance(Event.LOG_EMPTY_CONFIRMED)
        # A loss of power must not forget who has what only memory has here.
        await peer.home.make_durable()
        peer.progressed()

    async def _begin(self) -> None:
        """Tell the peer that it is being brought something, until the end is told."""
        peer = self._peer
        lineage = peer.home.lineage()
        # As at the end: the peer follows it from here on, and would refuse an earlier one.
        await peer.home.make_durable()
        peer.unflushed = False
        session = peer.link.session
        await self._tell(ops.Phase(True, *lineage))
        peer.told_in = session

    def _lacks_something(self) -> bool:
        peer = self._peer
        is_marked = len(self._log) or peer.unrecorded or peer.unflushed
        return bool(is_marked or not peer.settling.is_empty)

    async def _tell(self, op: ops.AnyOp, *, again: int = 0) -> bool:
        """Have the peer do *op*. False: it answers *again*, there is more to do."""
        answer = await self._peer.ask(op)
        if again and isinstance(answer, ops.Done) and answer.errno == again:
            return False
        if not isinstance(answer, ops.Done) or answer.errno:
            number = answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
            self._peer.note_error(op, describe(number))
            await trio.sleep(RETRY_MIN_S)
            raise PeerLost(f"the peer could not {type(op).__name__}: {describe(number)}")
        return True

    async def _pass(self) -> None:
        before = self._reached()
        await self.work.links.walk_for_sought()
        expansion = self._names.expansion
        await self._each(expansion.pending(), expansion.expand)
        await self._names.gather()
        await self._each(self._filling.pending(), self._filling.fill)
        await self._each(self._batches.pending(), self._batches.place)
        await self._each(self._log.names_pending(), self._names.place)
        await self._names.place_together()
        await self._each(self._log.objects_with_data(), self._contents.data)
        await self._each(self._log.objects_with_attrs(), self._contents.finish)
        self._peer.progressed()
        if not self._log.is_empty and self._reached() == before:
            await self._pause()

    def _reached(self) -> tuple[int, ...]:
        progress = self.work.progress
        return progress.files, progress.names, progress.compared, len(self._log)

    async def _pause(self) -> None:
        """Nothing moved: what is left is stuck. Wait until something may be tried again."""
        now = time.monotonic()
        due = min((one.retry_at for one in self.work.stuck.values()), default=now + RETRY_MIN_S)
        # Whoever waits for progress asks again after each pass: without a rest, a busy loop.
        await trio.sleep(_REST_S)
        with trio.move_on_after(max(0.0, min(due - now, RETRY_MAX_S) - _REST_S)):
            await self._peer.wait_work()
        if not self._peer.live:
            raise PeerLost("the session ended")

    async def _each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Work on all *items*, a few at a time; a lost peer ends it."""
        applications = self.work.pipeline.applications
        # A resync that gave way for ever to those who mark names as fast as it goes would not end.
        haste = self._names.outpaced
        turns = Turns(applications, self._peer.link.rtt_ns, haste)
        lost: list[PeerLost] = []

        async def one(item: T) -> None:
            try:
                if not self.work.is_waiting(item):
                    await work(item)
            except PeerLost as error:
                lost.append(error)
            except (OSError, ProtocolError) as error:
                # One item that cannot be read, recorded or sent does not stop the others.
                self.work.failed(item, None, str(error))
            finally:
                turns.release()

        async with trio.open_nursery() as nursery:
            for number, item in enumerate(items):
                await turns.acquire()
                if not number % (1 + haste):
                    await applications.give_way()
                if lost or not self._peer.live:
                    break
                nursery.start_soon(one, item)
        if lost or not self._peer.live:
            raise lost[0] if lost else PeerLost("the session ended")

    # What a strict change waits for ------------------------------------------------------------

    async def _serve_urgent(self) -> None:
        """Carry what strict changes wait for, beside the passes over everything else."""
        peer = self._peer
        while True:
            await peer.wait_urgent()
            while peer.urgent and peer.live and self._passing:
                inode = peer.urgent.popleft()
                self._contents.hurried.add(inode)
                try:
                    with self._tree.held(inode):
                        await self._carry_now(inode)
                    if not peer.settling.is_empty:
                        await self.work.settle()
                except PeerLost:
                    break
                except OSError as error:
                    self.work.failed(("urgent", inode.id), inode, error.strerror or "error")
                finally:
                    self._contents.hurried.discard(inode)
                if not peer.is_clean(inode):
                    await trio.sleep(_URGENT_RETRY_S)
                peer.progressed()

    async def _carry_now(self, inode: Inode) -> None:
        if inode.gone or not inode.id or not await self._names.is_placed(inode, now=True):
            return
        if inode.is_directory:
            await self._names.carry_now(inode)
        else:
            await self._contents.data(inode.id)
        await self._contents.finish(inode.id)
