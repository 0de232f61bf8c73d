"""The state of replication to one peer. Rule 1: every transition stands in `TRANSITIONS`.

Link, replication and the worth of the peer's data are separate axes. This is replication. A pair
that is not in the table is an error of the caller and changes nothing; an event that leaves a
state as it is stands there too.

`python -m replfs.core.relationship` prints the page docs/internals/relationship.md.
"""

from __future__ import annotations

import enum
from typing import Final

from replfs.core import generation


class State(enum.Enum):
    """Where replication to a peer stands."""

    UNINITIALIZED = "uninitialized"
    """The peer has never had a complete copy, and none is being made."""
    BASELINE = "baseline"
    """The first copy is being made."""
    INCREMENTAL = "incremental"
    """What is recorded is being carried; what is clean goes to both sides."""
    IN_SYNC = "in_sync"
    """The log is empty: the guarantee holds."""
    OUT_OF_SYNC = "out_of_sync"
    """There is no session; changes are recorded."""
    CONGESTED = "congested"
    """As out of sync, for a while: the peer answered too slowly for too long."""
    PAUSED = "paused"
    """As out of sync, by an operator; nothing but the operator ends it."""
    SPLIT_BRAIN = "split_brain"
    """Both stores were changed apart; an operator decides."""
    REFUSED = "refused"
    """The handshake said no."""


class Event(enum.Enum):
    """What happens."""

    DECIDED_BASELINE = "baseline decided"
    DECIDED_QUICK = "resync decided"
    STARTED = "resync started"
    LOG_EMPTY_CONFIRMED = "log empty, confirmed by the peer"
    OP_LOST = "an operation failed on the peer"
    LINK_DOWN = "link down"
    CONGESTED = "too slow"
    BACK_OFF_OVER = "back-off over"
    REFUSED = "refused"
    SPLIT_BRAIN = "split brain found"
    PAUSE = "pause"
    RESUME = "resume"


_S = State
_E = Event

_HELD_OFF: Final = {
    (state, event): state
    for state in (_S.PAUSED, _S.CONGESTED)
    for event in (
        _E.LINK_DOWN, _E.OP_LOST, _E.DECIDED_BASELINE, _E.DECIDED_QUICK, _E.REFUSED, _E.SPLIT_BRAIN,
    )
}  # fmt: skip
"""Links may come and go meanwhile: nothing is carried."""

_DECISIONS: Final = {
    (state, event): target
    for state in (_S.UNINITIALIZED, _S.OUT_OF_SYNC, _S.REFUSED, _S.SPLIT_BRAIN)
    for event, target in (
        (_E.DECIDED_BASELINE, _S.BASELINE),
        (_E.DECIDED_QUICK, _S.INCREMENTAL),
        (_E.REFUSED, _S.REFUSED),
        (_E.SPLIT_BRAIN, _S.SPLIT_BRAIN),
        (_E.LINK_DOWN, state),
        (_E.OP_LOST, state),
        (_E.PAUSE, _S.PAUSED),
    )
}

TRANSITIONS: Final[dict[tuple[State, Event], State]] = {
    **_DECISIONS,
    (_S.BASELINE, _E.STARTED): _S.BASELINE,
    (_S.BASELINE, _E.OP_LOST): _S.BASELINE,
    (_S.BASELINE, _E.LOG_EMPTY_CONFIRMED): _S.IN_SYNC,
    (_S.BASELINE, _E.LINK_DOWN): _S.OUT_OF_SYNC,
    (_S.BASELINE, _E.PAUSE): _S.PAUSED,
    (_S.INCREMENTAL, _E.STARTED): _S.INCREMENTAL,
    (_S.INCREMENTAL, _E.OP_LOST): _S.INCREMENTAL,
    (_S.INCREMENTAL, _E.LOG_EMPTY_CONFIRMED): _S.IN_SYNC,
    (_S.INCREMENTAL, _E.LINK_DOWN): _S.OUT_OF_SYNC,
    (_S.INCREMENTAL, _E.PAUSE): _S.PAUSED,
    (_S.IN_SYNC, _E.STARTED): _S.INCREMENTAL,
    (_S.IN_SYNC, _E.OP_LOST): _S.INCREMENTAL,
    (_S.IN_SYNC, _E.LINK_DOWN): _S.OUT_OF_SYNC,
    (_S.IN_SYNC, _E.PAUSE): _S.PAUSED,
    **_HELD_OFF,
    (_S.PAUSED, _E.RESUME): _S.OUT_OF_SYNC,
    (_S.PAUSED, _E.PAUSE): _S.PAUSED,
    (_S.BASELINE, _E.CONGESTED): _S.CONGESTED,
    (_S.INCREMENTAL, _E.CONGESTED): _S.CONGESTED,
    (_S.IN_SYNC, _E.CONGESTED): _S.CONGESTED,
    (_S.CONGESTED, _E.BACK_OFF_OVER): _S.OUT_OF_SYNC,
    (_S.CONGESTED, _E.PAUSE): _S.PAUSED,
}


def word(state: State) -> str:
    """The state as people see it."""
    if state is State.CONGESTED:
        return "out-of-sync(congested)"
    value: str = state.value
    return value.replace("_", "-")


class IllegalTransition(Exception):
    """An event that cannot happen in a state: a defect of the caller."""


def next_state(state: State, event: Event) -> State:
    """The state after *event*. Raises IllegalTransition, and changes nothing."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        raise IllegalTransition(f"{event.value} in state {state.value}") from None


def page() -> str:
    """The documentation page, made from the table."""
    lines = [
        "# Replication states",
        "",
        "Made from the table in `replfs/core/relationship.py` by "
        "`python -m replfs.core.relationship`; a test fails when it is stale.",
        "",
        "| state | meaning |",
        "| --- | --- |",
    ]
    meanings = {
        _S.UNINITIALIZED: "the peer has never had a complete copy, and none is being made",
        _S.BASELINE: "the first copy is being made",
        _S.INCREMENTAL: "what is recorded is being carried; what is clean goes to both sides",
        _S.IN_SYNC: "the log is empty: the guarantee holds",
        _S.OUT_OF_SYNC: "there is no session; changes are recorded",
        _S.CONGESTED: "as out of sync, for a while: the peer answered too slowly for too long",
        _S.PAUSED: "as out of sync, by an operator; nothing but the operator ends it",
        _S.SPLIT_BRAIN: "both stores were changed apart; an operator decides",
        _S.REFUSED: "the handshake said no",
    }
    lines += [f"| {state.value} | {meanings[state]} |" for state in State]
    lines += ["", "```mermaid", "stateDiagram-v2", "    [*] --> uninitialized"]
    lines += [
        f"    {state.value} --> {target.value}: {event.value}"
        for (state, event), target in TRANSITIONS.items()
        if target is not state
    ]
    lines += [
        "```",
        "",
        "## What two stores are to each other",
        "",
        "Decided by both sides at every greeting, each about itself (*m*) and the other, from the "
        "first row that fits (`replfs/core/generation.py`). Wall-clock time decides nothing.",
        "",
        "| row | what is done | why |",
        "| --- | --- | --- |",
    ]
    lines += [f"| {name} | {action.value} | {why} |" for name, _, action, why in generation.TABLE]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    import sys

    sys.stdout.write(page())
