"""The network between nodes: what `transport` promises, and nothing more.

Operations of one stream arrive in order, each at most once, after any delay. A connection may be
cut at any moment, in one direction or in both: of the operations under way a part still arrives,
later, until the next session begins; answers are lost; and either side notices only after a while,
or not at all if it still hears the other. `FakeLink` and `FakeListener` have
the faces that `transport.link.Link` and `transport.listener.Listener` show to the nodes.
"""

from __future__ import annotations

import itertools
import random
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import trio
from simulation.harness.life import Life, acting

from replfs.core import messages, ops, summary
from replfs.core.messages import Hello, Refuse, Welcome
from replfs.errors import PeerLost, Refused

LIVE, BULK = 0, 1
_BACKOFF_S = (0.1, 0.2, 0.4, 1.0)


class Conditions:
    """How the network behaves; drawn once a run."""

    def __init__(self, rng: random.Random) -> None:
        self.window = rng.choice((2, 4, 16, 512))
        self.latency_s = rng.choice((0.0001, 0.001, 0.02))
        self.idle_share = rng.choice((0.0, 0.2, 0.9))
        """Of deliveries, how many happen at once, without any other task in between."""
        self.eager_share = rng.choice((0.0, 0.3, 1.0))
        """Of calls that may deliver answers on the way, how many do."""


class Network:
    """All endpoints."""

    def __init__(
        self, rng: random.Random, nursery: trio.Nursery, trouble: Callable[[str], None]
    ) -> None:
        self.rng = rng
        self.nursery = nursery
        self.trouble = trouble
        self.note: Callable[[str], None] | None = None
        """Told of everything that arrives, where somebody wants to read it."""
        self.tamper: Callable[[Wire, Lane], None] = lambda _wire, _lane: None
        """May change what is about to arrive, as `transport` promises never to do."""
        self.on_disagreement = trouble
        """Told when a replica has not had what its primary says it has sent."""
        self.on_difference = trouble
        """Told when a replica had something else of a lost session than its primary sent in it."""
        self.on_welcomed: Callable[[str, str], None] = lambda _by, _name: None
        """Told when a primary has agreed to a session with a node."""
        self.conditions = Conditions(rng)
        self.listeners: dict[str, FakeListener] = {}
        self.links: list[FakeLink] = []
        """All that run."""
        self.blocked: set[tuple[str, str]] = set()
        """(from, to): nothing passes."""
        self.sessions = itertools.count(1)
        self.delivered = 0

    def delay_s(self) -> float:
        """How long something takes this time."""
        latency = self.conditions.latency_s
        return self.rng.choice((0.0, latency, latency, latency * 20 * self.rng.random()))

    def cut(self, one: str, other: str) -> None:
        """From here on nothing new passes from *one* node to the *other*."""
        self.blocked.add((one, other))
        for link in self.links:
            if link.wire is None:
                continue
            ends = (link.life.name, link.wire.listener.life.name)
            if ends == (one, other):
                link.wire.cut(answers=False)
            elif ends == (other, one):
                link.wire.cut(requests=False)

    def join(self, one: str, other: str) -> None:
        """It passes again."""
        self.blocked.discard((one, other))

    def passes(self, one: str, other: str) -> bool:
        """Whether it does."""
        return (one, other) not in self.blocked

    def died(self, life: Life) -> None:
        """A process ended: what was under way to it arrives nowhere, and others find out."""
        for link in [link for link in self.links if link.life is life]:
            link.is_up = False
            if link.wire is not None:
                link.wire.cut(noticed=True)
            self.links.remove(link)
        for listener in [one for one in self.listeners.values() if one.life is life]:
            listener.died()


class Lane:
    """One stream of one session, from the primary's hand to the replica's answer."""

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.queue: deque[tuple[int, ops.AnyOp, bytes | None, bytes]] = deque()
        """Numbers (0: nobody awaits it), operations, payloads, and the messages' heads."""
        self.sent = self.applied = (0, summary.NOTHING)
        """How many operations, and their running checksum: at the primary, at the replica."""
        self.limit: int | None = None
        """How many of the queue still arrive; None: all."""
        self.more = trio.Event()


