"""A secondary that may have more than the primary that comes, and a disk that fails just then."""

from __future__ import annotations

import errno
import stat
from typing import Any

import msgspec
import pytest
import trio
from helpers.states import opened

from replfs.core import ops
from replfs.core.messages import Hello, Welcome
from replfs.node.asking.identity import welcome_of
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.roles import reign
from replfs.node.roles import secondary as secondary_module
from replfs.node.roles.secondary import Secondary
from replfs.node.settings.config import Settings
from replfs.store.progress import Progress
from replfs.store.twins import find_twins

GENERATION, BEFORE, WINNER, SHARED = (bytes([n]) * 16 for n in (3, 4, 5, 6))


class Session:
    """Remembers why it was closed."""

    def __init__(self, hello: Hello, offered: Welcome) -> None:
        self.hello = hello
        self.offered = offered
        self.name = hello.name
        self.node = hello.node
        self.closed: list[str] = []

    def close(self, reason):
        self.closed.append(reason)


@pytest.fixture
def state(tree, tmp_path):
    with opened(tmp_path / "store") as made:
        made.update(role="secondary", volume=BEFORE, generation=BEFORE, uninitialized=False)
        made.started()
        yield made


@pytest.fixture
def secondary(state, tree, tmp_path):
    settings = Settings(command="agent", store=str(tmp_path / "store"), name="me")
    progress = Progress(str(tmp_path / "progress"), state.identity().node, 7)
    made = Secondary(
        settings, state, tree, Unwritten(), progress=progress, event=lambda *_, **__: None
    )
    yield made
    progress.close(clean=False)


def hello_of(state):
    """A primary that took the place of the one before when it had followed less far."""
    mine: Any = msgspec.structs.asdict(welcome_of(state))
    for key in ("session", "resumed", "applied", "had", "progress"):
        del mine[key]
    more: Any = {"node": WINNER, "name": "winner", "store": "elsewhere", "role": "primary"}
    more |= {"generation": GENERATION, "history": (BEFORE,), "base": BEFORE, "base_progress": 3}
    return Hello(**(mine | more))


def meet(secondary, state):
    """The session that the primary gets."""
    session = offer(secondary, hello_of(state))
    secondary.opened(session)
    return session


def offer(secondary, hello) -> Any:
    """A session that a primary has been offered, and may take."""
    return Session(hello, secondary.welcome(hello))


def test_what_it_has_alone_is_kept_beside(secondary, state):
    session = meet(secondary, state)
    assert secondary.session is session
    assert secondary.replica._live.beside is not None


@pytest.mark.parametrize("what", ["suspect", "Beside"])
def test_nothing_is_taken_from_that_primary_until_that_can_be_kept(
    secondary, state, monkeypatch, what
):
    def fail(*_):
        raise OSError(errno.EIO, "the disk fails")

    with monkeypatch.context() as patch:
        patch.setattr(secondary_module if what == "Beside" else reign, what, fail)
        session = meet(secondary, state)
    assert [reason.rpartition(": ")[2] for reason in session.closed] == ["the disk fails"]
    assert secondary.session is None

    session = meet(secondary, state)
    assert secondary.session is session
    assert secondary.replica._live.beside is not None


def other_of(state):
    """Another one that was promoted, and does not know of the first."""
    hello = hello_of(state)
    hello.node, hello.name, hello.generation = b"o" * 16, "other", b"G" * 16
    return hello


def test_it_remembers_whom_it_lets_in_whoever_asked_last(secondary, state):
    session = offer(secondary, hello_of(state))
    offer(secondary, other_of(state))
    secondary.opened(session)
    assert secondary.primary_name == "winner"
    assert (state.identity().leader, state.identity().follows) == (WINNER, GENERATION)


def test_who_was_told_what_it_is_no_more_is_not_let_in(secondary, state):
    """It would not ask what the other one has brought meanwhile."""
    late = offer(secondary, hello_of(state))
    session = offer(secondary, other_of(state))
    secondary.opened(session)
    secondary.opened(late)
    assert late.closed
    assert secondary.session is session
    assert state.identity().leader == session.node


def test_it_hears_of_what_was_decided_against_while_it_follows(secondary, state):
    """In sync or not: promoted, it may be the only one that a follower of a loser ever meets."""
    state.update(discarded=(BEFORE,))
    assert secondary._generation(ops.Generation(GENERATION, [WINNER], [WINNER])) == ops.Done(0)
    assert state.identity().discarded == (WINNER, BEFORE)
    secondary._phase(ops.Phase(False, GENERATION, [SHARED, WINNER], [SHARED, WINNER]))
    assert state.identity().discarded == (SHARED, WINNER, BEFORE)
    assert secondary._generation(ops.Generation(GENERATION, [])) == ops.Done(0)
    assert state.identity().discarded == (SHARED, WINNER, BEFORE)


async def began(secondary, state):
    """A resync begins, in the middle of another one if the state says so."""
    send, receive = trio.open_memory_channel[Any](1)
    op = ops.Phase(inconsistent=True, generation=GENERATION, history=[])
    async with trio.open_nursery() as nursery:
        await nursery.start(secondary.replica.run)
        answer = secondary.replica.apply(1, op, None, send.send_nowait)
        assert (answer or await receive.receive()) == ops.Done(0)
        nursery.cancel_scope.cancel()
    assert state.identity().inconsistent


async def test_whose_resync_was_cut_off_is_told_until_another_one_begins(secondary, state):
    """One that is only let in may not have heard of it: its next greeting has to be told again."""
    other = offer(secondary, other_of(state))
    secondary.opened(other)
    await began(secondary, state)
    assert state.identity().led_by == other.node
    session = offer(secondary, hello_of(state))
    secondary.opened(session)
    assert state.identity().leader == session.node
    assert secondary.welcome(hello_of(state)).led_by == other.node
    await began(secondary, state)
    assert state.identity().led_by == session.node


@pytest.mark.parametrize("is_cut_off", [False, True])
async def test_what_a_resync_that_was_cut_off_made_anew_is_told_from_what_it_was(
    secondary, state, tree, is_cut_off
):
    """To the next one either would be the object. Where none was cut off there are none."""
    for name in (b"old", b"anew"):
        tree.drop_unused(
            tree.make_like(tree.root, name, stat.S_IFDIR, owner=(0, 0), object_id=SHARED)[0]
        )
    state.update(inconsistent=is_cut_off)
    await began(secondary, state)
    assert (find_twins(tree.root_fd) == []) is is_cut_off
