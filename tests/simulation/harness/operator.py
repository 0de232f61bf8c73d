"""The operator's commands, and what they make of the nodes: which of them is the primary."""

from __future__ import annotations

import inspect
import random
from typing import TYPE_CHECKING, Any

import trio
from simulation.harness import check
from simulation.harness.life import acting
from simulation.harness.nodes import Member
from simulation.harness.result import Failure

from replfs.core.relationship import State
from replfs.errors import NotInSync, ReplfsError, UsageError

if TYPE_CHECKING:
    from simulation.harness.world import Simulation


class DiskFailed(ReplfsError):
    """What an operator sees of a command that ended with an error of the node's disk."""


class Operator:
    """Of one run."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim

    async def command(self, member: Member, name: str, **arguments: Any) -> dict[str, Any]:
        """A command of the operator's, as the control socket would call it.

        Raises:
            ReplfsError: it is refused; `DiskFailed` in place of an OSError.
        """
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
            except OSError as error:
                answers.append(DiskFailed(error.strerror or str(error)))

        with acting(life):
            self.sim.nursery.start_soon(call)
        await self.sim.until(f"{name} is done", lambda: bool(answers) or life.dead)
        if not answers:
            raise UsageError("the node died")
        if isinstance(answers[0], ReplfsError):
            raise answers[0]
        return answers[0]

    async def promote(self, replica: Member) -> None:
        """The primary is gone, or nobody can reach it: another node takes its place."""
        old = self.sim.primary
        if self.sim.rng.random() < 0.3:
            # It lives, and nobody changes anything on it any more.
            if not await self.sim.stand_still():
                return
            old.in_sync_at_death = old.in_sync()
            self.sim.cut_off(old)
        else:
            await self.sim.recovery.kill(old)
            await self.sim.recovery.buried(old)
        await self.sim.recovery.look_at_the_dead()
        self.sim.join_all()
        if old.is_alive:
            self.sim.cut_off(old)
        in_sync = {name for name, _ in old.in_sync_at_death}
        if old.is_alive:
            old.in_sync_at_death = {(old.name, 0)}  # who is in sync may change until it ends
        others = [one for one in self.sim.replicas if one.is_ready and one.is_alive]
        best = [one for one in others if one.name in in_sync and not one.is_other]
        chosen = self.sim.rng.choice(best or others or [replica])
        if not self.sim.confirms or not best:
            await trio.sleep(self.sim.rng.choice((0.0, 3.0)))
        # Where it died before it had read its state, nobody can know.
        before = old.state.identity().generation if old.is_built else b""
        chosen.ledger = self.sim.ledger
        if await self.take_over(chosen):
            identity = chosen.state.identity()
            if before not in {identity.generation, *identity.history}:
                # What the old one began alone, it may have acknowledged: nobody can know.
                self.sim.may_split = True
            if chosen in best and self.sim.confirms:
                store = check.Snapshot(chosen.raw, primary=False)
                self.sim.verdict(
                    "promoted without what was acknowledged", self.sim.ledger.missing(store)
                )
                self.sim.ledger.read(chosen.raw)
                self.sim.ledger.follow(chosen.name)
            else:
                self.sim.ledger.lost(chosen.raw, chosen.name)
            self.sim.use(chosen)
            await self._fail_at_once(chosen, is_whole=chosen in best and self.sim.confirms)
            if not old.is_alive and self.sim.rng.random() < 0.3:
                self.sim.recovery.lose_power(old)
        self.sim.gate.open()
        await trio.sleep(self.sim.rng.choice((0.0, 1.0, 10.0)))
        self.sim.join_all()
        await self.sim.recovery.revive()
        with trio.move_on_after(20.0):
            while (
                old is not self.sim.primary and old.primary is not None and not self.sim.may_split
            ):
                await trio.sleep(0.1)
        if old is not self.sim.primary and old.primary is not None:
            self.sim.may_split = True

    async def _fail_at_once(self, chosen: Member, *, is_whole: bool) -> None:
        """Perhaps the new primary loses power before it has done anything as one.

        *is_whole*: it had all that was acknowledged. It still has, in memory or not.
        """
        # Drawn apart, so that the other numbers stay what they are.
        if random.Random(f"{self.sim.seed} promoted at {self.sim.world.clock.now}").random() > 0.6:
            return
        if chosen.life is not None:
            chosen.life.die()
        await self.sim.recovery.buried(chosen)
        self.sim.note(f"{chosen.name} lost power: {chosen.lose_power(self.sim.rng)}")
        if is_whole:
            store = check.Snapshot(chosen.raw, primary=False)
            what = f"{chosen.name} was promoted, and lost what was acknowledged before"
            self.sim.verdict(what, self.sim.ledger.missing(store))
            self.sim.note("checked: what a new primary has after a loss of power")
        else:
            self.sim.ledger.lost(chosen.raw, chosen.name)

    async def take_over(self, chosen: Member) -> bool:
        """Promote a node; whether it is the primary now."""
        force = False
        for _ in range(2):
            try:
                answer = await self.command(chosen, "promote", force=force)
            except ReplfsError as error:
                self.sim.note(f"promote {chosen.name}: {error}")
                force = isinstance(error, NotInSync) and self.sim.rng.random() < 0.5
                if not force:
                    return False
            else:
                self.sim.note(f"promote {chosen.name}: {answer['message']!r}")
                return True
        return False

    # Switchover ----------------------------------------------------------------------------------

    async def switch_over(self, new: Member) -> None:
        """The primary hands its role to another node, and something may come in between."""
        sim, rng = self.sim, self.sim.rng
        old = sim.primary
        if not sim.serves() or sim.may_split:
            return
        peer = old.peer(new.name)
        with trio.move_on_after(20.0):
            while rng.random() < 0.9 and not (peer.state is State.IN_SYNC and peer.log.is_empty):
                await trio.sleep(1.0)
        if not await sim.stand_still():
            sim.gate.open()
            return
        if old.kernel is not None and rng.random() < 0.9:
            await old.kernel.close_files()
        is_quiet = rng.random() < 0.6
        if not is_quiet:
            sim.gate.open()
        things = sim.ledger.things() if is_quiet and not sim.habits.policies else ()
        flushed = sim.ledger.flush_begins(things)
        new.ledger = sim.ledger
        interference = Interference(sim, old, new)
        sim.nursery.start_soon(interference.run)
        try:
            answer = await self.command(old, "switchover", peer=new.name)
        except ReplfsError as error:
            sim.note(f"switchover: {error}")
            flushed(())
        else:
            sim.note(f"switchover: {answer['message']!r}")
            flushed(((old.name, 0), (new.name, 0)))
            if new.is_alive and self._primaries(old, new) != [new]:
                raise Failure(f"after a switchover {new.name} is not the primary, or not alone")
        await interference.end()
        await self._settle(old, new)
        sim.gate.open()

    @staticmethod
    def _primaries(*members: Member) -> list[Member]:
        """Those on which applications could change something."""
        return [
            one
            for one in members
            if one.is_alive and one.primary is not None and not one.is_leaving
        ]

    async def _settle(self, old: Member, new: Member) -> None:
        """After a switchover that was cut off: there is one primary, or none, and then either is.

        It has everything that was acknowledged, whichever it is.
        """
        sim = self.sim
        sim.gate.close()
        gone = [one for one in (old, new) if not one.is_alive]
        powerless = [one for one in gone if sim.rng.random() < 0.4]
        if old in gone or new in gone:
            await sim.recovery.revive(powerless)
        sim.join_all()
        if len(self._primaries(old, new)) > 1:
            raise Failure("after a switchover there are two primaries")
        with trio.move_on_after(20.0):
            # One may be in the middle of becoming it.
            while not self._primaries(old, new):
                await trio.sleep(0.05)
        if not self._primaries(old, new):
            sim.note("no primary")
            await self._promote_either(old, new)
        (winner,) = self._primaries(old, new)
        if winner is old:
            await sim.until("the applications end", lambda: not sim.busy)
            return
        await sim.until("the old mount is exchanged", lambda: old.kernel is None)
        if not sim.habits.policies:
            store = check.Snapshot(winner.raw, primary=False)
            sim.verdict("handed over without what was acknowledged", sim.ledger.missing(store))
            sim.note(f"checked: {winner.name} has what was acknowledged")
            sim.ledger.read(winner.raw)
        else:
            sim.ledger.lost(winner.raw, winner.name)
        sim.use(winner)

    async def _promote_either(self, old: Member, new: Member) -> None:
        """Both are secondaries, and were equal when the role was given up."""
        candidates = self.sim.rng.sample((old, new), 2)
        for member in candidates:
            try:
                answer = await self.command(member, "promote")
            except ReplfsError as error:
                self.sim.note(f"promote {member.name}: {error}")
            else:
                self.sim.note(f"promote {member.name}: {answer['message']!r}")
                return
        raise Failure("after a switchover nobody can be promoted")


class Interference:
    """Now and then two nodes that have something to settle do not come to it undisturbed.

    One of them dies, at a system call or at a moment, or does not hear the other any more.
    """

    def __init__(self, sim: Simulation, one: Member, other: Member) -> None:
        self.sim = sim
        self._victim, self._rest = sim.rng.sample((one, other), 2)
        self._kind = sim.rng.choice((*("",) * 4, "count", "count", "die", "cut", "cut", "one way"))
        self._delay_s = sim.rng.choice((0.0, 0.001, 0.01, 0.05, 0.3, 1.0))
        self._late_s = sim.rng.choice((0.0, 0.0, 0.001, 0.3))
        self._is_settled = trio.Event()
        self._is_over = trio.Event()

    async def end(self) -> None:
        """They are done, or gave up; a death may come soon after that."""
        self._is_settled.set()
        await self._is_over.wait()
        self.sim.join_all()

    async def run(self) -> None:
        life, rest = self._victim.life, self._rest.name
        if self._kind == "count" and life is not None:
            life.countdown = self.sim.rng.randint(1, 40)
            await self._is_settled.wait()
            await trio.sleep(self._late_s)
            life.countdown = 0
        elif self._kind:
            with trio.move_on_after(self._delay_s):
                await self._is_settled.wait()
            if self._kind == "die" and life is not None:
                life.die()
            elif self._kind != "die":
                self.sim.note(f"{self._kind}: {self._victim.name} from {rest}")
                self.sim.network.cut(self._victim.name, rest)
                if self._kind == "cut":
                    self.sim.network.cut(rest, self._victim.name)
        self._is_over.set()