class Wire:
    """One session as the network has it. The replica sees it as its `Session`."""

    def __init__(
        self,
        network: Network,
        link: FakeLink,
        listener: FakeListener,
        number: int,
        hello: Hello,
        offered: Welcome,
    ):
        self.hello = hello
        self.offered = offered
        self.network = network
        self.link = link
        self.listener = listener
        self.id = number
        self.name = hello.name
        self.node = hello.node
        self.lanes = (Lane(LIVE), Lane(BULK))
        self.answers: deque[tuple[int, int, ops.AnyAnswer]] = deque()
        self.answered = trio.Event()
        self.requests_cut = self.answers_cut = False
        self._silent_ns = 0
        self.is_open = True
        """At the replica: it applies what arrives."""
        self.drained = trio.Event()

    @property
    def is_cut(self) -> bool:
        """It will be given up."""
        return self.requests_cut or self.answers_cut

    @property
    def is_busy(self) -> bool:
        """Something will still arrive at the replica."""
        return any(lane.queue and lane.limit != 0 for lane in self.lanes)

    @property
    def heard_ns(self) -> int:
        """When the replica last heard of the primary."""
        if self.requests_cut:
            return self._silent_ns
        return int(time.monotonic() * 2) * 500_000_000

    def start(self) -> None:
        outer, Life.current = Life.current, None
        try:
            for lane in self.lanes:
                self.network.nursery.start_soon(self._deliver, lane)
            self.network.nursery.start_soon(self._return)
        finally:
            Life.current = outer

    # To the replica --------------------------------------------------------------------------

    async def _deliver(self, lane: Lane) -> None:
        network = self.network
        while self.is_open and lane.limit != 0:
            if not lane.queue:
                if lane.limit is not None:
                    return
                lane.more = trio.Event()
                await lane.more.wait()
                continue
            if network.rng.random() >= network.conditions.idle_share:
                await trio.sleep(network.delay_s())
                if not self._may_deliver(lane):
                    continue
            self.deliver_one(lane)

    def _may_deliver(self, lane: Lane) -> bool:
        return self.is_open and lane.limit != 0 and bool(lane.queue)

    def deliver_one(self, lane: Lane) -> None:
        """The first of the queue arrives."""
        self.network.tamper(self, lane)
        if not lane.queue:
            return
        seq, op, payload, head = lane.queue.popleft()
        if lane.limit is not None:
            lane.limit -= 1
        self.network.delivered += 1
        life = self.listener.life
        answer: ops.AnyAnswer | None = None
        with acting(life):
            try:
                answer = self.listener.applier.apply(self, lane.stream, seq, op, payload)
            except Exception as error:  # the real listener answers EIO: it is a defect all the same
                if not life.dead:
                    self.network.trouble(f"{life.name}: {op!r} raised {error!r}")
                    raise
        if self.network.note is not None:
            self.network.note(
                f"{self.id}.{lane.stream}.{seq} {life.name} {shown(op)} -> {shown(answer)}"
            )
        if life.dead:
            return
        if isinstance(answer, ops.Done) and answer.errno == ops.DISAGREES:
            self.network.on_disagreement(f"{life.name} has not had what was sent: {shown(op)}")
        number, checksum = lane.applied
        lane.applied = number + 1, messages.chained(checksum, head)
        is_silent = isinstance(op, ops.Locate | ops.Forget | ops.Stable)
        if answer is not None and not is_silent and seq:
            self.answer(lane.stream, seq, answer)
        # Several operations may have arrived at once.
        if not lane.queue or self.network.rng.random() < 0.5:
            with acting(life):
                self.listener.answered()

    def applied(self, stream: int) -> tuple[int, int]:
        """Session.applied: what the replica has had."""
        return self.lanes[stream].applied

    def answer(self, stream: int, seq: int, answer: ops.AnyAnswer) -> None:
        """Session.answer: on its way back."""
        if not self.answers_cut:
            self.answers.append((stream, seq, answer))
            self.answered.set()

    # To the primary --------------------------------------------------------------------------

    async def _return(self) -> None:
        network = self.network
        while not self.answers_cut:
            if not self.answers:
                self.answered = trio.Event()
                await self.answered.wait()
                continue
            if network.rng.random() >= network.conditions.idle_share:
                await trio.sleep(network.delay_s())
            self.return_all()
            await trio.lowlevel.checkpoint()

    def return_all(self) -> bool:
        """All answers that are there reach the primary; whether there were any."""
        found = False
        while self.answers and not self.answers_cut:
            stream, seq, answer = self.answers.popleft()
            with acting(self.link.life):
                self.link.answered(self, stream, seq, answer)
            found = True
        return found

    # The end ---------------------------------------------------------------------------------

    def cut(self, *, requests: bool = True, answers: bool = True, noticed: bool = False) -> None:
        """Nothing new goes in; a part of what was under way still comes out; no answers."""
        was_cut = self.is_cut
        if answers and not self.answers_cut:
            self.answers_cut = True
            self.answers.clear()
            self.answered.set()
        if requests and not self.requests_cut:
            self._silent_ns = self.heard_ns
            self.requests_cut = True
            for lane in self.lanes:
                lane.limit = self.network.rng.randint(0, len(lane.queue))
                lane.more.set()
            self._watch(self._fall_silent)
        if not noticed and not was_cut:
            self._watch(self._notice)

    def _watch(self, watch: Callable[[], Any]) -> None:
        outer, Life.current = Life.current, None
        self.network.nursery.start_soon(watch)
        Life.current = outer

    async def _fall_silent(self) -> None:
        """The replica ends the session when it has not heard of the primary for long."""
        await trio.sleep(3 * self.link.timeout_s)
        if self.is_open and not self.listener.life.dead:
            with acting(self.listener.life):
                self.close("silent")

    async def _notice(self) -> None:
        rng = self.network.rng
        await trio.sleep(rng.choice((0.0, rng.random() * 0.01, rng.random() * self.link.timeout_s)))
        with acting(self.link.life):
            self.link.lost(self, "no answer for 5.0 s")

    def shut(self) -> None:
        """The replica takes nothing of it any more."""
        self.is_open = False
        self.listener.over[self.id] = [lane.applied for lane in self.lanes]
        for lane in self.lanes:
            lane.more.set()

    def close(self, reason: str) -> None:
        """Session.close: the replica ends it."""
        if self.is_open:
            self.shut()
            self.cut()
            if self.listener.wire is self:
                self.listener.wire = None
            self.listener.applier.closed(self, reason)


