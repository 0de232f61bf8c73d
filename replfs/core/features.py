"""What a node understands that an earlier release did not: told in greetings, asked before use.

A peer that is sent an operation it does not know ends the session, again and again. So each kind
of operation that came later has a word here; whoever knows it says so in the `features` of its
greeting, and it is sent to nobody else. What is done instead stands where it would be sent.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

from replfs.core import ops

WORDS: Final[dict[type[ops.Op], str]] = {
    ops.Generation: "hears-generation",
    ops.Handover: "takes-over",
    ops.Progress: "counts-changes",
    ops.PlaceMany: "places-many",
    ops.Summary: "compares-summaries",
}
"""By the kind of operation. A word is never used again for something else."""


def understands(features: Collection[str], kind: type[ops.Op]) -> bool:
    """Whether a node with these *features* knows operations of that kind."""
    word = WORDS.get(kind)
    return word is None or word in features
