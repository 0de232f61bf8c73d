"""Whether both sides of a session have had the same operations, and stand where they should.

Each side of a stream keeps a running checksum (`messages.chained`): the primary over what it has
sent, once for each number however often it had to be sent again; its peer over what it has
applied. At times the primary says what it has (`ops.Summary`), and the peer compares that at the
same place in the stream. A session that is resumed goes on with both; a new one begins with none.

Of a session that was lost the peer says in the greeting of the next one what it had of it, and its
primary compares that with what it remembers (`Lost`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from replfs.core import ops

NOTHING: Final = 0
"""The running checksum of a stream that nothing was sent on yet."""


Had = tuple[int, int]
"""Of one stream: how many operations were applied, and their running checksum."""


class Lost(NamedTuple):
    """A session that was lost, as the side that had sent remembers it."""

    session: int = 0
    """0: none."""
    streams: Sequence[Mapping[int, int]] = ()
    """Of each stream the running checksum after each number of operations that the peer may have
    applied: from what it has said that it had to all that were sent."""

    def differences(self, had: Sequence[Had]) -> list[tuple[int, str]]:
        """The streams of which the peer had something else than was sent, and what, in words.

        *had* is what the peer says, in order; empty where it does not know of that session.
        """
        said = zip(self.streams, had, strict=False)
        found = [_lost_difference(sums, *one) for sums, one in said]
        return [(stream, words) for stream, words in enumerate(found) if words]


def _lost_difference(sums: Mapping[int, int], number: int, checksum: int) -> str:
    expected = sums.get(number)
    if expected is None:
        return f"{min(sums)} to {max(sums)} operations may have been applied, and {number} were"
    if expected != checksum:
        return f"of {number} operations, others were applied than were sent"
    return ""


def difference(
    said: ops.Summary, *, number: int, checksum: int, generation: bytes, change: int
) -> str:
    """What is not as the primary *said*, in words; empty where everything is.

    The others are this side's: operations applied on the stream before, their running checksum,
    the generation on record, and the change up to which it has everything. Those two are empty
    and 0 where they are not known, as while a resync goes on: the bulk stream tells of that, and
    may overtake what is said here.
    """
    if said.number != number:
        return f"{said.number} operations were sent, {number} were applied"
    if said.checksum != checksum:
        return f"of {number} operations, others were applied than were sent"
    if said.generation and generation and said.generation != generation:
        return f"the generation is {generation.hex()} and should be {said.generation.hex()}"
    if said.change and change and said.change != change:
        return f"everything is here up to change {change}, and should be up to {said.change}"
    return ""
