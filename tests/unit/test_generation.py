"""What two stores are to each other: every row of the table, and what no table may ever say."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from replfs.core import generation
from replfs.core.generation import Action, Side, decide, row_of

OLD, NOW, MINE, THEIRS = (bytes([n]) * 16 for n in range(4))
VOLUME, OTHER = b"V" * 16, b"W" * 16


def side(who="me", **changes):
    """A primary at generation NOW that was at OLD before."""
    values = {
        "store": b"store-" + who.encode(),
        "node": b"node-" + who.encode(),
        "volume": VOLUME,
        "role": "primary",
        "generation": NOW,
        "history": (OLD,),
    }
    return Side(**(values | changes))


def peer(**changes):
    return side("peer", **({"role": "secondary"} | changes))


NEW = {
    "volume": b"",
    "role": "secondary",
    "generation": b"",
    "history": (),
    "uninitialized": True,
}

CASES = {
    "same store": (side(), peer(store=b"store-me"), Action.REFUSE),
    "two primaries, changed apart": (
        side(generation=MINE, history=(NOW,)),
        peer(role="primary", generation=THEIRS, history=(NOW,)),
        Action.SPLIT_BRAIN,
    ),
    "two primaries, mine is outdated": (
        side(generation=NOW, history=(OLD,)),
        peer(role="primary", generation=MINE, history=(NOW, OLD)),
        Action.STEP_DOWN,
    ),
    "two primaries, the peer's is outdated": (
        side(generation=MINE, history=(NOW, OLD)),
        peer(role="primary", generation=NOW, history=(OLD,)),
        Action.OUTDATED,
    ),
    "two primaries": (side(), peer(role="primary"), Action.REFUSE),
    "no primary": (side(role="secondary"), peer(), Action.REFUSE),
    "another volume": (side(), peer(volume=OTHER), Action.REFUSE),
    "I follow another primary": (
        side(role="secondary", generation=OLD, history=(), follows=MINE),
        peer(role="primary"),
        Action.OUTDATED,
    ),
    "I follow, new": (side(**NEW), peer(role="primary"), Action.FOLLOW),
    "I follow, and may have more": (
        side(role="secondary", progress=8),
        peer(role="primary", generation=MINE, history=(NOW, OLD), base=NOW, base_progress=7),
        Action.FOLLOW_KEEPING,
    ),
    "I follow": (
        side(role="secondary", generation=OLD, history=()),
        peer(role="primary"),
        Action.FOLLOW,
    ),
    "I am ahead of the primary, which lost power": (
        side(role="secondary"),
        peer(role="primary", generation=OLD, history=(), memory_lost=True),
        Action.REFUSE,
    ),
    "I am ahead of the primary": (
        side(role="secondary"),
        peer(role="primary", generation=OLD, history=()),
        Action.OUTDATED,
    ),
    "I was changed apart from the primary": (
        side(role="secondary", generation=MINE, history=(NOW,)),
        peer(role="primary", generation=THEIRS, history=(NOW,)),
        Action.SPLIT_BRAIN,
    ),
    "I am unrelated to the primary": (
        side(role="secondary", generation=MINE, history=()),
        peer(role="primary", generation=THEIRS, history=()),
        Action.REFUSE,
    ),
    "the peer has no ACLs": (side(), peer(has_acls=False), Action.REFUSE),
    "the peer is new": (side(), peer(**NEW), Action.BASELINE),
    "the peer is behind, and lost memory": (side(), peer(memory_lost=True), Action.COMPARE),
    "the peer is behind, and may have more": (
        side(generation=MINE, history=(NOW, OLD), base=NOW, base_progress=7),
        peer(progress=8),
        Action.QUICK,
    ),
    "the peer is behind": (side(), peer(generation=OLD, history=()), Action.QUICK),
    "the peer is ahead, and this store lost power": (
        side(generation=OLD, history=(), memory_lost=True),
        peer(generation=NOW, history=(OLD,)),
        Action.REFUSE,
    ),
    "the peer is ahead": (
        side(generation=OLD, history=()),
        peer(generation=NOW, history=(OLD,)),
        Action.STEP_DOWN,
    ),
    "changed apart": (
        side(generation=MINE, history=(NOW,)),
        peer(generation=THEIRS, history=(NOW,)),
        Action.SPLIT_BRAIN,
    ),
    "unrelated": (
        side(generation=MINE, history=()),
        peer(generation=THEIRS, history=()),
        Action.REFUSE,
    ),
}


def test_every_row_has_a_case_and_a_name_of_its_own():
    assert [row[0] for row in generation.TABLE] == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_row(name):
    mine, theirs, action = CASES[name]
    row = row_of(mine, theirs)
    assert row[0] == name
    assert decide(mine, theirs) == generation.Decision(action, row[3])
    assert row[3][0].islower()
    assert not row[3].endswith(".")


def test_equal_generations_need_what_was_recorded_and_nothing_else():
    assert decide(side(), peer()).action is Action.QUICK


def test_a_seeded_store_is_new_until_it_was_complete_once():
    """An interrupted first copy leaves the volume's name and generation behind."""
    begun = peer(uninitialized=True, inconsistent=True)
    assert decide(side(), begun).action is Action.BASELINE


