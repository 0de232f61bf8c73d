"""The way of every change: turn, activity log, local and peers, acknowledgement.

The life of an operation: it claims what it touches and waits for its turn (`core.scheduler`); it is
noted in the activity log; it is sent to every peer on which it is clean, recorded dirty for the
others (`core.splitter`), and done here meanwhile, so that both sides work at the same time; where
what results, or whether it succeeds, is not known before, it is done here first. The
acknowledgements are awaited; the claims are given back. Between deciding, sending and doing there
is no await: the order on the wire is the local order. So where an operation need not be awaited
(policy `async`), or is later (`node.replication.window`), its claims are given back at once all
the same.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import trio

from replfs.core import ops
from replfs.core.policy import Policy
from replfs.core.scheduler import Claim, Scheduler, Ticket
from replfs.errors import HalfDone, NotInSync, NotRecorded
from replfs.node.pacing.courtesy import Applications
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.replication.flight import Flight, Latencies
from replfs.node.replication.peer import Peer
from replfs.node.replication.policies import Policies
from replfs.node.replication.window import Window, not_cancelled
from replfs.store import locators
from replfs.store.activity import KIND_ATTRS, ActivityLog, Slot
from replfs.store.inode import Inode
from replfs.store.record import PRIVILEGED
from replfs.store.tree import Tree
from replfs.transport.spin import Spin

_CROWDED_S: Final = 0.001
_SUSPENDED_S: Final = 0.05
_FREES_SPACE: Final = frozenset({"unlink", "rmdir", "truncate", "fsync"})
_SPIN_NS: Final = 300_000
"""How long a lone operation watches for its acknowledgement before it sleeps."""

_AWAITED: Final = frozenset({"rename", "link"})
"""What waits for itself, and for what is awaited later, also under `ack=close`."""
_LOOK_AT: Final = 16
"""So many unconfirmed operations are worth a look whether answers have come."""

_BACKGROUND: Final = frozenset({"resync", "verify"})
_HURRY_S: Final = 0.01
Touched = tuple[Inode, int, int]
"""(inode, kind, region) for the activity log."""
Steps = Iterator[ops.AnyOp | None]
"""A metadata operation at work: it yields once, what is sent (None: nothing is).

