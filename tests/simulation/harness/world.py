"""One run of the simulation: two to four nodes, applications, and faults.

First faults, with applications at work; now and then everything stands still and what is recorded
is held against what differs. Then the faults end, and all must come in sync and be equal; then the
applications work once more, in sync from beginning to end.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import trio
from simulation.harness.apart import Apart
from simulation.harness.faults import Faults
from simulation.harness.kernel import Kernel
from simulation.harness.ledger import InSync, Ledger
from simulation.harness.life import Life, World, acting
from simulation.harness.mix import DEFAULT, Mix
from simulation.harness.network import FakeLink, FakeListener, Network, Wire
from simulation.harness.nodes import Member, is_connected, populate
from simulation.harness.operator import Operator
from simulation.harness.recovery import Recovery
from simulation.harness.result import Failure, Result
from simulation.harness.verdicts import Verdicts
from simulation.harness.workload import NAMES, Habits, Process

from replfs.core.relationship import State
from replfs.node.mounted.view import ReadOnlyView
from replfs.node.replication.peer import Peer
from replfs.node.resync.contents import DISK_FAILED
from replfs.node.roles.primary import Primary

NODES = ("a", "b", "c", "d")
_PATIENCE_S = 300.0
_STEPS_MAX = 3_000_000


class Gate:
    """Applications stop here while it is closed."""

    def __init__(self) -> None:
        self._open = trio.Event()
        self._open.set()
        self.inside = 0

    async def passed(self) -> None:
        while not self._open.is_set():
            await self._open.wait()

    def close(self) -> None:
        if self._open.is_set():
            self._open = trio.Event()

    def open(self) -> None:
        self._open.set()


class Simulation:
    """One seed's run."""

    def __init__(
        self, seed: int, base: Path, world: World, result: Result, mix: Mix = DEFAULT
    ) -> None:
        self.seed = seed
        self.mix = mix
        self.world = world
        self.result = result
        self.rng = random.Random(f"{seed} faults")
        self.habits = Habits(random.Random(f"{seed} habits"), has_policies=mix.has_policies)
        rng = random.Random(f"{seed} set-up")
        count = rng.choice(mix.replicas)
        names = NODES[: count + 1]
        for name in names:
            (base / name).mkdir()
        self._fill(rng, base, names)
        policy = "async" if rng.random() < 0.1 else "sync"
        # Drawn apart, so that the other numbers stay what they are.
        is_late = policy == "sync" and random.Random(f"{seed} ack").random() < 0.2
        ack: Literal["op", "close"] = "close" if is_late else "op"
        self.members = [Member(base, name, names, policy, ack) for name in names]
        self.used = self.members[:1]
        """Those that applications use: one, and two while a volume is two."""
        self.use(self.members[0], Ledger(self.members[0].raw))
        for member in self.members:
            member.mounted = partial(self._mounted, member)
        self.is_whole = policy == "sync" and not self.habits.policies
        """Everything is replicated, and before it is acknowledged or flushed."""
        self.confirms = self.is_whole and not is_late
        """Before it is acknowledged, that is."""
        self.work = rng.choice((30, 100, 200, 300))
        self.budget = 0
        """Operations that the applications may still begin."""
        self.processes = rng.choice((1, 2, 4, 6))
        self.rounds = rng.choice(mix.rounds)
        self.gate = Gate()
        self.verdicts = Verdicts(self)
        self.recovery = Recovery(self)
        self.operator = Operator(self)
        self.apart = Apart(self)
        self.faults = Faults(self)
        self.network: Network
        self.nursery: trio.Nursery
        self.troubles: list[str] = []
        self.lives = 0
        self.wire = False
        self.is_over = False
        self.may_split = False
        """There may be two primaries, each with changes that the other does not know: one was
        promoted that did not know the last generation of the one before, or has not met it."""

    @staticmethod
    def _fill(rng: random.Random, base: Path, names: tuple[str, ...]) -> None:
        if rng.random() < 0.6:
            return
        first, *others = names
        populate(base / first, rng, NAMES)
        for name in others:
            kind = rng.randrange(3)
            if kind == 0:
                populate(base / name, rng, NAMES)
            elif kind == 1:
                shutil.rmtree(base / name)
                shutil.copytree(base / first, base / name, symlinks=True)

    @property
    def primary(self) -> Member:
        """The node that applications use; the first of two."""
        return self.used[0]

    @property
    def ledger(self) -> Ledger:
        """What its applications were told."""
        return self.primary.ledger

    def use(self, primary: Member, ledger: Ledger | None = None) -> None:
        """Applications use that node from here on, and no other; all others follow it."""
        self.used = [primary]
        for member in self.members:
            member.ledger = ledger or primary.ledger

    @property
    def replicas(self) -> list[Member]:
        """All but the primary."""
        return [one for one in self.members if one is not self.primary]

    # Notes -----------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.result.trace.append(f"{self.world.clock.now:10.4f} {text}")

    def trouble(self, text: str) -> None:
        self.note(f"!! {text}")
        self.troubles.append(text)

    def verdict(self, what: str, found: list[str]) -> None:
        found = found + self.troubles
        if found:
            raise Failure(f"{what}:\n  " + "\n  ".join(found))

    # Lives -----------------------------------------------------------------------------------

    async def start(self, member: Member) -> None:
        """Start a node, and wait until it has a role."""

        def died() -> None:
            if not self.is_over:
                self.note(f"{member.name} died")
                self.result.crashes += 1
            member.died()
            self.network.died(life)

        self.lives += 1
        life = Life(member.name, random.Random(f"{self.seed} life {self.lives}"), died)
        main = member.main(life)
        self.nursery.start_soon(self._live, member, life, main)
        member.is_alone = False
        await member.settled.wait()
        if member.failure:
            self.note(f"{member.name} did not start: {member.failure}")
            if not member.settings.start_alone:
                member.start_alone(alone=True)
                await self.start(member)
                member.start_alone(alone=False)
                member.is_alone = True
            return
        self.note(f"{member.name} started as {'primary' if member.primary else 'secondary'}")

    async def _live(
        self, member: Member, life: Life, main: Callable[[], Awaitable[object]]
    ) -> None:
        await life.run(main)
        self.result.steps += life.steps
        self.network.died(life)
        if not life.dead:
            life.dead = True
            self.note(f"{member.name} ended {member.failure}")
        member.bury()

    async def _mounted(self, member: Member, primary: Primary | None) -> None:
        """What stands behind a node's mount is another thing: its kernel is told."""
        life = member.life
        kernel, member.kernel = member.kernel, None
        if kernel is not None:
            # Whoever is still inside gets an error, or an answer.
            while kernel.inside:
                await trio.sleep(0.01)
            kernel.volume = ReadOnlyView(member.tree)  # type: ignore[assignment]
            await kernel.drop_everything()
        if primary is None or life is None:
            return
        member.was_primary = True
        rng = life.rng
        primary.pipeline.fuse_ready = lambda: rng.random() < 0.5
        kernel = member.kernel = Kernel(
            primary.volume,
            rng,
            self.trouble,
            member.ledger,
            stores_in_sync=partial(self.in_sync, member),
            may_fail=lambda: bool(life.errors),
        )
        primary.pipeline.do_chore = kernel.chores.do_one
        async with trio.open_nursery() as nursery:
            for number in range(self.processes):
                nursery.start_soon(self._application, number, member, kernel, life)

    async def _application(self, number: int, member: Member, kernel: Kernel, life: Life) -> None:
        rng = life.rng
        process = Process(kernel, member.raw, rng, self.habits)
        while member.kernel is kernel:
            await self.gate.passed()
            if member.kernel is not kernel:
                return
            if self.budget <= 0 or member not in self.used:
                await trio.sleep(0.5)
                continue
            self.budget -= 1
            self.result.operations += 1
            kernel.inside += 1
            errors = life.errors
            try:
                await process.step(lambda text: self.note(f"[{number}] {text}"))
            except OSError as error:
                # A failed clean-up may have left a symlink that the kernel does not know of, and
                # what a failed flush was of is never flushed again.
                lasting = (errno.ELOOP, member.unwritten)
                is_failing = life.errors != errors or (errors and error.errno in lasting)
                if not is_failing and not (error.errno == errno.EROFS and member.is_leaving):
                    raise
            kernel.inside -= 1
            await trio.sleep(rng.choice(self.habits.pauses_s))

    # Waiting ---------------------------------------------------------------------------------

    async def until(self, what: str, condition: Callable[[], bool], step_s: float = 0.05) -> None:
        """Wait for *condition*, but not for ever."""
        deadline = trio.current_time() + _PATIENCE_S
        while not condition():
            if self.troubles:
                self.verdict("meanwhile", [])
            if trio.current_time() > deadline or self._steps() > _STEPS_MAX:
                raise Failure(f"{what}: not within {_PATIENCE_S:.0f} s; {self._where()}")
            await trio.sleep(step_s)

    def _steps(self) -> int:
        return sum(one.life.steps for one in self.members if one.life is not None)

    @property
    def busy(self) -> int:
        """Applications that wait for a primary."""
        return sum(one.kernel.inside for one in self.used if one.kernel is not None)

    def _where(self) -> str:
        words = [
            f"{one.name} {one.state.identity().role if one.is_built else 'not built'} "
            f"{'ready' if one.is_ready else 'not ready'} alive {one.is_alive}"
            for one in self.members
        ]
        if self.primary.primary is None:
            return "; ".join(words)
        pipeline = self.primary.pipeline
        words += [f"{self.busy} busy", f"{pipeline.scheduler.in_flight} claims"]
        words.append(f"{pipeline.flights} flights")
        for peer in pipeline.peers:
            link = peer.link
            assert isinstance(link, FakeLink)
            stuck = {repr(key): one.reason for key, one in self._stuck(peer).items()}
            marks = {
                object_id.hex(): repr(peer.log.marks(object_id)) for object_id in peer.log.objects()
            }
            words.append(
                f"{peer.name}: {peer.state.value} ({peer.reason}) live {peer.live} up {link.is_up} "
                f"refused {link.refused!r} stuck {stuck} log {marks} "
                f"error {peer.last_error and (peer.last_error.path, peer.last_error.reason)}"
            )
        return "; ".join(words)

    def _stuck(self, peer: Peer) -> dict[object, Any]:
        primary = self.primary.primary
        return dict(primary.resyncs[peer.name].work.stuck) if primary is not None else {}

    async def stand_still(self) -> bool:
        """No application is in the middle of anything; False if a primary died meanwhile."""
        self.gate.close()
        lives = [(member, member.life) for member in self.used]

        def serves(member: Member, life: Life | None) -> bool:
            return life is not None and not life.dead and member.primary is not None

        def still() -> bool:
            return not any(
                serves(*one) and (one[0].is_busy or one[0].pipeline.flights) for one in lives
            )

        await self.until("applications finish", still, 0.01)
        return all(serves(*one) for one in lives)

    # The network -----------------------------------------------------------------------------

    def cut_off(self, member: Member) -> None:
        """Nobody reaches it, and it reaches nobody."""
        for other in self.members:
            if other is not member:
                self.network.cut(member.name, other.name)
                self.network.cut(other.name, member.name)

    def join_all(self) -> None:
        """Everybody may reach everybody."""
        self.network.blocked.clear()

    def wires(self) -> list[Wire]:
        listeners = self.network.listeners.values()
        return [one.wire for one in listeners if one.wire is not None and one.wire.is_open]

    def in_sync(self, member: Member) -> set[InSync]:
        """Stores that take part in an fsync there, of whatever it may be."""
        if self.is_whole and member.primary is not None and not self.may_split:
            return member.in_sync()
        return {(member.name, 0)}

    def named(self, name: str) -> Member:
        return next(one for one in self.members if one.name == name)

    def serves(self) -> bool:
        return self.primary.is_alive and self.primary.primary is not None

    def life_of_primary(self) -> Life:
        assert self.primary.life is not None
        return self.primary.life

    def resume_all(self) -> None:
        if self.serves():
            with acting(self.life_of_primary()):
                for peer in self.primary.pipeline.peers:
                    peer.resume()

    def wires_to(self, member: Member) -> list[Wire]:
        return [one for one in self.wires() if one.listener.life is member.life]

    # The run ---------------------------------------------------------------------------------

    async def main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            rng = random.Random(f"{self.seed} network")
            self.network = Network(rng, self.nursery, self.trouble)
            FakeLink.network = FakeListener.network = self.network
            self.network.on_welcomed = self._welcomed
            if self.wire:
                self.network.note = self.note
            for replica in self.replicas:
                if self.rng.random() < 0.9:
                    await self.start(replica)
            await self.start(self.primary)
            await self._faults()
            await self._heal()
            await self._work_in_sync()
            await self.verdicts.forgotten()
            self.is_over = True
            for member in self.members:
                if member.life is not None:
                    member.life.die()
            self.nursery.cancel_scope.cancel()
        self.result.delivered = self.network.delivered
        self.result.simulated_s = self.world.clock.now

    def _welcomed(self, by: str, name: str) -> None:
        """A primary has agreed to a session with a node."""
        if by == self.primary.name:
            self.named(name).is_other = False

    async def _faults(self) -> None:
        if self.rng.random() < 0.5:
            with trio.move_on_after(30.0):
                while not self.is_in_sync():
                    await trio.sleep(0.05)
        for _ in range(self.rounds):
            self.verdict("meanwhile", [])
            self.budget += self.work // self.rounds
            await trio.sleep(self.rng.choice((0.0, 0.0005, 0.005, 0.05, 0.3, 1.0, 4.0)))
            await self.faults.happen()
            if not self.primary.is_alive and self.rng.random() < 0.9:
                await self.recovery.revive()

    def is_in_sync(self) -> bool:
        """All replicas are, and connected."""
        return self.serves() and all(
            peer.live and peer.state is State.IN_SYNC and peer.log.is_empty and is_connected(peer)
            for peer in self.primary.pipeline.peers
        )

    def is_held(self) -> bool:
        """A replica differs from a primary whose disk has failed to write: nobody is in the right
        before that one is started again."""
        primary = self.primary.primary
        return primary is not None and any(
            stuck.reason == DISK_FAILED
            for resync in primary.resyncs.values()
            for stuck in resync.work.stuck.values()
        )

    async def until_in_sync(self) -> None:
        """Wait for it, and do what the operator is told to do for it."""
        await self.until("in sync", lambda: self.is_in_sync() or self.is_held())
        if self.is_held():
            self.note(f"{self.primary.name} is started again: its disk has failed to write")
            self.life_of_primary().die()
            await self.recovery.revive()
        await self.until("in sync", self.is_in_sync)

    async def _heal(self) -> None:
        self.note("-- healing")
        for member in self.members:
            if member.life is not None:
                member.life.error_rate = 0.0
                member.life.countdown = 0
        await self.recovery.revive()
        self.join_all()
        await self.until("the primary serves", lambda: self.primary.kernel is not None)
        self.resume_all()
        if not self.rounds:
            self.budget = self.work
        elif self.rng.random() < 0.5:
            self.budget = 0
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        await self._decide_split_brain()
        await self.until_in_sync()
        self.verdicts.equal("healed")
        for peer in self.primary.pipeline.peers:
            self.verdict("unrepresentable", list(peer.unrepresentable.reasons()))

    async def _decide_split_brain(self) -> None:
        """The operator's decision: the primary wins, the others begin anew."""
        while self.may_split:
            with trio.move_on_after(60.0):
                while not self.is_in_sync():
                    await trio.sleep(0.1)
            apart = [
                peer
                for peer in self.primary.pipeline.peers
                if peer.state in {State.SPLIT_BRAIN, State.REFUSED}
            ]
            if not apart:
                return
            for peer in apart:
                self.note(f"{peer.name} is {peer.state.value}: it loses")
                if peer.state is State.REFUSED or not await self.apart.discard(peer.name):
                    await self.faults.wipe(self.named(peer.name))

    async def _work_in_sync(self) -> None:
        self.note("-- in sync")
        self.budget = 30
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        await self.until("in sync", self.is_in_sync)
        self.verdicts.equal("after work in sync")
