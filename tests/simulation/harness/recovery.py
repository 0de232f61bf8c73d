"""Deaths of nodes and what follows: what they left is looked at, and they are started again."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import trio
from simulation.harness import check
from simulation.harness.nodes import Member

if TYPE_CHECKING:
    from simulation.harness.world import Simulation


class Recovery:
    """Of one run."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim

    async def kill(self, member: Member) -> None:
        """It dies, at once or at one of its next system calls."""
        life = member.life
        if life is None:
            return
        if self.sim.rng.random() < 0.6:
            life.countdown = self.sim.rng.randint(1, 60)
            with trio.move_on_after(2.0):
                await life.died.wait()
        if not life.dead:
            life.die()

    async def revive(self, powerless: Collection[Member] = ()) -> None:
        """Start what is dead, after looking at what it left; *powerless* lose power before."""
        for replica in self.sim.replicas:
            if not replica.is_alive:
                await self.buried(replica)
                if replica in powerless:
                    self.lose_power(replica)
                await self.sim.start(replica)
        if self.sim.primary.is_alive:
            return
        await self.buried(self.sim.primary)
        await trio.sleep(self.sim.rng.choice((0.0, 0.02, 1.0)))
        await self.look_at_the_dead()
        if self.sim.primary in powerless:
            self.lose_power(self.sim.primary)
            await self._start_after_loss()
        else:
            self.sim.ledger.read(self.sim.primary.raw)
            await self.sim.start(self.sim.primary)
        if self.sim.primary.primary is not None and self.sim.primary.is_alive:
            self.sim.verdicts.covered("after a start of the primary")
        self.sim.join_all()

    async def _start_after_loss(self) -> None:
        """A primary that lost power fetches what it lost, where somebody has it, and serves."""
        primary = self.sim.primary
        sources = [
            name
            for name, _ in primary.in_sync_at_death
            if name != primary.name and not self.sim.named(name).is_other
        ]
        if self.sim.rng.random() < 0.8:
            self.sim.join_all()
        await self.sim.start(primary)
        if primary.primary is None:
            return  # it gave its role up
        if primary.is_alone:
            sources = []
        if sources and self.sim.confirms and not self.sim.may_split:
            store = check.Snapshot(primary.raw, primary=False)
            what = f"{primary.name} did not get back what {sources} had"
            self.sim.verdict(what, self.sim.ledger.missing(store))
            self.sim.note("checked: what was fetched")
        store = check.Snapshot(primary.raw, primary=False)
        found = primary.ledger.broken(store, primary.name)
        self.sim.verdict(f"{primary.name} lost what was flushed to what it fetched", found)
        self.sim.ledger.lost(primary.raw, primary.name)

    async def look_at_the_dead(self) -> None:
        """What the dead primary left behind; it is cut off from then on."""
        # What arrives late may arrive until the next session, but not while it is looked at.
        self.sim.cut_off(self.sim.primary)
        while any(wire.is_busy for wire in self.sim.wires()):
            await trio.sleep(0.01)
        if self.sim.primary.primary is not None:
            self.sim.verdicts.covered(
                "what was acknowledged", slots=self.sim.primary.slots_at_death
            )
        self.sim.verdicts.acknowledged()

    @staticmethod
    async def buried(member: Member) -> None:
        while member.life is not None:
            await trio.sleep(0.001)

    def lose_power(self, member: Member, brought: check.Snapshot | None = None) -> None:
        """*brought*: what another one had, of which copies may have been brought here."""
        is_inconsistent = member.is_inconsistent
        self.sim.note(f"{member.name} lost power: {member.lose_power(self.sim.rng)}")
        if is_inconsistent:
            return  # in the middle of a resync things stand in limbo
        store = check.Snapshot(member.raw, primary=False)
        found = member.ledger.broken(store, member.name, brought)
        self.sim.verdict(f"{member.name} lacks what was flushed", found)
