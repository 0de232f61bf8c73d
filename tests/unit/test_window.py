"""The window of operations that are awaited together: numbers, order, and who is woken when."""

from __future__ import annotations

import time
from typing import cast

import pytest
import trio
import trio.testing

from replfs.node.replication.flight import Flight, Owner
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.node.replication.window import LATEST_NS, Window
from replfs.store.activity import ActivityLog
from replfs.store.tree import Tree


class Nobody:
    flights = 0
    detached = 0
    activity = cast(ActivityLog, None)

    def confirmations_needed(self) -> int:
        return 0


def on_its_way(window: Window) -> Flight:
    """One that is sent to one peer."""
    owner: Owner = Nobody()
    flight = Flight(owner, "write")
    flight.waiting = 1
    window.join(flight)
    flight.detach([], window)
    return flight


def answered(flight: Flight) -> None:
    flight.waiting = 0
    if flight.group is not None:
        flight.group.landed()


def test_they_leave_in_the_order_they_joined_in():
    window = Window()
    first, second, third = (on_its_way(window) for _ in range(3))
    assert (window.sent, window.confirmed, len(window)) == (3, 0, 3)
    answered(second)
    assert (window.confirmed, len(window)) == (0, 3)
    answered(first)
    assert (window.confirmed, len(window)) == (2, 1)
    assert window.flight(3) is third
    answered(third)
    assert (window.confirmed, len(window)) == (3, 0)


def test_one_that_was_answered_at_once_is_confirmed_at_once():
    window = Window()
    flight = Flight(Nobody(), "write")
    assert window.join(flight) == 1
    flight.detach([], window)
    assert window.confirmed == 1


async def test_who_waits_for_one_waits_for_all_before_it(autojump_clock):
    window = Window()
    flights = [on_its_way(window) for _ in range(3)]
    woken: list[int] = []

    async def wait(number: int) -> None:
        await window.wait(number)
        woken.append(number)

    async with trio.open_nursery() as nursery:
        for number in (2, 3, 1):
            nursery.start_soon(wait, number)
        await trio.testing.wait_all_tasks_blocked()
        assert window.is_awaited
        answered(flights[1])
        await trio.testing.wait_all_tasks_blocked()
        assert woken == []
        answered(flights[0])
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(woken) == [1, 2]
        answered(flights[2])
    assert woken[2:] == [3]
    assert not window.is_awaited


def test_the_oldest_decides_whether_it_is_late(monkeypatch):
    now = 1_000_000_000
    monkeypatch.setattr(time, "monotonic_ns", lambda: now)
    window = Window()
    assert not window.is_late()
    first = on_its_way(window)
    now += LATEST_NS
    second = on_its_way(window)
    assert not window.is_late()
    now += 1
    assert window.is_late()
    answered(first)
    assert not window.is_late()
    answered(second)
    now += LATEST_NS
    assert not window.is_late()


async def test_a_number_of_an_earlier_life_is_no_number_to_wait_for():
    """Inodes outlive the primary that numbered their changes, and numbers begin anew."""
    pipeline = Pipeline(cast(Tree, None), cast(ActivityLog, None), cast(Policies, None))
    with trio.fail_after(5):
        await pipeline.together(500)
    flight = on_its_way(pipeline.window)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipeline.together, 500)
        await trio.testing.wait_all_tasks_blocked(0.05)
        answered(flight)
        with trio.fail_after(5):
            await trio.testing.wait_all_tasks_blocked()
    assert pipeline.window.confirmed == 1


@pytest.mark.parametrize("count", [1, 5])
def test_detached_ones_are_counted_until_they_land(count):
    owner = Nobody()
    flights = []
    for _ in range(count):
        flight = Flight(owner, "write")
        flight.waiting = 1
        flight.detach([])
        flights.append(flight)
    assert owner.detached == count
    for flight in flights:
        flight._land()
    assert owner.detached == 0
