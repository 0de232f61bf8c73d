"""Decisions of a split brain: on a primary, and what a secondary can do of it, or who else can."""

from __future__ import annotations

from typing import Any

import pytest

from replfs.core.generation import Action, Decision
from replfs.errors import Refused, ReplfsError, UsageError
from replfs.node.failover import splitbrain
from replfs.node.failover.splitbrain import SplitBrain
from replfs.node.roles import reign
from replfs.node.settings.values import PeerSetting


class Settings:
    name = "me"


class Roles:
    """A secondary with two configured peers."""

    primary = None
    settings = Settings()
    state = None

    def peers(self):
        return [PeerSetting("silent", "tcp://h:1"), PeerSetting("b", "tcp://h:2")]


class Answer:
    def __init__(self, role):
        self.role = role


@pytest.fixture
def asked(monkeypatch):
    """What b says, and what this store is to it."""
    found = {"b": Answer("primary")}

    async def probe(_roles, name, _endpoint):
        return found.get(name)

    def decide(_state, _theirs):
        return Decision(Action.SPLIT_BRAIN, "changed apart")

    monkeypatch.setattr(splitbrain, "probe", probe)
    monkeypatch.setattr(reign, "decide", decide)
    return found


async def said(action):
    roles: Any = Roles()
    with pytest.raises(UsageError) as raised:
        await SplitBrain(roles).command({"action": action})
    return str(raised.value)


@pytest.mark.parametrize(
    ("action", "there"),
    [("list", "list"), ("keep-both", "keep-both")],
)
async def test_the_primary_that_decides_is_named_with_the_command_for_it(asked, action, there):
    assert f"'replfs split-brain TARGET {there} --peer me' on b" in await said(action)


async def test_a_secondary_can_only_win_as_a_primary(asked):
    assert "replfs promote --force" in await said("keep-mine")


@pytest.mark.parametrize("answer", [None, Answer("secondary")])
async def test_where_no_such_primary_is_reachable_that_is_said(asked, answer):
    asked["b"] = answer
    assert "no primary that was changed apart from it is reachable" in await said("list")


async def test_the_copies_of_keep_both_are_flushed_before_the_decision_is_made(monkeypatch):
    done = []

    class Primary:
        async def checkpoint(self):
            done.append("flushed")

        def supersede(self, _peer, _theirs):
            done.append("decided")

    class Link:
        def retry(self):
            done.append("told")

    class Peer:
        name = "b"
        is_apart = True
        link = Link()

    primary: Any = Primary()
    primary.pipeline = primary
    primary.peers = [Peer()]
    roles: Any = Roles()
    roles.primary = primary
    command = SplitBrain(roles)

    async def look(_peer):
        return Answer("primary")

    async def copy(_primary, _peer):
        done.append("copied")
        return 3

    monkeypatch.setattr(command, "_look", look)
    monkeypatch.setattr(command, "_copy", copy)
    answer = await command.command({"action": "keep-both"})
    assert done == ["copied", "flushed", "decided", "told"]
    assert "3 of its versions" in answer["message"]


async def give_up(monkeypatch, asked, taken, **arguments):
    """Have the secondary give up what it has; b answers with *taken*. What is said."""
    told = []

    async def yield_to(_roles, name, _endpoint):
        told.append(name)
        if taken == "quick":
            monkeypatch.setattr(reign, "decide", lambda *_: Decision(Action.FOLLOW, "it follows"))
        raise Refused("the peer is behind", taken)

    monkeypatch.setattr(splitbrain, "yield_to", yield_to)
    roles: Any = Roles()
    try:
        answer = await SplitBrain(roles).command({"action": "keep-theirs"} | arguments)
    except ReplfsError as error:
        return told, str(error)
    return told, answer["message"]


async def test_a_secondary_gives_up_what_it_has_by_telling_the_primary(monkeypatch, asked):
    told, said = await give_up(monkeypatch, asked, "quick")
    assert told == ["b"]
    assert "follows it when it connects" in said


async def test_it_only_says_so_where_it_is_tentative(monkeypatch, asked):
    told, said = await give_up(monkeypatch, asked, "quick", tentative=True)
    assert not told
    assert "would follow it" in said


async def test_a_primary_that_does_not_take_it_is_told_of(monkeypatch, asked):
    _, said = await give_up(monkeypatch, asked, "split-brain")
    assert "b does not take it" in said


async def test_of_several_primaries_one_has_to_be_named(monkeypatch, asked):
    asked["silent"] = Answer("primary")
    told, said = await give_up(monkeypatch, asked, "quick")
    assert (told, "silent, b: say which with --peer" in said) == ([], True)
    told, said = await give_up(monkeypatch, asked, "quick", peer="b")
    assert told == ["b"]
