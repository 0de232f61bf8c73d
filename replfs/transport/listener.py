"""The listening side: one `Listener` per node, with at most one current `Session`.

A peer greets on a first connection (live stream) and is offered a session; its second greeting
(bulk stream) confirms it, and only then does it replace the current one. Each connection of a
session is known by the identity that ZeroMQ gave it; what comes from anywhere else is dropped.

Per stream, operations are applied strictly in order and each exactly once: the next number is
applied, an earlier one gets its remembered answer, a gap closes the session. Everything wrong
closes the session or, without one, is ignored; nothing is applied from it.
"""

from __future__ import annotations

import errno
import logging
import math
import secrets
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec
import trio
import zmq

from replfs.core import messages, ops, summary
from replfs.core.messages import BULK, LIVE, STREAMS, Hello, Welcome
from replfs.errors import ProtocolError, Refused
from replfs.transport.lane import Lane, size_of
from replfs.transport.security import Curve
from replfs.transport.socket import Listening, NotSent, Seldom
from replfs.transport.spin import Spin
from replfs.transport.wire import Wire, listen, wire_of_environment

logger = logging.getLogger(__name__)

SPIN_NS: Final = 200_000
TURN_MESSAGES: Final = 64
TURN_NS: Final = 5_000_000
"""After this much of either, other tasks get their turn."""
BATCH: Final = 16
DEFERRED_MAX: Final = 2048
OFFERED_MAX: Final = 8
OVER_MAX: Final = 8
"""Sessions that are over of which it is remembered what was applied."""
SILENT_UNTOLD: Final = 64
SILENCE_TIMEOUTS: Final = 3
NET_S: Final = 0.05
FAREWELL_S: Final = 0.1
LINGER_MS: Final = 300
STOPPED: Final = "the listener stops"
_SILENT: Final = frozenset({ops.Locate, ops.Forget, ops.Stable})
"""These have no answer."""


class Applier(Protocol):
    """Who a listener works for. All calls are made inline, in the order of the stream."""

    def welcome(self, hello: Hello) -> Welcome:
        """This node's side of the handshake. Raises `Refused(reason[, code])` to say no."""

    def opened(self, session: Session) -> None:
        """A new session is current; an older one has been closed before."""

    def closed(self, session: Session, reason: str) -> None:
        """The session is over; nothing of it will be applied any more."""

    def apply(
        self,
        session: Session,
        stream: int,
        seq: int,
        op: ops.AnyOp,
        payload: memoryview | bytes | None,
    ) -> ops.AnyAnswer | None:
        """Apply one operation. None: `session.answer` will be called for it later."""


def _nothing() -> None:
    """For a listener whose owner has nothing to do after an answer."""


class SessionStatistics(msgspec.Struct, frozen=True):
    """What one session has carried."""

    id: int
    name: str
    applied_live: int
    applied_bulk: int
    deferred: int
    retries: int
    received_bytes: int


class ListenerStatistics(msgspec.Struct, frozen=True):
    """A listener's counters since it was made, and its current session."""

    endpoint: str
    session: SessionStatistics | None
    sessions: int
    resumes: int
    refusals: int
    malformed: int
    strays: int
    denied_keys: int