What is to be sent may be known before anything is done here: the rest is done behind the yield.
"""


class Pipeline:
    """What all changes of a volume go through; it owns the scheduler and knows the peers."""

    def __init__(
        self,
        tree: Tree,
        activity: ActivityLog,
        policies: Policies,
        unwritten: Unwritten | None = None,
    ) -> None:
        self.tree = tree
        self.unwritten = unwritten or Unwritten()
        """What this node's disk could not write."""
        self.activity = activity
        self.policies = policies
        self.scheduler = Scheduler()
        self.peers: list[Peer] = []
        self.changes = 0
        """The number of the last change; a peer that has everything counts with it."""
        self.is_over = False
        """This node is no primary any more: every change fails with EROFS."""
        self.strict_peers = 0
        """How many peers a strict change needs; 0: all of them."""
        self.async_queue_bytes = 64 << 20
        """What may be on its way to a peer when more is sent that nobody awaits."""
        self.strict_timeout_s = 5.0
        self.suspend_s = 0.0
        """How long a strict change waits for lost peers before it fails; 0: not at all."""
        self.suspended = 0
        """Strict changes that wait for lost peers."""
        self._released = 0
        self.strict_at = float("-inf")
        """When a strict change was made last, monotonic seconds."""
        self.slow_ns = 1 << 62
        """A wait for a peer that is longer is told to it."""
        self.background = 0
        """Claims held or wanted by what is not an application."""
        self.announcing = 0
        """Peers that have not confirmed yet that they know of a generation."""
        self._all_announced = trio.Event()
        self.flights = 0
        """Operations that a peer has not answered."""
        self.detached = 0
        """Those of them that no caller awaits by itself."""
        self.window = Window()
        self._failed_here: set[str] = set()
        """Kinds of changes of which the last one failed here after it had been sent."""
        self.silent: dict[Inode, int] = {}
        """Files, and how many handles of each the kernel closes without telling."""
        self.applications = Applications(lambda: self.flights)
        self.latencies: dict[str, Latencies] = {}
        self._patience = Spin(_SPIN_NS)
        self.fuse_ready: Callable[[], bool] = lambda: False
        """Whether another request is waiting, so that nothing may spin."""
        self.do_chore: Callable[[], bool] = lambda: False
        """Does some work that nobody waits for, if there is any, within tens of microseconds."""

    # Claims ------------------------------------------------------------------------------------

    async def claim(self, claims: tuple[Claim, ...], kind: str) -> Ticket:
        """Wait for a turn: nothing that conflicts is in flight when this returns."""
        if kind in _BACKGROUND:
            self.background += 1
        ticket = self.scheduler.admit(claims, kind)
        if ticket.waits:
            ticket.owner = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(not_cancelled)
        return ticket

    @asynccontextmanager
    async def claimed(
        self, claims: tuple[Claim, ...], kind: str, peer: Peer
    ) -> AsyncIterator[Ticket]:
        """A turn for as long as the block lasts, behind what is on its way to *peer*, too."""
        ticket = await self.claim(claims, kind)
        try:
            await peer.fence()
            yield ticket
        finally:
            self.release_claim(ticket)

    async def turn(
        self, claims: tuple[Claim, ...], kind: str, inode: Inode, policy: int | None = None
    ) -> tuple[Ticket, int]:
        """As `claim`, with everything true that must be before *inode* is changed; its policy too.

        There is room to send and to record. A strict change has the peers it needs, with the
        object in sync on them; it waits for that without claims, since the resync needs them.

        Raises:
            NotInSync: the peers a strict change needs are lost; nothing is applied.
            OSError: ENOSPC, a change that some peer lacks could not be recorded.
        """
        until = time.monotonic() + self.strict_timeout_s
        while True:
            effective = self.policies.effective(inode) if policy is None else policy
            if effective == Policy.STRICT:
                await self._wait_strict(inode)
            ticket = await self.claim(claims, kind)
            try:
                if self.is_over and kind != "fsync":
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS))
                # The policy may have been changed while this waited for its turn.
                same = policy is not None or self.policies.effective(inode) == effective
                if same and (effective != Policy.STRICT or self._is_strict_ready(inode)):
                    if effective != Policy.NONE and not self.all_have_room():
                        await self._make_room(kind, effective)
                    return ticket, effective
                if time.monotonic() > until:
                    raise NotInSync("the object does not stay in sync on the peers it needs")
            except BaseException:
                self.release_claim(ticket)
                raise
            self.release_claim(ticket)

    async def _wait_strict(self, inode: Inode) -> None:
        """`_require_strict`, or with `suspend_s` wait for it to become true."""
        until = time.monotonic() + self.suspend_s
        released = self._released
        while True:
            try:
                await self._require_strict(inode)
            except NotInSync:
                if self._released != released or time.monotonic() >= until:
                    raise
            else:
                return
            self.suspended += 1
            try:
                await trio.sleep(_SUSPENDED_S)
            finally:
                self.suspended -= 1

    def release_suspended(self) -> None:
        """Strict changes that wait for their peers fail now, unless they are ready."""
        self._released += 1

    def release_claim(self, ticket: Ticket) -> None:
        """Give the turn to those that wait for it."""
        if ticket.kind in _BACKGROUND:
            self.background -= 1
        for later in self.scheduler.complete(ticket):
            if isinstance(later.owner, trio.lowlevel.Task):
                trio.lowlevel.reschedule(later.owner)

    # The way of every change ---------------------------------------------------------------------

    def note(self, touched: tuple[Touched, ...]) -> list[Slot]:
        """Record what is about to diverge, before it can."""
        slots = []
        for inode, kind, region in touched:
            slot = self.activity.begin(
                inode.id, kind, region, partial(locators.of, self.tree, inode)
            )
            if slot is not None:
                slots.append(slot)
        return slots

    async def _make_room(self, kind: str, policy: int) -> None:
        """Room to send, in the activity log, and for marks; what frees space needs none."""
        for peer in self.peers:
            if kind not in _FREES_SPACE and not peer.gets_all:
                peer.check_recordable()
            if peer.live and policy != Policy.ASYNC and not peer.link.has_room():
                began = time.monotonic_ns()
                await peer.wait_room()
                peer.waited(began, time.monotonic_ns())
        while self.activity.is_crowded:
            await trio.sleep(_CROWDED_S)

    def _is_strict_ready(self, inode: Inode) -> bool:
        ready = sum(peer.live and peer.is_clean(inode) for peer in self.peers)
        return ready >= self.confirmations_needed()

    def confirmations_needed(self) -> int:
        """How many peers must confirm a strict change."""
        return self.strict_peers or len(self.peers)

    async def _require_strict(self, *inodes: Inode) -> None:
        """EIO before anything is applied, where the peers a strict change needs are lost."""
        self.strict_at = time.monotonic()
        needed = self.confirmations_needed()
        ready = 0
        for peer in self.peers:
            if peer.congested:
                peer.hurry()
                with trio.move_on_after(peer.timeout_s):
                    while not peer.live:
                        await trio.sleep(_HURRY_S)
            if peer.live and await peer.bring_in_sync(inodes):
                ready += 1
        if ready < needed:
            raise NotInSync(f"{ready} of {needed} peers confirm strict changes")

    def send(
        self,
        op: ops.AnyOp,
        payload: bytes | None,
        flight: Flight,
        start: int,
        policy: int = Policy.SYNC,
    ) -> None:
        """To every peer on which *op* is clean; into the log of the others.

        What cannot be recorded is told when it is settled: by then it has been applied.
        """
        queue_bytes = self.async_queue_bytes if policy == Policy.ASYNC else 0
        flight.op = op
        if type(op) is not ops.Sync:
            self.changes += 1
        if len(self.peers) > 1:
            # Those that get it learn first that it belongs to another generation.
            for peer in self.peers:
                if not peer.diverged and not peer.is_whole(queue_bytes):
                    try:
                        peer.begin_divergence()
                    except OSError as error:
                        flight.unrecorded = peer.doubt_all(error)
        length = len(payload) if payload is not None else 0
        for peer in self.peers:
            # What keeps it from one of them is no reason not to send it to the others.
            try:
                if not peer.send(op, payload, flight, start, queue_bytes):
                    peer.mark(op, length=length, start=start)
            except OSError as error:
                flight.unrecorded = peer.doubt_all(error)

    def part_from_lacking(self) -> None:
        """Everything is about to be promised: who may lack any of it is told apart by a generation.

        Also one that was never without a change that was made since: what a killed process had in
        flight is to be compared with it. Raises OSError.
        """
        for peer in self.peers:
            if not peer.log.is_empty:
                peer.begin_divergence()

    async def announced(self) -> None:
        """Wait until the peers that go on know of the generation that has begun.

        What some peer does not have is acknowledged only then: whoever is promoted is told apart
        by it. Bounded, as every answer.
        """
        while self.announcing:
            await self._all_announced.wait()

    def announcement_ended(self) -> None:
        """A peer knows of a generation, or is lost."""
        self.announcing -= 1
        if not self.announcing:
            self._all_announced.set()
            self._all_announced = trio.Event()

    async def confirmed(self, flight: Flight) -> None:
        """Wait until every peer the operation went to has answered or is lost."""
        if self.flights - self.detached == 1 and flight.waiting and self._patience.begin():
            self._spin(flight)
        if flight.waiting:
            self.do_chore()
            began = time.monotonic_ns()
            flight.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(not_cancelled)
            self._slept(flight, began)

    def _slept(self, flight: Flight, began: int) -> None:
        ended = time.monotonic_ns()
        self._patience.slept(ended - began)
        if ended - began > self.slow_ns:
            for peer in flight.sent_to:
                if peer.link is flight.last:
                    peer.waited(began, ended)

    def _spin(self, flight: Flight) -> None:
        ready = self.fuse_ready
        do_chore = self.do_chore
        spin = self._patience
        while spin.go_on():
            do_chore()
            for peer in self.peers:
                if peer.live:
                    peer.link.pump()
            if not flight.waiting:
                spin.paid()
                return
            if ready():
                return

    # Acknowledgement later ---------------------------------------------------------------------

    def let_go(self, flight: Flight, slots: list[Slot], inode: Inode, policy: int) -> bool:
        """Whether a caller returns without awaiting what it did to *inode* and sent.

        The answers then end *slots*, and what they say is recorded.
        """
        if flight.unrecorded is not None:
            return False  # its caller is to know
        if policy == Policy.ASYNC:
            flight.detach(slots)
            return True
        if (
            self.policies.is_deferred(inode, policy)
            and flight.kind not in _AWAITED
            and inode not in self.silent
        ):
            inode.unconfirmed = self.window.join(flight)
            flight.detach(slots, self.window)
            return True
        return False

    async def catch_up(self) -> None:
        """Before one that was let go returns: those of `ack=close` are confirmed in time."""
        window = self.window
        if len(window) < _LOOK_AT and not window.is_late():
            return
        for peer in self.peers:
            if peer.live:
                peer.link.pump()
        while window.is_late():
            await self.together(window.confirmed + 1)

    async def together(self, number: int) -> None:
        """Wait until what is awaited later is confirmed, or recorded, up to this number."""
        window = self.window
        # An inode may have its number from before this node was a secondary for a while.
        number = min(number, window.sent)
        if window.confirmed < number:
            flight = window.flight(number)
            lone = self.flights == self.detached and not window.is_awaited
            if lone and self._patience.begin():
                self._spin(flight)
            if window.confirmed < number:
                began = time.monotonic_ns()
                await window.wait(number)
                self._slept(flight, began)
        if self.announcing:
            await self.announced()

    async def settled(self, flight: Flight, policy: int) -> None:
        """Wait for the answers to an operation, and compare them with what became of it here.

        Errors as of `Flight.settle`. What began a generation is acknowledged only when the peers
        that go on know of it.
        """
        if flight.waiting:
            await self.confirmed(flight)
        flight.settle(strict=policy == Policy.STRICT)
        if self.announcing:
            await self.announced()

    async def change(
        self,
        kind: str,
        claims: tuple[Claim, ...],
        subject: Inode,
        touched: tuple[Touched, ...],
        apply: Callable[[], Steps],
        *,
        policy: int | None = None,
        here_first: bool = False,
    ) -> bool:
        """One metadata operation: turn, peers and here at the same time, acknowledgement.

        *subject* decides the policy. *apply* begins when it is the operation's turn. *here_first*:
        nothing is sent before all of it is done, for the store may well refuse it. Returns whether
        the claims were held to the end: nothing else has changed what they cover since.
        """
        began = time.monotonic_ns()
        ticket, policy = await self.turn(claims, kind, subject, policy)
        slots: list[Slot] = []
        let_go = False
        failed: OSError | None = None
        flight = Flight(self, kind)
        try:
            if self.peers:
                if policy == Policy.NONE:
                    # What is not replicated itself may have its name in a directory that is.
                    touched = tuple(
                        one for one in touched if self.policies.effective(one[0]) != Policy.NONE
                    )
                for inode, _, _ in touched:
                    self.tree.ensure_id(inode)
                slots = self.note(touched)
            steps = apply()
            op = self._go_on(steps, touched)
            if here_first or not self._may_lead(kind):
                self._go_on(steps, touched)
            if op is not None:
                if slots and type(op) is ops.Make:
                    # A peer that dies over it has it under its name, and not all of its attributes.
                    slots += self.note(((self.tree.table.by_id[op.object], KIND_ATTRS, 0),))
                self.send(op, None, flight, 0, policy)
            try:
                self._go_on(steps, touched)
                self._failed_here.discard(kind)
            except OSError as error:
                failed = error
                flight.here = ops.Done(error.errno or errno.EIO)
                if flight.sent_to:
                    self._failed_here.add(kind)
            if op is not None:
                if flight.waiting:
                    let_go = self.let_go(flight, slots, subject, policy)
                if let_go:
                    slots = []
                else:
                    await self.settled(flight, policy)
        finally:
            for slot in slots:
                self.activity.end(slot)
            self.release_claim(ticket)
            self.measure(kind, began)
        if failed is not None:
            raise failed
        if let_go:
            await self.catch_up()
        return not let_go

    def _may_lead(self, kind: str) -> bool:
        """Whether a change may be sent before it is done here.

        What fails here all the same is put right on the peers, but is done there until then. So
        after one failure nothing of its kind is, until one has succeeded here: a store that has
        become read-only, say, has the peers do no more than one change that its callers are told
        has failed. And never without root, which may be refused what a peer may do.
        """
        return PRIVILEGED and kind not in self._failed_here

    def _go_on(self, steps: Steps, touched: tuple[Touched, ...]) -> ops.AnyOp | None:
        """Go on with an operation up to its yield, or from there to its end. Raises OSError."""
        try:
            return next(steps, None)
        except OSError as error:
            # Of a call that fails with EIO nobody knows what it did, and what could not be
            # recorded was done; any other did nothing.
            if isinstance(error, HalfDone | NotRecorded) or error.errno == errno.EIO:
                self.record(lambda peer: peer.mark_touched(touched))
            raise

    def record(self, mark: Callable[[Peer], None]) -> OSError | None:
        """Record that every peer lacks something; the error, where that cannot be kept."""
        failure = None
        for peer in self.peers:
            try:
                mark(peer)
            except OSError as error:
                failure = peer.doubt_all(error)
        return failure

    def measure(self, kind: str, began: int) -> None:
        """Count an operation of this class, and how long it took since *began* (monotonic ns)."""
        found = self.latencies.get(kind)
        if found is None:
            found = self.latencies[kind] = Latencies()
        now = self.applications.last_ns = time.monotonic_ns()
        found.add(now - began)

    def all_have_room(self) -> bool:
        """Whether an operation can go to every peer now, without any care to be taken."""
        for peer in self.peers:
            if not (
                peer.live and peer.log.is_empty and peer.settling.is_empty and peer.link.has_room()
            ):
                return False
        return not self.activity.is_crowded

    async def drained(self) -> None:
        """Wait until nothing of an application is in flight."""
        while self.scheduler.in_flight > self.background or self.flights:
            await trio.sleep(0.01)
