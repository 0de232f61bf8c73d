"""What one stream of a link has sent and the peer has not answered: window, order, deadlines.

No sockets here beyond holding the stream's current connection, and no clock: time comes in.
"""

from __future__ import annotations

from collections import deque
from typing import Final, Generic, Literal, TypeVar

import msgspec
import trio

from replfs.core import ops, summary
from replfs.core.messages import Refuse, Welcome
from replfs.errors import ProtocolError
from replfs.transport.socket import Connection

WINDOW_OPS: Final = 512
WINDOW_BYTES: Final = 32 << 20
"""Bounds what either side holds for a stream: here unanswered operations, there answers."""
QUEUE_OPS: Final = 1024
"""Operations that may be on the way of those that nobody awaits; their bytes are the caller's to
bound. No more than the answers that the other side remembers."""
DEFERRED_TIMEOUTS: Final = 6
"""Peer timeouts that an operation may take which the peer has accepted and is working on."""
CHECKPOINT_TIMEOUTS: Final = 60
"""The same for flushing a whole store, which may have much to write: no application waits."""
_LISTING_BYTES: Final = 256 << 10
_DIGEST_BYTES: Final = 16
_INSPECTED_BYTES: Final = 16 << 10
_SUSPECTED_BYTES: Final = 512 << 10

ANSWER_TYPES: Final[dict[type[ops.Op], type[ops.Answer]]] = {
    ops.Place: ops.Placed,
    ops.Digest: ops.Digests,
    ops.List: ops.Listing,
    ops.Inspect: ops.Inspected,
    ops.Suspects: ops.Suspected,
    ops.Fetch: ops.Fetched,
    ops.PlaceMany: ops.PlacedMany,
}
"""What answers an operation besides `Done`, which may answer any."""

SinkT = TypeVar("SinkT")

LinkState = Literal["connecting", "up", "resuming", "refused", "closed"]


class LinkStatistics(msgspec.Struct, frozen=True):
    """A link at one moment. Times in nanoseconds, `since_ns` on the monotonic clock."""

    name: str
    endpoint: str
    state: LinkState
    since_ns: int
    session: int
    rtt_ns: int
    outstanding: int
    outstanding_bytes: int
    sent_ops: int
    sent_bytes: int
    answers: int
    sessions: int
    resumes: int
    attempts: int
    last_error: str


def cost_of(op: ops.AnyOp, head: bytes, payload: bytes | None) -> int:
    """Bytes of the window that an operation takes until it is answered."""
    cost = len(head) if payload is None else len(head) + len(payload)
    if type(op) not in ANSWER_TYPES:
        return cost
    if type(op) is ops.List:
        cost += _LISTING_BYTES
    elif type(op) is ops.Digest:
        cost += op.count * _DIGEST_BYTES
    elif type(op) is ops.Inspect:
        cost += _INSPECTED_BYTES
    elif type(op) is ops.Suspects:
        cost += _SUSPECTED_BYTES
    elif type(op) is ops.Fetch:
        cost += op.length
    return cost


class Call(msgspec.Struct, Generic[SinkT], frozen=True, gc=False):
    """One operation on its way, ready to be sent again."""

    head: bytes
    payload: bytes | None
    sink: SinkT | None
    answer_type: type[ops.Answer]
    cost: int
    sent_ns: int
    timeouts: int = DEFERRED_TIMEOUTS
    before: int = summary.NOTHING
    """The stream's running checksum of all that was sent before it."""


