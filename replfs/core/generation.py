"""What two stores are to each other: one decision, one table, no clocks.

A *generation* names a span of time in which a volume's replicas were equal. A primary begins a new
one before the first change that a peer does not get, and whenever it is promoted, and remembers the
earlier ones. So a store whose generation stands in the other's history is simply behind; two stores
of which neither knows the other's generation have been changed apart. An operator who decides which
of those wins enters the loser's generation in the winner's history.

Within a generation the primary numbers its changes, and its secondaries count them. So of several
secondaries at one generation it is known which has more when their primary is gone; what one has
beyond the number at which another became the primary is not thrown away.

`decide` is asked by both sides at connect, each about itself, and answers with the first row of
`TABLE` that fits. Wall-clock time never decides anything.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec


class Action(enum.Enum):
    """What is done about it."""

    FOLLOW = "follow"
    """This side is the secondary and takes what comes."""
    QUICK = "quick"
    """This side is the primary; the peer lacks what its log says, and nothing else."""
    BASELINE = "baseline"
    """This side is the primary; the peer has nothing yet, or an earlier copy without ids."""
    COMPARE = "compare"
    """This side is the primary; everything is compared, for it is not known what the peer has."""
    FOLLOW_KEEPING = "follow-keeping"
    """As `FOLLOW`; what this side may have and its primary lacks is kept beside."""
    STEP_DOWN = "step-down"
    """This side is a primary that another store has left behind: it becomes a secondary."""
    OUTDATED = "outdated"
    """The peer is such a primary: it is told so, and steps down."""
    SPLIT_BRAIN = "split-brain"
    """Both were changed apart from a common generation: an operator decides."""
    REFUSE = "refused"
    """They may not be connected."""


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """One store, as far as the decision needs it."""

    store: bytes
    """Names the directory; equal only for one and the same."""
    node: bytes
    volume: bytes
    """Empty before the store belongs to a volume."""
    role: str
    """`primary`, `secondary` or `unset`."""
    generation: bytes
    history: tuple[bytes, ...] = ()
    uninitialized: bool = False
    """Never was a primary nor a complete replica."""
    inconsistent: bool = False
    """A resync into it has begun and not ended."""
    memory_lost: bool = False
    """It lost power, and with it what was not flushed."""
    progress: int = 0
    """Up to which change of its generation a secondary has everything; 0: it is not known."""
    base: bytes = b""
    """A primary's: the generation in whose place its reign began; empty where it began none."""
    base_progress: int = 0
    """Up to which change of that one it had everything then; 0: it is not known."""
    discarded: tuple[bytes, ...] = ()
    """Generations of its history that are not its own: an operator decided against them."""
    has_acls: bool = True
    """Its file system keeps POSIX access control lists."""
    follows: bytes = b""
    """The generation of the primary that a secondary let in last; known of one's own side only."""
    leader: bytes = b""
    """The node of that primary; empty where that is not known."""


class Lineage(NamedTuple):
    """What a primary tells its peers that they are at when they have all that it has."""

    generation: bytes
    history: list[bytes]
    """Newest first."""
    discarded: list[bytes]
    """Those of it that are another store's, which an operator decided against."""


class Decision(msgspec.Struct, frozen=True):
    """What is done, and why, in one sentence."""

    action: Action
    sentence: str


Row = tuple[str, Callable[[Side, Side], bool], Action, str]


def _knows(mine: Side, theirs: Side) -> bool:
    """Whether *theirs* is at a generation that *mine* is or was at."""
    return bool(theirs.generation) and (
        theirs.generation == mine.generation or theirs.generation in mine.history
    )


def _common(mine: Side, theirs: Side) -> bool:
    ours = {mine.generation, *mine.history} - {b""}
    return not ours.isdisjoint({theirs.generation, *theirs.history})


def _are_apart(mine: Side, theirs: Side) -> bool:
    """Whether both were changed since they were last equal."""
    return (
        _common(mine, theirs)
        and not (mine.uninitialized or theirs.uninitialized)
        and not (_knows(mine, theirs) or _knows(theirs, mine))
    )


def _may_have_more(follower: Side, primary: Side) -> bool:
    """Whether *follower* may have changes that *primary*, or who was one before it, never had.

    They are those of a generation that was decided against, or of the one in whose place *primary*
    began. Of the latter one that lost power has no more than its disk kept of them by chance: what
    anybody was promised, *primary* has, too.
    """
    if follower.generation in primary.discarded:
        return True
    if not primary.base or primary.base != follower.generation or follower.memory_lost:
        return False
    known = follower.progress and primary.base_progress
    return not known or follower.progress > primary.base_progress


def _may_have_forgotten(primary: Side, follower: Side) -> bool:
    """Whether *follower* may be ahead by what *primary* itself had begun, and lost with its power.

    Where it followed another node, that one was made primary in place of *primary*.
    """
    return primary.memory_lost and follower.leader in {b"", primary.node}


def _two_primaries(mine: Side, theirs: Side) -> bool:
    return mine.role == theirs.role == "primary" and mine.volume == theirs.volume


