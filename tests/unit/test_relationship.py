"""The replication state table, and the page made from it."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import replfs
from replfs.core import relationship
from replfs.core.relationship import TRANSITIONS, Event, IllegalTransition, State, next_state

ROOT = Path(replfs.__path__[0]).parent
PAGE = ROOT / "docs/internals/relationship.md"

WALKS = {
    "a first start": [
        (Event.DECIDED_BASELINE, State.BASELINE),
        (Event.STARTED, State.BASELINE),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
    ],
    "a first copy cut off and taken up again": [
        (Event.DECIDED_BASELINE, State.BASELINE),
        (Event.LINK_DOWN, State.OUT_OF_SYNC),
        (Event.LINK_DOWN, State.OUT_OF_SYNC),
        (Event.DECIDED_BASELINE, State.BASELINE),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
    ],
    "a lost link": [
        (Event.DECIDED_QUICK, State.INCREMENTAL),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
        (Event.LINK_DOWN, State.OUT_OF_SYNC),
        (Event.DECIDED_QUICK, State.INCREMENTAL),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
    ],
    "an operation that fails on the peer": [
        (Event.DECIDED_QUICK, State.INCREMENTAL),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
        (Event.OP_LOST, State.INCREMENTAL),
        (Event.OP_LOST, State.INCREMENTAL),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
    ],
    "an operator's pause, which nothing else ends": [
        (Event.DECIDED_QUICK, State.INCREMENTAL),
        (Event.PAUSE, State.PAUSED),
        (Event.LINK_DOWN, State.PAUSED),
        (Event.DECIDED_QUICK, State.PAUSED),
        (Event.SPLIT_BRAIN, State.PAUSED),
        (Event.RESUME, State.OUT_OF_SYNC),
        (Event.DECIDED_QUICK, State.INCREMENTAL),
    ],
    "a peer that is too slow, is left alone for a while, and then resynced": [
        (Event.DECIDED_QUICK, State.INCREMENTAL),
        (Event.LOG_EMPTY_CONFIRMED, State.IN_SYNC),
        (Event.CONGESTED, State.CONGESTED),
        (Event.LINK_DOWN, State.CONGESTED),
        (Event.DECIDED_QUICK, State.CONGESTED),
        (Event.BACK_OFF_OVER, State.OUT_OF_SYNC),
        (Event.LINK_DOWN, State.OUT_OF_SYNC),
        (Event.DECIDED_QUICK, State.INCREMENTAL),
    ],
    "an operator's pause of a peer that is too slow": [
        (Event.DECIDED_BASELINE, State.BASELINE),
        (Event.CONGESTED, State.CONGESTED),
        (Event.PAUSE, State.PAUSED),
        (Event.RESUME, State.OUT_OF_SYNC),
    ],
    "a split brain and its end": [
        (Event.SPLIT_BRAIN, State.SPLIT_BRAIN),
        (Event.LINK_DOWN, State.SPLIT_BRAIN),
        (Event.DECIDED_QUICK, State.INCREMENTAL),
    ],
    "a refusal that is lifted": [
        (Event.REFUSED, State.REFUSED),
        (Event.REFUSED, State.REFUSED),
        (Event.DECIDED_BASELINE, State.BASELINE),
    ],
}


@pytest.mark.parametrize("walk", WALKS)
def test_walk(walk):
    state = State.UNINITIALIZED
    for event, expected in WALKS[walk]:
        state = next_state(state, event)
        assert state is expected


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_every_pair_has_a_target_or_the_one_error(state, event):
    if (state, event) in TRANSITIONS:
        assert next_state(state, event) is TRANSITIONS[state, event]
    else:
        with pytest.raises(IllegalTransition, match=state.value):
            next_state(state, event)


def _reachable(state):
    found = {state}
    while True:
        more = {target for (origin, _), target in TRANSITIONS.items() if origin in found} - found
        if not more:
            return found
        found |= more


@pytest.mark.parametrize("state", list(State))
def test_there_is_a_way_to_in_sync_from_every_state(state):
    assert State.IN_SYNC in _reachable(state)


def test_every_state_is_reached_and_every_event_has_a_use():
    assert _reachable(State.UNINITIALIZED) == set(State)
    assert {event for _, event in TRANSITIONS} == set(Event)


def test_in_sync_is_reached_only_by_the_peers_confirmation():
    """No handshake rule and no operator makes two stores equal."""
    ways = {event for (_, event), target in TRANSITIONS.items() if target is State.IN_SYNC}
    assert ways == {Event.LOG_EMPTY_CONFIRMED}


def test_a_pause_is_ended_only_by_the_operator():
    ways = {
        event
        for (state, event), target in TRANSITIONS.items()
        if state is State.PAUSED and target is not State.PAUSED
    }
    assert ways == {Event.RESUME}


@pytest.mark.parametrize("event", [Event.LINK_DOWN, Event.PAUSE])
def test_links_and_operators_may_do_this_at_any_time(event):
    assert {state for state in State if (state, event) in TRANSITIONS} == set(State)


def test_a_lost_link_never_leaves_in_sync_standing():
    for state in State:
        assert next_state(state, Event.LINK_DOWN) is not State.IN_SYNC


def test_the_page_is_fresh():
    """If this fails: python -m replfs.core.relationship > docs/internals/relationship.md."""
    assert PAGE.read_text(encoding="utf-8") == relationship.page()


def test_the_command_prints_the_page():
    shown = subprocess.run(
        [sys.executable, "-m", "replfs.core.relationship"],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
        timeout=60,
    )
    assert shown.stdout == relationship.page()
    for state in State:
        assert f"| {state.value} |" in shown.stdout
