"""One stream of a session at the receiving end: what of it was applied, and what was answered."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

from replfs.core import ops, summary

REMEMBERED: Final = 1024
"""Answers kept per stream: at least the dialling side's window, as only that can be asked for."""
REMEMBERED_BYTES: Final = 64 << 20
_SMALL: Final = 64


class Lane:
    """The receiving end of one stream."""

    __slots__ = (
        "answers", "answers_bytes", "applied", "applying", "batch", "checksum", "deferred",
        "identity", "stream", "told",
    )  # fmt: skip

    def __init__(self, stream: int) -> None:
        self.stream = stream
        self.identity = b""
        """The connection it runs over; empty while there is none."""
        self.applied = 0
        self.applying = 0
        """What is being applied and has no answer yet; 0: nothing."""
        self.checksum = summary.NOTHING
        """The running checksum of what was applied."""
        self.told = 0
        # Of a plain dict the first of many that went is found again only behind all their places.
        self.answers: OrderedDict[int, ops.AnyAnswer] = OrderedDict()
        """What was sent, oldest answer first."""
        self.answers_bytes = 0
        self.deferred: set[int] = set()
        self.batch: list[tuple[int, ops.AnyAnswer]] = []
        """What is to be sent; then it is remembered."""

    def remember(self, sent: list[tuple[int, ops.AnyAnswer]]) -> None:
        """Keep answers for a retry; the oldest go where there are too many, or too large ones."""
        answers = self.answers
        for seq, answer in sent:
            if seq not in answers:
                answers[seq] = answer
                self.answers_bytes += size_of(answer)
        while len(answers) > REMEMBERED or self.answers_bytes > REMEMBERED_BYTES:
            self.answers_bytes -= size_of(answers.popitem(last=False)[1])

    def repeat(self) -> None:
        """Send all answers again that may not have come."""
        self.batch = [*self.answers.items(), *self.batch]

    def forget_until(self, seq: int) -> None:
        """The other side has the answers up to *seq*."""
        for old in [number for number in self.answers if number <= seq]:
            self.answers_bytes -= size_of(self.answers.pop(old))


def size_of(answer: ops.AnyAnswer) -> int:
    """About how many bytes an answer takes, on the wire and in memory."""
    variable = _VARIABLE.get(type(answer))
    return _SMALL if variable is None else _SMALL + variable(answer)


def _size_of_listing(answer: ops.Listing) -> int:
    return sum(len(entry.name) + _SMALL for entry in answer.entries)


def _size_of_placed(answer: ops.PlacedMany) -> int:
    return _SMALL * len(answer.results)


def _size_of_digests(answer: ops.Digests) -> int:
    return len(answer.digests)


def _size_of_inspected(answer: ops.Inspected) -> int:
    found = answer.attributes
    if found is None:
        return 0
    return 3 * _SMALL + len(found.target) + sum(len(name) + _SMALL for name in found.xattrs)


def _size_of_fetched(answer: ops.Fetched) -> int:
    return len(answer.data) + _SMALL * len(answer.holes)


def _size_of_suspected(answer: ops.Suspected) -> int:
    return sum(len(place.name) + _SMALL for place in answer.places) + sum(
        sum(map(len, suspect.names)) + _SMALL * (1 + len(suspect.runs))
        for suspect in answer.suspects
    )


_VARIABLE: Final[dict[type[ops.AnyAnswer], Callable[[Any], int]]] = {
    ops.Listing: _size_of_listing,
    ops.PlacedMany: _size_of_placed,
    ops.Digests: _size_of_digests,
    ops.Inspected: _size_of_inspected,
    ops.Fetched: _size_of_fetched,
    ops.Suspected: _size_of_suspected,
}
"""Answers that may be long; all others are short."""