TABLE: Final[tuple[Row, ...]] = (
    (
        "same store",
        lambda m, t: m.store == t.store or m.node == t.node,
        Action.REFUSE,
        "the peer is this same store; give it a directory of its own",
    ),
    (
        "two primaries, changed apart",
        lambda m, t: _two_primaries(m, t) and _are_apart(m, t),
        Action.SPLIT_BRAIN,
        "both stores were changed as primaries since they were last equal",
    ),
    (
        "two primaries, mine is outdated",
        lambda m, t: _two_primaries(m, t) and _knows(t, m) and not _knows(m, t),
        Action.STEP_DOWN,
        "the peer was made primary in place of this store, which steps down",
    ),
    (
        "two primaries, the peer's is outdated",
        lambda m, t: _two_primaries(m, t) and _knows(m, t) and not _knows(t, m),
        Action.OUTDATED,
        "another store was made primary in place of the one that connects, which is outdated",
    ),
    (
        "two primaries",
        lambda m, t: m.role == t.role == "primary",
        Action.REFUSE,
        "the peer is a primary too: only one may be",
    ),
    (
        "no primary",
        lambda m, t: "primary" not in {m.role, t.role},
        Action.REFUSE,
        "neither store is a primary: mount one of them",
    ),
    (
        "another volume",
        lambda m, t: bool(m.volume) and bool(t.volume) and m.volume != t.volume,
        Action.REFUSE,
        "the peer's store belongs to another volume; remove its .replfs directory if its data "
        "may be replaced",
    ),
    (
        "I follow another primary",
        lambda m, t: (
            m.role != "primary"
            and bool(m.follows)
            and m.follows not in {t.generation, *t.history}
            # Its own primary may have forgotten, with its power, what it was about to begin.
            and m.leader != t.node
            # Then an operator has to decide, whomever it follows.
            and not _are_apart(m, t)
        ),
        Action.OUTDATED,
        "this store follows another primary, which was made one later or apart from this one",
    ),
    (
        "I follow, new",
        lambda m, t: m.role != "primary" and (m.uninitialized or not m.generation),
        Action.FOLLOW,
        "this store is new and becomes a replica",
    ),
    (
        "I follow, and may have more",
        lambda m, t: m.role != "primary" and _knows(t, m) and _may_have_more(m, t),
        Action.FOLLOW_KEEPING,
        "this store follows its primary, and keeps beside what that one never had",
    ),
    (
        "I follow",
        lambda m, t: m.role != "primary" and _knows(t, m),
        Action.FOLLOW,
        "this store follows its primary",
    ),
    (
        "I am ahead of the primary, which lost power",
        lambda m, t: m.role != "primary" and _knows(m, t) and _may_have_forgotten(t, m),
        Action.REFUSE,
        "this store is ahead of the primary that connects, which lost power",
    ),
    (
        "I am ahead of the primary",
        lambda m, t: m.role != "primary" and _knows(m, t) and m.volume == t.volume,
        Action.OUTDATED,
        "this store is ahead of the primary that connects, which is outdated",
    ),
    (
        "I was changed apart from the primary",
        lambda m, t: m.role != "primary" and _common(m, t),
        Action.SPLIT_BRAIN,
        "this store and its primary were changed apart since they were last equal",
    ),
    (
        "I am unrelated to the primary",
        lambda m, t: m.role != "primary",
        Action.REFUSE,
        "the stores have no common generation: their data is unrelated",
    ),
    (
        "the peer has no ACLs",
        lambda m, t: m.has_acls and not t.has_acls,
        Action.REFUSE,
        "the peer's store is on a file system without ACLs, which this one has: give it another",
    ),
    (
        "the peer is new",
        lambda m, t: t.uninitialized or not t.generation,
        Action.BASELINE,
        "the peer is new: everything is carried, what it has already is recognised",
    ),
    (
        "the peer is behind, and lost memory",
        lambda m, t: _knows(m, t) and t.memory_lost,
        Action.COMPARE,
        "the peer lost power: what it may have lost is compared",
    ),
    (
        "the peer is behind, and may have more",
        lambda m, t: _knows(m, t) and _may_have_more(t, m),
        Action.QUICK,
        "the peer lacks what was recorded for it, and may have changes that this store never had: "
        "they are compared, and kept beside there",
    ),
    (
        "the peer is behind",
        _knows,
        Action.QUICK,
        "the peer lacks what was recorded for it, and nothing else",
    ),
    (
        "the peer is ahead, and this store lost power",
        lambda m, t: _knows(t, m) and _may_have_forgotten(m, t),
        Action.REFUSE,
        "the peer is ahead of this store, which lost power",
    ),
    (
        "the peer is ahead",
        lambda m, t: _knows(t, m) and m.volume == t.volume,
        Action.STEP_DOWN,
        "the peer is ahead of this store, which is outdated and steps down",
    ),
    (
        "changed apart",
        _common,
        Action.SPLIT_BRAIN,
        "both stores were changed since they were last equal",
    ),
    (
        "unrelated",
        lambda m, t: True,
        Action.REFUSE,
        "the stores have no common generation: their data is unrelated",
    ),
)
"""Rows in the order in which they are tried: what it is called, when it fits, what is done, why."""


def is_ahead(one: Side, other: Side) -> bool:
    """Whether *one* has what *other* lacks, both being replicas of one volume.

    At one generation the one ahead is that which is known to have followed further.
    """
    if one.generation and one.generation == other.generation:
        return one.progress > other.progress
    return _knows(one, other) and not _knows(other, one)


def row_of(mine: Side, theirs: Side) -> Row:
    """The row that fits."""
    return next(row for row in TABLE if row[1](mine, theirs))


def decide(mine: Side, theirs: Side) -> Decision:
    """What *mine* does about *theirs*."""
    _, _, action, sentence = row_of(mine, theirs)
    return Decision(action, sentence)
