"""Whether both sides of a session have had the same operations, and stand where they should.

Each side of a stream keeps a running checksum (`messages.chained`): the primary over what it has
sent, once for each number however often it had to be sent again; its peer over what it has
applied. At times the primary says what it has (`ops.Summary`), and the peer compares that at the
same place in the stream. A session that is resumed goes on with both; a new one begins with none.
"""

from __future__ import annotations

from typing import Final

from replfs.core import ops

NOTHING: Final = 0
"""The running checksum of a stream that nothing was sent on yet."""


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
