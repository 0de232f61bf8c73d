"""One operation on its way: which peers still owe an answer, and what the answers add up to."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, Protocol

import trio

from replfs.core import ops
from replfs.errors import NotInSync
from replfs.store.activity import ActivityLog, Slot
from replfs.transport.link import Link

_BUCKETS: Final = 52


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
        "bad", "group", "kind", "last", "length", "op", "owner", "sent_to", "slots", "start",
        "task", "waiting",
    )  # fmt: skip

    def __init__(self, owner: Owner, kind: str, length: int = 0) -> None:
        self.owner = owner
        self.kind = kind
        self.length = length
        """Payload bytes that each side should apply."""
        self.op: ops.AnyOp | None = None
        self.start = 0
        self.waiting = 0
        self.task: trio.lowlevel.Task | None = None
        self.last: Link | None = None
        """Which link answered last, or was lost last."""
        self.slots: list[Slot] | None = None
        """Activity log entries to end with the last answer, where its caller does not await it."""
        self.group: Group | None = None
        self.sent_to: list[Target] = []
        self.bad: list[tuple[Target, int, int]] | None = None
        """(peer, errno, bytes written) of answers that were not plain success; EIO if lost."""

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
            if answer.errno or answer.written != self.length:
                self._note_bad(link, answer.errno, answer.written)
        else:
            self._note_bad(link, errno.EPROTO, 0)
        self._one_less()

    def lost(self, link: Link) -> None:
        """One peer's session ended before it answered."""
        self.last = link
        self._note_bad(link, errno.ETIMEDOUT, 0)
        self._one_less()

    def _note_bad(self, link: Link, number: int, written: int) -> None:
        if self.bad is None:
            self.bad = []
        for peer in self.sent_to:
            if peer.link is link:
                self.bad.append((peer, number, written))

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

    def settle(self, *, strict: bool, failed: int = 0, written: int | None = None) -> None:
        """Compare what became of it here (*failed*, an errno) and on the peers.

        The same errno with nothing written on both is the caller's error and changes nothing;
        anything else that differs is recorded dirty and repaired from the local copy.

        Raises:
            NotInSync: *strict*, and fewer peers than needed confirmed what was applied here.
        """
        op = self.op
        if op is None:
            return
        if failed or (written is not None and written != self.length):
            self._settle_local_failure(op, failed, written or 0)
            return
        if self.bad is None and not strict:
            return
        bad = self.bad or []
        for peer, number, _ in bad:
            peer.failed(op, number, length=self.length, start=self.start)
        if strict and len(self.sent_to) - len(bad) < self.owner.confirmations_needed():
            raise NotInSync("applied here, unconfirmed on a peer")

    def _settle_local_failure(self, op: ops.AnyOp, failed: int, written: int) -> None:
        bad = {peer: (number, got) for peer, number, got in self.bad or ()}
        for peer in self.sent_to:
            number, got = bad.get(peer, (0, self.length))
            if failed and number == failed and not got:
                continue  # neither side has it, for the same reason
            if not failed and not number and got == written:
                continue  # as short on both sides
            peer.failed(op, number or failed, length=self.length, start=self.start)


def describe(number: int) -> str:
    """An errno in words."""
    return os.strerror(number) if number else "short write"
