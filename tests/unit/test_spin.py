"""When waiting without sleeping is begun, and when it is given up."""

from __future__ import annotations

import os
import time

import pytest

from replfs.transport import spin
from replfs.transport.spin import Spin

LIMIT = 300_000


class Machine:
    """A clock that moves by what a yield takes, and cores."""

    def __init__(self) -> None:
        self.now = 10**9
        self.yield_ns = 1000
        self.cores = {0, 1}
        self.yields = 0

    def sched_yield(self) -> None:
        self.now += self.yield_ns
        self.yields += 1


@pytest.fixture
def machine(monkeypatch):
    made = Machine()
    monkeypatch.setattr(time, "monotonic_ns", lambda: made.now)
    monkeypatch.setattr(os, "sched_yield", made.sched_yield)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: made.cores)
    return made


def wait(waiter: Spin, *, looks: int) -> bool | None:
    """Wait for what is there at the last of so many looks; None: it was not begun."""
    if not waiter.begin():
        return None
    for _ in range(looks):
        if not waiter.go_on():
            return False
    waiter.paid()
    return True


def test_it_looks_until_the_limit(machine):
    waiter = Spin(LIMIT)
    assert wait(waiter, looks=100) is True
    machine.yields = 0
    assert wait(waiter, looks=10_000) is False
    assert machine.yields == LIMIT // machine.yield_ns


def test_with_one_core_or_no_time_it_never_begins(machine):
    assert wait(Spin(0), looks=1) is None
    machine.cores = {1}
    assert wait(Spin(LIMIT), looks=1) is None


def test_vain_waits_end_it_until_something_comes_soon_again(machine):
    waiter = Spin(LIMIT)
    for _ in range(spin.MISSES_MAX):
        assert wait(waiter, looks=10_000) is False
    assert wait(waiter, looks=1) is None
    waiter.slept(LIMIT)
    assert wait(waiter, looks=1) is None
    waiter.slept(LIMIT - 1)
    assert wait(waiter, looks=1) is True


def test_now_and_then_in_vain_is_no_reason(machine):
    waiter = Spin(LIMIT)
    for _ in range(10 * spin.MISSES_MAX):
        assert wait(waiter, looks=10_000) is False
        assert wait(waiter, looks=1) is True


def test_where_others_need_the_core_it_rests(machine):
    waiter = Spin(LIMIT)
    machine.yield_ns = spin.CONTENDED_NS + 1
    assert wait(waiter, looks=1) is True
    machine.yield_ns = 1000
    assert wait(waiter, looks=1) is None
    machine.now += spin.REST_NS
    assert wait(waiter, looks=1) is True
