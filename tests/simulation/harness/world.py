"""One run of the simulation: two to four nodes, applications, and faults.

First faults, with applications at work; now and then everything stands still and what is recorded
is held against what differs. Then the faults end, and all must come in sync and be equal; then the
applications work once more, in sync from beginning to end.
"""

from __future__ import annotations

import errno
import inspect
import random
import shutil
from collections.abc import Awaitable, Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any, Literal

import trio
from simulation.harness import check
from simulation.harness.kernel import Kernel
from simulation.harness.ledger import InSync, Ledger
from simulation.harness.life import Life, World, acting
from simulation.harness.network import FakeLink, FakeListener, Network, Wire
from simulation.harness.nodes import Member, populate
from simulation.harness.result import Failure, Result
from simulation.harness.workload import NAMES, Habits, Process

from replfs.core.footprint import CLASSES
from replfs.core.relationship import State
from replfs.errors import NotInSync, ReplfsError, UsageError
from replfs.node.mounted.view import ReadOnlyView
from replfs.node.replication.peer import Peer
from replfs.node.roles.primary import Primary
from replfs.store.reach import KEEP_PIN

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
        names = NODES[: count + 1]
        for name in names:
            (base / name).mkdir()
        self._fill(rng, base, names)
        policy = "async" if rng.random() < 0.1 else "sync"
        # Drawn apart, so that the other numbers stay what they are.
        is_late = policy == "sync" and random.Random(f"{seed} ack").random() < 0.2
        ack: Literal["op", "close"] = "close" if is_late else "op"
        self.members = [Member(base, name, names, policy, ack) for name in names]
        self.primary = self.members[0]
        """The one that applications use."""
        for member in self.members:
            member.mounted = partial(self._mounted, member)
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
        self.faults: dict[str, Callable[[Member], Awaitable[None]]] = {
            "cut": self._cut,
            "cut again": self._cut,
            "crash": self._crash,
            "crash again": self._crash,
            "replica": self._crash_replica,
            "errors": self._errors,
            "pause": self._pause,
            "still": self._still,
            "still again": self._still,
            "compare": self._compare,
            "restart": self._restart,
            "wipe": self._wipe,
            "power": self._power,
            "power again": self._power,
            "in-sync": self._wait_in_sync,
            "promote": self._promote,
            "promote again": self._promote,
        }
        self.kernel: Kernel | None = None
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
        await member.settled.wait()
        if member.failure:
            self.note(f"{member.name} did not start: {member.failure}")
            if not member.settings.start_alone:
                member.start_alone()
                await self.start(member)
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
            self.ledger,
            stores_in_sync=self._in_sync,
            may_fail=lambda: bool(life.errors),
        )
        async with trio.open_nursery() as nursery:
            for number in range(self.processes):
                nursery.start_soon(self._application, number, member, kernel, life)

    async def _application(self, number: int, member: Member, kernel: Kernel, life: Life) -> None:
        rng = life.rng
        process = Process(kernel, member.raw, rng, self.habits)
        while member.kernel is kernel:
            await self.gate.passed()
            if self.budget <= 0 or member is not self.primary:
                await trio.sleep(0.5)
                continue
            self.budget -= 1
            self.result.operations += 1
            kernel.inside += 1
            errors = life.errors
            try:
                await process.step(lambda text: self.note(f"[{number}] {text}"))
            except OSError as error:
                # A failed clean-up may have left a symlink that the kernel does not know of.
                is_failing = life.errors != errors or (errors and error.errno == errno.ELOOP)
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
        """Applications that wait for the primary."""
        kernel = self.primary.kernel
        return kernel.inside if kernel is not None else 0

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
        """No application is in the middle of anything; False if the primary died meanwhile."""
        self.gate.close()
        member, life = self.primary, self.primary.life

        def still() -> bool:
            if life is None or life.dead or member.primary is None:
                return True
            return not self.busy and not member.pipeline.flights

        await self.until("applications finish", still, 0.01)
        return life is not None and not life.dead and member.primary is not None

    # Checks ----------------------------------------------------------------------------------

    def check_covered(self, what: str, *, slots: check.Slots | None = None) -> None:
        """Whatever differs on a replica is recorded."""
        ours = check.Snapshot(self.primary.raw, primary=True)
        for replica in self.replicas:
            self._check_log(replica, ours, what, slots or set())
        self.note(f"checked: {what}")

    def _check_log(
        self, replica: Member, ours: check.Snapshot, what: str, slots: check.Slots
    ) -> None:
        peer = self.primary.peer(replica.name)
        if peer.state is State.UNINITIALIZED or replica.is_other:
            return
        if self.may_split:
            return  # another primary may have had it meanwhile
        if not peer.is_asked or not peer.peer_node:
            return  # since the primary was promoted it has not met that node, or not asked it yet
        # What is none belongs to its node, and stays when that is a primary no more.
        theirs = check.Snapshot(replica.raw, primary=replica.was_primary)
        found = check.not_covered(ours, theirs, peer.log, slots)
        self.verdict(f"{what}: {peer.name} lacks something that is not recorded", found)

    def check_equal(self, what: str) -> None:
        """Replicas are what they should be."""
        everything = check.Snapshot(self.primary.raw, primary=False)
        self.verdict(f"{what}: acknowledged and missing", self.ledger.missing(everything))
        ours = check.Snapshot(self.primary.raw, primary=True)
        for replica in self.replicas:
            # What is none belongs to its node, and stays when that is a primary no more.
            theirs = check.Snapshot(replica.raw, primary=replica.was_primary)
            self.verdict(f"{what}: {replica.name} differs", check.differences(ours, theirs))
            found = check.compared(self.primary.raw, replica.raw, ours, theirs)
            self.verdict(f"{what}: {replica.name} differs", found)
        self.note(f"checked equal: {what}")

    async def check_forgotten(self) -> None:
        """Nothing is held for nobody."""
        node, pipeline, kernel = self.primary, self.primary.pipeline, self.primary.kernel
        assert kernel is not None
        await kernel.drop_everything()
        self.verdict("the kernel holds inodes", kernel.held())
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
            for inode in table.by_nodeid.values()
            if inode is not table.root and (inode.lookups or inode.opens or inode.pins & ~KEEP_PIN)
        ]
        self.verdict("inodes are held", left)
        self.verdict("handles are open", [repr(number) for number in table.handles])

    # Faults ----------------------------------------------------------------------------------

    async def fault(self) -> None:
        """One of the things that happen."""
        rng = self.rng
        kind = rng.choice(tuple(self.faults))
        replica = rng.choice(self.replicas)
        self.note(f"-- fault: {kind} ({replica.name})")
        await self.faults[kind](replica)

    async def _cut(self, replica: Member) -> None:
        ends = [(self.primary.name, replica.name), (replica.name, self.primary.name)]
        ends = self.rng.choice((ends, ends, ends[:1], ends[1:]))
        for one, other in ends:
            self.network.cut(one, other)
        self.note(f"cut: {ends}")
        await trio.sleep(self.rng.choice((0.0, 0.05, 1.0, 8.0, 20.0)))
        if self.rng.random() < 0.7:
            for one, other in ends:
                self.network.join(one, other)

    def _cut_off(self, member: Member) -> None:
        for other in self.members:
            if other is not member:
                self.network.cut(member.name, other.name)
                self.network.cut(other.name, member.name)

    def _join_all(self) -> None:
        self.network.blocked.clear()

    async def _kill(self, member: Member) -> None:
        """It dies, at once or at one of its next system calls."""
        life = member.life
        if life is None:
            return
        if self.rng.random() < 0.6:
            life.countdown = self.rng.randint(1, 60)
            with trio.move_on_after(2.0):
                await life.died.wait()
        if not life.dead:
            life.die()

    async def _crash(self, _: Member) -> None:
        await self._kill(self.primary)
        await self.revive()

    async def revive(self, powerless: Collection[Member] = ()) -> None:
        """Start what is dead, after looking at what it left; *powerless* lose power before."""
        for replica in self.replicas:
            if not replica.is_alive:
                await self._buried(replica)
                if replica in powerless:
                    self._lose_power(replica)
                await self.start(replica)
        if self.primary.is_alive:
            return
        await self._buried(self.primary)
        await trio.sleep(self.rng.choice((0.0, 0.02, 1.0)))
        await self._look_at_the_dead()
        if self.primary in powerless:
            self._lose_power(self.primary)
            await self._start_after_loss()
        else:
            self.ledger.read(self.primary.raw)
            await self.start(self.primary)
        if self.primary.primary is not None and self.primary.is_alive:
            self.check_covered("after a start of the primary")
        self._join_all()

    async def _start_after_loss(self) -> None:
        """A primary that lost power fetches what it lost, where somebody has it, and serves."""
        primary = self.primary
        sources = [
            name
            for name, _ in primary.in_sync_at_death
            if name != primary.name and not self._named(name).is_other
        ]
        if self.rng.random() < 0.8:
            self._join_all()
        await self.start(primary)
        if primary.settings.start_alone:
            sources = []
        if sources and self.confirms and not self.may_split and primary.primary is not None:
            store = check.Snapshot(primary.raw, primary=False)
            what = f"{primary.name} did not get back what {sources} had"
            self.verdict(what, self.ledger.missing(store))
            self.note("checked: what was fetched")
        self.ledger.lost(primary.raw, primary.name)

    async def _look_at_the_dead(self) -> None:
        """What the dead primary left behind; it is cut off from then on."""
        # What arrives late may arrive until the next session, but not while it is looked at.
        self._cut_off(self.primary)
        while any(map(_pending, self._wires())):
            await trio.sleep(0.01)
        if self.primary.primary is not None:
            self.check_covered("what was acknowledged", slots=self.primary.slots_at_death)
        self._check_acknowledged()

    def _wires(self) -> list[Wire]:
        listeners = self.network.listeners.values()
        return [one.wire for one in listeners if one.wire is not None and one.wire.is_open]

    @staticmethod
    async def _buried(member: Member) -> None:
        while member.life is not None:
            await trio.sleep(0.001)

    def _in_sync(self) -> set[InSync]:
        """Stores that take part in an fsync of whatever it may be."""
        if self.is_whole and self.primary.primary is not None and not self.may_split:
            return self.primary.in_sync()
        return {(self.primary.name, 0)}

    def _check_acknowledged(self) -> None:
        """The dead primary and all that were in sync with it have what applications were told."""
        for name, _ in sorted(self.primary.in_sync_at_death):
            member = self._named(name)
            is_bound = self.confirms and not member.is_other and not self.may_split
            if member is not self.primary and not is_bound:
                continue
            store = check.Snapshot(member.raw, primary=False)
            self.verdict(f"{name} lacks what was acknowledged", self.ledger.missing(store))
        self.note(f"checked: {self.ledger.noted} acknowledged changes")

    def _named(self, name: str) -> Member:
        return next(one for one in self.members if one.name == name)

    def _lose_power(self, member: Member) -> None:
        is_inconsistent = member.is_inconsistent
        self.note(f"{member.name} lost power: {member.lose_power(self.rng)}")
        if is_inconsistent:
            return  # in the middle of a resync things stand in limbo
        store = check.Snapshot(member.raw, primary=False)
        found = self.ledger.broken(store, member.name)
        self.verdict(f"{member.name} lacks what was flushed", found)

    async def _power(self, replica: Member) -> None:
        """Machines lose power."""
        choices = [
            [replica],
            [self.primary],
            [self.primary, replica],
            [self.primary, *self.replicas],
        ]
        gone = self.rng.choice(choices)
        for member in gone:
            if member.life is not None:
                member.life.die()
        if self.primary not in gone:
            await trio.sleep(self.rng.choice((0.0, 0.02, 1.0, 7.0)))
        await self.revive(gone)

    async def _crash_replica(self, replica: Member) -> None:
        if replica.life is None:
            return
        await self._kill(replica)
        await trio.sleep(self.rng.choice((0.0, 0.02, 1.0, 7.0)))
        await self._buried(replica)
        await self.start(replica)

    async def _wipe(self, replica: Member) -> None:
        """The replica's disk is replaced."""
        if replica.life is not None:
            replica.life.die()
        await self._buried(replica)
        replica.wipe()
        self.ledger.replaced(replica.name)
        await self.start(replica)

    async def _errors(self, replica: Member) -> None:
        member = self.primary if self.rng.random() < 0.3 else replica
        life = member.life
        if life is not None and member.is_ready:
            life.error_rate = self.rng.choice((0.01, 0.1, 0.5))
            await trio.sleep(self.rng.choice((0.2, 2.0)))
            life.error_rate = 0.0

    async def _pause(self, replica: Member) -> None:
        if not self._serves():
            return
        peer = self.primary.peer(replica.name)
        with acting(self._life_of_primary()):
            peer.pause("by the operator")
        await trio.sleep(self.rng.choice((0.0, 0.5, 3.0)))
        self._resume_all()

    def _serves(self) -> bool:
        return self.primary.is_alive and self.primary.primary is not None

    def _life_of_primary(self) -> Life:
        assert self.primary.life is not None
        return self.primary.life

    def _resume_all(self) -> None:
        if self._serves():
            with acting(self._life_of_primary()):
                for peer in self.primary.pipeline.peers:
                    peer.resume()

    async def _compare(self, replica: Member) -> None:
        if self._serves():
            with acting(self._life_of_primary()):
                self.primary.peer(replica.name).compare_all()

    async def _promote(self, replica: Member) -> None:
        """The primary is gone, or nobody can reach it: another node takes its place."""
        old = self.primary
        if self.rng.random() < 0.3:
            # It lives, and nobody changes anything on it any more.
            if not await self.stand_still():
                return
            old.in_sync_at_death = old.in_sync()
            self._cut_off(old)
        else:
            await self._kill(old)
            await self._buried(old)
        await self._look_at_the_dead()
        self._join_all()
        if old.is_alive:
            self._cut_off(old)
        in_sync = {name for name, _ in old.in_sync_at_death}
        others = [one for one in self.replicas if one.is_ready and one.is_alive]
        best = [one for one in others if one.name in in_sync and not one.is_other]
        chosen = self.rng.choice(best or others or [replica])
        if not self.confirms or not best:
            await trio.sleep(self.rng.choice((0.0, 3.0)))
        before = old.state.identity().generation
        if await self._take_over(chosen):
            identity = chosen.state.identity()
            if before not in {identity.generation, *identity.history}:
                # What the old one began alone, it may have acknowledged: nobody can know.
                self.may_split = True
            if chosen in best and self.confirms:
                store = check.Snapshot(chosen.raw, primary=False)
                self.verdict("promoted without what was acknowledged", self.ledger.missing(store))
                self.ledger.read(chosen.raw)
                self.ledger.follow(chosen.name)
            else:
                self.ledger.lost(chosen.raw, chosen.name)
            self.primary = chosen
            if not old.is_alive and self.rng.random() < 0.3:
                self._lose_power(old)
        self.gate.open()
        await trio.sleep(self.rng.choice((0.0, 1.0, 10.0)))
        self._join_all()
        await self.revive()
        with trio.move_on_after(20.0):
            while old is not self.primary and old.primary is not None and not self.may_split:
                await trio.sleep(0.1)
        if old is not self.primary and old.primary is not None:
            self.may_split = True

    async def _take_over(self, chosen: Member) -> bool:
        """Promote a node; whether it is the primary now."""
        force = False
        for _ in range(2):
            try:
                answer = await self.command(chosen, "promote", force=force)
            except ReplfsError as error:
                self.note(f"promote {chosen.name}: {error}")
                force = isinstance(error, NotInSync) and self.rng.random() < 0.5
                if not force:
                    return False
            else:
                self.note(f"promote {chosen.name}: {answer['message']!r}")
                return True
        return False

    async def _still(self, replica: Member) -> None:
        """Everything stands still, one peer is away: what it lacks is recorded."""
        if await self.stand_still():
            self._cut_off(replica)
            peer = self.primary.peer(replica.name)
            await self.until(
                "the link is seen to be down",
                lambda: (
                    not self._serves()
                    or (not peer.live and not any(map(_pending, self._wires_to(replica))))
                ),
            )
            if self._serves():
                ours = check.Snapshot(self.primary.raw, primary=True)
                self._check_log(replica, ours, "standing still, cut off", set())
                self.note("checked: standing still, cut off")
            self._join_all()
        self.gate.open()

    def _wires_to(self, member: Member) -> list[Wire]:
        return [one for one in self._wires() if one.listener.life is member.life]

    async def command(self, member: Member, name: str, **arguments: Any) -> dict[str, Any]:
        """A command of the operator's, as the control socket would call it. Raises what it does."""
        answers: list[dict[str, Any] | ReplfsError] = []
        life = member.life
        if life is None or life.dead or name not in member.commands:
            raise UsageError("the node does not run")

        async def call() -> None:
            try:
                answer = member.commands[name](arguments)
                answers.append(await answer if inspect.isawaitable(answer) else answer)
            except ReplfsError as error:
                answers.append(error)

        with acting(life):
            self.nursery.start_soon(call)
        await self.until(f"{name} is done", lambda: bool(answers) or life.dead)
        if not answers:
            raise UsageError("the node died")
        if isinstance(answers[0], ReplfsError):
            raise answers[0]
        return answers[0]

    async def _restart(self, _: Member) -> None:
        """A clean stop and a start."""
        if not await self.stand_still() or not self.primary.is_ready:
            self.gate.open()
            return
        try:
            await self.command(self.primary, "stop")
        except ReplfsError as error:
            self.note(f"stop: {error}")
            if self.primary.life is not None:
                self.primary.life.die()
        self.gate.open()
        await self.revive()

    async def _wait_in_sync(self, replica: Member) -> None:
        """Once in sync, and with nothing under way, a replica is equal."""
        if not self._serves():
            return
        peer = self.primary.peer(replica.name)
        with trio.move_on_after(20.0):
            while peer.state is not State.IN_SYNC:
                await trio.sleep(0.05)
        if await self.stand_still() and peer.live and _is_connected(peer):
            if peer.state is State.IN_SYNC and peer.log.is_empty:
                ours = check.Snapshot(self.primary.raw, primary=True)
                theirs = check.Snapshot(replica.raw, primary=replica.was_primary)
                self.verdict("standing still in sync", check.differences(ours, theirs))
                self.note("checked equal: standing still in sync")
        self.gate.open()

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
            await self.check_forgotten()
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
            self._named(name).is_other = False

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
        return self._serves() and all(
            peer.live and peer.state is State.IN_SYNC and peer.log.is_empty and _is_connected(peer)
            for peer in self.primary.pipeline.peers
        )

    async def _heal(self) -> None:
        self.note("-- healing")
        for member in self.members:
            if member.life is not None:
                member.life.error_rate = 0.0
                member.life.countdown = 0
        await self.revive()
        self._join_all()
        await self.until("the primary serves", lambda: self.primary.kernel is not None)
        self._resume_all()
        if not self.rounds:
            self.budget = self.work
        elif self.rng.random() < 0.5:
            self.budget = 0
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        await self._decide_split_brain()
        await self.until("in sync", self._is_in_sync)
        self.check_equal("healed")
        for peer in self.primary.pipeline.peers:
            self.verdict("unrepresentable", list(peer.unrepresentable.reasons()))

    async def _decide_split_brain(self) -> None:
        """The operator's decision: the primary wins, the others begin anew."""
        while self.may_split:
            with trio.move_on_after(60.0):
                while not self._is_in_sync():
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
                await self._wipe(self._named(peer.name))

    async def _work_in_sync(self) -> None:
        self.note("-- in sync")
        self.budget = 30
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        await self.until("in sync", self._is_in_sync)
        self.check_equal("after work in sync")


def _pending(wire: Wire) -> bool:
    return any(lane.queue and lane.limit != 0 for lane in wire.lanes)


def _is_connected(peer: Peer) -> bool:
    """Whether there is a session, not only in the primary's eyes."""
    wire = peer.link.wire  # type: ignore[attr-defined]
    return wire is not None and not wire.is_cut
