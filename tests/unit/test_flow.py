"""What is outstanding on a stream: window, settling, checks of answers, deadlines."""

from __future__ import annotations

import pytest

from replfs.core import ops
from replfs.errors import ProtocolError
from replfs.transport.flow import (
    ANSWER_TYPES,
    DEFERRED_TIMEOUTS,
    QUEUE_OPS,
    WINDOW_BYTES,
    WINDOW_OPS,
    Call,
    Flow,
    cost_of,
)
from replfs.transport.lane import REMEMBERED

I = b"i" * 16  # noqa: E741
SECOND = 10**9


def put(
    flow: Flow[str],
    op: ops.AnyOp,
    sink: str | None = "sink",
    *,
    size: int = 0,
    now: int = 0,
    before: int = 0,
):
    payload = bytes(size) if size else None
    seq = flow.next_seq
    flow.next_seq += 1
    cost = cost_of(op, b"head", payload)
    kind = ANSWER_TYPES.get(type(op), ops.Done)
    flow.calls[seq] = Call(b"head", payload, sink, kind, cost, now, before=before)
    flow.bytes += cost
    if sink is None:
        flow.silent.append(seq)
    return seq


def writes(flow: Flow[str], count: int, now: int = 0) -> None:
    for _ in range(count):
        put(flow, ops.Write(I, 0, 0), size=10, now=now)


def test_the_window_is_bounded_in_operations_and_bytes():
    flow: Flow[str] = Flow(0)
    writes(flow, WINDOW_OPS - 1)
    assert flow.has_room()
    writes(flow, 1)
    assert not flow.has_room()
    flow = Flow(0)
    for _ in range(WINDOW_BYTES >> 20):
        assert flow.has_room()
        put(flow, ops.Write(I, 0, 0), size=1 << 20)
    assert not flow.has_room()


def test_what_nobody_awaits_has_a_queue_with_a_bound_of_its_own():
    """In bytes, larger or smaller than the window, and in as many operations as are remembered."""
    flow: Flow[str] = Flow(0)
    for _ in range(3):
        assert flow.has_room(3 << 20)
        put(flow, ops.Write(I, 0, 0), size=1 << 20)
    assert not flow.has_room(3 << 20)
    assert flow.has_room()
    assert flow.has_room(64 << 20)
    while flow.has_room(64 << 20):
        put(flow, ops.Write(I, 0, 0), size=1 << 20)
    assert 64 << 20 <= flow.bytes < 65 << 20
    assert not flow.has_room()
    flow = Flow(0)
    writes(flow, QUEUE_OPS - 1)
    assert flow.has_room(1 << 30)
    writes(flow, 1)
    assert not flow.has_room(1 << 30)
    assert QUEUE_OPS <= REMEMBERED


def test_answers_that_are_large_take_room_before_they_come():
    flow: Flow[str] = Flow(1)
    while flow.has_room():
        put(flow, ops.List(I, b""))
    assert len(flow.calls) < 150
    assert cost_of(ops.Digest(I, 0, 1000, 1), b"", None) == 16000


def test_settling_takes_out_what_has_no_sink():
    flow: Flow[str] = Flow(0)
    for number in range(1, 11):
        put(flow, ops.Locate(I, I, b"n"), None if number % 2 else "sink")
    flow.settle(5, 1)
    assert list(flow.calls) == [2, 4, 6, 7, 8, 9, 10]
    assert flow.answered() == 1
    flow.settle(3, 2)  # late news changes nothing
    assert flow.applied == 5
    flow.settle(10, 3)
    assert list(flow.calls) == [2, 4, 6, 8, 10]
    for seq in list(flow.calls):
        assert flow.take(seq, ops.Done(0)) is not None
    assert flow.bytes == 0
    assert flow.answered() == 10
    with pytest.raises(ProtocolError):
        flow.settle(11, 4)


def test_the_checksum_is_known_after_each_number_that_may_have_been_applied():
    flow: Flow[str] = Flow(0)
    assert flow.sums() == {0: 0}
    for number in range(1, 6):
        put(flow, ops.Write(I, 0, 0), before=10 * (number - 1))
        flow.checksum = 10 * number
    assert flow.sums() == {0: 0, 1: 10, 2: 20, 3: 30, 4: 40, 5: 50}
    flow.settle(3, 1)
    flow.take(3, ops.Done(0))
    flow.take(1, ops.Done(0))
    assert flow.sums() == {3: 30, 4: 40, 5: 50}
    flow.settle(5, 2)
    assert flow.sums() == {5: 50}


def test_answers_must_fit():
    flow: Flow[str] = Flow(1)
    put(flow, ops.List(I, b""))
    put(flow, ops.Data(I, 0), size=10)
    put(flow, ops.Sync(I, True))
    flow.settle(2, 1)
    with pytest.raises(ProtocolError, match="Digests answers Listing"):
        flow.take(1, ops.Digests(b"", 0))
    with pytest.raises(ProtocolError, match="more bytes written"):
        flow.take(2, ops.Done(0, 11))
    with pytest.raises(ProtocolError, match="never sent"):
        flow.take(4, ops.Done(0))
    with pytest.raises(ProtocolError, match="before it was applied"):
        flow.take(3, ops.Done(0))
    assert flow.take(1, ops.Done(2)) is not None
    assert flow.take(1, ops.Done(2)) is None
    assert flow.take(2, ops.Done(0, 10)) is not None


def test_an_operation_without_answer_is_overdue():
    flow: Flow[str] = Flow(0)
    assert flow.overdue(100 * SECOND, SECOND) == ""
    writes(flow, 1, now=10 * SECOND)
    assert flow.overdue(11 * SECOND, SECOND) == ""
    assert flow.overdue(11 * SECOND + 1, SECOND) == "no answer for 1.0 s"


def test_a_slow_link_is_not_taken_for_a_dead_one():
    flow: Flow[str] = Flow(0)
    writes(flow, 100, now=0)
    now = 0
    for step in range(1, 100):
        now = step * 9 * SECOND // 10
        assert flow.overdue(now, SECOND) == ""
        flow.settle(step, now)
        flow.take(step, ops.Done(0, 10))
    assert flow.overdue(now + SECOND + 1, SECOND) == "no answer for 1.0 s"


def test_what_the_peer_works_on_has_its_own_deadline():
    flow: Flow[str] = Flow(0)
    put(flow, ops.Sync(I, False), now=0)
    writes(flow, 2, now=0)
    flow.settle(1, SECOND)
    for step in range(1, DEFERRED_TIMEOUTS + 1):
        flow.progress_ns = step * SECOND
        assert flow.overdue(step * SECOND, SECOND) == ""
    end = (DEFERRED_TIMEOUTS + 1) * SECOND
    flow.progress_ns = end
    assert flow.overdue(end + 1, SECOND) == f"no result for {DEFERRED_TIMEOUTS}.0 s"
    flow.take(1, ops.Done(0))
    assert flow.overdue(end + 1, SECOND) == ""
