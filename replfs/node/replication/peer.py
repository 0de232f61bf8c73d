"""One peer, as its primary sees it: link, dirty region log, relationship state.

Decides for every operation whether it is sent to this peer or recorded. Where objects are it is
told by `node.replication.places`; what it lacks is recorded in `node.replication.lacks`; what
empties the log is `node.resync`.
"""

from __future__ import annotations

import errno
import logging
import os
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

import trio

from replfs.core import ops, splitter
from replfs.core.dirty import DirtyLog
from replfs.core.features import understands
from replfs.core.generation import Action, Decision, Lineage
from replfs.core.messages import BULK, Hello, Refuse, Welcome
from replfs.core.relationship import Event, State, next_state
from replfs.errors import PeerLost, ProtocolError, Refused
from replfs.node.asking.identity import INCONSISTENT, SUSPECTED, led_by
from replfs.node.asking.question import Question, ask
from replfs.node.replication.flight import Flight, describe
from replfs.node.replication.places import LIVE, Places
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree
from replfs.transport.link import Link, Sink

log = logging.getLogger(__name__)

_CARRIES: Final = frozenset({
    ops.Gather, ops.Place, ops.PlaceMany, ops.Clear, ops.Data, ops.Finish,
})  # fmt: skip
"""Operations of a resync that change the peer's store."""


class Home(Protocol):
    """What a peer needs of the node it belongs to."""

    tree: Tree

    def hello(self) -> Hello:
        """This node's identity. Raises Refused: it cannot be told now."""

    def lineage(self) -> Lineage:
        """This node's generation and the earlier ones, on the disk or not."""

    def decide(self, peer: Peer, welcome: Welcome) -> Decision:
        """What the two stores are to each other."""

    def diverging(self, peer: Peer) -> bool:
        """The first change that *peer* does not get: a new generation begins before it.

        False: none does, for this node is handing its role over.
        """

    def changed(self, peer: Peer) -> None:
        """The peer's state is another one."""

    def may_have(self, peer: Peer, generation: bytes) -> None:
        """The peer is about to be told that it is at that generation. Raises OSError."""

    def can_record(self) -> bool:
        """Whether there is room kept back for dirty marks."""

    def is_self(self, node: bytes) -> bool:
        """Whether that is this node."""

    def is_discarded(self, generation: bytes) -> bool:
        """Whether an operator decided against what was changed in that generation."""

    def outdated(self, peer: Peer) -> None:
        """The peer says that this node's place as primary was taken."""

    async def make_durable(self) -> None:
        """Dirty marks and generation are on stable storage when this returns."""

    def note_led_apart(self, peer: Peer) -> None:
        """Remember that nothing is to be fetched from the peer before it is in sync."""

    def set_apart(self, peer: Peer, *, apart: bool) -> None:
        """Remember whether the peer may have what a power loss here would take."""


class LastError:
    """What went wrong last, for people."""

    __slots__ = ("path", "reason", "when")

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        self.when = time.time()


