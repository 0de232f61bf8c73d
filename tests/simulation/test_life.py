"""A simulated process that is dead: nothing of it goes on, not even in its own memory."""

from __future__ import annotations

import random

import pytest
import trio
from simulation.harness.life import Life, simulated


def lived(main):
    """Run *main*, given the life it is, in one."""
    with simulated(1) as world:
        life = Life("a", random.Random(1), lambda: None)

        async def start():
            await life.run(lambda: main(life))

        trio.run(start, clock=world.clock)


@pytest.mark.parametrize("children", [0, 1, 3])
@pytest.mark.parametrize("is_at_a_system_call", [False, True])
def test_what_comes_after_a_nursery_does_not_happen_to_the_dead(children, is_at_a_system_call):
    """Its children end where the process died; whoever waits must not take that for done."""
    done = []

    async def child(life):
        await trio.sleep(1)
        if is_at_a_system_call:
            life.countdown = 1
            life.system_call()
        life.die()
        await trio.sleep(1)
        done.append("child")

    async def work(life):
        async with trio.open_nursery() as nursery:
            for _ in range(children):
                nursery.start_soon(child, life)
            if not children:
                life.die()
        done.append("after the nursery")

    async def main(life):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(work, life)
        done.append("after all")

    lived(main)
    assert done == []


def test_what_comes_after_a_nursery_happens_to_the_living():
    done = []

    async def child():
        await trio.sleep(1)
        done.append("child")

    async def main(life):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(child)
        done.append("after")

    lived(main)
    assert done == ["child", "after"]
