"""The rate that background work keeps to, against a clock that jumps."""

from __future__ import annotations

import time

import pytest
import trio

from replfs.node.pacing.rate import Rate

LIMIT = 1000


@pytest.fixture
def rate(monkeypatch):
    """A rate of 1000 bytes a second."""
    monkeypatch.setattr(time, "monotonic", trio.current_time)
    return Rate(LIMIT)


async def test_what_was_taken_is_paid_for_before_more_is(rate, autojump_clock):
    began = trio.current_time()
    await rate.spend(5 * LIMIT)
    # Nothing was owed.
    assert trio.current_time() == began
    await rate.spend(1)
    assert trio.current_time() - began == pytest.approx(5, abs=0.11)


async def test_many_at_once_keep_to_it_together_and_in_turn(rate, autojump_clock):
    finished = []

    async def one(number):
        for _ in range(3):
            async with rate.allowance(LIMIT) as allowance:
                allowance.left -= LIMIT
            finished.append(number)

    began = trio.current_time()
    async with trio.open_nursery() as nursery:
        for number in range(8):
            nursery.start_soon(one, number)
    assert trio.current_time() - began == pytest.approx(23, abs=0.11)
    # None comes a second time before all have come once.
    assert all(sorted(finished[at : at + 8]) == list(range(8)) for at in (0, 8, 16))


async def test_what_is_given_back_lets_the_next_one_go_on(rate, autojump_clock):
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def one():
            async with rate.allowance(60 * LIMIT):
                await trio.sleep(1)

        for _ in range(3):
            nursery.start_soon(one)
    assert trio.current_time() - began == pytest.approx(3, abs=0.11)


async def test_more_than_was_asked_for_is_paid_for_too(rate, autojump_clock):
    async with rate.allowance(LIMIT) as allowance:
        allowance.left -= 3 * LIMIT
    began = trio.current_time()
    await rate.spend(1)
    assert trio.current_time() - began == pytest.approx(3, abs=0.11)


async def test_what_is_taken_at_once_does_not_wait_but_counts(rate, autojump_clock):
    await rate.spend(10 * LIMIT)
    began = trio.current_time()
    async with rate.allowance(LIMIT, at_once=True) as allowance:
        allowance.left -= LIMIT
    assert trio.current_time() == began
    await rate.spend(1)
    assert trio.current_time() - began == pytest.approx(11, abs=0.11)


async def test_without_a_limit_nothing_waits(autojump_clock):
    rate = Rate(0)
    began = trio.current_time()
    for _ in range(3):
        async with rate.allowance(1 << 40) as allowance:
            allowance.left -= 1 << 40
    assert trio.current_time() == began
