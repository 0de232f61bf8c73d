"""Several things on their way at once, and what becomes of them in order."""

from __future__ import annotations

import pytest
import trio

from replfs.errors import PeerLost
from replfs.node.pacing.ahead import ahead
from replfs.node.pacing.courtesy import Applications
from replfs.node.resync.inorder import InOrder


class Work:
    """Items that end when they are let go."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.gates = [trio.Event() for _ in range(10)]
        self.fails: set[int] = set()
        self.stops: set[int] = set()

    async def __call__(self, item: int) -> bool:
        self.begun.append(item)
        await self.gates[item].wait()
        if item in self.fails:
            raise PeerLost("gone")
        return item not in self.stops


@pytest.fixture
def work():
    return Work()


@pytest.fixture
def waiting():
    return [0]


@pytest.fixture
def applications(waiting):
    return Applications(lambda: waiting[0])


async def test_an_item_is_taken_when_its_turn_has_come(work, applications, autojump_clock):
    results = []

    async def run():
        results.append(await ahead(iter(range(5)), work, applications, tasks=2))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        assert work.begun == [0, 1]
        work.gates[1].set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.begun == [0, 1, 2]
        for gate in work.gates:
            gate.set()
    assert work.begun == [0, 1, 2, 3, 4]
    assert results == [True]


async def test_one_at_a_time_while_applications_are_at_work(
    work, applications, waiting, autojump_clock
):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: ahead(iter(range(5)), work, applications, tasks=3))
        await trio.testing.wait_all_tasks_blocked()
        assert work.begun == [0, 1, 2]
        waiting[0] = 1
        work.gates[1].set()
        work.gates[2].set()
        await trio.testing.wait_all_tasks_blocked()
        assert work.begun == [0, 1, 2]
        for gate in work.gates:
            gate.set()
    assert work.begun == [0, 1, 2, 3, 4]


async def test_a_failure_is_raised_when_what_was_begun_has_ended(work, applications):
    work.fails = {0}
    failures = []

    async def run():
        with pytest.raises(PeerLost):
            await ahead(iter(range(5)), work, applications, tasks=2)
        failures.append(0)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(run)
        await trio.testing.wait_all_tasks_blocked()
        work.gates[0].set()
        await trio.testing.wait_all_tasks_blocked()
        assert (work.begun, failures) == ([0, 1], [])
        work.gates[1].set()
    assert (work.begun, failures) == ([0, 1], [0])


async def test_it_stops_where_the_work_says_so(work, applications):
    work.stops = {1}
    for gate in work.gates:
        gate.set()
    assert not await ahead(iter(range(5)), work, applications, tasks=1)
    assert work.begun == [0, 1]


def test_what_ends_early_is_cleared_after_what_began_before():
    cleared = []
    order = InOrder[str](lambda item, version: cleared.append((item, version)))
    for item in "abcd":
        order.begin(item)
    order.end("c", "part of c", 3)
    order.end("b", "b", 4)
    assert cleared == []
    order.drop("a")
    assert cleared == [("b", 4), ("part of c", 3)]
    order.begin("e")
    order.end("e", "e", 6)
    assert cleared == [("b", 4), ("part of c", 3)]  # `d` never ended
