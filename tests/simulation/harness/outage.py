"""Power that fails while a volume that had become two is put together again.

All that was there before the operator decided is on the disks by then, and no application changes
anything until it is one volume: so nothing of the winner's may be missing ever after, and nothing
that the loser had alone.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import trio
from simulation.harness import check
from simulation.harness.nodes import Member

if TYPE_CHECKING:
    from simulation.harness.world import Simulation


class Outage:
    """Of one decision; in most there is none."""

    def __init__(self, sim: Simulation) -> None:
        """Nothing is in flight."""
        self.sim = sim
        # Drawn apart, so that the other numbers stay what they are.
        self._rng = random.Random(f"{sim.seed} outage at {sim.world.clock.now}")
        self._happens = self._rng.random() < sim.mix.outages
        if self._happens:
            sim.note("the power will fail; all disks are flushed")
            for one in sim.members:
                one.disk.syncfs()

    def befall(self, member: Member, brought: check.Snapshot | None) -> None:
        """It is dead and buried: perhaps its machine lost power.

        *brought*: what the other one had, of which copies may have been brought here.
        """
        if self._happens and self._rng.random() < 0.7:
            self.sim.recovery.lose_power(member, brought)

    async def strike(self, loser: Member, winner: Member) -> list[Member]:
        """Perhaps one of them loses power while the loser is resynchronised; those that did."""
        struck: list[Member] = []
        if not self._happens:
            return struck
        for _ in range(self._rng.choice((1, 1, 2))):
            victim = self._rng.choice((loser, loser, winner))
            life = victim.life
            if life is None:
                continue
            life.countdown = self._rng.randint(1, 150)
            with trio.move_on_after(self._rng.choice((0.05, 0.5, 5.0))):
                await life.died.wait()
            if not life.dead:
                life.die()
            await self.sim.recovery.buried(victim)
            self.sim.recovery.lose_power(victim)
            await self.sim.start(victim)
            struck.append(victim)
        return struck