class FakeLink:
    """`transport.link.Link`, as its owner sees it."""

    network: Network

    def __init__(
        self,
        context: Any,
        endpoint: str,
        owner: Any,
        *,
        peer_timeout_s: float,
        security: Any = None,
        name: str,
        on_refused: Any = None,
        on_difference: Callable[[int, str], None] = lambda _stream, _what: None,
    ) -> None:
        del context, security
        self._on_refused = on_refused
        self._on_difference = on_difference
        self._lost = summary.Lost()
        self._sums: tuple[dict[int, int], dict[int, int]] = ({}, {})
        """The running checksums of what was sent and, as far as is known, applied last or never."""
        self.name = name
        self.endpoint = endpoint
        self.owner = owner
        self.is_up = False
        self.session = 0
        self.outstanding = 0
        self.rtt_ns = 0
        self.timeout_s = peer_timeout_s
        self.wire: Wire | None = None
        self.refused = ""
        self._calls: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
        self._next = [1, 1]
        self._room = trio.Event()
        self._over = trio.Event()
        life = Life.current
        if life is None:
            raise RuntimeError("a link belongs to a life")
        self.life = life

    # For the caller --------------------------------------------------------------------------

    @property
    def is_connected(self) -> bool:
        """Whether there is a session, not only in this node's eyes."""
        return self.wire is not None and not self.wire.is_cut

    def send(self, op: ops.AnyOp, payload: bytes | None, sink: Any, stream: int = LIVE) -> int:
        """Into the wire."""
        if not self.is_up or self.wire is None:
            raise PeerLost(f"{self.name} is not connected")
        seq = self._next[stream]
        head = messages.encode_op(stream, self.session, seq, op, payload)
        op = messages.decode_op(stream, head, payload)
        self._next[stream] = seq + 1
        wire, lane = self.wire, self.wire.lanes[stream]
        lane.sent = seq, messages.chained(lane.sent[1], head)
        self._sums[stream][seq] = lane.sent[1]
        if sink is not None:
            self._calls[stream][seq] = sink
            if stream == LIVE:
                self.outstanding += 1
        if not wire.requests_cut:
            lane.queue.append((seq, op, None if payload is None else bytes(payload), head))
            lane.more.set()
            if self.network.rng.random() < self.network.conditions.eager_share / 4:
                wire.return_all()
        return seq

    def pump(self) -> bool:
        """Sometimes the operation is there and the answer back, before anybody else runs."""
        wire = self.wire
        network = self.network
        if wire is None or network.rng.random() >= network.conditions.eager_share:
            return False
        lane = wire.lanes[LIVE]
        while not wire.requests_cut and wire.is_open and lane.queue and network.rng.random() < 0.8:
            wire.deliver_one(lane)
        return wire.return_all()

    def has_room(self, stream: int = LIVE, queue_bytes: int = 0) -> bool:
        """Whether the window admits another, or the queue, which is twice that."""
        window = self.network.conditions.window * (2 if queue_bytes else 1)
        return len(self._calls[stream]) < window

    async def wait_room(self, stream: int = LIVE) -> None:
        """Wait for that."""
        while True:
            if not self.is_up:
                raise PeerLost(f"{self.name} is not connected")
            if self.has_room(stream):
                return
            self._room = trio.Event() if self._room.is_set() else self._room
            await self._room.wait()

    def sent(self, stream: int) -> tuple[int, int]:
        """What was sent in this session, and its checksum."""
        if self.wire is None:
            raise PeerLost(f"{self.name} is not connected")
        return self.wire.lanes[stream].sent

    def disagreed(self, reason: str) -> None:
        """As `fail`, in a task of its own; what was sent is not compared again."""
        self._lose_soon(reason, disagreed=True)

    def lose(self) -> None:
        """The session ends, for no reason that either side knows of."""
        self._lose_soon("it is lost", disagreed=False)

    def _lose_soon(self, reason: str, *, disagreed: bool) -> None:
        wire = self.wire

        async def fail() -> None:
            if self.wire is wire:
                with acting(self.life):
                    self.fail(reason)
                if disagreed:
                    self._lost = summary.Lost()

        outer, Life.current = Life.current, None
        self.network.nursery.start_soon(fail)
        Life.current = outer

    def retry(self) -> None:
        """It is tried again soon all the same."""

    def fail(self, reason: str) -> None:
        """The owner gives the session up."""
        wire = self.wire
        if self.is_up and wire is not None:
            wire.cut(noticed=True)
            self.lost(wire, reason)

    # Answers and the end -----------------------------------------------------------------------

    def answered(self, wire: Wire, stream: int, seq: int, answer: ops.AnyAnswer) -> None:
        """One answer came."""
        if wire is not self.wire or not self.is_up:
            return
        sink = self._calls[stream].pop(seq)
        for older in [number for number in self._sums[stream] if number < seq]:
            del self._sums[stream][older]
        if stream == LIVE:
            self.outstanding -= 1
        self._room.set()
        sink.answered(self, answer)

    def lost(self, wire: Wire, reason: str) -> None:
        """The session is over: the owner first, then whoever waits for an answer."""
        if wire is not self.wire or not self.is_up:
            return
        self.is_up = False
        self.wire = None
        self.outstanding = 0
        calls, self._calls = self._calls, ({}, {})
        self._lost = summary.Lost(self.session, self._sums)
        self.owner.went_down(self, reason)
        for lane in calls:
            for sink in lane.values():
                sink.lost(self)
        self._room.set()
        self._over.set()

    # Sessions ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """One session after the other."""
        network = self.network
        network.links.append(self)
        try:
            while True:
                try:
                    await self._session()
                except Refused as error:
                    reason, code = (*map(str, error.args), "refused")[:2]
                    self.refused = reason
                    if self._on_refused is not None:
                        self._on_refused(self, Refuse(reason, code))
                    await trio.sleep(1.0)
                await trio.sleep(network.rng.choice(_BACKOFF_S))
        finally:
            if self in network.links:
                network.links.remove(self)
            wire = self.wire
            if wire is not None:
                wire.cut(noticed=True)
                with acting(self.life):
                    self.lost(wire, "the link is not wanted any more")

    async def ask(self, hello: Hello) -> Welcome:
        """Greet, and go no further."""
        await trio.sleep(self.network.delay_s())
        listener = self._listener()
        if listener is None:
            await trio.sleep(self.timeout_s)
            raise PeerLost(f"{self.name} does not answer")
        welcome = self._greeted(listener, hello)
        await trio.sleep(self.network.delay_s())
        if not self._is_heard(listener):
            await trio.sleep(self.timeout_s)
            raise PeerLost(f"{self.name} does not answer")
        if isinstance(welcome, Refused):
            raise welcome
        return welcome

    def _greeted(self, listener: FakeListener, hello: Hello) -> Welcome | Refused:
        """What the listener's side says."""
        answer: Welcome | Refused = Refused("the node is gone", "refused")
        with acting(listener.life):
            try:
                answer = _carried_welcome(listener.applier.welcome(_carried_hello(hello)))
            except Refused as error:
                answer = error
        return answer

    def _is_heard(self, listener: FakeListener) -> bool:
        return not listener.life.dead and self.network.passes(listener.life.name, self.life.name)

    async def _session(self) -> None:
        network = self.network
        listener = self._listener()
        if listener is None:
            return
        await trio.sleep(network.delay_s())
        if self._listener() is not listener:
            return
        hello = _carried_hello(self.owner.hello())
        welcome = self._greeted(listener, hello)
        await trio.sleep(network.delay_s())
        if not self._is_heard(listener):
            await trio.sleep(self.timeout_s)
            return
        if isinstance(welcome, Refused):
            raise welcome
        if self._listener() is not listener:
            return
        wire = Wire(network, self, listener, next(network.sessions), hello, welcome)
        listener.open(wire)
        await trio.sleep(network.delay_s())
        if listener.wire is not wire or self._listener() is not listener:
            return
        if not self._is_heard(listener):
            wire.cut(noticed=True)
            return
        had = listener.over.get(self._lost.session, [])
        second = _carried_welcome(msgspec.structs.replace(welcome, had=had))
        self._calls, self._next = ({}, {}), [1, 1]
        self._sums = ({0: summary.NOTHING}, {0: summary.NOTHING})
        self.wire = wire
        self.session = wire.id
        self.outstanding = 0
        self.is_up = True
        self._over = trio.Event()
        wire.start()
        try:
            self.owner.welcomed(self, welcome)
        except Refused:
            self.is_up = False
            self.wire = None
            wire.cut(noticed=True)
            raise
        for stream, what in self._lost.differences(second.had) if self.is_up else ():
            self._on_difference(stream, what)
            network.on_difference(f"of a lost session {listener.life.name} had: {what}")
        network.on_welcomed(self.life.name, listener.life.name)
        await self._over.wait()

    def _listener(self) -> FakeListener | None:
        listener = self.network.listeners.get(self.endpoint)
        if listener is None or listener.life.dead:
            return None
        return listener if self.network.passes(self.life.name, listener.life.name) else None


