"""A link and a listener in one process, with an applier and sinks that record everything."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio
import zmq

from replfs.core import ops
from replfs.core.messages import Hello, Refuse, Welcome
from replfs.errors import Refused
from replfs.transport.link import Link
from replfs.transport.listener import Listener, Session
from replfs.transport.security import Curve
from replfs.transport.wire import Wire

Wires = tuple[Wire, Wire]
"""Who speaks: for the link, for the listener."""
DIRECT: Wires = (Wire.AUTO, Wire.AUTO)
WIRES: dict[str, Wires] = {
    "direct": DIRECT,
    "direct to libzmq": (Wire.AUTO, Wire.LIBZMQ),
    "libzmq to direct": (Wire.LIBZMQ, Wire.AUTO),
    "libzmq": (Wire.LIBZMQ, Wire.LIBZMQ),
}

PATIENCE_S = 60.0
"""How long to wait for what must happen: long, because it only matters when it does not."""


def identity(**changes: Any) -> dict[str, Any]:
    """The fields of `Hello` and `Welcome` that the owner fills."""
    fields: dict[str, Any] = {
        "volume": b"v" * 16,
        "node": b"n" * 16,
        "name": "node",
        "store": b"store",
        "role": "primary",
        "generation": b"g" * 16,
        "history": [b"h" * 16],
        "clean": True,
        "uninitialized": False,
        "memory_lost": False,
        "features": ["one"],
    }
    return fields | changes


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait until *condition* is true."""
    with trio.move_on_after(PATIENCE_S):
        while not condition():
            await trio.sleep(0.005)
        return
    raise TimeoutError(f"waited {PATIENCE_S} s in vain until {what}")


def object_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def write(number: int, size: int = 100) -> tuple[ops.Write, bytes]:
    """A write whose offset is its number."""
    return ops.Write(object_id(number), number, number), number.to_bytes(8, "big") * (-(-size // 8))


class RecordingSink:
    """Remembers what became of one operation."""

    def __init__(self) -> None:
        self.answer: ops.AnyAnswer | None = None
        self.was_lost = False
        self.calls = 0
        self.down_before = False

    def answered(self, link: Link, answer: ops.AnyAnswer) -> None:
        self.calls += 1
        self.answer = answer

    def lost(self, link: Link) -> None:
        self.calls += 1
        self.was_lost = True
        self.down_before = not link.is_up


class RecordingOwner:
    """A link's owner."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.welcomes: list[Welcome] = []
        self.refusals: list[Refuse] = []
        self.refuse = ""
        self.fields = identity(node=b"P" * 16, name="primary")

    def hello(self) -> Hello:
        return Hello(**self.fields)

    def welcomed(self, link: Link, welcome: Welcome) -> None:
        if self.refuse:
            raise Refused(self.refuse)
        self.welcomes.append(welcome)
        self.events.append("up")

    def went_down(self, link: Link, reason: str) -> None:
        self.events.append(f"down: {reason}")

    def refused(self, link: Link, refuse: Refuse) -> None:
        self.refusals.append(refuse)


class RecordingApplier:
    """Applies nothing, remembers everything."""

    def __init__(self) -> None:
        self.applied: list[tuple[int, int, ops.AnyOp, bytes | None]] = []
        self.events: list[str] = []
        self.sessions: list[Session] = []
        self.hellos: list[Hello] = []
        self.refuse: tuple[str, ...] = ()
        self.defer: Callable[[ops.AnyOp], bool] = lambda _op: False
        self.on_apply: Callable[[ops.AnyOp], None] = lambda _op: None
        self.on_answered: Callable[[], None] = lambda: None

    def welcome(self, hello: Hello) -> Welcome:
        self.hellos.append(hello)
        if self.refuse:
            raise Refused(*self.refuse)
        return Welcome(**identity(node=b"S" * 16, name="secondary", role="secondary"))

    def opened(self, session: Session) -> None:
        self.sessions.append(session)
        self.events.append("opened")

    def closed(self, session: Session, reason: str) -> None:
        self.events.append(f"closed: {reason}")

    def apply(
        self,
        session: Session,
        stream: int,
        seq: int,
        op: ops.AnyOp,
        payload: memoryview | bytes | None,
    ) -> ops.AnyAnswer | None:
        data = None if payload is None else bytes(payload)
        self.applied.append((stream, seq, op, data))
        self.on_apply(op)
        if self.defer(op):
            return None
        if isinstance(op, ops.Place):
            return ops.Placed(complete=True, created=False)
        if isinstance(op, ops.List):
            entries = [ops.Entry(b"name%d" % n, object_id(n), complete=True) for n in range(1000)]
            return ops.Listing(entries, more=False)
        if isinstance(op, ops.Digest):
            return ops.Digests(b"d" * 16 * op.count, 7)
        if isinstance(op, ops.Sync):
            return ops.Done(errno.EDQUOT)
        return ops.Done(0, 0 if data is None else len(data))


class Pair:
    """A listener, an optional detour to it, and a link; all run in *nursery*."""

    def __init__(
        self, nursery: trio.Nursery, timeout_s: float, wires: Wires, security: Curve | None
    ) -> None:
        self.nursery = nursery
        self.security = security
        self.timeout_s = timeout_s
        self.wires = wires
        self.context: zmq.Context[Any] = zmq.Context()
        self.applier = RecordingApplier()
        self.owner = RecordingOwner()
        self.listener: Listener | None = None
        self.listener_scope = trio.CancelScope()
        self.link: Link | None = None
        self.link_scope = trio.CancelScope()

    async def listen(self, endpoint: str = "tcp://127.0.0.1:0") -> str:
        self.listener = Listener(
            self.context,
            endpoint,
            self.applier,
            peer_timeout_s=self.timeout_s,
            security=self.security,
            wire=self.wires[1],
            answered=lambda: self.applier.on_answered(),
        )
        self.listener_scope = trio.CancelScope()

        async def run(task_status: trio.TaskStatus[str]) -> None:
            with self.listener_scope:
                await self.listener.run(task_status=task_status)

        return str(await self.nursery.start(run))

    def dial(self, endpoint: str, **arguments: Any) -> Link:
        link = self.link = Link(
            self.context,
            endpoint,
            self.owner,
            peer_timeout_s=self.timeout_s,
            name="secondary",
            on_refused=self.owner.refused,
            wire=self.wires[0],
            **arguments,
        )
        self.link_scope = trio.CancelScope()

        async def run() -> None:
            with self.link_scope:
                await link.run()

        self.nursery.start_soon(run)
        return link

    async def up(self, endpoint: str | None = None, **arguments: Any) -> Link:
        link = self.dial(endpoint or await self.listen(), **arguments)
        await until(lambda: link.is_up, "the session is up")
        return link


@contextlib.asynccontextmanager
async def running_pair(
    timeout_s: float = 60.0, wires: Wires = DIRECT, *, security: Curve | None = None
) -> AsyncIterator[Pair]:
    """A `Pair` that is stopped at the end, and must not leave a socket open."""
    async with trio.open_nursery() as nursery:
        pair = Pair(nursery, timeout_s, wires, security)
        yield pair
        nursery.cancel_scope.cancel()
    with trio.fail_after(PATIENCE_S):
        await trio.to_thread.run_sync(pair.context.term, abandon_on_cancel=True)


def port_of(endpoint: str) -> int:
    return int(endpoint.rpartition(":")[2])