def test_an_old_primary_that_returns_does_not_become_the_source():
    """It comes as a primary, is told so, and cannot overwrite what its successor has."""
    successor = side(generation=MINE, history=(NOW, OLD))
    returned = peer(role="primary", generation=NOW, history=(OLD,))
    assert decide(successor, returned).action is Action.OUTDATED
    assert decide(returned, successor).action is Action.STEP_DOWN
    # And as a secondary it follows.
    returned = peer(generation=NOW, history=(OLD,))
    assert decide(successor, returned).action is Action.QUICK
    assert decide(returned, successor).action is Action.FOLLOW


def test_a_secondary_of_another_primary_that_was_changed_apart_is_a_split_brain_too():
    """Its own primary may be gone for good: then an operator decides with it alone."""
    mine = side(generation=MINE, history=(NOW, OLD))
    follower = peer(generation=THEIRS, history=(NOW, OLD), follows=THEIRS, leader=b"node-x")
    assert decide(mine, follower).action is decide(follower, mine).action is Action.SPLIT_BRAIN
    # Not one that is only about to follow it: it belongs to that one.
    begun = peer(generation=NOW, history=(OLD,), follows=THEIRS, leader=b"node-x")
    assert decide(begun, mine).action is Action.OUTDATED


def test_an_operator_decides_a_split_brain_by_giving_the_winner_the_losers_generation():
    loser = peer(role="primary", generation=THEIRS, history=(NOW, OLD))
    winner = side(generation=MINE, history=(NOW, OLD))
    assert decide(winner, loser).action is decide(loser, winner).action is Action.SPLIT_BRAIN
    winner = side(generation=b"D" * 16, history=(MINE, THEIRS, NOW, OLD))
    assert decide(winner, loser).action is Action.OUTDATED
    assert decide(loser, winner).action is Action.STEP_DOWN
    # And whoever followed the loser follows the winner.
    follower = peer(generation=THEIRS, history=(NOW, OLD))
    assert decide(follower, winner).action is Action.FOLLOW


def successor(progress):
    """A secondary of generation NOW that was promoted, having followed so far."""
    return side(generation=MINE, history=(NOW, OLD), base=NOW, base_progress=progress)


@pytest.mark.parametrize(
    ("theirs", "mine", "keeps"),
    [
        (7, 7, False),
        (7, 6, False),
        (7, 8, True),
        # What is not known may be more.
        (0, 7, True),
        (7, 0, True),
    ],
)
def test_a_secondary_that_followed_further_than_its_new_primary_keeps_what_that_one_lacks(
    theirs, mine, keeps
):
    follower = peer(progress=mine)
    found = decide(follower, successor(theirs)).action
    assert found is (Action.FOLLOW_KEEPING if keeps else Action.FOLLOW)
    assert row_of(successor(theirs), follower)[0] == (
        "the peer is behind, and may have more" if keeps else "the peer is behind"
    )


@pytest.mark.parametrize("memory_lost", [False, True])
def test_whoever_followed_a_loser_keeps_what_the_winner_never_had(memory_lost):
    """What it had followed was acknowledged, and maybe nobody else has it any more."""
    winner = side(generation=b"D" * 16, history=(MINE, THEIRS, NOW, OLD), discarded=(THEIRS,))
    follower = peer(generation=THEIRS, history=(NOW, OLD), memory_lost=memory_lost)
    assert decide(follower, winner).action is Action.FOLLOW_KEEPING
    assert decide(winner, follower).action is (Action.COMPARE if memory_lost else Action.QUICK)
    # And whoever was left behind before the two went apart has nothing of its own.
    assert decide(peer(memory_lost=memory_lost), winner).action is Action.FOLLOW


def test_progress_means_something_only_where_the_reign_took_the_place_of_that_generation():
    further = peer(progress=9)
    for primary in (
        side(),  # the same primary as before
        side(generation=MINE, history=(NOW, OLD), base=OLD, base_progress=7),
    ):
        assert decide(further, primary).action is Action.FOLLOW
        assert decide(primary, further).action is Action.QUICK


def test_a_secondary_that_lost_power_is_not_asked_to_keep_what_is_older():
    assert decide(peer(memory_lost=True), successor(7)).action is Action.FOLLOW
    assert decide(successor(7), peer(memory_lost=True)).action is Action.COMPARE