class Session:
    """A session as the applier sees it."""

    def __init__(self, listener: Listener, number: int, hello: Hello, welcome: Welcome) -> None:
        self.id = number
        self.node = hello.node
        self.name = hello.name
        self.hello = hello
        self.offered = welcome
        self.is_open = False
        self.lanes = (Lane(LIVE), Lane(BULK))
        self.heard_ns = time.monotonic_ns()
        self.retries = 0
        self.received_bytes = 0
        self._listener = listener

    def answer(self, stream: int, seq: int, answer: ops.AnyAnswer) -> None:
        """Answer an operation for which `apply` returned None. Only in the event loop.

        Does nothing if the session is over or the operation has an answer.
        """
        lane = self.lanes[stream]
        if not self.is_open:
            return
        if seq == lane.applying:
            lane.applying = 0
        elif seq in lane.deferred:
            lane.deferred.remove(seq)
        else:
            return
        lane.batch.append((seq, answer))
        self._listener._deferred_answer(self, lane)  # noqa: SLF001 - two halves of one thing

    def applied(self, stream: int) -> tuple[int, int]:
        """How many operations were applied on *stream*, and their checksum.

        Asked from within `apply`, of those before that one.
        """
        lane = self.lanes[stream]
        return lane.applied, lane.checksum

    def close(self, reason: str) -> None:
        """End it from this side; the peer is told, and `Applier.closed` is called."""
        self._listener._close(self, reason)  # noqa: SLF001 - two halves of one thing

    def statistics(self) -> SessionStatistics:
        """Counters since the session was opened."""
        live, bulk = self.lanes
        return SessionStatistics(
            id=self.id,
            name=self.name,
            applied_live=live.applied,
            applied_bulk=bulk.applied,
            deferred=len(live.deferred) + len(bulk.deferred),
            retries=self.retries,
            received_bytes=self.received_bytes,
        )


def _fitting(batch: list[tuple[int, ops.AnyAnswer]]) -> int:
    """How many of these answers go into one message, at least one."""
    size = count = 0
    for _, answer in batch[:BATCH]:
        size += size_of(answer)
        if count and size > messages.HEAD_MAX // 2:
            break
        count += 1
    return count