class Peer(Places):
    """One configured peer."""

    def __init__(
        self, home: Home, name: str, endpoint: str, dirty: DirtyLog, timeout_s: float
    ) -> None:
        super().__init__(home.tree, dirty)
        self.home = home
        self.name = name
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self.reason = "not connected yet"
        self.since = time.time()
        self.last_in_sync: float | None = None
        self.paused = False
        self.congested = False
        """It was too slow, and is left alone for a while."""
        self.waited: Callable[[int, int], None] = _not_counted
        """Told when a caller waited long for this peer: from, to, monotonic ns."""
        self.peer_node = b""
        self.peer_generation = b""
        self.release = ""
        """Its version of replfs, as it said last."""
        self.features: frozenset[str] = frozenset()
        """What it said of itself in the greeting of this session."""
        self.clock_difference_s: float | None = None
        """How far its clock was ahead of ours then."""
        self.base = b""
        """The generation at which the log was begun, where that was by a promotion."""
        self.is_asked = True
        """The log holds what the peer may have on its own, as far as it has to be asked."""
        self.is_refused = False
        """The last attempt to connect was refused."""
        self.last_error: LastError | None = None
        self.apart = False
        """It was away when this side was last flushed."""
        self.led_apart = False
        """It has what another primary began to bring to it."""
        self.changes = 0
        """How often the state has become another one."""
        self.knows_stable = False
        """It was told of a common checkpoint since its state became what it is."""
        self.unrecorded = False
        """A mark could not be kept: everything is compared before the peer is in sync again."""
        self.told_in = 0
        """The session in which it was told last that a resync brings it something."""
        self.unawaited = 0
        """Operations sent that nobody waits for (policy `async`), ever."""
        self.landed = 0
        """Those of them that were answered or lost, in about the order they were sent in."""
        self.urgent: deque[Inode] = deque()
        """Objects a strict change waits for: the resync takes them first."""
        self._wake_urgent = trio.Event()
        self._hurry = trio.Event()
        self._progress = trio.Event()

    # State -------------------------------------------------------------------------------------

    def advance(self, event: Event, reason: str = "") -> None:
        """Something happened; the table says what state that makes."""
        new = next_state(self.state, event)
        # Why nothing is sent at all is worth more than what becomes of the link meanwhile.
        held_off = new is self.state and new in {State.PAUSED, State.CONGESTED}
        if reason and (not held_off or event is Event.PAUSE):
            self.reason = reason
        if new is self.state:
            return
        log.info(
            "peer %s: %s (%s)%s", self.name, new.value, event.value, f": {reason}" if reason else ""
        )
        if self.state is State.IN_SYNC:
            self.last_in_sync = time.time()
        self.state = new
        self.changes += 1
        self.knows_stable = False
        if not reason:
            self.reason = ""
        self.since = time.time()
        self.home.changed(self)

    def wake_urgent(self) -> None:
        """There is something a strict change waits for, and a resync that may carry it."""
        self._wake_urgent.set()

    async def wait_urgent(self) -> None:
        """Wait until `wake_urgent`."""
        await self._wake_urgent.wait()
        self._wake_urgent = trio.Event()

    def progressed(self) -> None:
        """The log became shorter: whoever waits for something in it may look again."""
        if self._progress.statistics().tasks_waiting:
            self._progress.set()
            self._progress = trio.Event()

    def pause(self, reason: str) -> None:
        """Nothing is sent from here on; what changes is recorded."""
        self.paused = True
        self.live = False
        self.advance(Event.PAUSE, reason)
        self.link.fail("paused")

    def resume(self) -> None:
        """The operator's pause is over; the link comes back, and with it the resync."""
        if self.paused:
            self.paused = False
            self.advance(Event.RESUME, "resumed")
            self.link.fail("resumed")
        self.hurry()

    def congest(self, reason: str) -> None:
        """Nothing is sent for a while; what changes is recorded."""
        self.congested = True
        self.live = False
        self.advance(Event.CONGESTED, reason)
        self.link.fail("the peer is too slow")

    def hurry(self) -> None:
        """If the peer is left alone because it was too slow: not any longer."""
        self._hurry.set()

    async def wait_hurry(self) -> None:
        """Wait until `hurry`."""
        self._hurry = trio.Event()
        await self._hurry.wait()

    def end_congestion(self) -> None:
        """The link comes back, and with it the resync."""
        self.congested = False
        if self.state is State.CONGESTED:
            self.advance(Event.BACK_OFF_OVER, "it was too slow, and is tried again")
            self.link.fail("tried again")

    def compare_all(self) -> None:
        """Everything is to be compared with the peer again."""
        self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
        if self.state is State.IN_SYNC:
            self.advance(Event.OP_LOST, "everything is compared")
        self.wake_resync()

    def doubt(self, reason: str) -> None:
        """Something was marked that should be equal: the resync looks at it."""
        if self.state is State.IN_SYNC:
            self.advance(Event.OP_LOST, reason)
        self.wake_resync()

    def data_word(self) -> str:
        """What the peer's copy is worth now."""
        if self.state is State.UNINITIALIZED:
            return "inconsistent"
        return "outdated" if not self.live else "inconsistent"

    def understands(self, kind: type[ops.Op]) -> bool:
        """Whether its release knows operations of that kind: no other may be sent."""
        return understands(self.features, kind)

    def is_whole(self, queue_bytes: int = 0) -> bool:
        """It gets what is sent now; *queue_bytes* as for `send`."""
        return self.gets_all and self.link.has_room(LIVE, queue_bytes)

    @property
    def gets_all(self) -> bool:
        """It gets everything that there is room for."""
        return self.live and self.is_asked and self.log.is_empty and self.settling.is_empty

    def announce(self, lineage: Lineage, sink: Sink) -> bool:
        """What follows belongs to another generation; *sink* is told.

        False: it is not there, or of a release that is told by a resync only.
        """
        if not self.understands(ops.Generation):
            self.doubt("it runs an older release, which only a resync tells of a new generation")
            return False
        try:
            self.link.send(ops.Generation(*lineage), None, sink, LIVE)
        except PeerLost:
            return False
        return True

    # The link's owner --------------------------------------------------------------------------

    def hello(self) -> Hello:
        """This node, as it is now."""
        return self.home.hello()

    def welcomed(self, link: Link, welcome: Welcome) -> None:
        """A session is up: what the stores are to each other decides what happens."""
        del link
        decision = self.home.decide(self, welcome)
        if decision.action is Action.REFUSE:
            raise Refused(decision.sentence, "refused")
        if decision.action is Action.SPLIT_BRAIN:
            raise Refused(decision.sentence, "split-brain")
        self.located = (set(), set())
        for known in self.located:
            known.add(ROOT_ID)
        try:
            event, sentence = self._take_stock(decision, welcome)
            self.unrepresentable.try_again(self.log)
            if self._was_led_by_another(welcome) and not self.led_apart:
                self.home.note_led_apart(self)
            self.set_apart(apart=False)
        except OSError as error:
            raise Refused(
                f"what the peer lacks cannot be recorded here: {error.strerror}", "refused"
            ) from error
        self.is_refused = False
        self.features = frozenset(welcome.features)
        self.peer_node = welcome.node
        self.peer_generation = welcome.generation
        self.diverged = welcome.generation != self.home.lineage().generation
        self.advance(event, sentence)
        self.live = not self.paused and not self.congested
        self.wake_resync()

    def _take_stock(self, decision: Decision, welcome: Welcome) -> tuple[Event, str]:
        """Mark what the peer may lack; what that makes of it, and why. Raises OSError."""
        if decision.action is Action.BASELINE:
            if welcome.memory_lost or self._has_what_is_unknown(welcome):
                # What an earlier part of the baseline has carried may be gone again, or what it
                # has is of another one, of which the log does not say how it goes on below.
                self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
            else:
                self.log.mark_names_all(ROOT_ID)
            return Event.DECIDED_BASELINE, decision.sentence
        if not self._speaks_of(welcome):
            self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
            self.is_asked = True
        else:
            if self._was_led_by_another(welcome):
                self.is_asked = False
            if decision.action is Action.COMPARE:
                return Event.DECIDED_QUICK, self._mark_lost()
        return Event.DECIDED_QUICK, decision.sentence

    def _was_led_by_another(self, welcome: Welcome) -> bool:
        """Whether another primary has begun a resync into it, which has not ended.

        Its generation is the one before that, and its log says nothing of what it was given.
        """
        leader = led_by(welcome)
        return bool(leader) and not self.home.is_self(leader)

    def _has_what_is_unknown(self, welcome: Welcome) -> bool:
        """Whether a peer whose first copy has begun has something that the log says nothing of.

        It was brought by another primary, or the log was kept for another store, or is younger.
        """
        is_begun = INCONSISTENT in welcome.features
        is_known = welcome.node == self.peer_node and not self._was_led_by_another(welcome)
        return is_begun and not is_known

    def asked(self) -> None:
        """What the peer may have on its own is in the log now."""
        self.is_asked = True
        self.home.changed(self)

    @property
    def is_apart(self) -> bool:
        """Its store and this one were changed apart."""
        return self.state is State.SPLIT_BRAIN

    def _speaks_of(self, welcome: Welcome) -> bool:
        """Whether the log says what that node lacks.

        It was kept for the node it knows, and for no other; begun by a promotion, for those that
        were complete and at the same generation then.
        """
        if self.home.is_discarded(welcome.generation):
            # What was changed there apart from here is told by that node, or nobody knows it.
            self.is_asked = False
            lineage = {welcome.generation, *welcome.history}
            known = welcome.node == self.peer_node or (not self.peer_node and self.base in lineage)
            return known and SUSPECTED in welcome.features
        if self.peer_node:
            return welcome.node == self.peer_node
        return (
            bool(self.base)
            and welcome.generation == self.base
            and INCONSISTENT not in welcome.features
        )

    def _mark_lost(self) -> str:
        """The peer lost power: mark what it may have lost; that, in words."""
        lost = self.unstable.snapshot(everywhere=False)
        if lost is None:
            self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
            return "the peer lost power: everything is compared"
        self.log.absorb(lost, compare=True)
        return f"the peer lost power: {len(lost)} objects that it may have lost are compared"

    # Common checkpoints ------------------------------------------------------------------------

    def begin_checkpoint(self, op: ops.Checkpoint, sink: Sink) -> bool:
        """Have the peer flush what it was sent before; *sink* is told. False: it is not there."""
        try:
            self.link.send(op, None, sink, LIVE)
        except PeerLost:
            return False
        self.unstable.begin()
        return True

    def flush_failed(self, reason: str) -> None:
        """The peer could not flush: what it should have on its disk is sent again.

        Not compared: what it has in memory may be right, and what is on its disk not. Where it is
        not known what that is, a comparison of everything is all there is.
        """
        self.last_error = LastError("/", f"cannot be flushed: {reason}")
        lost = self.unstable.snapshot(everywhere=False)
        self.unflushed = True
        self.begin_divergence()
        if lost is None:
            self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
        else:
            self.log.absorb(lost)
        self.doubt(f"the peer could not flush its store: {reason}")

    def doubt_all(self, error: OSError) -> OSError:
        """What it lacks could not be recorded: everything is compared. Returns *error*."""
        self.unrecorded = True
        self.last_error = LastError("/", f"what it lacks cannot be recorded: {error.strerror}")
        self.doubt(self.last_error.reason)
        return error

    def set_apart(self, *, apart: bool = True) -> None:
        """The peer has nothing that this side's disk does not have, or may have from here on."""
        if self.apart != apart:
            self.home.set_apart(self, apart=apart)
            self.apart = apart

    def tell(self, op: ops.Stable) -> None:
        """A common checkpoint has ended; there is no answer to that."""
        try:
            self.link.send(op, None, None, LIVE)
        except PeerLost:
            return
        self.knows_stable = True

    def refused(self, link: Link, refuse: Refuse) -> None:
        """One side of the handshake said no; the link tries again at times."""
        del link
        self.is_refused = True
        if refuse.code == Action.OUTDATED.value:
            self.home.outdated(self)
        if refuse.code == "frozen":
            # It is the same store as before, for a while only.
            self.reason = refuse.reason
            return
        event = Event.SPLIT_BRAIN if refuse.code == "split-brain" else Event.REFUSED
        if self.state in {State.UNINITIALIZED, State.OUT_OF_SYNC, State.REFUSED, State.SPLIT_BRAIN}:
            self.advance(event, refuse.reason)

    def went_down(self, link: Link, reason: str) -> None:
        """The session is over; what was unanswered is recorded by its operations."""
        del link
        self.live = False
        self.advance(Event.LINK_DOWN, reason)
        self.wake_resync()
        self.progressed()

    # Operations --------------------------------------------------------------------------------

    def send(
        self,
        op: ops.AnyOp,
        payload: bytes | None,
        flight: Flight,
        start: int,
        queue_bytes: int = 0,
    ) -> bool:
        """Send *op* if everything it needs is on the peer; False: it is to be recorded.

        *queue_bytes*: behind how much on its way, where nobody awaits it; 0: the window's room,
        which has been waited for.
        """
        if not self.live or not self.is_asked:
            return False  # until it has been asked, it may have something of its own there
        dirty = self.log
        if not dirty.is_empty:
            if type(op) is ops.Write:
                length = len(payload) if payload is not None else 0
                if not dirty.data_is_clean(op.object, start, op.offset + length):
                    return False
            elif type(op) is ops.Truncate:
                if not dirty.data_is_clean(op.object, min(start, op.size), None):
                    return False
            elif type(op) is ops.Sync:
                if not dirty.object_is_clean(op.object):
                    # An fsync will return for what the peer may not have.
                    self.begin_divergence()
            elif not splitter.is_clean(dirty, op):
                return False
        if not self.settling.is_empty and not self._is_settled(op, payload, start):
            return False
        if not self.link.has_room(LIVE, queue_bytes):
            return False  # the queue of `async` is full: the log takes over
        try:
            if not self.locate_for(op):
                return False
            flight.sent(self, op, start)
            try:
                self.link.send(op, payload, flight, LIVE)
            except BaseException:
                flight.unsent(self)
                raise
            # Not before: meanwhile the peer is at work.
            self.unstable.note(op, self._locator, length=flight.length, start=start)
        except PeerLost:
            return False
        except ProtocolError as error:
            # Beyond what a message can hold, as a time after the year 2262 can be.
            self.note_error(op, str(error))
            return False
        return True

    def _is_settled(self, op: ops.AnyOp, payload: bytes | None, start: int) -> bool:
        if type(op) is ops.Write:
            stop = op.offset + (len(payload) if payload is not None else 0)
            return self.settling.allows(op, start, stop)
        if type(op) is ops.Truncate:
            return self.settling.allows(op, min(start, op.size), None)
        return self.settling.allows(op, 0, 0)

    def _diverging(self) -> bool:
        return self.home.diverging(self)

    def check_recordable(self) -> None:
        """ENOSPC before anything is applied, where a mark might not be kept."""
        if not self.home.can_record():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def failed(self, op: ops.AnyOp, number: int, *, length: int, start: int) -> None:
        """The peer did not do, or did not confirm, what was sent."""
        if isinstance(op, ops.Sync) and number == errno.ETIMEDOUT:
            return  # what it was to flush is unstable still
        try:
            if isinstance(op, ops.Sync):
                self.mark_unflushed(op.object)
            else:
                self.mark(op, length=length, start=start)
        except OSError as error:
            self.doubt_all(error)
        if number == errno.ESTALE:
            # Something, perhaps far above it, is not where it was located once: all is told anew.
            self.located[LIVE].intersection_update({ROOT_ID})
        if number != errno.ETIMEDOUT:
            self.note_error(op, describe(number))
            self.advance(Event.OP_LOST, f"the peer could not apply a change: {describe(number)}")

    def note_error(self, op: ops.AnyOp, reason: str) -> None:
        """Remember what went wrong, with a path where there is one."""
        object_id = getattr(op, "object", b"")
        inode = self._tree.table.by_id.get(object_id)
        path = inode.path().decode(errors="backslashreplace") if inode is not None else ""
        self.last_error = LastError("/" + path, reason)

    # Waiting -----------------------------------------------------------------------------------

    async def wait_room(self) -> None:
        """Wait until another operation may be sent, or the peer is lost."""
        try:
            await self.link.wait_room()
        except PeerLost:
            return

    async def bring_in_sync(self, inodes: tuple[Inode, ...]) -> bool:
        """Whether what a strict change touches is in sync; if not, wait for it to become so."""
        if self.log.is_empty and self.settling.is_empty:
            return True
        with trio.move_on_after(self.timeout_s):
            while self.live:
                waiting = [inode for inode in inodes if not self.is_clean(inode)]
                if not waiting:
                    return True
                for inode in waiting:
                    if inode not in self.urgent:
                        self.urgent.append(inode)
                self.wake_resync()
                self.wake_urgent()
                await self._progress.wait()
        return self.live and all(self.is_clean(inode) for inode in inodes)

    async def marks_durable(self) -> None:
        """If the peer lacks anything, what it lacks is recorded on stable storage."""
        if not self.gets_all:
            await self.home.make_durable()

    async def ask(self, op: ops.AnyOp, payload: bytes | None = None) -> ops.AnyAnswer:
        """Send on the bulk stream and wait for the answer. Raises PeerLost."""
        carries = type(op) in _CARRIES
        if carries:
            # Here, so that it leaves in the session that is looked at: a wait may outlast one.
            if not self.link.has_room(BULK):
                await self.link.wait_room(BULK)
            self.check_told()
        answer = await ask(self.link, op, payload)
        if carries:
            # Only now: what a checkpoint covered was applied before it.
            self.unstable.note(op, self._locator, length=len(payload) if payload else 0)
        return answer

    def check_told(self) -> None:
        """PeerLost where another session has begun since it was told that it is brought something.

        A resync ends with its session, also if that was replaced while nobody was looking: to what
        a new session found out (who is at the other end, what has to be asked first) it is blind.
        """
        if self.told_in != self.link.session:
            raise PeerLost("another session has begun")

    async def align(self, number: Callable[[], int]) -> None:
        """Tell the peer, in the order of the live stream, that it has everything up to a change.

        *number* is asked when that is sent. Nothing may be recorded for the peer then, or it is to
        be told again. Raises PeerLost.
        """
        if not self.understands(ops.Progress):
            return
        while not self.link.has_room():
            await self.link.wait_room()
        question = Question()
        self.link.send(ops.Progress(number()), None, question, LIVE)
        await question.answer()

    async def fence(self) -> None:
        """Wait until what is on its way on the live stream has been answered.

        Only `async` operations can be: all others hold claims, and the caller has its own. It does
        not wait for those that are sent meanwhile, which touch nothing that is claimed.
        """
        sent = self.unawaited
        while self.live and self.landed < sent:
            await trio.sleep(0.001)


def _not_counted(_began: int, _ended: int) -> None:
    """Nobody wants to know."""
