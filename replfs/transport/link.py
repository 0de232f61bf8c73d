"""The dialling side: one `Link` per peer, with a live and a bulk stream to it.

A *session* is agreed in the handshake and outlives its TCP connections. Operations are numbered
per stream, kept until they are answered, and sent again, in order and under the same number, when
a broken connection has been replaced within `peer_timeout_s`; the peer applies each number once.
If that fails the session is lost: nobody knows then whether what was unanswered has been applied,
and the owner and every sink are told so.

Each connection is an object of its own (`socket.Connection`). What is handed to `send` never waits:
it leaves at once, or as soon as it can, or with the next connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

import msgspec
import trio
import zmq

from replfs.core import messages, ops, summary
from replfs.core.messages import BULK, LIVE, Hello, Refuse, Welcome
from replfs.errors import PeerLost, ProtocolError, Refused, UsageError
from replfs.transport.flow import (
    ANSWER_TYPES,
    CHECKPOINT_TIMEOUTS,
    DEFERRED_TIMEOUTS,
    Call,
    Flow,
    LinkState,
    LinkStatistics,
    cost_of,
)
from replfs.transport.security import Curve
from replfs.transport.socket import NotSent
from replfs.transport.wire import Wire, connect, wire_of_environment

logger = logging.getLogger(__name__)

BACKOFF_MIN_S: Final = 0.1
BACKOFF_MAX_S: Final = 5.0
REFUSED_BACKOFF_MIN_S: Final = 1.0
REFUSED_BACKOFF_MAX_S: Final = 30.0
PINGS_PER_TIMEOUT: Final = 5
CHECKS_PER_TIMEOUT: Final = 20
BUSY_CHECK_S: Final = 0.05
"""How often a stream with unanswered operations is looked at although nothing woke its task."""
FRUITLESS_RESUMES: Final = 3
STOPPED: Final = "this node ended the session"
RESUME_DELAY_MIN_S: Final = 0.02
RESUME_DELAY_MAX_S: Final = 0.5
LINGER_MS: Final = 300
"""How long a farewell may take to leave after its socket is closed."""


class Sink(Protocol):
    """What the caller hands in with an operation. Called synchronously; must not raise."""

    def answered(self, link: Link, answer: ops.AnyAnswer) -> None:
        """The peer's answer."""

    def lost(self, link: Link) -> None:
        """The session ended before an answer; the operation may or may not have been applied."""


class LinkOwner(Protocol):
    """Who a link works for. Called synchronously."""

    def hello(self) -> Hello:
        """This node, as it is now; asked before each connection. Raises `Refused`: not now."""

    def welcomed(self, link: Link, welcome: Welcome) -> None:
        """A new session is up and can be used at once. Raises `Refused` to give it up again."""

    def went_down(self, link: Link, reason: str) -> None:
        """An established session is over; called once for it, before the sinks' `lost`."""


def _not_compared(_stream: int, _what: str) -> None:
    """Nobody wants to know what the peer had of a session that was lost."""


class _Gone(Exception):
    """An attempt to connect failed; `unreachable` if nothing listens there at all."""

    def __init__(self, reason: str, *, unreachable: bool = False) -> None:
        super().__init__(reason)
        self.unreachable = unreachable


