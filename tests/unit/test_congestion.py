"""When a slow peer is slow enough to be left behind."""

from __future__ import annotations

import pytest
import trio

from replfs.node.replication.congestion import Congestion, Held

SECOND = 10**9


def test_waits_add_up_to_the_limit():
    held = Held(10 * SECOND)
    for number in range(9):
        assert not held.add(number * SECOND, (number + 1) * SECOND)
    assert held.add(9 * SECOND, 10 * SECOND)
    # And it begins anew.
    assert not held.add(10 * SECOND, 11 * SECOND)


def test_waits_at_the_same_time_count_once():
    held = Held(10 * SECOND)
    for _ in range(100):
        assert not held.add(0, 9 * SECOND)
    assert not held.add(3 * SECOND, 5 * SECOND)
    assert held.add(8 * SECOND, 10 * SECOND)


def test_time_without_waits_is_taken_off():
    held = Held(10 * SECOND)
    assert not held.add(0, 9 * SECOND)
    assert not held.add(17 * SECOND, 20 * SECOND)  # 9 - 8 + 3
    assert not held.add(20 * SECOND, 25 * SECOND)
    assert held.add(25 * SECOND, 26 * SECOND)
    assert not held.add(1000 * SECOND, 1009 * SECOND)


class FakePeer:
    """A peer that notes what becomes of it."""

    def __init__(self):
        self.live = True
        self.calls: list[str] = []
        self.waited = None
        self.hurried = trio.Event()

    def congest(self, reason):
        self.live = False
        self.calls.append(reason.partition(":")[0])

    async def wait_hurry(self):
        await self.hurried.wait()

    def end_congestion(self):
        self.live = True
        self.calls.append("over")


class FakePipeline:
    strict_at = float("-inf")
    slow_ns = 0


@pytest.fixture
def parts():
    return FakePipeline(), FakePeer()


async def settled():
    for _ in range(3):
        await trio.testing.wait_all_tasks_blocked()


async def test_a_slow_peer_is_left_behind_and_tried_again(nursery, parts, autojump_clock):
    pipeline, peer = parts
    congestion = Congestion(pipeline, peer, 5.0)
    assert pipeline.slow_ns == SECOND // 2
    nursery.start_soon(congestion.run)
    peer.waited(0, SECOND // 4)  # too short to count
    for number in range(5):
        peer.waited(number * SECOND, (number + 1) * SECOND)
    await settled()
    assert peer.calls[0] == "congested"
    peer.waited(5 * SECOND, 50 * SECOND)  # what was still waiting is its end, not a beginning
    peer.hurried.set()
    await settled()
    assert peer.calls == ["congested", "over"]


async def test_not_while_strict_changes_are_made(nursery, parts):
    pipeline, peer = parts
    congestion = Congestion(pipeline, peer, 5.0)
    nursery.start_soon(congestion.run)
    pipeline.strict_at = float("inf")
    peer.waited(0, 6 * SECOND)
    await settled()
    assert not peer.calls
    pipeline.strict_at = float("-inf")
    peer.waited(6 * SECOND, 12 * SECOND)
    await settled()
    assert peer.calls == ["congested"]


async def test_never(nursery, parts):
    pipeline, peer = parts
    Congestion(pipeline, peer, 0.0)
    assert peer.waited is None
    assert pipeline.slow_ns == 0  # left as it was
