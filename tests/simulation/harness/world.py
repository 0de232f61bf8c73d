"""One run of the simulation: a primary, one to three replicas, applications, and faults.

First faults, with applications at work; now and then everything stands still and what is recorded
is held against what differs. Then the faults end, and all must come in sync and be equal; then the
applications work once more, in sync from beginning to end.
"""

from __future__ import annotations

import errno
import random
import shutil
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any

import trio
from simulation.harness import check
from simulation.harness.kernel import Kernel
from simulation.harness.ledger import InSync, Ledger
from simulation.harness.life import Life, World
from simulation.harness.network import FakeLink, FakeListener, Network
from simulation.harness.nodes import PrimaryNode, ReplicaNode, Store, populate
from simulation.harness.result import Failure, Result
from simulation.harness.workload import NAMES, Habits, Process

from replfs.core.footprint import CLASSES
from replfs.core.relationship import State
from replfs.node.peer import Peer
from replfs.store.tree import KEEP_PIN

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
        self._open = trio.Event()

    def open(self) -> None:
        self._open.set()


class Simulation:
    """One seed's run."""

    def __init__(self, seed: int, base: Path, world: World, result: Result) -> None:
        self.seed = seed
        self.world = world
        self.result = result
        self.rng = random.Random(f"{seed} faults")
        self.habits = Habits(random.Random(f"{seed} habits"))
        rng = random.Random(f"{seed} set-up")
        count = rng.choice((1, 1, 1, 2, 3))
        endpoints = [f"sim://r{number}" for number in range(count)]
        for name in ("primary", *(f"r{number}" for number in range(count)), "run"):
            (base / name).mkdir()
        self._fill(rng, base, count)
        policy = "async" if rng.random() < 0.1 else "sync"
        # Drawn apart, so that the other numbers stay what they are.
        is_late = policy == "sync" and random.Random(f"{seed} ack").random() < 0.2
        self.primary = PrimaryNode(
            base / "primary", endpoints, base / "run", policy, "close" if is_late else "op"
        )
        self.replicas = [
            ReplicaNode(base / f"r{number}", endpoint) for number, endpoint in enumerate(endpoints)
        ]
        self.ledger = Ledger(self.primary.raw)
        self.is_whole = policy == "sync" and not self.habits.policies
        """Everything is replicated, and before it is acknowledged or flushed."""
        self.confirms = self.is_whole and not is_late
        """Before it is acknowledged, that is."""
        self.work = rng.choice((30, 100, 200, 300))
        self.budget = 0
        """Operations that the applications may still begin."""
        self.processes = rng.choice((1, 2, 4, 6))
        self.rounds = rng.choice((0, 2, 5, 10))
        self.gate = Gate()
        self.kernel: Kernel
        self.network: Network
        self.nursery: trio.Nursery
        self.troubles: list[str] = []
        self.lives = 0
        self.busy = 0
        self.wire = False
        self.is_over = False

    @staticmethod
    def _fill(rng: random.Random, base: Path, count: int) -> None:
        if rng.random() < 0.6:
            return
        populate(base / "primary", rng, NAMES)
        for number in range(count):
            kind = rng.randrange(3)
            if kind == 0:
                populate(base / f"r{number}", rng, NAMES)
            elif kind == 1:
                shutil.rmtree(base / f"r{number}")
                shutil.copytree(base / "primary", base / f"r{number}", symlinks=True)

    # Notes -----------------------------------------------------------------------------------

    def note(self, text: str) -> None:
        self.result.trace.append(f"{self.world.clock.current_time():10.4f} {text}")

    def trouble(self, text: str) -> None:
        self.note(f"!! {text}")
        self.troubles.append(text)

    def verdict(self, what: str, found: list[str]) -> None:
        found = found + self.troubles
        if found:
            raise Failure(f"{what}:\n  " + "\n  ".join(found))

    # Lives -----------------------------------------------------------------------------------

    def _life(self, name: str, on_death: Callable[[], None]) -> Life:
        self.lives += 1
        rng = random.Random(f"{self.seed} life {self.lives}")
        return Life(name, rng, on_death)

    def _note_death(self, life: Life) -> None:
        if not self.is_over:
            self.note(f"{life.name} died")
            self.result.crashes += 1

    async def start_replica(self, node: ReplicaNode) -> None:
        def died() -> None:
            self._note_death(life)
            node.listener.died()

        life = self._life(node.path.name, died)
        main = node.start(life)
        self.nursery.start_soon(self._live_replica, node, life, main)
        while node.endpoint not in self.network.listeners and not life.dead:
            await trio.sleep(0)

    async def _live_replica(
        self, node: ReplicaNode, life: Life, main: Callable[[], Awaitable[object]]
    ) -> None:
        await life.run(main)
        self.result.steps += life.steps
        node.bury()

    async def start_primary(self) -> None:
        def died() -> None:
            self._note_death(life)
            node.slots_at_death = node.in_flight()
            node.in_sync_at_death = node.in_sync()
            for peer in node.primary.pipeline.peers:
                link = peer.link
                assert isinstance(link, FakeLink)
                link.is_up = False
                if link.wire is not None:
                    link.wire.cut(noticed=True)

        node = self.primary
        life = self._life("primary", died)
        main = node.start(life)
        pipeline = node.primary.pipeline
        rng = life.rng
        pipeline.fuse_ready = lambda: rng.random() < 0.5
        self.kernel = Kernel(
            node.primary.volume,
            life.rng,
            self.trouble,
            self.ledger,
            stores_in_sync=self._in_sync,
            may_fail=lambda: bool(life.errors),
        )
        self.note(f"primary started, {len(pipeline.peers)} peers")
        self.busy = 0
        self.nursery.start_soon(self._live_primary, node, life, main)

    async def _live_primary(
        self, node: PrimaryNode, life: Life, main: Callable[[], Awaitable[object]]
    ) -> None:
        async def everything() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(main)
                nursery.start_soon(self._checkpoints)
                for number in range(self.processes):
                    nursery.start_soon(self._application, number, life)

        await life.run(everything)
        self.result.steps += life.steps
        node.bury()

    async def _checkpoints(self) -> None:
        while True:
            await trio.sleep(5.0)
            self.primary.state.flush()
            self.primary.state.reserve_space()

    async def _application(self, number: int, life: Life) -> None:
        rng = life.rng
        process = Process(self.kernel, self.primary.raw, rng, self.habits)
        while True:
            await self.gate.passed()
            if self.budget <= 0:
                await trio.sleep(0.5)
                continue
            self.budget -= 1
            self.result.operations += 1
            self.busy += 1
            errors = life.errors
            try:
                await process.step(lambda text: self.note(f"[{number}] {text}"))
            except OSError as error:
                # A failed clean-up may have left a symlink that the kernel does not know of.
                if life.errors == errors and not (errors and error.errno == errno.ELOOP):
                    raise
            self.busy -= 1
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
        return self.primary.life.steps if self.primary.life is not None else 0

    def _where(self) -> str:
        pipeline = self.primary.primary.pipeline
        words = [f"{self.busy} busy", f"{pipeline.scheduler.in_flight} claims"]
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
        return dict(self.primary.primary.resyncs[peer.name].work.stuck)

    async def stand_still(self) -> bool:
        """No application is in the middle of anything; False if the primary died meanwhile."""
        self.gate.close()
        life = self.primary.life
        pipeline = self.primary.primary.pipeline

        def still() -> bool:
            if life is None or life.dead:
                return True
            return not self.busy and not pipeline.flights

        await self.until("applications finish", still, 0.01)
        return life is not None and not life.dead

    # Checks ----------------------------------------------------------------------------------

    def check_covered(self, what: str, *, slots: check.Slots | None = None) -> None:
        """Whatever differs on a replica is recorded."""
        ours = check.Snapshot(self.primary.raw, primary=True)
        logs = self.primary.saved_logs()
        for peer, replica in zip(self.primary.primary.pipeline.peers, self.replicas, strict=True):
            if peer.state is State.UNINITIALIZED or replica.is_other:
                continue
            theirs = check.Snapshot(replica.raw, primary=False)
            found = check.not_covered(ours, theirs, logs[peer.name], slots or set())
            self.verdict(f"{what}: {peer.name} lacks something that is not recorded", found)
        self.note(f"checked: {what}")

    def check_equal(self, what: str) -> None:
        """Replicas are what they should be."""
        everything = check.Snapshot(self.primary.raw, primary=False)
        self.verdict(f"{what}: acknowledged and missing", self.ledger.missing(everything))
        ours = check.Snapshot(self.primary.raw, primary=True)
        for replica in self.replicas:
            theirs = check.Snapshot(replica.raw, primary=False)
            self.verdict(f"{what}: {replica.path.name} differs", check.differences(ours, theirs))
            found = check.compared(self.primary.raw, replica.raw, ours)
            self.verdict(f"{what}: {replica.path.name} differs", found)
        self.note(f"checked equal: {what}")

    async def check_forgotten(self) -> None:
        """Nothing is held for nobody."""
        node, pipeline = self.primary, self.primary.primary.pipeline
        await self.kernel.drop_everything()
        self.verdict("the kernel holds inodes", self.kernel.held())
        held = list(pipeline.scheduler._lines)
        self.verdict("claims are left", [repr(key) for key in held])
        self.verdict("slots are in use", [repr(key) for key in node.in_flight()])
        kinds = {word for reason in pipeline.scheduler.held for word in reason.split(" behind ")}
        self.verdict("kinds without a class", sorted(kinds - CLASSES.keys() - {"resync"}))
        # What works in the background holds what it looks at, and lets it go.
        await self.until("nothing is held", lambda: not node.tree._held)
        table = node.tree.table
        left = [
            f"{inode.path()!r} lookups {inode.lookups} opens {inode.opens} pins {inode.pins}"
            for inode in table.by_ino.values()
            if inode is not table.root and (inode.lookups or inode.opens or inode.pins & ~KEEP_PIN)
        ]
        self.verdict("inodes are held", left)
        self.verdict("handles are open", [repr(number) for number in table.handles])

    # Faults ----------------------------------------------------------------------------------

    async def fault(self) -> None:
        """One of the things that happen."""
        rng = self.rng
        kind = rng.choice((
            "cut", "cut", "cut", "crash", "crash", "replica", "replica", "errors", "pause",
            "still", "still", "compare", "restart", "in-sync", "wipe", "power", "power",
        ))  # fmt: skip
        replica = rng.choice(self.replicas)
        self.note(f"-- fault: {kind} ({replica.path.name})")
        await {
            "cut": self._cut,
            "crash": self._crash,
            "replica": self._crash_replica,
            "errors": self._errors,
            "pause": self._pause,
            "still": self._still,
            "compare": self._compare,
            "restart": self._restart,
            "wipe": self._wipe,
            "power": self._power,
            "in-sync": self._wait_in_sync,
        }[kind](replica)

    def _peer_of(self, replica: ReplicaNode) -> Peer:
        return next(
            peer
            for peer in self.primary.primary.pipeline.peers
            if peer.endpoint == replica.endpoint
        )

    async def _cut(self, replica: ReplicaNode) -> None:
        self.network.cut(replica.endpoint)
        await trio.sleep(self.rng.choice((0.0, 0.05, 1.0, 8.0)))
        if self.rng.random() < 0.7:
            self.network.join(replica.endpoint)

    async def _crash(self, _: ReplicaNode) -> None:
        life = self.primary.life
        if life is None:
            return
        if self.rng.random() < 0.6:
            life.countdown = self.rng.randint(1, 40)
            with trio.move_on_after(2.0):
                while not life.dead:
                    await trio.sleep(0.01)
        if not life.dead:
            life.die()
        await self.revive()

    async def revive(self, powerless: Collection[Store] = ()) -> None:
        """Start what is dead, after looking at what it left; *powerless* lose power before."""
        for replica in self.replicas:
            if not replica.is_alive:
                await self._buried(replica)
                if replica in powerless and replica.was_started:
                    self._lose_power(replica)
                await self.start_replica(replica)
        if self.primary.is_alive:
            return
        await self._buried(self.primary)
        await trio.sleep(self.rng.choice((0.0, 0.02, 1.0)))
        # What arrives late may arrive until the next session, but not while it is looked at.
        for endpoint in self.network.links:
            self.network.cut_off.add(endpoint)
        wires = [one.listener.wire for one in self.replicas if one.is_alive]
        while any(wire is not None and wire.is_open and _pending(wire) for wire in wires):
            await trio.sleep(0.01)
        self.check_covered("what was acknowledged", slots=self.primary.slots_at_death)
        self._check_acknowledged()
        if self.primary in powerless:
            self._lose_power(self.primary)
            self.ledger.lost(self.primary.raw, self.primary.path.name)
        else:
            self.ledger.read(self.primary.raw)
        await self.start_primary()
        self.check_covered("after a start of the primary")
        for endpoint in self.network.links:
            self.network.join(endpoint)

    @staticmethod
    async def _buried(node: Store) -> None:
        while node.life is not None:
            await trio.sleep(0.001)

    def _in_sync(self) -> set[InSync]:
        """Stores that take part in an fsync of whatever it may be."""
        if self.is_whole:
            return self.primary.in_sync()
        return {(self.primary.path.name, 0)}

    def _check_acknowledged(self) -> None:
        """The dead primary and all that were in sync with it have what applications were told."""
        for name, _ in sorted(self.primary.in_sync_at_death):
            if name == self.primary.path.name:
                store = check.Snapshot(self.primary.raw, primary=False)
            else:
                replica = next(one for one in self.replicas if one.path.name == name)
                if not self.confirms or replica.is_other:
                    continue
                store = check.Snapshot(replica.raw, primary=False)
            self.verdict(f"{name} lacks what was acknowledged", self.ledger.missing(store))
        self.note(f"checked: {self.ledger.noted} acknowledged changes")

    def _lose_power(self, node: Store) -> None:
        is_inconsistent = node.is_inconsistent
        self.note(f"{node.path.name} lost power: {node.lose_power(self.rng)}")
        if is_inconsistent:
            return  # in the middle of a resync things stand in limbo
        store = check.Snapshot(node.raw, primary=False)
        found = self.ledger.broken(store, node.path.name)
        self.verdict(f"{node.path.name} lacks what was flushed", found)

    async def _power(self, replica: ReplicaNode) -> None:
        """Machines lose power."""
        choices: list[list[Store]] = [
            [replica],
            [self.primary],
            [self.primary, replica],
            [self.primary, *self.replicas],
        ]
        gone = self.rng.choice(choices)
        for node in gone:
            if node.life is not None:
                node.life.die()
        if self.primary not in gone:
            await trio.sleep(self.rng.choice((0.0, 0.02, 1.0, 7.0)))
        await self.revive(gone)

    async def _crash_replica(self, replica: ReplicaNode) -> None:
        life = replica.life
        if life is None:
            return
        if self.rng.random() < 0.7:
            life.countdown = self.rng.randint(1, 60)
            with trio.move_on_after(2.0):
                while not life.dead:
                    await trio.sleep(0.01)
        if not life.dead:
            life.die()
        await trio.sleep(self.rng.choice((0.0, 0.02, 1.0, 7.0)))
        while replica.life is not None:
            await trio.sleep(0.001)
        await self.start_replica(replica)

    async def _wipe(self, replica: ReplicaNode) -> None:
        """The replica's disk is replaced."""
        if replica.life is not None:
            replica.life.die()
        while replica.life is not None:
            await trio.sleep(0.001)
        replica.wipe()
        replica.is_other = True
        await self.start_replica(replica)

    async def _errors(self, replica: ReplicaNode) -> None:
        node = self.primary if self.rng.random() < 0.3 else replica
        life = node.life
        if life is not None:
            life.error_rate = self.rng.choice((0.01, 0.1, 0.5))
            await trio.sleep(self.rng.choice((0.2, 2.0)))
            life.error_rate = 0.0

    async def _pause(self, replica: ReplicaNode) -> None:
        if not self.primary.is_alive or self.primary.life is None:
            return
        peer = self._peer_of(replica)
        Life.current = self.primary.life
        try:
            peer.pause("by the operator")
        finally:
            Life.current = None
        await trio.sleep(self.rng.choice((0.0, 0.5, 3.0)))
        self._resume_all()

    def _resume_all(self) -> None:
        if not self.primary.is_alive:
            return
        Life.current = self.primary.life
        try:
            for peer in self.primary.primary.pipeline.peers:
                peer.resume()
        finally:
            Life.current = None

    async def _compare(self, replica: ReplicaNode) -> None:
        if self.primary.is_alive:
            Life.current = self.primary.life
            try:
                self._peer_of(replica).compare_all()
            finally:
                Life.current = None

    async def _still(self, replica: ReplicaNode) -> None:
        """Everything stands still, one peer is away: what it lacks is recorded."""
        if await self.stand_still():
            self.network.cut(replica.endpoint)
            peer = self._peer_of(replica)
            wire = replica.listener.wire if replica.is_alive else None
            await self.until(
                "the link is seen to be down",
                lambda: (
                    not self.primary.is_alive
                    or (not peer.live and (wire is None or not wire.is_open or not _pending(wire)))
                ),
            )
            if self.primary.is_alive:
                self._check_one(replica, "standing still, cut off")
            self.network.join(replica.endpoint)
        self.gate.open()

    def _check_one(self, replica: ReplicaNode, what: str) -> None:
        peer = self._peer_of(replica)
        if peer.state is State.UNINITIALIZED or replica.is_other:
            return
        ours = check.Snapshot(self.primary.raw, primary=True)
        theirs = check.Snapshot(replica.raw, primary=False)
        found = check.not_covered(ours, theirs, peer.log)
        self.verdict(f"{what}: {peer.name} lacks something that is not recorded", found)
        self.note(f"checked: {what}")

    async def _restart(self, _: ReplicaNode) -> None:
        """A clean stop and a start."""
        if not await self.stand_still() or self.primary.life is None:
            self.gate.open()
            return
        life = self.primary.life

        async def stop() -> None:
            await self.kernel.drop_everything()
            await self.primary.primary.pipeline.drained()
            await self.primary.primary.checkpoint()
            self.primary.state.stopped_cleanly()
            done.set()

        done = trio.Event()
        Life.current = life
        try:
            self.nursery.start_soon(stop)
        finally:
            Life.current = None
        await self.until("the primary stops", lambda: done.is_set() or life.dead)
        life.die()
        self.note("stopped" if done.is_set() else "died while it stopped")
        self.gate.open()
        await self.revive()

    async def _wait_in_sync(self, replica: ReplicaNode) -> None:
        """Once in sync, and with nothing under way, a replica is equal."""
        peer = self._peer_of(replica)
        with trio.move_on_after(20.0):
            while peer.state is not State.IN_SYNC:
                await trio.sleep(0.05)
        still = await self.stand_still() and self.network.is_connected(replica.endpoint)
        if still and peer.live and peer.state is State.IN_SYNC:
            ours = check.Snapshot(self.primary.raw, primary=True)
            theirs = check.Snapshot(replica.raw, primary=False)
            if peer.log.is_empty:
                self.verdict("standing still in sync", check.differences(ours, theirs))
                self.note("checked equal: standing still in sync")
        self.gate.open()

    # The run ---------------------------------------------------------------------------------

    async def main(self) -> None:
        async with trio.open_nursery() as self.nursery:
            rng = random.Random(f"{self.seed} network")
            self.network = Network(rng, self.nursery, self.trouble)
            FakeLink.network = FakeListener.network = self.network
            if self.wire:
                self.network.note = self.note
            for replica in self.replicas:
                if self.rng.random() < 0.9:
                    await self.start_replica(replica)
            await self.start_primary()
            await self._faults()
            await self._heal()
            await self._work_in_sync()
            await self.check_forgotten()
            self.is_over = True
            for node in (self.primary, *self.replicas):
                if node.life is not None:
                    node.life.die()
            self.nursery.cancel_scope.cancel()
        self.result.delivered = self.network.delivered
        self.result.simulated_s = self.world.clock.current_time()

    async def _faults(self) -> None:
        if self.rng.random() < 0.5:
            with trio.move_on_after(30.0):
                while not self._is_in_sync():
                    await trio.sleep(0.05)
        for _ in range(self.rounds):
            self.verdict("meanwhile", [])
            self.budget += self.work // self.rounds
            await trio.sleep(self.rng.choice((0.0, 0.0005, 0.005, 0.05, 0.3, 1.0, 4.0)))
            await self.fault()
            if not self.primary.is_alive and self.rng.random() < 0.9:
                await self.revive()

    def _is_in_sync(self) -> bool:
        return self.primary.is_alive and all(
            peer.live
            and peer.state is State.IN_SYNC
            and peer.log.is_empty
            and self.network.is_connected(peer.endpoint)
            for peer in self.primary.primary.pipeline.peers
        )

    async def _heal(self) -> None:
        self.note("-- healing")
        for node in (self.primary, *self.replicas):
            if node.life is not None:
                node.life.error_rate = 0.0
                node.life.countdown = 0
        await self.revive()
        for replica in self.replicas:
            self.network.join(replica.endpoint)
        self._resume_all()
        if not self.rounds:
            self.budget = self.work
        elif self.rng.random() < 0.5:
            self.budget = 0
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        await self.until("in sync", self._is_in_sync)
        self.check_equal("healed")
        for peer in self.primary.primary.pipeline.peers:
            self.verdict("unrepresentable", list(peer.unrepresentable.reasons()))

    async def _work_in_sync(self) -> None:
        self.note("-- in sync")
        self.budget = 30
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        await self.until("in sync", self._is_in_sync)
        self.check_equal("after work in sync")


def _pending(wire: object) -> bool:
    lanes = wire.lanes  # type: ignore[attr-defined]
    return any(lane.queue and lane.limit != 0 for lane in lanes)
