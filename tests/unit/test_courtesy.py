"""The background gives way while applications are at work, and only then."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio
from trio.testing import assert_checkpoints, assert_no_checkpoints

from replfs.node.pacing.courtesy import TASKS, Applications, Slice, Turns

MS = 1_000_000


@pytest.fixture
def applications(monkeypatch):
    """Applications that did nothing for long, at a time that stands still: `tick` moves it."""
    now = [10**12]
    monkeypatch.setattr(time, "monotonic_ns", lambda: now[0])
    found: Any = Applications(lambda: found.in_flight)
    found.in_flight = 0
    found.tick = lambda ns: now.__setitem__(0, now[0] + ns)
    return found


async def started(turns, count):
    """How many of *count* tasks get a turn at once."""
    got = 0

    async def one():
        nonlocal got
        await turns.acquire()
        got += 1

    async with trio.open_nursery() as nursery:
        for _ in range(count):
            nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    return got


async def test_applications_are_busy_while_they_wait_and_a_while_after(applications):
    assert not applications.are_busy
    applications.in_flight = 1
    assert applications.are_busy
    applications.in_flight = 0
    applications.last_ns = time.monotonic_ns()
    assert applications.are_busy
    applications.tick(99 * MS)
    assert applications.are_busy
    applications.tick(2 * MS)
    assert not applications.are_busy


async def test_many_work_while_nobody_else_does(applications):
    assert await started(Turns(applications, 0), 20) == TASKS


@pytest.mark.parametrize(("rtt_ms", "few"), [(0, 1), (0.9, 1), (1, 2), (3.5, 4), (80, TASKS)])
async def test_few_work_beside_applications(applications, rtt_ms, few):
    applications.in_flight = 1
    assert await started(Turns(applications, int(rtt_ms * MS)), 20) == few


@pytest.mark.parametrize(("haste", "some"), [(0, 1), (1, 2), (5, 6), (50, TASKS)])
async def test_more_work_beside_applications_that_outpace_them(applications, haste, some):
    applications.in_flight = 1
    assert await started(Turns(applications, 0, haste), 20) == some


async def test_who_waits_goes_on_when_another_is_done(applications):
    applications.in_flight = 1
    turns = Turns(applications, 0)
    await turns.acquire()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(turns.acquire)
        await trio.testing.wait_all_tasks_blocked()
        turns.release()


async def test_it_gives_way_only_to_who_is_active(applications, autojump_clock):
    began = trio.current_time()
    with assert_no_checkpoints():
        await applications.give_way()
    applications.in_flight = 1
    await applications.give_way()
    applications.in_flight = 0
    applications.last_ns = time.monotonic_ns()
    await applications.give_way()
    assert trio.current_time() - began == pytest.approx(0.002)
    applications.tick(5 * MS)
    with assert_no_checkpoints():
        await applications.give_way()


async def test_a_turn_of_the_loop_is_short(applications):
    share = Slice()
    with assert_no_checkpoints():
        await share.breathe()
    applications.tick(MS // 2)
    with assert_checkpoints():
        await share.breathe()
    with assert_no_checkpoints():
        await share.breathe()