class Flow(Generic[SinkT]):
    """One stream of one session."""

    __slots__ = (
        "applied", "bytes", "calls", "checksum", "connection", "fruitless", "greeting", "heard_ns",
        "next_seq", "noticed", "open", "progress_ns", "reply", "room", "silent", "stream",
    )  # fmt: skip

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.connection: Connection | None = None
        self.open = False
        """Whether operations may be put on the connection; if not, they wait for the next."""
        self.calls: dict[int, Call[SinkT]] = {}
        """By sequence number, ascending."""
        self.silent: deque[int] = deque()
        """Those of the calls without a sink, ascending; `settle` takes them out."""
        self.bytes = 0
        self.next_seq = 1
        self.checksum = summary.NOTHING
        """The running checksum of all up to there."""
        self.applied = 0
        """What the peer is known to have applied, all up to this number."""
        self.progress_ns = 0
        """When `applied` last moved or an answer came."""
        self.heard_ns = 0
        """When the peer was last heard."""
        self.fruitless = 0
        """Connections in a row that brought no progress."""
        self.noticed: dict[int, int] = {}
        """When the peer was first seen to have accepted a call that it has not answered."""
        self.greeting = 0
        self.reply: Welcome | Refuse | None = None
        self.room = trio.lowlevel.ParkingLot()

    def has_room(self, queue_bytes: int = 0) -> bool:
        """Whether the window admits another operation, or a queue of so many bytes one more."""
        if queue_bytes:
            return len(self.calls) < QUEUE_OPS and self.bytes < queue_bytes
        return len(self.calls) < WINDOW_OPS and self.bytes < WINDOW_BYTES

    def answered(self) -> int:
        """The number up to which every operation has been answered."""
        return next(iter(self.calls), self.next_seq) - 1

    def sums(self) -> dict[int, int]:
        """The running checksum after each number that the peer may have applied last."""
        applied = self.applied
        sums = {seq - 1: call.before for seq, call in self.calls.items() if seq > applied}
        sums[self.next_seq - 1] = self.checksum
        return sums

    def heard(self, now: int) -> None:
        """Something came that shows progress."""
        self.heard_ns = self.progress_ns = now
        self.fruitless = 0

    def settle(self, applied: int, now: int) -> None:
        """The peer has applied all up to *applied*.

        Raises:
            ProtocolError: it cannot have.
        """
        if applied >= self.next_seq:
            raise ProtocolError(f"operation {applied} was applied, {self.next_seq - 1} was sent")
        if applied <= self.applied:
            return
        self.applied = applied
        self.heard(now)
        silent = self.silent
        while silent and silent[0] <= applied:
            self.bytes -= self.calls.pop(silent.popleft()).cost

    def take(self, seq: int, answer: ops.AnyAnswer) -> Call[SinkT] | None:
        """The call that *answer* settles; None if it was settled before.

        Raises:
            ProtocolError: it answers what was never sent, or not what was asked.
        """
        call = self.calls.get(seq)
        if call is None:
            if seq >= self.next_seq:
                raise ProtocolError(f"an answer to operation {seq}, which was never sent")
            return None
        kind = type(answer)
        if kind is ops.Done:
            size = 0 if call.payload is None else len(call.payload)
            if answer.written > size:  # type: ignore[union-attr]  # narrowed by `kind`
                raise ProtocolError(f"more bytes written than the {size} sent")
        elif kind is not call.answer_type:
            raise ProtocolError(f"{kind.__name__} answers {call.answer_type.__name__}")
        if seq > self.applied:
            raise ProtocolError(f"an answer to operation {seq} before it was applied")
        del self.calls[seq]
        self.bytes -= call.cost
        return call

    def overdue(self, now: int, timeout_ns: int) -> str:
        """Why the session has to end: an operation has waited too long. Else empty.

        What the peer has not yet applied must move: the deadline runs from when it was sent, or
        from the last progress if that was later, so that a slow link is not taken for a dead one.
        What it has accepted and not answered (an fsync, say) has a deadline of its own, from when
        that was first noticed here.
        """
        noticed: dict[int, int] = {}
        for seq, call in self.calls.items():
            if seq > self.applied:
                if now - max(call.sent_ns, self.progress_ns) > timeout_ns:
                    return f"no answer for {timeout_ns / 1e9:.1f} s"
                break
            if call.sink is not None:
                noticed[seq] = since = self.noticed.get(seq, now)
                if now - since > timeout_ns * call.timeouts:
                    return f"no result for {timeout_ns * call.timeouts / 1e9:.1f} s"
        self.noticed = noticed
        return ""

    def close(self, linger_ms: int = 0) -> None:
        """Close the connection, if there is one."""
        self.open = False
        if self.connection is not None:
            self.connection.close(linger_ms)
