"""A generation is told only when no loss of power can take it back."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from replfs.core.dirty import DirtyLog
from replfs.core.messages import Hello
from replfs.core.relationship import State as Replication
from replfs.errors import NotInSync, Refused
from replfs.node.asking.identity import PROBE, YIELDING, hello_of, make_tellable
from replfs.node.replication.peer import Peer
from replfs.node.roles.primary import Primary
from replfs.node.roles.reception import Reception
from replfs.node.settings.config import Settings
from replfs.store.state import State
from replfs.store.tree import Tree

NOW, VOLUME = b"N" * 16, b"V" * 16


@pytest.fixture
def state(fd):
    state = State(fd)
    state.update(role="primary", name="a", volume=VOLUME, generation=NOW, uninitialized=False)
    state.harden()
    yield state
    state.close()


@pytest.fixture
def fail(state, monkeypatch):
    """Makes the disk of the state fail, or not any more."""
    harden = state._database.harden

    def set_failing(failing: bool) -> None:
        def broken() -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(state._database, "harden", broken if failing else harden)

    return set_failing


def test_a_generation_is_durable_once_it_was_hardened(state, fail):
    assert state.is_generation_durable
    state.new_generation()
    assert not state.is_generation_durable
    fail(True)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        state.harden()
    assert not state.is_generation_durable
    fail(False)
    state.harden()
    assert state.is_generation_durable


def test_of_one_that_was_read_it_is_not_known(state, tmp_path):
    """The last run may have been killed before it was on the disk."""
    state.close()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    again = State(fd)
    assert not again.is_generation_durable
    make_tellable(again)
    assert again.is_generation_durable
    again.close()
    os.close(fd)


def test_no_greeting_tells_what_the_disk_does_not_take(state, fail):
    home: Any = SimpleNamespace(state=state)
    state.new_generation()
    fail(True)
    with pytest.raises(Refused, match="cannot save its generation"):
        Primary.hello(home)
    fail(False)
    assert Primary.hello(home).generation == state.identity().generation


def test_peers_hear_of_a_generation_only_if_the_disk_took_it(state, fail):
    home = Home(state)
    away, there = home.pipeline.peers
    fail(True)
    home.diverging(away)
    # What some peer does not get belongs to another generation all the same.
    assert state.identity().history == (NOW,)
    assert not home.told
    fail(False)
    away.peer_generation = state.identity().generation
    home.diverging(away)
    assert home.told == [there]


def test_who_hands_its_role_over_begins_no_generation(state, fd):
    """Who takes it begins one: this node's would part the two. If nobody does, it is begun then."""
    home = Home(state)
    peer = Peer(home, "d", "tcp://127.0.0.1:1", DirtyLog(), 1.0)
    peer.state = Replication.IN_SYNC
    peer.peer_generation = NOW
    home.pipeline.peers.append(peer)
    state.update(role="secondary")
    peer.mark_unflushed(b"i" * 16)  # as of an fsync that it refuses, for it takes the role over
    peer.begin_divergence()
    assert not peer.log.is_empty
    assert state.identity().generation == NOW
    with pytest.raises(NotInSync, match="handing its role over"):
        home.supersede(peer, other(state))
    state.update(role="primary")
    home.reign_again()
    assert state.identity().history == (NOW,)
    assert peer.diverged


def test_that_a_peer_may_have_heard_of_a_generation_is_saved_before_it_has(state, fd):
    """A later run that cannot reach it must not go on in that generation."""
    home = Home(state)
    away, _ = home.pipeline.peers
    home.diverging(away)
    state.close()
    again = State(fd)
    saved = {peer.name: peer.generation for peer in again.peers()}
    assert saved == {"c": again.identity().generation}
    again.close()


def test_a_peer_that_is_told_that_its_first_copy_is_whole_gets_what_follows(state):
    """Or that is another generation's, also before the peer has answered."""
    home = Home(state)
    copied, _ = home.pipeline.peers
    copied.state = Replication.BASELINE
    home.may_have(copied, state.identity().generation)
    home.diverging(copied)
    assert state.identity().history == (NOW,)


def test_who_else_had_led_a_peer_is_forgotten_before_it_is_told_that_it_is_whole(state):
    """From then on it may be all that has what a loss of power takes here."""
    home = Home(state)
    led, _ = home.pipeline.peers
    home.note_led_apart(led)
    assert led.led_apart
    saved = state.peer(led.name)
    assert saved is not None
    assert saved.led_apart
    home.may_have(led, NOW)
    assert not led.led_apart
    saved = state.peer(led.name)
    assert saved is not None
    assert not saved.led_apart


class Home(Primary):
    """As much of a primary as generations need: one peer is away, the other in sync."""

    def __init__(self, state):
        self.state = state
        self.tree: Any = SimpleNamespace(table=SimpleNamespace(by_id={}))
        self.told = []
        away: Any = SimpleNamespace(
            name="b",
            state=Replication.OUT_OF_SYNC,
            live=False,
            peer_generation=NOW,
            log=DirtyLog(),
        )
        there: Any = SimpleNamespace(
            name="c", state=Replication.IN_SYNC, live=True, peer_generation=NOW,
            understands=lambda _: True, announce=self._heard, log=DirtyLog(),
        )  # fmt: skip
        self.pipeline: Any = SimpleNamespace(peers=[away, there], announcing=0)

    def _heard(self, lineage, sink):
        assert lineage.generation == self.state.identity().generation
        self.told.append(self.pipeline.peers[1])
        return True


@pytest.fixture
def reception(state, fd):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    settings = Settings(command="mount", store="/s", name="a", listen="tcp://127.0.0.1:0")
    tree = Tree(fd)

    def supersede(_hello: Hello) -> None:
        state.new_generation()
        state.flush(durable=True)

    yield Reception(
        settings, state, tree, context, None,
        on_outdated=lambda _: None, on_yield=supersede, changed=lambda _: None,
    )  # fmt: skip
    tree.close_all()
    context.destroy(0)


def other(state, *marks, **changes):
    """A greeting of another store."""
    hello = hello_of(state, *marks)
    for name, value in ({"node": b"o" * 16, "store": b"other"} | changes).items():
        setattr(hello, name, value)
    return hello


def test_nor_does_an_answer(state, fail, reception):
    state.new_generation()
    fail(True)
    with pytest.raises(Refused, match="cannot save its generation"):
        reception.welcome(other(state, PROBE))
    fail(False)
    assert reception.welcome(other(state, PROBE)).generation == state.identity().generation


def test_a_secondary_answers_whatever_its_disk_does(state, fail, reception):
    """It tells what its primary told it."""
    reception.follower = SimpleNamespace(progress=7)
    state.new_generation()
    fail(True)
    assert reception.welcome(other(state, PROBE)).progress == 7


def test_what_another_store_gave_up_is_taken_only_if_that_can_be_saved(state, fail, reception):
    apart = other(state, YIELDING, generation=b"X" * 16, history=[NOW])
    state.update(generation=b"Y" * 16, history=(NOW,))
    make_tellable(state)
    fail(True)
    with pytest.raises(Refused, match="cannot be saved"):
        reception.welcome(apart)