class Listener:
    """Listens on *endpoint* and hands what peers send to *applier*.

    Args:
        context: the process's ZeroMQ context.
        endpoint: where to listen, `tcp://ADDRESS:PORT` or `ipc://PATH`.
        applier: applies operations.
        security: keys and allow-list, or None for plain text.
        peer_timeout_s: as the peers have it; three times this without a sign ends a session.
        spin_ns: how long to look for the next message before sleeping, while messages come.
        wire: who speaks; None: what the environment asks for.
        answered: called when operations were applied and their answers sent, for what need not
            come before that; some more may have been applied until then.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        applier: Applier,
        *,
        security: Curve | None = None,
        peer_timeout_s: float,
        spin_ns: int = SPIN_NS,
        wire: Wire | None = None,
        answered: Callable[[], None] = _nothing,
    ) -> None:
        self.endpoint = endpoint
        self._context = context
        self._applier = applier
        self._security = security
        self._timeout_s = peer_timeout_s
        self._timeout_ns = int(peer_timeout_s * 1e9)
        self._spin = Spin(spin_ns)
        self._wire = wire_of_environment() if wire is None else wire
        self._answered = answered
        self._socket: Listening | None = None
        self._session: Session | None = None
        self._offered: dict[int, Session] = {}
        self._over: dict[int, list[summary.Had]] = {}
        """What was applied in the last sessions, by stream."""
        self._owes = False
        """`answered` is to be called."""
        self._in_turn = False
        self._busy_turn = False
        self._complaints = Seldom()
        self._sessions = self._resumes = self._refusals = self._malformed_count = 0
        self._strays = 0

    def statistics(self) -> ListenerStatistics:
        """Counters since the listener was made."""
        return ListenerStatistics(
            endpoint=self.endpoint,
            session=None if self._session is None else self._session.statistics(),
            sessions=self._sessions,
            resumes=self._resumes,
            refusals=self._refusals,
            malformed=self._malformed_count,
            strays=self._strays,
            denied_keys=0 if self._socket is None else self._socket.denied,
        )

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; reports the endpoint it got.

        Raises:
            UsageError: it cannot listen there.
        """
        socket = self._socket = listen(
            self._context,
            self.endpoint,
            self._received,
            self._malformed,
            wire=self._wire,
            curve=self._security,
            frame_max=messages.HEAD_MAX,
            heartbeat_s=self._timeout_s,
            silence_s=self._timeout_s * SILENCE_TIMEOUTS,
            is_needed=self._is_needed,
        )
        self.endpoint = socket.endpoint
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(socket.watch)
                nursery.start_soon(self._watch)
                task_status.started(self.endpoint)
                await self._serve(socket)
        finally:
            if self._session is not None:
                self._close(self._session, STOPPED)
                # Closing at once could overtake the farewell: a DEALER that does not reconnect
                # drops what it has not read when the connection ends.
                with trio.CancelScope(shield=True):
                    await trio.sleep(FAREWELL_S)
            socket.close(LINGER_MS)

    # The loop ------------------------------------------------------------------------------------

    async def _serve(self, socket: Listening) -> None:
        clock = time.monotonic_ns
        handled = 0
        spin = self._spin
        since = clock()
        while True:
            count = self._turn(socket)
            handled += count
            if count:
                self._owes = True
            if count >= TURN_MESSAGES or handled >= TURN_MESSAGES or clock() - since > TURN_NS:
                handled = 0
                self._catch_up()
                await trio.lowlevel.checkpoint()
                since = clock()
                continue  # other tasks may have sent, so the socket must be looked at again
            deferred = self._awaits_answers()
            # What is awaited here is nothing that comes on the socket: its tasks go first.
            if not deferred and spin.begin():
                while not (found := socket.readable()):
                    if not spin.go_on():
                        break
                    if self._owes:
                        # Whoever was woken by the answer, maybe on this core, has gone on now.
                        self._catch_up()
                if found:
                    spin.paid()
                    continue
            self._catch_up()
            asleep = clock()
            await socket.wait(NET_S if deferred else math.inf)
            handled = 0
            since = clock()
            spin.slept(since - asleep)

    def _catch_up(self) -> None:
        """Do what need not come before the answers, if that has not been done."""
        if self._owes:
            self._owes = False
            self._answered()

    def _is_needed(self, identity: bytes) -> bool:
        """Whether it is a connection of a session, or of one that was offered."""
        sessions = [*self._offered.values()]
        if self._session is not None:
            sessions.append(self._session)
        return any(lane.identity == identity for one in sessions for lane in one.lanes)

    def _awaits_answers(self) -> bool:
        session = self._session
        return session is not None and any(lane.deferred for lane in session.lanes)

    def _turn(self, socket: Listening) -> int:
        """Handle what has come, and leave the socket empty unless TURN_MESSAGES were handled."""
        count = 0
        end = time.monotonic_ns() + TURN_NS
        self._in_turn = True
        try:
            while count < TURN_MESSAGES:
                if count > 1:
                    # More are likely: trying is cheaper than asking first, except at the end.
                    more = socket.receive()
                else:
                    more = socket.pending() and socket.receive()
                if more:
                    count += 1
                    if count == 1 and not self._busy_turn:
                        self._flush()  # alone, most likely: its sender is waiting
                    if time.monotonic_ns() < end:
                        continue
                    self._flush()
                    return TURN_MESSAGES
                if not self._flush():
                    break
            else:
                self._flush()
        finally:
            self._in_turn = False
            self._busy_turn = count > 2
        return count

    def _flush(self) -> bool:
        """Send the answers that have gathered; whether there were any."""
        session = self._session
        if session is None:
            return False
        sent = False
        for lane in session.lanes:
            if lane.batch or lane.applied - lane.told >= SILENT_UNTOLD:
                self._send_answers(session, lane)
                sent = True
        return sent

    def _send_answers(self, session: Session, lane: Lane) -> None:
        batch = lane.batch
        while True:
            count = _fitting(batch) if len(batch) > 1 else 1
            part, batch = batch[:count], batch[count:]
            if lane.identity:
                head = messages.encode_answers(lane.stream, session.id, lane.applied, part)
                if not self._send(lane.identity, head):
                    lane.identity = b""  # what is remembered goes with the next connection
            lane.told = lane.applied
            if not batch:
                break
        sent, lane.batch = lane.batch, []
        lane.remember(sent)  # not before: somebody waits for the answer

    def _send(self, identity: bytes, head: bytes) -> bool:
        """Whether it could be queued."""
        socket = self._socket
        if socket is None or socket.closed:
            return False
        try:
            socket.send(head, identity)
        except NotSent:
            return False
        if socket.is_edge_triggered and not self._in_turn and socket.pending():
            socket.poke()  # `send` may have hidden a message from the sleeping loop
        return True

    def _deferred_answer(self, session: Session, lane: Lane) -> None:
        """An answer came later than `apply`; inside a turn it waits for the turn's end."""
        if not self._in_turn and session is self._session:
            self._send_answers(session, lane)

    # Messages ------------------------------------------------------------------------------------

    def _received(self, identity: bytes, head: bytes, payload: memoryview | None) -> None:
        session = None
        try:
            header = messages.open_head(head, payload)
            kind = header.kind
            if kind == messages.HELLO:
                self._hello(identity, header.stream, header.seq, head)
                return
            session = self._session
            if session is None or session.id != header.session:
                self._strays += 1
                return
            lane = session.lanes[header.stream]
            if lane.identity != identity:
                session = None  # whoever this is, it is not the peer
                self._strays += 1
                return
            session.heard_ns = time.monotonic_ns()
            if kind == messages.OP:
                self._op(session, lane, header.seq, head, payload)
            elif kind == messages.PING:
                self._flush()
                self._send(identity, messages.encode_pong(session.id, header.seq, lane.applied))
            elif kind == messages.BYE:
                self._close(session, f"the peer: {messages.decode_bye(head)}", farewell=False)
            else:
                raise ProtocolError(f"message kind {kind} from a link")
        except ProtocolError as error:
            self._malformed(identity, str(error))

    def _malformed(self, identity: bytes, what: str) -> None:
        """Close the session whose connection this came from; ignore strangers."""
        self._malformed_count += 1
        session = self._session
        if session is not None and any(lane.identity == identity for lane in session.lanes):
            self._close(session, f"something wrong was received: {what}")
            return
        held_back = self._complaints.allow()
        if held_back is not None:
            logger.warning("ignored a message from a stranger: %s (%d more)", what, held_back)

    def _op(
        self, session: Session, lane: Lane, seq: int, head: bytes, payload: memoryview | None
    ) -> None:
        if seq != lane.applied + 1:
            self._out_of_order(session, lane, seq)
            return
        op = messages.decode_op(lane.stream, head, payload)
        session.received_bytes += len(head) if payload is None else len(head) + len(payload)
        lane.applying = seq
        answer: ops.AnyAnswer | None
        try:
            answer = self._applier.apply(session, lane.stream, seq, op, payload)
        except ProtocolError:
            raise
        except Exception:
            logger.exception("while applying %s", type(op).__name__)
            answer = ops.Done(errno.EIO)
        is_answered = not lane.applying
        lane.applied = seq
        lane.applying = 0
        lane.checksum = messages.chained(lane.checksum, head)
        if type(op) in _SILENT:
            return
        if answer is not None:
            lane.batch.append((seq, answer))
        elif not is_answered:
            if len(lane.deferred) >= DEFERRED_MAX:
                raise ProtocolError(f"{DEFERRED_MAX} operations without an answer")
            lane.deferred.add(seq)
        if len(lane.batch) >= BATCH:
            self._send_answers(session, lane)

    def _out_of_order(self, session: Session, lane: Lane, seq: int) -> None:
        if not 0 < seq <= lane.applied:
            raise ProtocolError(f"operation {seq} came where {lane.applied + 1} was due")
        session.retries += 1
        answer = lane.answers.get(seq)
        if answer is not None:  # if there is none yet, it comes when the operation is done
            lane.batch.append((seq, answer))

    # Sessions ------------------------------------------------------------------------------------

    def _hello(self, identity: bytes, stream: int, number: int, head: bytes) -> None:
        try:
            hello = messages.decode_hello(head)
            if hello.version != messages.PROTOCOL_VERSION:
                raise Refused(
                    f"protocol version {hello.version} is not supported, "
                    f"{messages.PROTOCOL_VERSION} is: use the same release on both nodes",
                    "version",
                )
            if stream != hello.stream:
                raise ProtocolError("a greeting for another stream")
            if hello.resume:
                self._go_on(identity, number, hello)
            elif stream != LIVE:
                raise ProtocolError("a session cannot begin with the bulk stream")
            else:
                self._offer(identity, number, hello)
        except Refused as error:
            self._refusals += 1
            reason = str(error.args[0]) if error.args else "refused"
            code = str(error.args[1]) if len(error.args) > 1 else "refused"
            self._send(identity, messages.encode_refuse(stream, number, reason, code))
        except ProtocolError:
            raise
        except Exception:
            logger.exception("while answering a greeting")
            reason = "the peer could not answer, see its log"
            self._send(identity, messages.encode_refuse(stream, number, reason, "internal"))

    def _offer(self, identity: bytes, number: int, hello: Hello) -> None:
        welcome = msgspec.structs.replace(
            self._applier.welcome(hello),
            version=messages.PROTOCOL_VERSION,
            clock_ns=time.time_ns(),
            session=secrets.randbits(64) or 1,
            resumed=False,
            applied=0,
        )
        session = Session(self, welcome.session, hello, welcome)
        session.lanes[LIVE].identity = identity
        while len(self._offered) >= OFFERED_MAX:
            self._offered.pop(next(iter(self._offered)))
        self._offered[session.id] = session
        self._send(identity, messages.encode_welcome(LIVE, number, welcome))

    def _go_on(self, identity: bytes, number: int, hello: Hello) -> None:
        session = self._session
        if session is None or session.id != hello.resume:
            session = self._offered.get(hello.resume)
            if session is None or hello.stream != BULK:
                raise Refused("this session is not known here any more", "unknown-session")
            self._open(session)
        if hello.node != session.node:
            raise Refused("this session belongs to another node", "unknown-session")
        session.heard_ns = time.monotonic_ns()
        lane = session.lanes[hello.stream]
        if hello.answered > lane.applied:
            raise Refused("answers were received that were never given", "unknown-session")
        if lane.identity:
            self._resumes += 1
        lane.identity = identity
        lane.told = lane.applied
        welcome = msgspec.structs.replace(
            session.offered,
            clock_ns=time.time_ns(),
            resumed=True,
            applied=lane.applied,
            had=self._over.get(hello.lost, []),
        )
        self._send(identity, messages.encode_welcome(hello.stream, number, welcome))
        # Whatever the old connection may have swallowed is answered again.
        lane.forget_until(hello.answered)
        lane.repeat()
        self._send_answers(session, lane)

    def _open(self, session: Session) -> None:
        del self._offered[session.id]
        if self._session is not None:
            self._close(self._session, f"{session.name} began a new session")
        self._session = session
        session.is_open = True
        self._sessions += 1
        logger.info("session with %s is up", session.name)
        try:
            self._applier.opened(session)
        except Exception:
            logger.exception("while opening a session")
            self._close(session, "it could not be opened")

    def _close(self, session: Session, reason: str, *, farewell: bool = True) -> None:
        if session is not self._session:
            return
        self._session = None
        session.is_open = False
        while len(self._over) >= OVER_MAX:
            self._over.pop(next(iter(self._over)))
        self._over[session.id] = [session.applied(stream) for stream in STREAMS]
        identity = session.lanes[LIVE].identity
        if farewell and identity:
            self._send(identity, messages.encode_bye(session.id, reason))
        level = logging.WARNING if farewell and reason != STOPPED else logging.INFO
        logger.log(level, "session with %s is over: %s", session.name, reason)
        try:
            self._applier.closed(session, reason)
        except Exception:
            logger.exception("while closing a session")

    async def _watch(self) -> None:
        """End sessions that have fallen silent, and forget offers that nobody took."""
        limit_ns = self._timeout_ns * SILENCE_TIMEOUTS
        while True:
            await trio.sleep(self._timeout_s / 2)
            now = time.monotonic_ns()
            session = self._session
            if session is not None and now - session.heard_ns > limit_ns:
                self._close(session, f"silent for {limit_ns / 1e9:.1f} s")
            for offered in list(self._offered.values()):
                if now - offered.heard_ns > limit_ns:
                    del self._offered[offered.id]
