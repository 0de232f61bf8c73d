"""A primary that lost power, before it serves: who tells it that its place was taken."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import trio

from replfs.core import ops
from replfs.core.messages import Refuse, Welcome
from replfs.errors import PeerLost
from replfs.node.asking.identity import welcome_of
from replfs.node.recovery.fetch import Fetch, _Source, _Standing
from replfs.node.roles import reign
from replfs.node.settings.config import Settings
from replfs.node.settings.values import PeerSetting
from replfs.store.record import ROOT_ID
from replfs.store.state import SUSPECTS, State
from replfs.store.tree import Tree

NOW, LATER, VOLUME, B, C, OTHER = (bytes([n]) * 16 for n in range(1, 7))
PEERS = [PeerSetting("b", "tcp://b:1"), PeerSetting("c", "tcp://c:1")]


@pytest.fixture
def state(fd):
    """A primary that lost power; b was in sync, and c left behind long ago."""
    state = State(fd)
    state.update(role="primary", volume=VOLUME, generation=NOW, uninitialized=False)
    state.save_peer("b", node=B, generation=NOW, state="in_sync")
    state.save_peer("c", node=C, generation=OTHER, state="out_of_sync", apart=True)
    state.memory_lost = True
    yield state
    state.close()


class Silent:
    """A link to a node that does not answer, or refuses."""

    def __init__(self, owner: Any, refusal: str) -> None:
        self._owner = owner
        self._refusal = refusal

    async def run(self) -> None:
        if self._refusal:
            self._owner.refused(self, Refuse("another is the primary", self._refusal))
        await trio.sleep_forever()


def says(state: State, **changes: Any) -> Welcome:
    """What another store says of itself."""
    other = {"node": C, "name": "c", "store": b"c", "role": "secondary", "memory_lost": False}
    ahead = {"generation": LATER, "history": [NOW]}
    return msgspec.structs.replace(welcome_of(state), **(other | ahead | changes))


async def run(
    state: State,
    fd: int,
    answers: dict[str, Welcome],
    *,
    refusal: str = "",
    start_alone: bool = False,
) -> Fetch:
    async def who(name: str, _endpoint: str) -> Welcome | None:
        return answers.get(name)

    def make_link(_endpoint: str, _name: str, owner: Any) -> Any:
        return Silent(owner, refusal)

    tree = Tree(fd)
    wait_s = 0.1 if start_alone else 5.0
    settings = Settings(
        command="mount", store="/s", name="a", start_wait_s=wait_s, start_alone=start_alone
    )
    fetch = Fetch(settings, state, tree, PEERS, make_link, who, event=lambda *_a, **_k: None)
    try:
        assert await fetch.run() == frozenset()
    finally:
        tree.close_all()
    return fetch


async def test_its_successor_tells_it_although_it_has_nothing_to_fetch(state, fd, autojump_clock):
    successor = says(state, role="primary")
    assert (await run(state, fd, {"c": successor})).winner == successor


async def test_who_followed_its_successor_tells_it_too(state, fd, autojump_clock):
    follower = says(state, leader=B)
    assert (await run(state, fd, {"c": follower})).winner == follower


@pytest.mark.parametrize("leader", ["this store", "nobody"])
async def test_who_followed_nobody_else_does_not(state, fd, autojump_clock, leader):
    """It may be ahead by what this store had begun, and forgot with its power."""
    node = state.identity().node if leader == "this store" else b""
    with pytest.RaisesGroup(pytest.RaisesExc(PeerLost, match="Start that node")):
        await run(state, fd, {"c": says(state, leader=node)})
    assert state.identity().role == "primary"


async def test_a_peer_that_follows_another_one_is_no_proof_by_itself(state, fd, autojump_clock):
    """It says so by refusing; before this store serves, it waits for who can tell it more."""
    with pytest.RaisesGroup(pytest.RaisesExc(PeerLost, match="another is the primary")):
        await run(state, fd, {}, refusal="outdated")


def test_a_fenced_store_suspects_what_its_log_says(state):
    state.load_log("b").mark_data(OTHER, 0, 1)
    reign.fence(state, says(state, leader=B))
    assert state.identity().role == "secondary"
    found = state.peer(SUSPECTS)
    assert found is not None
    assert found.node == B
    assert list(state.load_log(SUSPECTS).objects()) == [OTHER]
    assert state.load_log("b").is_empty


def test_without_a_log_of_its_successor_it_suspects_everything(state):
    reign.fence(state, says(state, leader=OTHER))
    suspects = reign.suspects_of(state)
    assert suspects is not None
    assert suspects.winner == OTHER
    assert not suspects.log.is_empty


async def test_what_an_unfinished_fetch_took_aside_is_kept_by_who_starts_alone(
    state, fd, tmp_path, autojump_clock
):
    state.update(inconsistent=True)
    (tmp_path / ".replfs/limbo/0102").write_bytes(b"had a name once")
    await run(state, fd, {}, start_alone=True)
    (kept,) = (tmp_path / ".replfs/kept").iterdir()
    assert kept.name.startswith("unfinished-fetch-")
    assert (kept / "0102").read_bytes() == b"had a name once"
    assert not state.identity().inconsistent
    assert NOW in state.identity().history


# Of a loser ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("met_at", "is_asked", "standing"),
    [
        # Since it was decided against, it was sent nothing.
        (NOW, True, _Standing.NOTHING),
        (OTHER, False, _Standing.NOTHING),
        # What it had alone is in the log, and counts as right here.
        (OTHER, True, _Standing.READY),
    ],
)
def test_of_one_that_was_decided_against_nothing_is_fetched_that_it_had_alone(
    state, met_at, is_asked, standing
):
    state.update(generation=LATER, history=(NOW, OTHER), discarded=(OTHER,))
    peer = state.save_peer("b", generation=met_at, is_asked=is_asked)
    source = _Source(state, peer)
    link: Any = None
    source.welcomed(link, says(state, node=B, generation=OTHER, history=[NOW]))
    assert source.standing is standing
    assert source.is_partial == (standing is _Standing.READY)


# Of one that was not complete since ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "met_at", "is_partial"),
    [
        # What it may lack was on this disk when the reign began; it may have half of it.
        ({"base": OTHER}, OTHER, True),
        ({"base": OTHER}, B, True),
        # It was in sync in this reign: what is only unknown may be lost here, and is there.
        ({"base": OTHER}, NOW, False),
        # No reign began, or its beginning is too long ago.
        ({}, OTHER, False),
        ({"base": VOLUME}, OTHER, False),
        # The disk may lack anything.
        ({"base": OTHER, "disk_failed": True}, OTHER, False),
    ],
)
def test_of_one_that_was_not_in_sync_since_a_promotion_nothing_is_fetched_that_it_may_lack(
    state, changes, met_at, is_partial
):
    state.update(generation=LATER, history=(NOW, OTHER), **changes)
    source = _Source(state, state.save_peer("b", generation=met_at))
    link: Any = None
    source.welcomed(link, says(state, node=B, generation=OTHER, history=[]))
    assert source.standing is _Standing.READY
    assert source.is_partial == is_partial
    assert source.is_replica


class Asked:
    """A link to a peer that is lost with the first question."""

    def __init__(self) -> None:
        self.asked: list[type] = []

    def has_room(self, _stream: int) -> bool:
        return True

    def send(self, op: ops.AnyOp, _payload: None, sink: Any, _stream: int) -> None:
        self.asked.append(type(op))
        sink.lost(self)


@pytest.mark.parametrize("is_unknown", [True, False])
async def test_a_tree_all_of_which_it_may_lack_is_not_fetched_from_it(state, fd, is_unknown):
    """It may name objects in it: only where the log knows them one by one it is asked for them."""
    state.load_log("b").mark_names_all(ROOT_ID, deep=is_unknown)
    state.update(generation=LATER, history=(NOW, OTHER), base=OTHER)
    source = _Source(state, state.save_peer("b", generation=OTHER))
    link: Any = Asked()
    source.welcomed(link, says(state, node=B, generation=OTHER, history=[]))
    source.link = link
    tree = Tree(fd)
    settings = Settings(command="mount", store="/s", name="a")
    nobody: Any = None
    fetch = Fetch(settings, state, tree, PEERS, nobody, nobody, event=lambda *_a, **_k: None)
    try:
        with pytest.RaisesGroup(PeerLost, flatten_subgroups=True, allow_unwrapped=True):
            await fetch._from(source, own_counts=True)
    finally:
        tree.close_all()
    # Of the whole tree only the attributes of the root are looked at; no name in it.
    assert link.asked == [ops.Inspect if is_unknown else ops.Suspects]


@pytest.mark.parametrize(
    ("is_known", "leader", "features", "standing"),
    [
        (False, C, ["inconsistent"], _Standing.NOTHING),
        (False, C, [], _Standing.READY),
        (False, b"", ["inconsistent"], _Standing.READY),
        # It was let in here since.
        (True, b"self", ["inconsistent"], _Standing.NOTHING),
        (False, b"self", ["inconsistent"], _Standing.READY),
    ],
)
def test_of_one_that_another_primary_had_begun_to_resynchronise_nothing_is_fetched(
    state, is_known, leader, features, standing
):
    source = _Source(state, state.save_peer("b", led_apart=is_known))
    link: Any = None
    leader = state.identity().node if leader == b"self" else leader
    said = says(state, node=B, generation=NOW, history=[], leader=leader, features=features)
    source.welcomed(link, said)
    assert source.standing is standing
