"""What a primary sends to a peer that lacks something: nothing that it could not find there."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from replfs.core import features, ops
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Action, Decision, Lineage
from replfs.core.relationship import Event, State
from replfs.errors import NotInSync, NotRecorded, PeerLost, UsageError
from replfs.node.failover.switchover import Switchover
from replfs.node.replication.flight import Flight
from replfs.node.replication.peer import Peer
from replfs.node.replication.places import LIVE
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

SELF, OTHER, KNOWN = b"self" * 4, b"other" * 3 + b"!", b"n" * 16


class Home:
    """As much of a node as a peer needs here."""

    def __init__(self, tree):
        self.tree = tree

    def can_record(self):
        return True

    def diverging(self, peer):
        return True

    def changed(self, peer):
        pass


class Link:
    """Remembers what is sent."""

    def __init__(self):
        self.sent = []

    def send(self, op, payload, sink, stream):
        self.sent.append(op)

    def has_room(self, stream=LIVE, queue_bytes=0):
        return True


class Owner:
    flights = 0


@pytest.fixture
def tree(tmp_path):
    store = tmp_path / "store"
    (store / "a/b").mkdir(parents=True)
    (store / "a/b/file").touch()
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd)
    yield tree
    tree.close_all()
    os.close(fd)


@pytest.fixture
def peer(tree):
    home: Any = Home(tree)
    link: Any = Link()
    peer = Peer(home, "peer", "tcp://127.0.0.1:1", DirtyLog(), 1.0)
    peer.link = link
    peer.live = True
    peer.located = ({ROOT_ID}, {ROOT_ID})
    return peer


@pytest.fixture
def below(tree):
    """The directories `a` and `a/b`, and the file in it, with ids."""
    a = tree.lookup(tree.root, b"a")[0]
    b = tree.lookup(a, b"b")[0]
    file = tree.lookup(b, b"file")[0]
    for inode in (a, b, file):
        tree.ensure_id(inode)
    return a, b, file


def send(peer, op, payload=None):
    owner: Any = Owner()
    return peer.send(op, payload, Flight(owner, "test"), 0)


def harden(peer):
    """What was cleared is cleared on the disk, too."""
    peer.settling.begin()
    peer.settling.settle(peer.log)


def test_nothing_is_sent_before_the_peer_was_asked_what_it_has_alone(peer, below):
    """It would go over what is to be kept beside there, and is in no log here yet."""
    op = ops.Write(below[2].id, 0, 1)
    peer.is_asked = False
    assert not send(peer, op, b"x")
    peer.asked()
    assert send(peer, op, b"x")
    assert peer.link.sent[-1] == op


def test_an_fsync_of_what_it_may_lack_tells_it_apart(peer, below):
    """A killed process had it in flight: it is to be compared, and nothing was recorded since."""
    peer.log.mark_data(below[2].id, 0, 1, compare=True)
    assert send(peer, ops.Sync(below[0].id, False))
    assert not peer.diverged
    assert send(peer, ops.Sync(below[2].id, False))
    assert peer.diverged


def test_the_way_to_an_object_is_told_once(peer, below):
    a, b, file = below
    op = ops.SetAttr(file.id, mtime=1)
    assert send(peer, op)
    assert peer.link.sent == [
        ops.Locate(a.id, ROOT_ID, b"a"),
        ops.Locate(b.id, a.id, b"b"),
        ops.Locate(file.id, b.id, b"file"),
        op,
    ]
    assert send(peer, op)
    assert peer.link.sent[4:] == [op]


def test_nothing_goes_below_a_name_that_the_peer_does_not_have_yet(peer, below):
    """It could not find it, and what it was told of the way there would be taken for known."""
    a, b, file = below
    peer.log.mark_name(ROOT_ID, b"a")
    assert not send(peer, ops.SetAttr(file.id, mtime=1))
    assert not send(peer, ops.Make(bytes([9]) * 16, b.id, b"new", 0o100644, 0, 0, 0, b"", 1, 1))
    assert not send(peer, ops.Unlink(file.id, b.id, b"file", False, 0))
    assert peer.link.sent == []
    peer.log.clear_name(ROOT_ID, b"a", version=peer.log.mark_version(ROOT_ID))
    peer.log.clear_attrs(ROOT_ID, version=peer.log.mark_version(ROOT_ID))
    assert peer.log.is_empty
    harden(peer)
    assert send(peer, ops.SetAttr(file.id, mtime=1))
    assert [type(op) for op in peer.link.sent] == [ops.Locate] * 3 + [ops.SetAttr]


def test_what_is_known_already_may_be_told_of_again_wherever_it_is(peer, below):
    a, b, file = below
    assert send(peer, ops.SetAttr(file.id, mtime=1))
    peer.log.mark_name(ROOT_ID, b"a")
    assert send(peer, ops.SetAttr(file.id, mtime=2))


def test_after_a_stale_answer_the_whole_way_is_told_anew(peer, below):
    a, b, file = below
    op = ops.SetAttr(file.id, mtime=1)
    assert send(peer, op)
    peer.failed(op, errno.ESTALE, length=0, start=0)
    peer.log.clear_attrs(file.id, version=peer.log.mark_version(file.id))
    harden(peer)
    del peer.link.sent[:]
    assert send(peer, op)
    assert [type(one) for one in peer.link.sent] == [ops.Locate] * 3 + [ops.SetAttr]


def test_a_directory_that_may_not_be_empty_there_is_removed_by_the_resync(peer, tree, below):
    """Something in it is to be removed or moved first: rmdir(2) would fail on the peer."""
    a, b, file = below
    assert send(peer, ops.SetAttr(b.id, mtime=1))
    peer.log.mark_name(b.id, b"file")
    peer.object_removed(b, a, b"b")
    assert not peer.log.marks(b.id)
    assert not peer.log.name_is_clean(a.id, b"b")
    assert not send(peer, ops.Unlink(b.id, a.id, b"b", True, 1))


def test_a_removed_directory_that_is_equal_there_is_removed_at_once(peer, below):
    a, b, file = below
    assert send(peer, ops.SetAttr(b.id, mtime=1))
    peer.log.mark_attrs(b.id)
    peer.object_removed(b, a, b"b")
    assert peer.log.is_empty
    assert send(peer, ops.Unlink(b.id, a.id, b"b", True, 1))


async def test_a_resync_is_hurried_also_after_the_peer_was_left_alone(peer):
    """Both wait for something; neither takes away what the other waits for."""
    woken = []

    async def wait(what, until):
        await until()
        woken.append(what)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait, "resync", peer.wait_urgent)
        await wait_all_tasks_blocked()
        nursery.start_soon(wait, "congestion", peer.wait_hurry)
        await wait_all_tasks_blocked()
        peer.wake_urgent()
        await wait_all_tasks_blocked()
        assert woken == ["resync"]
        peer.hurry()
    assert woken == ["resync", "congestion"]


# What the disk does not say yet ----------------------------------------------------------------


def test_nothing_is_sent_on_top_of_what_the_disk_still_calls_dirty(peer, below):
    _, _, file = below
    write = ops.Write(file.id, 0, 1)
    peer.log.mark_data(file.id, 0, 1)
    peer.log.clear_regions(file.id, 0, None)
    peer.log.clear_attrs(file.id)
    assert peer.log.is_empty
    assert not peer.gets_all
    assert not peer.is_clean(file)
    assert not send(peer, write, b"x")
    assert peer.link.sent == []
    peer.settling.begin()
    assert not send(peer, write, b"x")
    peer.settling.settle(peer.log)
    assert peer.gets_all
    assert peer.is_clean(file)
    assert send(peer, write, b"x")


def test_nor_below_a_name_that_the_disk_still_calls_dirty(peer, below):
    a, b, file = below
    peer.log.mark_name(a.id, b"b")
    peer.log.clear_name(a.id, b"b")
    peer.log.clear_attrs(a.id)
    assert not peer.is_clean(file)
    assert not send(peer, ops.SetAttr(file.id, mtime=1))
    assert peer.link.sent == []
    harden(peer)
    assert send(peer, ops.SetAttr(file.id, mtime=1))


# Releases ----------------------------------------------------------------------------------------


class Sink:
    def answered(self, link, answer):
        pass

    def lost(self, link):
        pass


def test_a_generation_is_announced_to_a_peer_that_knows_what_that_is(peer):
    peer.state = State.IN_SYNC
    peer.features = frozenset(features.WORDS.values())
    assert peer.announce(Lineage(b"g" * 16, [b"h" * 16], [b"h" * 16]), Sink())
    assert peer.link.sent == [ops.Generation(b"g" * 16, [b"h" * 16], [b"h" * 16])]


def test_a_peer_of_an_older_release_is_told_of_a_generation_by_a_resync(peer):
    """It would end the session at an operation that it does not know, and do so for ever."""
    peer.state = State.IN_SYNC
    peer.peer_generation = b"o" * 16
    assert not peer.announce(Lineage(b"g" * 16, [], []), Sink())
    assert peer.link.sent == []
    assert peer.peer_generation == b"o" * 16
    assert peer.state is State.INCREMENTAL
    assert "older release" in peer.reason


async def test_a_peer_of_an_older_release_is_not_asked_to_take_over(peer):
    roles: Any = None
    peer.release = "0.0.9"
    with pytest.raises(UsageError, match=r"peer runs replfs 0\.0\.9, which cannot be handed"):
        await Switchover(roles)._prepare(peer)
    assert peer.link.sent == []


async def test_no_role_is_handed_over_before_it_is_known_what_the_store_has(peer, autojump_clock):
    """What is found later would be recorded for nobody."""
    rescan = SimpleNamespace(is_over=trio.Event())
    settings = SimpleNamespace(listen="tcp://127.0.0.1:1")
    roles: Any = SimpleNamespace(settings=settings, front=None)
    primary: Any = SimpleNamespace(rescan=rescan)
    with pytest.raises(NotInSync, match="changed behind the mount"):
        await Switchover(roles)._check(primary, peer)
    rescan.is_over.set()
    with pytest.raises(NotInSync, match="peer is not in sync"):
        await Switchover(roles)._check(primary, peer)


@pytest.mark.parametrize(
    ("features", "leader", "led_by", "asked"),
    [
        (["inconsistent"], OTHER, OTHER, True),
        (["inconsistent"], SELF, OTHER, True),
        (["inconsistent"], OTHER, SELF, False),
        (["inconsistent"], SELF, SELF, False),
        # Of a release that does not tell whose resync it is.
        (["inconsistent"], OTHER, b"", True),
        (["inconsistent"], SELF, b"", False),
        (["inconsistent"], b"", b"", False),
        ([], OTHER, b"", False),
    ],
)
def test_what_another_primary_began_to_bring_to_a_peer_is_asked_for(
    peer, features, leader, led_by, asked
):
    """It is cut off in the middle: the peer is at its old generation, and has what no log says."""
    peer.home.is_discarded = lambda _: False
    peer.home.is_self = lambda node: node == b"self" * 4
    peer.peer_node = b"n" * 16
    welcome: Any = SimpleNamespace(
        node=peer.peer_node,
        generation=b"g" * 16,
        history=[],
        features=features,
        leader=leader,
        led_by=led_by,
    )
    event, _ = peer._take_stock(Decision(Action.QUICK, "it lacks what was recorded"), welcome)
    assert event is Event.DECIDED_QUICK
    assert peer.is_asked != asked
    assert peer.log.is_empty


@pytest.mark.parametrize(
    ("node", "features", "led_by", "is_known"),
    [
        (KNOWN, [], b"", True),
        (KNOWN, ["inconsistent"], SELF, True),
        (KNOWN, ["inconsistent"], OTHER, False),
        # The log was kept for another store in its place, or for none.
        (b"another machine!", [], b"", True),
        (b"another machine!", ["inconsistent"], SELF, False),
        (b"another machine!", ["inconsistent"], OTHER, False),
    ],
)
def test_what_another_primary_began_a_first_copy_with_is_compared(
    peer, node, features, led_by, is_known
):
    """An object of it is the same by its id, and what is below it is not."""
    peer.home.is_self = lambda node: node == SELF
    peer.peer_node = KNOWN
    welcome: Any = SimpleNamespace(
        node=node, memory_lost=False, features=features, leader=SELF, led_by=led_by
    )
    event, _ = peer._take_stock(Decision(Action.BASELINE, "it is new"), welcome)
    assert event is Event.DECIDED_BASELINE
    marks = peer.log.marks(ROOT_ID)
    assert marks.names_all
    assert marks.deep != is_known


@pytest.mark.parametrize("leader", [OTHER, SELF])
def test_what_another_primary_began_to_bring_to_a_peer_is_remembered_before_it_counts(peer, leader):
    """While it is apart nothing is fetched from it; from then on it would be."""
    noted = []
    peer.apart = True
    peer.home.decide = lambda *_: Decision(Action.QUICK, "it lacks what was recorded")
    peer.home.is_discarded = lambda _: False
    peer.home.is_self = lambda node: node == b"self" * 4
    peer.home.lineage = lambda: Lineage(b"g" * 16, [], [])
    peer.home.note_led_apart = lambda _: noted.append("led apart")
    peer.home.set_apart = lambda _, *, apart: noted.append(apart)
    peer.peer_node = b"n" * 16
    welcome: Any = SimpleNamespace(
        node=peer.peer_node,
        generation=b"g" * 16,
        history=[],
        features=["inconsistent"],
        leader=leader,
        led_by=b"",
    )
    peer.welcomed(peer.link, welcome)
    assert noted == ([False] if peer.home.is_self(leader) else ["led apart", False])


@pytest.mark.parametrize("is_known", [True, False])
def test_a_peer_that_could_not_flush_is_brought_what_it_was_to_flush(peer, below, is_known):
    """Where that is not known, everything: it would be in sync again with nothing sent."""
    _, _, file = below
    if is_known:
        peer.unstable.begin()
        peer.unstable.settle(everywhere=True)
        peer.unstable.note(ops.Write(file.id, 0, 7), lambda _: b"handle", length=4)
    peer.flush_failed("disk")
    assert peer.diverged
    marks = peer.log.marks(file.id if is_known else ROOT_ID)
    assert marks is not None
    assert marks.data if is_known else marks.deep


def test_where_what_it_lacks_cannot_be_recorded_everything_is_compared(peer):
    peer.state = State.IN_SYNC
    error = NotRecorded(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert peer.doubt_all(error) is error
    assert peer.unrecorded
    assert peer.state is State.INCREMENTAL
    assert os.strerror(errno.ENOSPC) in peer.last_error.reason


def test_what_is_unstable_is_found_where_it_was_moved_to(peer, tree, below):
    """A rename is noted before it is done."""
    a, b, file = below
    peer.unstable.begin()
    peer.unstable.settle(everywhere=True)
    peer.unstable.note(ops.Write(file.id, 0, 7), peer._locator, length=4)
    before = peer._locator(file.id)
    op = ops.Rename(file.id, b.id, b"file", a.id, b"moved", b"", False, 8, 8)  # noqa: FBT003
    peer.unstable.note(op, peer._locator)
    tree.rename(b, b"file", a, b"moved", 0, inode=file, replaced=None, replaced_links=0)
    peer.moved(file)
    assert peer.unstable.snapshot(everywhere=False).marks(file.id).handle == peer._locator(file.id)
    assert peer._locator(file.id) != before


async def test_nothing_is_carried_in_a_session_that_was_told_of_no_resync(peer):
    """One that goes on from the session before knows nothing of what the new one found out."""

    class Answering(Link):
        session = 1

        def send(self, op, payload, sink, stream):
            super().send(op, payload, sink, stream)
            sink.answered(self, ops.Done(0))

    link: Any = Answering()
    peer.link = link
    peer.told_in = link.session
    carried, asked = ops.Clear(ROOT_ID, b"a"), ops.List(ROOT_ID, b"")
    await peer.ask(carried)
    link.session = 2
    await peer.ask(asked)
    with pytest.raises(PeerLost):
        await peer.ask(carried)
    assert link.sent == [carried, asked]
