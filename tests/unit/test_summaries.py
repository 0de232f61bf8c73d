"""Asking a peer whether it has had what it was sent, and what is done where it has not."""

from __future__ import annotations

import errno
import logging
from typing import Any

import pytest
import trio

from replfs.core import features, ops
from replfs.core.dirty import DirtyLog
from replfs.core.messages import BULK, LIVE
from replfs.core.relationship import State
from replfs.errors import PeerLost
from replfs.node.replication import summaries
from replfs.node.replication.peer import Peer
from replfs.store.record import ROOT_ID

GENERATION = b"g" * 16


class Home:
    """As much of a node as a peer needs here."""

    def __init__(self, tree):
        self.tree = tree
        self.diverged = 0

    def diverging(self, peer):
        self.diverged += 1
        return True

    def changed(self, peer):
        pass


class Link:
    """Remembers what is sent, and answers as it is told to."""

    def __init__(self):
        self.operations = []
        self.answers = {}
        self.reason = ""

    def sent(self, stream):
        return 10 + stream, 20 + stream

    def send(self, op, payload, sink, stream):
        self.operations.append((stream, op))
        sink.answered(self, ops.Done(self.answers.get(stream, 0)))

    def has_room(self, stream=LIVE, queue_bytes=0):
        return True

    def disagreed(self, reason):
        self.reason = reason


@pytest.fixture
def peer(tree):
    home: Any = Home(tree)
    link: Any = Link()
    peer = Peer(home, "peer", "tcp://127.0.0.1:1", DirtyLog(), 1.0)
    peer.link = link
    peer.live = True
    peer.state = State.IN_SYNC
    peer.features = frozenset(features.WORDS.values())
    peer.peer_generation = GENERATION
    # Nothing is unstable but what is noted from here on.
    for _ in range(2):
        peer.unstable.begin()
        peer.unstable.settle(everywhere=True)
    return peer


def noted(peer, number):
    """The peer was sent a write to an object."""
    object_id = number.to_bytes(16, "big")
    peer.unstable.note(ops.Write(object_id, 0, 0), lambda _: b"handle", length=5)
    return object_id


async def test_both_streams_are_compared_before_a_peer_is_in_sync(peer):
    peer.state = State.INCREMENTAL
    assert await summaries.agree(peer, lambda: 99)
    assert peer.link.operations == [
        (LIVE, ops.Summary(10, 20, GENERATION, 99)),
        (BULK, ops.Summary(11, 21, b"", 0)),
    ]
    assert not peer.link.reason


@pytest.mark.parametrize("what", ["mark", "diverged", "unrecorded"])
async def test_what_is_recorded_just_then_is_not_held_against_the_peer(peer, what):
    if what == "mark":
        peer.log.mark_names_all(ROOT_ID)
    else:
        setattr(peer, what, True)
    assert not await summaries.agree(peer, lambda: 99)
    assert peer.link.operations[0] == (LIVE, ops.Summary(10, 20, b"", 0))


async def test_while_a_resync_goes_on_only_what_was_sent_is_compared(peer):
    peer.state = State.INCREMENTAL
    assert summaries.begin(peer, LIVE, 99) is not None
    assert peer.link.operations == [(LIVE, ops.Summary(10, 20, b"", 0))]


async def test_an_earlier_release_is_not_asked(peer):
    peer.features -= {features.WORDS[ops.Summary]}
    assert await summaries.agree(peer, lambda: 99)
    assert summaries.begin(peer, LIVE, 99) is None
    assert not peer.link.operations


async def test_one_that_does_not_count_changes_is_not_asked_for_their_number(peer):
    peer.features -= {features.WORDS[ops.Progress]}
    assert await summaries.agree(peer, lambda: 99)
    assert peer.link.operations[0] == (LIVE, ops.Summary(10, 20, GENERATION, 0))


async def test_a_disagreement_is_logged_and_all_that_is_unstable_compared(peer, caplog):
    """What was sent since the last checkpoint, and what the peer says that it has applied."""
    object_id = noted(peer, 7)
    peer.link.answers[LIVE] = ops.DISAGREES
    summaries.begin(peer, LIVE, 99)
    assert peer.state is State.INCREMENTAL
    assert "has not had the same 10 operations" in peer.link.reason
    assert peer.last_error.reason == peer.reason == peer.link.reason
    assert set(peer.log.objects()) == {object_id}
    assert not peer.is_asked
    assert peer.home.diverged == 1
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "1 objects are compared" in record.getMessage()


@pytest.mark.parametrize("stream", [LIVE, BULK])
async def test_where_there_is_no_bound_everything_is_compared(peer, stream, caplog):
    noted(peer, 7)
    if stream == LIVE:
        peer.unstable._noted.overflow()
    peer.link.answers[stream] = ops.DISAGREES
    with pytest.raises(PeerLost):
        await summaries.agree(peer, lambda: 99)
    marks = peer.log.marks(ROOT_ID)
    assert marks is not None
    assert marks.deep
    assert "everything is compared" in caplog.text


async def test_what_a_lost_session_left_is_compared_in_the_next_one(peer, caplog):
    object_id = noted(peer, 7)
    summaries.differed(peer, LIVE, "of 3 operations, others were applied than were sent")
    assert peer.state is State.INCREMENTAL
    assert "session that was lost" in peer.reason
    assert set(peer.log.objects()) == {object_id}
    assert not peer.is_asked
    assert peer.home.diverged == 1
    assert not peer.link.reason
    assert "1 objects are compared" in caplog.text


async def test_marks_that_cannot_be_kept_keep_it_out_of_sync(peer, caplog):
    noted(peer, 7)

    def full(_):
        raise OSError(errno.ENOSPC, "no room")

    peer.log.attach(full)
    peer.link.answers[LIVE] = ops.DISAGREES
    summaries.begin(peer, LIVE, 99)
    assert peer.unrecorded
    assert peer.link.reason
    assert "no room" in caplog.text


async def test_one_that_refuses_is_not_in_sync_and_nothing_is_marked(peer):
    peer.link.answers[LIVE] = errno.EROFS
    with pytest.raises(PeerLost):
        await summaries.agree(peer, lambda: 99)
    assert peer.log.is_empty
    assert not peer.link.reason
    await trio.lowlevel.checkpoint()