class FakeListener:
    """`transport.listener.Listener`, as its applier sees it."""

    network: Network

    def __init__(
        self,
        context: Any,
        endpoint: str,
        applier: Any,
        *,
        security: Any,
        peer_timeout_s: float,
        answered: Callable[[], None] = lambda: None,
    ) -> None:
        del context, security, peer_timeout_s
        self.endpoint = endpoint
        self.applier = applier
        self.answered = answered
        self.wire: Wire | None = None
        self.over: dict[int, list[summary.Had]] = {}
        """What was applied in each session that is over."""
        life = Life.current
        if life is None:
            raise RuntimeError("a listener belongs to a life")
        self.life = life

    async def run(self, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
        """Listen."""
        self.network.listeners[self.endpoint] = self
        task_status.started(self.endpoint)
        try:
            await trio.sleep_forever()
        finally:
            self.died()

    def open(self, wire: Wire) -> None:
        """A session begins; an earlier one is over."""
        with acting(self.life):
            older, self.wire = self.wire, wire
            if older is not None:
                older.shut()
                older.cut()
                self.applier.closed(older, "began a new session")
            try:
                self.applier.opened(wire)
            except OSError:
                if not self.life.errors:
                    raise
                wire.close("it could not be opened")

    def died(self) -> None:
        """The process ended: what was under way arrives nowhere, and the primary finds out."""
        if self.wire is not None:
            self.wire.shut()
            self.wire.cut()
        if self.network.listeners.get(self.endpoint) is self:
            del self.network.listeners[self.endpoint]


def shown(value: object) -> str:
    """An operation or an answer for a person, with short ids and no times."""
    if isinstance(value, bytes):
        is_id = len(value) == ops.OBJECT_ID_SIZE
        return f"<{value[:1].hex()}{value[-1:].hex()}>" if is_id else repr(value[:20])
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, msgspec.Struct):
        fields = [
            f"{key}={shown(getattr(value, key))}"
            for key in value.__struct_fields__
            if key not in {"mtime", "parent_mtime", "new_parent_mtime", "history", "atime"}
        ]
        return f"{type(value).__name__}({', '.join(fields)})"
    return repr(value)


def _carried_hello(hello: Hello) -> Hello:
    return messages.decode_hello(messages.encode_hello(1, hello))


def _carried_welcome(welcome: Welcome) -> Welcome:
    return messages.decode_welcome(messages.encode_welcome(LIVE, 1, welcome))