class Link:
    """The link to one peer. `is_up`, `session` and `outstanding` are plain attributes to read.

    Args:
        context: the process's ZeroMQ context.
        endpoint: where the peer listens.
        owner: told of sessions coming and going.
        peer_timeout_s: how long the peer may take for anything.
        security: keys, or None for plain text.
        name: the peer's name, in messages and to find its key.
        on_refused: called when the peer refuses a session, or the owner does.
        on_difference: called when a session is up and the peer says that of the one before, which
            was lost, it had something else than was sent; with the stream, and what, in words.
        wire: who speaks; None: what the environment asks for.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        owner: LinkOwner,
        *,
        peer_timeout_s: float,
        security: Curve | None = None,
        name: str,
        on_refused: Callable[[Link, Refuse], None] | None = None,
        on_difference: Callable[[int, str], None] = _not_compared,
        wire: Wire | None = None,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        self.is_up = False
        self.session = 0
        self.outstanding = 0
        """Operations on the live stream that have a sink and no answer."""
        self._context = context
        self._owner = owner
        self._security = security
        self._on_refused = on_refused
        self._on_difference = on_difference
        self._lost = summary.Lost()
        """The last session that was established and is over, and in which nobody disagreed."""
        self._is_disputed = False
        self._wire = wire_of_environment() if wire is None else wire
        self._timeout_s = peer_timeout_s
        self._timeout_ns = int(peer_timeout_s * 1e9)
        self._flows: tuple[Flow[Sink], Flow[Sink]] = (Flow(LIVE), Flow(BULK))
        self._established = False
        self._doom = ""
        self._retry = trio.Event()
        self._scope: trio.CancelScope | None = None
        self._nursery: trio.Nursery | None = None
        self._greetings = 0
        self._pings = 0
        self._ping_sent_ns = 0
        self._next_ping_ns = 0
        self._state: LinkState = "closed"
        self._since_ns = time.monotonic_ns()
        self.rtt_ns = 0
        """The round trip measured last; 0: none yet."""
        self._sent_ops = self._sent_bytes = self._answers = 0
        self._sessions = self._resumes = self._attempts = 0
        self._last_error = ""

    # For the caller ------------------------------------------------------------------------------

    def send(
        self, op: ops.AnyOp, payload: bytes | None, sink: Sink | None, stream: int = LIVE
    ) -> int:
        """Send an operation; its sequence number. Never waits: see `has_room` for the window.

        Answers of earlier operations may be delivered meanwhile.

        Raises:
            PeerLost: there is no session.
            ProtocolError: the operation cannot be sent; nothing has happened.
        """
        if not self.is_up:
            raise PeerLost(f"{self.name} is not connected")
        flow = self._flows[stream]
        seq = flow.next_seq
        head = messages.encode_op(stream, self.session, seq, op, payload)
        alone = not flow.calls and not self._ping_sent_ns
        connection = flow.connection if flow.open else None
        try:
            if connection is not None:
                connection.send(head, payload)
        except NotSent as error:
            self._broken(flow, error)
            connection = None
        finally:
            # Only now: meanwhile the peer is at work.
            self._keep(flow, seq, op, head, payload, sink)
        # Relies on: zmq_send looks for commands before it hands a message on, never after; so it
        # can have consumed the sign of an answer only if one was due.
        if connection is not None and connection.is_edge_triggered and not alone:
            connection.drain()
        return seq

    def _keep(
        self,
        flow: Flow[Sink],
        seq: int,
        op: ops.AnyOp,
        head: bytes,
        payload: bytes | None,
        sink: Sink | None,
    ) -> None:
        """Operation *seq* is on its way, now or with the next connection, until it is answered."""
        kind = type(op)
        cost = cost_of(op, head, payload)
        flow.next_seq = seq + 1
        before = flow.checksum
        flow.checksum = messages.chained(before, head)
        answer_type = ANSWER_TYPES.get(kind, ops.Done)
        timeouts = CHECKPOINT_TIMEOUTS if kind is ops.Checkpoint else DEFERRED_TIMEOUTS
        flow.calls[seq] = Call(
            head, payload, sink, answer_type, cost, time.monotonic_ns(), timeouts, before
        )
        flow.bytes += cost
        self._sent_ops += 1
        self._sent_bytes += len(head) if payload is None else len(head) + len(payload)
        if sink is None:
            flow.silent.append(seq)
        elif flow.stream == LIVE:
            self.outstanding += 1

    def pump(self) -> bool:
        """Handle what has come on the live stream, without waiting; whether anything had."""
        connection = self._flows[LIVE].connection
        if connection is None or connection.closed:
            return False
        return connection.readable() and connection.drain() > 0

    @property
    def fd(self) -> int:
        """For poll(2): readable when `pump` may have something to do; -1 if there is nothing."""
        connection = self._flows[LIVE].connection
        return -1 if connection is None or connection.closed else connection.fd

    def has_room(self, stream: int = LIVE, queue_bytes: int = 0) -> bool:
        """Whether the window of *stream* admits another operation.

        With *queue_bytes*, one that nobody awaits: whether so much and no more is on the way.
        """
        return self._flows[stream].has_room(queue_bytes)

    async def wait_room(self, stream: int = LIVE) -> None:
        """Wait until `has_room`. Raises `PeerLost` if there is no session."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            if not self.is_up:
                raise PeerLost(f"{self.name} is not connected")
            flow = self._flows[stream]
            if flow.has_room():
                return
            await flow.room.park()

    def sent(self, stream: int) -> tuple[int, int]:
        """How many operations were sent on *stream* in this session, and their checksum."""
        flow = self._flows[stream]
        return flow.next_seq - 1, flow.checksum

    def retry(self) -> None:
        """What was refused may not be any more: try now."""
        self._retry.set()

    def fail(self, reason: str) -> None:
        """End the session, if there is one; the link then tries to get another."""
        if self.is_up:
            self._end(reason)

    def disagreed(self, reason: str) -> None:
        """End the session, for the peer has not had what was sent; the next one need not ask.

        Not before whoever is at it has ended: this may be inside a `send`.
        """
        if self.is_up:
            self._is_disputed = True
            self._fate(reason)

    def statistics(self) -> LinkStatistics:
        """Counters since the link was made, and its state."""
        flows = self._flows
        state = self._state
        if state == "up" and not (flows[LIVE].open and flows[BULK].open):
            state = "resuming"
        return LinkStatistics(
            name=self.name,
            endpoint=self.endpoint,
            state=state,
            since_ns=self._since_ns,
            session=self.session,
            rtt_ns=self.rtt_ns,
            outstanding=sum(len(flow.calls) for flow in flows),
            outstanding_bytes=sum(flow.bytes for flow in flows),
            sent_ops=self._sent_ops,
            sent_bytes=self._sent_bytes,
            answers=self._answers,
            sessions=self._sessions,
            resumes=self._resumes,
            attempts=self._attempts,
            last_error=self._last_error,
        )

    async def run(self) -> None:
        """Keep a session going, until cancelled."""
        delay = BACKOFF_MIN_S
        refused_delay = REFUSED_BACKOFF_MIN_S
        try:
            async with trio.open_nursery() as self._nursery:
                while True:
                    if self._state != "refused":
                        self._enter("connecting")
                    began = time.monotonic_ns()
                    try:
                        await self._session()
                    except Refused as error:
                        self._refused(error)
                        if error.args[1:] in {("frozen",), ("step-down",)}:
                            # It passes, and much may be waiting for it.
                            refused_delay = REFUSED_BACKOFF_MIN_S
                        self._retry = trio.Event()
                        with trio.move_on_after(refused_delay):
                            await self._retry.wait()
                        refused_delay = min(refused_delay * 2, REFUSED_BACKOFF_MAX_S)
                        if self._retry.is_set():
                            refused_delay = REFUSED_BACKOFF_MIN_S
                        continue
                    except _Gone as error:
                        if self._security is not None:
                            self._security.failed(self.name)
                        self._last_error = str(error)
                        self._enter("connecting")
                    else:
                        refused_delay = REFUSED_BACKOFF_MIN_S
                        if time.monotonic_ns() - began > self._timeout_ns:
                            delay = BACKOFF_MIN_S
                    await trio.sleep(delay)
                    delay = min(delay * 2, BACKOFF_MAX_S)
        finally:
            self._nursery = None
            self._enter("closed")

    async def ask(self, hello: Hello) -> Welcome:
        """Greet with *hello* and return the reply, without beginning a session. Not while `run`.

        Raises:
            Refused: the peer says no.
            PeerLost: it does not answer within the peer timeout.
        """
        flow: Flow[Sink] = Flow(LIVE)
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                return await self._greet(flow, 0, self._timeout_s, hello)
            except _Gone as gone:
                error: Refused | PeerLost = PeerLost(str(gone))
            except Refused as refusal:
                error = refusal
            finally:
                self._nursery = None
                flow.close()
                nursery.cancel_scope.cancel()
        raise error

    # Sessions ------------------------------------------------------------------------------------

    def _enter(self, state: LinkState) -> None:
        if state != self._state:
            self._state = state
            self._since_ns = time.monotonic_ns()

    def _refused(self, error: Refused) -> None:
        reason = str(error.args[0]) if error.args else "refused"
        code = str(error.args[1]) if len(error.args) > 1 else "refused"
        if reason != self._last_error:
            logger.warning("no session with %s: %s", self.name, reason)
        self._last_error = reason
        self._enter("refused")
        if self._on_refused is not None:
            self._on_refused(self, Refuse(reason, code))

    async def _session(self) -> None:
        """One session from greeting to end. Raises `_Gone` or `Refused` if there is none."""
        live, bulk = self._flows = (Flow(LIVE), Flow(BULK))
        try:
            welcome = await self._greet(live, 0, self._timeout_s)
            self.session = welcome.session
            # The second greeting confirms the session: only now does the peer give up an older
            # one, so a greeting that was under way too long cannot replace anything.
            second = await self._greet(bulk, self.session, self._timeout_s)
            if not self.session or second.session != self.session or second.applied:
                raise _Gone("the peer gave each stream another session")
            now = time.monotonic_ns()
            for flow in self._flows:
                flow.open = True
                flow.progress_ns = flow.heard_ns = now
            self.outstanding = 0
            self._doom = ""
            self._is_disputed = False
            self._ping_sent_ns = 0
            self._next_ping_ns = now
            self.is_up = True
            self._owner.welcomed(self, welcome)
            if not self.is_up:
                return
            self._established = True
            self._sessions += 1
            self._last_error = ""
            self._enter("up")
            logger.info("session with %s at %s is up", self.name, self.endpoint)
            # Nothing was sent in this one yet.
            for stream, what in self._lost.differences(second.had):
                self._on_difference(stream, what)
            async with trio.open_nursery() as nursery:
                self._scope = nursery.cancel_scope
                nursery.start_soon(self._serve, live)
                nursery.start_soon(self._serve, bulk)
                nursery.start_soon(self._watch)
        finally:
            self._scope = None
            if self.is_up:
                self._end(STOPPED)
            for flow in (live, bulk):
                flow.close(LINGER_MS)

    def _end(self, reason: str, *, farewell: bool = True) -> None:
        """The session is over, whoever noticed."""
        self.is_up = False
        self._last_error = reason
        live = self._flows[LIVE]
        linger_ms = 0
        if farewell and live.open and live.connection is not None:
            try:
                live.connection.send(messages.encode_bye(self.session, reason))
                linger_ms = LINGER_MS
            except NotSent:
                pass
        # What has not left yet must not leave any more: the owner takes it for lost. Only
        # the farewell of an idle stream may linger.
        if any(flow.calls for flow in self._flows):
            linger_ms = 0
        for flow in self._flows:
            flow.close(linger_ms)
        self.outstanding = 0
        if self._established:
            self._established = False
            sums = [] if self._is_disputed else [flow.sums() for flow in self._flows]
            self._lost = summary.Lost(self.session, sums)
            level = logging.INFO if reason == STOPPED else logging.WARNING
            logger.log(level, "session with %s is over: %s", self.name, reason)
            try:
                self._owner.went_down(self, reason)
            except Exception:
                logger.exception("while telling that the session with %s is over", self.name)
        for flow in self._flows:
            calls, flow.calls = flow.calls, {}
            flow.silent.clear()
            flow.bytes = 0
            for call in calls.values():
                if call.sink is not None:
                    try:
                        call.sink.lost(self)
                    except Exception:
                        logger.exception("while telling that an operation was lost")
            flow.room.unpark_all()
        if self._scope is not None:
            self._scope.cancel()

    async def _greet(
        self, flow: Flow[Sink], resume: int, seconds: float, hello: Hello | None = None
    ) -> Welcome:
        """Connect *flow* and agree on a session. Raises `_Gone` or `Refused`."""
        nursery = self._nursery
        if nursery is None:
            raise _Gone("the link is not running")
        self._attempts += 1
        self._greetings += 1
        flow.greeting = self._greetings
        flow.reply = None
        hello = msgspec.structs.replace(
            hello or self._owner.hello(),
            version=messages.PROTOCOL_VERSION,
            clock_ns=time.time_ns(),
            resume=resume,
            answered=flow.answered(),
            stream=flow.stream,
            lost=self._lost.session,
        )
        try:
            connection = connect(
                self._context,
                self.endpoint,
                partial(self._received, flow),
                self._malformed,
                wire=self._wire,
                curve=self._security,
                peer=self.name,
                frame_max=messages.HEAD_MAX,
            )
        except UsageError as error:
            raise _Gone(f"cannot connect: {error}") from error
        flow.connection = connection
        connected = False
        try:
            nursery.start_soon(connection.watch)
            connection.send(messages.encode_hello(flow.greeting, hello))
            deadline = trio.current_time() + seconds
            while flow.reply is None:
                connection.drain()
                if flow.reply is not None:
                    break
                if connection.gone:
                    raise _Gone(connection.gone, unreachable=connection.unreachable)
                left = deadline - trio.current_time()
                if left <= 0:
                    what = "answer to the greeting" if connection.established else "connection"
                    raise _Gone(f"no {what} for {seconds:.1f} s")
                await connection.wait(left)
            reply: Welcome | Refuse = flow.reply
            if isinstance(reply, Refuse):
                raise Refused(reply.reason, reply.code)
            connected = True
            return reply
        except NotSent as error:
            raise _Gone(f"cannot greet {self.endpoint}: {error}") from error
        finally:
            if not connected:
                connection.close()

    async def _serve(self, flow: Flow[Sink]) -> None:
        """Receive on one stream, and replace its connection when it breaks."""
        while True:
            connection = flow.connection
            if connection is None:
                return
            limit = 256
            count = connection.drain(limit)
            if self._doom:
                self.fail(self._doom)
            if not self.is_up:
                return
            if connection.gone:
                await self._resume(flow, connection.gone)
            elif count >= limit:
                await trio.lowlevel.checkpoint()
            else:
                await connection.wait()

    async def _resume(self, flow: Flow[Sink], reason: str) -> None:
        began = trio.current_time()
        delay = RESUME_DELAY_MIN_S
        flow.close()
        self._last_error = reason
        flow.fruitless += 1
        if flow.calls and flow.fruitless > FRUITLESS_RESUMES:
            self.fail(f"{reason}, again and again")
        while self.is_up:
            elapsed = trio.current_time() - began
            left = self._timeout_s - elapsed
            if left <= 0:
                self.fail(f"{reason}, and no other came about for {self._timeout_s:.1f} s")
                return
            try:
                welcome = await self._greet(flow, self.session, left)
            except Refused as error:
                self.fail(f"{reason}, and the peer does not go on: {error.args[0]}")
            except _Gone as error:
                # A peer that is not there at all has lost the session with its memory: waiting
                # for it would only delay applications.
                if error.unreachable and elapsed > min(1.0, self._timeout_s / 5):
                    self.fail(f"{reason}, then: {error}")
                    return
                await trio.sleep(min(delay, left))
                delay = min(delay * 2, RESUME_DELAY_MAX_S)
            else:
                self._resumed(flow, welcome)
                return

    def _resumed(self, flow: Flow[Sink], welcome: Welcome) -> None:
        """Send again what the peer has not applied; the answers to the rest come by themselves."""
        connection = flow.connection
        if connection is None or not self.is_up:
            return
        if welcome.session != self.session or not welcome.resumed:
            self.fail("the peer went on with another session")
            return
        try:
            flow.settle(welcome.applied, time.monotonic_ns())
        except ProtocolError as error:
            self.fail(str(error))
            return
        now = time.monotonic_ns()
        flow.open = True
        flow.heard_ns = now
        flow.progress_ns = max(flow.progress_ns, now - self._timeout_ns // 2)
        if flow.stream == LIVE:
            self._ping_sent_ns = 0
            self._next_ping_ns = now
        self._resumes += 1
        try:
            for seq, call in flow.calls.items():
                if seq > welcome.applied:
                    connection.send(call.head, call.payload)
        except NotSent as error:
            self._broken(flow, error)
        logger.info("the connection to %s was replaced, the session goes on", self.name)

    def _broken(self, flow: Flow[Sink], error: NotSent) -> None:
        flow.open = False
        connection = flow.connection
        if connection is not None:
            connection.gone = connection.gone or f"cannot send: {error}"
            connection.poke()

    # Messages ------------------------------------------------------------------------------------

    def _received(self, flow: Flow[Sink], _identity: bytes, head: bytes, payload: Any) -> None:
        try:
            header = messages.open_head(head, payload)
            if header.stream != flow.stream:
                raise ProtocolError(f"a message of stream {header.stream} on stream {flow.stream}")
            kind = header.kind
            if kind == messages.ANSWER:
                if self.is_up and header.session == self.session:
                    self._answered(flow, header.seq, messages.decode_answers(head))
            elif kind == messages.PONG:
                if self.is_up and header.session == self.session:
                    self._pong(flow, header.seq, messages.decode_pong(head))
            elif kind == messages.WELCOME:
                if header.seq == flow.greeting:
                    flow.reply = messages.decode_welcome(head)
            elif kind == messages.REFUSE:
                if header.seq == flow.greeting:
                    flow.reply = messages.decode_refuse(head)
            elif kind == messages.BYE:
                if self.is_up and header.session == self.session:
                    self._fate(f"the peer ended the session: {messages.decode_bye(head)}")
            else:
                raise ProtocolError(f"message kind {kind} from a listener")
        except ProtocolError as error:
            self._malformed(b"", str(error))

    def _malformed(self, _identity: bytes, what: str) -> None:
        self._fate(f"the peer sent something wrong: {what}")

    def _fate(self, reason: str) -> None:
        """End the session soon, in its own task: this may be inside somebody's `send`."""
        self._doom = self._doom or reason
        for flow in self._flows:
            if flow.connection is not None:
                flow.connection.poke()

    def _answered(
        self, flow: Flow[Sink], applied: int, answers: list[tuple[int, ops.AnyAnswer]]
    ) -> None:
        now = time.monotonic_ns()
        flow.settle(applied, now)
        flow.heard(now)
        calls = flow.calls
        for seq, answer in answers:
            call = flow.take(seq, answer)
            if call is None:
                continue  # answered before the connection was replaced
            self._answers += 1
            sink = call.sink
            if sink is None:
                continue
            if flow.stream == LIVE:
                self.outstanding -= 1
            try:
                sink.answered(self, answer)
            except Exception:
                logger.exception("while delivering an answer from %s", self.name)
            if flow.calls is not calls:
                return  # the sink ended the session
        if flow.room and flow.has_room():
            flow.room.unpark_all()

    def _pong(self, flow: Flow[Sink], number: int, applied: int) -> None:
        flow.heard_ns = time.monotonic_ns()
        flow.settle(applied, flow.heard_ns)
        if number == self._pings and self._ping_sent_ns:
            self.rtt_ns = flow.heard_ns - self._ping_sent_ns
            self._ping_sent_ns = 0
        if flow.room and flow.has_room():
            flow.room.unpark_all()

    # Deadlines -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Heartbeats and deadlines, and the net under the edge-triggered descriptors."""
        idle_s = self._timeout_s / CHECKS_PER_TIMEOUT
        sent_before = -1
        while self.is_up:
            now = time.monotonic_ns()
            busy = self._sent_ops != sent_before
            sent_before = self._sent_ops
            for flow in self._flows:
                if not flow.open or flow.connection is None:
                    continue
                overdue = flow.overdue(now, self._timeout_ns)
                if overdue:
                    self._end(overdue, farewell=False)
                    return
                busy = busy or bool(flow.calls)
                flow.connection.drain()
            if self._doom:
                self.fail(self._doom)
            if not self.is_up:
                return
            self._heartbeat(now)
            await trio.sleep(min(idle_s, BUSY_CHECK_S) if busy else idle_s)

    def _heartbeat(self, now: int) -> None:
        live = self._flows[LIVE]
        if not live.open or live.connection is None:
            return
        if self._ping_sent_ns:
            if now - max(self._ping_sent_ns, live.heard_ns) > self._timeout_ns:
                self._end(f"no answer for {self._timeout_s:.1f} s", farewell=False)
        elif now >= self._next_ping_ns:
            self._pings += 1
            self._ping_sent_ns = now
            self._next_ping_ns = now + self._timeout_ns // PINGS_PER_TIMEOUT
            try:
                live.connection.send(messages.encode_ping(self.session, self._pings))
            except NotSent as error:
                self._broken(live, error)
            else:
                live.connection.drain()
