"""What a stream's receiving end keeps of its answers."""

from __future__ import annotations

from replfs.core import ops
from replfs.core.messages import LIVE
from replfs.transport import lane as lanes
from replfs.transport.lane import Lane, size_of

OK = ops.Done(0)


def test_what_is_answered_twice_is_kept_once():
    lane = Lane(LIVE)
    lane.remember([(1, OK), (2, OK)])
    lane.remember([(1, OK)])
    assert lane.answers_bytes == 2 * size_of(OK)
    lane.forget_until(2)
    assert lane.answers_bytes == 0


def test_the_oldest_answers_go_first():
    lane = Lane(LIVE)
    for seq in range(1, lanes.REMEMBERED + 3):
        lane.remember([(seq, OK)])
    assert list(lane.answers) == list(range(3, lanes.REMEMBERED + 3))
    assert lane.answers_bytes == lanes.REMEMBERED * size_of(OK)


def test_what_was_not_sent_yet_is_no_less_repeated():
    lane = Lane(LIVE)
    lane.remember([(1, OK), (2, OK)])
    lane.batch.append((3, OK))
    lane.repeat()
    assert [seq for seq, _ in lane.batch] == [1, 2, 3]