def test_a_primary_that_forgot_what_it_was_about_to_begin_is_no_other_primary():
    """Its disk failed to keep the generation that it told, and then it lost power."""
    primary = side("primary", memory_lost=True)
    follower = peer(follows=MINE, leader=primary.node)
    assert decide(follower, primary).action is Action.FOLLOW
    assert decide(primary, follower).action is Action.QUICK
    assert decide(peer(follows=MINE, leader=b"node-x"), primary).action is Action.OUTDATED


@pytest.mark.parametrize(
    ("leader", "here", "there"),
    [
        (b"", Action.REFUSE, Action.REFUSE),
        # What it is ahead by may be what this store had begun itself.
        (b"node-me", Action.REFUSE, Action.REFUSE),
        (b"node-other", Action.STEP_DOWN, Action.OUTDATED),
    ],
)
def test_a_primary_that_lost_power_steps_down_before_a_store_that_followed_another_one(
    leader, here, there
):
    returned = side(generation=OLD, history=(), memory_lost=True)
    ahead = peer(generation=NOW, history=(OLD,), leader=leader)
    assert decide(returned, ahead).action is here
    assert decide(ahead, returned).action is there


@pytest.mark.parametrize(
    ("one", "other", "ahead"),
    [
        ({"progress": 8}, {"progress": 7}, True),
        ({"progress": 7}, {"progress": 8}, False),
        ({"progress": 7}, {"progress": 7}, False),
        ({"progress": 7}, {"progress": 0}, True),
        ({"progress": 0}, {"progress": 7}, False),
        # Of another generation the number says nothing.
        ({"progress": 1}, {"progress": 9, "generation": OLD, "history": ()}, True),
        ({"progress": 9, "generation": OLD, "history": ()}, {"progress": 1}, False),
        ({"progress": 9, "generation": MINE}, {"progress": 1, "generation": THEIRS}, False),
    ],
)
def test_of_two_secondaries_the_one_with_the_later_generation_or_the_higher_number_is_ahead(
    one, other, ahead
):
    assert generation.is_ahead(peer(**one), peer(**other)) is ahead


def test_another_volume_makes_nobody_step_down():
    stranger = peer(role="primary", volume=OTHER, generation=MINE, history=(NOW, OLD))
    assert decide(side(), stranger).action is Action.REFUSE


def test_history_that_was_forgotten_is_not_guessed():
    """Beyond the history's length two stores are unrelated, not in sync."""
    long_ago = peer(generation=b"L" * 16, history=())
    assert decide(side(), long_ago).action is Action.REFUSE


GENERATIONS: list[tuple[bytes, tuple[bytes, ...]]] = [
    (b"", ()),
    (OLD, ()),
    (NOW, (OLD,)),
    (MINE, (OLD,)),
    (MINE, (NOW, OLD)),
    (THEIRS, (NOW, OLD)),
    (THEIRS, ()),
]
FLAGS = ("uninitialized", "inconsistent", "memory_lost")
SIDES: list[dict[str, Any]] = [
    {"role": role, "volume": volume, "generation": current, "history": history}
    | dict(zip(FLAGS, flags, strict=True))
    for role in ("primary", "secondary", "unset")
    for volume in (b"", VOLUME, OTHER)
    for current, history in GENERATIONS
    for flags in itertools.product((False, True), repeat=3)
    # A primary belongs to a volume and has a generation.
    if role != "primary" or (volume and current and not flags[0])
]
FOLLOWING = {Action.FOLLOW, Action.FOLLOW_KEEPING}
SENDING = {Action.QUICK, Action.BASELINE, Action.COMPARE}


def test_every_combination_is_decided_and_both_sides_agree():
    """Never two sources, never a source without a follower, and one store is refused as itself."""
    for left, right in itertools.product(SIDES, SIDES):
        one, other = side("one", **left), side("other", **right)
        here, there = decide(one, other).action, decide(other, one).action
        assert (here in SENDING) == (there in FOLLOWING), (one, other)
        assert (here is Action.SPLIT_BRAIN) == (there is Action.SPLIT_BRAIN), (one, other)
        assert (here is Action.STEP_DOWN) == (there is Action.OUTDATED), (one, other)
        if here is Action.STEP_DOWN:
            # Only a primary, and only before one that was at the same generation and went on.
            assert one.role == "primary"
            assert one.volume == other.volume
            assert one.generation in other.history
        if here in SENDING:
            assert one.role == "primary"
            assert other.role != "primary"
            # Nobody is overwritten who has what the source never had.
            known = {one.generation, *one.history}
            assert other.uninitialized or not other.generation or other.generation in known
            assert not other.volume or other.volume == one.volume
            if other.memory_lost and not (other.uninitialized or not other.generation):
                assert here is Action.COMPARE


def test_nothing_is_decided_between_a_store_and_itself():
    for changes in SIDES:
        itself = side("one", **changes)
        assert decide(itself, itself).action is Action.REFUSE
        assert decide(itself, side("other", **changes | {"node": itself.node})).action is (
            Action.REFUSE
        )
