"""The things that happen to nodes and to what is between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import trio
from simulation.harness import check
from simulation.harness.life import acting
from simulation.harness.nodes import Member, is_connected

from replfs.core.relationship import State
from replfs.errors import ReplfsError

if TYPE_CHECKING:
    from simulation.harness.world import Simulation


class Faults:
    """Of one run; each is about a replica, or about the primary."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim
        self._kinds: dict[str, Callable[[Member], Awaitable[None]]] = {
            "cut": self._cut,
            "crash": self._crash,
            "replica": self._crash_replica,
            "errors": self._errors,
            "pause": self._pause,
            "still": self._still,
            "compare": self._compare,
            "restart": self._restart,
            "wipe": self.wipe,
            "first copy": self._first_copy,
            "power": self._power,
            "in-sync": self._wait_in_sync,
            "promote": sim.operator.promote,
            "switchover": sim.operator.switch_over,
            "split brain": sim.apart.happen,
        }
        self._drawn = tuple(kind for kind, weight in sim.mix.faults.items() for _ in range(weight))

    async def happen(self) -> None:
        """One of the things that happen."""
        rng = self.sim.rng
        kind = rng.choice(self._drawn)
        replica = rng.choice(self.sim.replicas)
        self.sim.note(f"-- fault: {kind} ({replica.name})")
        await self._kinds[kind](replica)

    async def _cut(self, replica: Member) -> None:
        ends = [(self.sim.primary.name, replica.name), (replica.name, self.sim.primary.name)]
        ends = self.sim.rng.choice((ends, ends, ends[:1], ends[1:]))
        for one, other in ends:
            self.sim.network.cut(one, other)
        self.sim.note(f"cut: {ends}")
        await trio.sleep(self.sim.rng.choice((0.0, 0.05, 1.0, 8.0, 20.0)))
        if self.sim.rng.random() < 0.7:
            for one, other in ends:
                self.sim.network.join(one, other)

    async def _crash(self, _: Member) -> None:
        await self.sim.recovery.kill(self.sim.primary)
        await self.sim.recovery.revive()

    async def _crash_replica(self, replica: Member) -> None:
        if replica.life is None:
            return
        await self.sim.recovery.kill(replica)
        await trio.sleep(self.sim.rng.choice((0.0, 0.02, 1.0, 7.0)))
        await self.sim.recovery.buried(replica)
        await self.sim.start(replica)

    async def _power(self, replica: Member) -> None:
        """Machines lose power."""
        choices = [
            [replica],
            [self.sim.primary],
            [self.sim.primary, replica],
            [self.sim.primary, *self.sim.replicas],
        ]
        gone = self.sim.rng.choice(choices)
        for member in gone:
            if member.life is not None:
                member.life.die()
        if self.sim.primary not in gone:
            await trio.sleep(self.sim.rng.choice((0.0, 0.02, 1.0, 7.0)))
        await self.sim.recovery.revive(gone)

    async def wipe(self, replica: Member) -> None:
        """The replica's disk is replaced."""
        if replica.life is not None:
            replica.life.die()
        await self.sim.recovery.buried(replica)
        replica.wipe()
        self.sim.ledger.replaced(replica.name)
        await self.sim.start(replica)

    async def _first_copy(self, replica: Member) -> None:
        """The replica's disk is replaced, and while it gets its first copy one of the two dies."""
        await self.wipe(replica)
        with trio.move_on_after(5.0):
            while not self.sim.serves() or not self._is_copied(replica):
                await trio.sleep(0.005)
        await trio.sleep(self.sim.rng.choice((0.0, 0.0, 0.002, 0.05, 0.5)))
        await self.sim.recovery.kill(self.sim.rng.choice((self.sim.primary, replica)))
        await self.sim.recovery.revive()

    def _is_copied(self, replica: Member) -> bool:
        return self.sim.primary.peer(replica.name).state is State.BASELINE

    async def _errors(self, replica: Member) -> None:
        member = self.sim.primary if self.sim.rng.random() < 0.3 else replica
        life = member.life
        if life is not None and member.is_ready:
            life.error_rate = self.sim.rng.choice((0.01, 0.1, 0.5))
            await trio.sleep(self.sim.rng.choice((0.2, 2.0)))
            life.error_rate = 0.0

    async def _pause(self, replica: Member) -> None:
        if not self.sim.serves():
            return
        peer = self.sim.primary.peer(replica.name)
        with acting(self.sim.life_of_primary()):
            peer.pause("by the operator")
        await trio.sleep(self.sim.rng.choice((0.0, 0.5, 3.0)))
        self.sim.resume_all()

    async def _compare(self, replica: Member) -> None:
        if self.sim.serves():
            with acting(self.sim.life_of_primary()):
                self.sim.primary.peer(replica.name).compare_all()

    async def _still(self, replica: Member) -> None:
        """Everything stands still, one peer is away: what it lacks is recorded."""
        if await self.sim.stand_still():
            self.sim.cut_off(replica)
            peer = self.sim.primary.peer(replica.name)
            await self.sim.until(
                "the link is seen to be down",
                lambda: (
                    not self.sim.serves()
                    or (
                        not peer.live
                        and not any(wire.is_busy for wire in self.sim.wires_to(replica))
                    )
                ),
            )
            if self.sim.serves():
                ours = check.Snapshot(self.sim.primary.raw, primary=True)
                self.sim.verdicts.log(replica, ours, "standing still, cut off", set())
                self.sim.note("checked: standing still, cut off")
            self.sim.join_all()
        self.sim.gate.open()

    async def _restart(self, _: Member) -> None:
        """A clean stop and a start."""
        primary = self.sim.primary
        if not await self.sim.stand_still() or not primary.is_ready:
            self.sim.gate.open()
            return
        try:
            await self.sim.operator.command(primary, "stop")
        except ReplfsError as error:
            self.sim.note(f"stop: {error}")
            if primary.life is not None:
                primary.life.die()
        # The answer comes before the end of the process.
        await self.sim.until("a stopped node ends", lambda: primary.life is None)
        self.sim.gate.open()
        await self.sim.recovery.revive()

    async def _wait_in_sync(self, replica: Member) -> None:
        """Once in sync, and with nothing under way, a replica is equal."""
        if not self.sim.serves():
            return
        peer = self.sim.primary.peer(replica.name)
        with trio.move_on_after(20.0):
            while peer.state is not State.IN_SYNC:
                await trio.sleep(0.05)
        if await self.sim.stand_still() and peer.live and is_connected(peer):
            if peer.state is State.IN_SYNC and peer.log.is_empty:
                ours = check.Snapshot(self.sim.primary.raw, primary=True)
                theirs = ours.of_replica(replica.raw, was_primary=replica.was_primary)
                self.sim.verdict("standing still in sync", check.differences(ours, theirs))
                self.sim.note("checked equal: standing still in sync")
        self.sim.gate.open()
