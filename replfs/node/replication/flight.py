"""One operation on its way: which peers still owe an answer, and what the answers add up to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, Protocol

import trio

from replfs.core import ops
from replfs.errors import HalfDone, NotInSync
from replfs.store.activity import ActivityLog, Slot
from replfs.transport.link import Link

UNRECORDED: Final = "applied here, and what a peer lacks of it cannot be recorded"
_BUCKETS: Final = 52

_NOTHING_DONE: Final[dict[type, frozenset[int]]] = {
    ops.Write: frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG}),
    ops.Truncate: frozenset({errno.EFBIG}),
    ops.Link: frozenset({errno.EEXIST, errno.EMLINK}),
}
"""Errors that leave no doubt: nothing was done, but that the mtime of the data was set.

Relies on: buffered write(2) looks for room before it takes a byte. ftruncate(2) that fails for want
of room may have set the size.
"""


class Latencies:
    """How long operations of one class took, in buckets of half powers of two."""

    __slots__ = ("buckets", "count", "total_ns")

    def __init__(self) -> None:
        self.count = 0
        self.total_ns = 0
        self.buckets = [0] * _BUCKETS

    def add(self, ns: int) -> None:
        """One operation took *ns* nanoseconds."""
        self.count += 1
        self.total_ns += ns
        us = ns // 1000
        power = us.bit_length()
        half = power and (us >> (power - 2) if power > 1 else us << 1) & 1
        self.buckets[min(2 * power + half, _BUCKETS - 1)] += 1

    def quantile_us(self, share: float) -> int:
        """The upper edge, in microseconds, of the bucket that *share* of all lie below."""
        wanted = share * self.count
        seen = 0
        for index, number in enumerate(self.buckets):
            seen += number
            if seen >= wanted and number:
                power, half = divmod(index, 2)
                return (1 << power) * (3 if not half else 4) // 4 if power else 1
        return 0

    def below_us(self) -> dict[str, int]:
        """How many took less than so many microseconds, in steps of four."""
        return {str(1 << power): sum(self.buckets[: 2 * (power + 1)]) for power in range(4, 26, 2)}


class Owner(Protocol):
    """What counts flights: the volume."""

    flights: int
    detached: int
    activity: ActivityLog

    def confirmations_needed(self) -> int:
        """How many peers must confirm a strict change."""


class Target(Protocol):
    """A peer, as an operation on its way sees it."""

    link: Link
    unawaited: int
    landed: int
    waited: Callable[[int, int], None]

    def failed(self, op: ops.AnyOp, number: int, *, length: int, start: int) -> None:
        """The peer does not have what *op* did, with this errno (0: part of it)."""


class Group(Protocol):
    """Operations that are awaited together."""

    def landed(self) -> None:
        """One of them has been answered or lost, and settled."""


class Flight:
    """An operation that was sent; the sink of its answers."""

    __slots__ = (
        "bad", "group", "here", "kind", "last", "length", "op", "owner", "sent_to", "slots",
        "start", "task", "unrecorded", "waiting",
    )  # fmt: skip

    def __init__(self, owner: Owner, kind: str, length: int = 0) -> None:
        self.owner = owner
        self.kind = kind
        self.length = length
        """Payload bytes that each side should apply."""
        self.op: ops.AnyOp | None = None
        self.here: ops.Done | None = None
        """What became of it here; None: all of it was done."""
        self.start = 0
        self.waiting = 0
        self.task: trio.lowlevel.Task | None = None
        self.last: Link | None = None
        """Which link answered last, or was lost last."""
        self.slots: list[Slot] | None = None
        """Activity log entries to end with the last answer, where its caller does not await it."""
        self.group: Group | None = None
        self.sent_to: list[Target] = []
        self.bad: dict[Target, ops.Done] | None = None
        """Answers that were not plain success; ETIMEDOUT: none came."""
        self.unrecorded: OSError | None = None
        """Why it could not be recorded what a peer lacks of it."""

    def sent(self, peer: Target, op: ops.AnyOp, start: int) -> None:
        """It is on its way to *peer*."""
        self.op = op
        self.start = start
        if not self.waiting:
            self.owner.flights += 1
        self.waiting += 1
        self.sent_to.append(peer)

    def unsent(self, peer: Target) -> None:
        """It could not be sent to *peer* after all."""
        self.sent_to.remove(peer)
        self.waiting -= 1
        if not self.waiting:
            self.owner.flights -= 1

    def answered(self, link: Link, answer: ops.AnyAnswer) -> None:
        """One peer's answer."""
        self.last = link
        if isinstance(answer, ops.Done):
            if not self._is_whole(answer):
                self._note_bad(link, answer)
        else:
            self._note_bad(link, ops.Done(errno.EPROTO))
        self._one_less()

    def lost(self, link: Link) -> None:
        """One peer's session ended before it answered."""
        self.last = link
        self._note_bad(link, ops.Done(errno.ETIMEDOUT))
        self._one_less()

    def _note_bad(self, link: Link, answer: ops.Done) -> None:
        if self.bad is None:
            self.bad = {}
        for peer in self.sent_to:
            if peer.link is link:
                self.bad[peer] = answer

    def _one_less(self) -> None:
        self.waiting -= 1
        if self.waiting:
            return
        self.owner.flights -= 1
        if self.slots is not None:
            self._land()
        elif self.task is not None:
            trio.lowlevel.reschedule(self.task)
            self.task = None

    def detach(self, slots: list[Slot], group: Group | None = None) -> None:
        """Its caller does not await it: the last answer settles it, and then *group* is told."""
        self.slots = slots
        self.group = group
        self.owner.detached += 1
        for peer in self.sent_to:
            peer.unawaited += 1
        if not self.waiting:
            self._land()

    def _land(self) -> None:
        slots = self.slots or []
        self.slots = None
        self.owner.detached -= 1
        for peer in self.sent_to:
            peer.landed += 1
        self.settle(strict=False)
        for slot in slots:
            self.owner.activity.end(slot)
        if self.group is not None:
            self.group.landed()

    def settle(self, *, strict: bool) -> None:
        """Compare what became of it here and on the peers: what differs is recorded dirty.

        It is repaired from the local copy.

        Raises:
            NotInSync: *strict*, and fewer peers than needed confirmed what was applied here.
            HalfDone: what a peer lacks of it could not be recorded.
        """
        op = self.op
        here = self.here
        is_whole = self.bad is None and (here is None or self._is_whole(here))
        if op is None or (is_whole and not strict and self.unrecorded is None):
            return
        confirmed = self._compare(op)
        is_applied = here is None or not here.errno
        if strict and is_applied and confirmed < self.owner.confirmations_needed():
            raise NotInSync("applied here, unconfirmed on a peer")
        if self.unrecorded is not None:
            raise HalfDone(errno.EIO, UNRECORDED) from self.unrecorded

    def _compare(self, op: ops.AnyOp) -> int:
        """Record what may differ on the peers; how many of them have confirmed it."""
        whole = ops.Done(0, self.length)
        here = self.here or whole
        answers = self.bad or {}
        confirmed = 0
        for peer in self.sent_to:
            answer = answers.get(peer, whole)
            if _is_same(op, here, answer):
                confirmed += 1
            else:
                number = answer.errno or here.errno
                peer.failed(op, number, length=self.length, start=self.start)
        return confirmed

    def _is_whole(self, done: ops.Done) -> bool:
        return not done.errno and done.written == self.length


def _is_same(op: ops.AnyOp, here: ops.Done, there: ops.Done) -> bool:
    """Whether *op* has left both sides equal, for certain."""
    if here != there:
        return False
    return not here.errno or (not here.written and here.errno in _NOTHING_DONE.get(type(op), ()))


def describe(number: int) -> str:
    """An errno in words."""
    return os.strerror(number) if number else "short write"
