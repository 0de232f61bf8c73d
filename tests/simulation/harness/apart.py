"""A volume that becomes two, each with applications of its own, and one again.

The primary is cut off with some of the nodes, another one is promoted among the rest, and both are
changed. Each side has a ledger. Then they meet, an operator decides, and the winner has all that
its applications were told, every store is equal to it, and what the loser had is beside.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from typing import TYPE_CHECKING

import trio
from simulation.harness import check
from simulation.harness.ledger import COPY, is_made_for_copies
from simulation.harness.nodes import Member
from simulation.harness.operator import DiskFailed, Interference
from simulation.harness.outage import Outage
from simulation.harness.result import Failure

from replfs.errors import ReplfsError

if TYPE_CHECKING:
    from simulation.harness.world import Simulation

_ACTIONS = ("keep-mine", "keep-theirs", "keep-both")
_ATTEMPTS = 8


class Apart:
    """Of one run."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim

    async def happen(self, _: Member) -> None:
        """The volume is divided, changed on both sides, and put together again."""
        sim, rng = self.sim, self.sim.rng
        old = sim.primary
        if sim.may_split or not await sim.stand_still():
            sim.gate.open()
            return
        has_all = {name for name, _ in old.in_sync()}
        others = [one for one in sim.replicas if self._is_copy(one)]
        if not others:
            sim.gate.open()
            return
        best = [one for one in others if one.name in has_all]
        new = rng.choice(best or others)
        there = [new, *(one for one in sim.replicas if one is not new and rng.random() < 0.5)]
        here = [one for one in sim.members if one not in there]
        self._divide(here, there)
        ledger = sim.ledger
        for one in there:
            one.ledger = ledger.copy()
        sim.may_split = True
        base = check.Snapshot(new.raw, primary=False)
        is_apart = await sim.operator.take_over(new)
        if is_apart:
            self._begin(old, new, there, is_whole=new in best and sim.confirms)
            await self._work_apart(old, new)
        sim.join_all()
        if is_apart and await self._meet(old, new):
            old, new = await self._decide(old, new, base)
        await self._put_together(new if is_apart else old)

    @staticmethod
    def _is_copy(member: Member) -> bool:
        """Whether it has what the primary had, at some time."""
        if not member.is_ready or not member.is_alive or member.is_other:
            return False
        return not member.state.identity().uninitialized

    def _divide(self, here: list[Member], there: list[Member]) -> None:
        self.sim.note(f"divided: {[m.name for m in here]} from {[m.name for m in there]}")
        for one in here:
            for other in there:
                self.sim.network.cut(one.name, other.name)
                self.sim.network.cut(other.name, one.name)

    def _begin(self, old: Member, new: Member, there: list[Member], *, is_whole: bool) -> None:
        """Both are primaries from here on."""
        store = check.Snapshot(new.raw, primary=False)
        if is_whole:
            self.sim.verdict("promoted without what was acknowledged", new.ledger.missing(store))
            new.ledger.read(new.raw)
            new.ledger.follow(new.name)
        else:
            new.ledger.lost(new.raw, new.name)
        for one in there:
            one.ledger = new.ledger
        self.sim.used = [old, new]

    async def _work_apart(self, old: Member, new: Member) -> None:
        sim, rng = self.sim, self.sim.rng
        sim.budget += rng.choice((10, 40, 100))
        sim.gate.open()
        for _ in range(rng.choice((1, 1, 2))):
            await trio.sleep(rng.choice((0.05, 0.5, 2.0, 8.0)))
            if rng.random() < 0.3:
                await self._crash(rng.choice((old, new)))

    async def _crash(self, member: Member) -> None:
        """It dies where it is, and has what its own applications were told."""
        sim = self.sim
        await sim.recovery.kill(member)
        await self._start_again(member)

    async def _start_again(
        self,
        member: Member,
        before: check.Snapshot | None = None,
        outage: Outage | None = None,
    ) -> None:
        """*outage*: its power may fail, and nothing is changed until the decision is made."""
        sim = self.sim
        await sim.recovery.buried(member)
        if outage is not None:
            outage.befall(member, before)
        self._check_own(member, f"{member.name} lacks what was acknowledged", before)
        is_follower = member.state.identity().role != "primary"
        if outage is None or is_follower:
            # A follower has been brought something of the other's, in place of what it had.
            member.ledger.read(member.raw, everything=is_follower)
        await sim.start(member)
        if outage is not None and member.primary is not None:
            # Not before: what is lost of a copy it fetches from who follows it.
            member.ledger.read(member.raw)

    # Decisions ---------------------------------------------------------------------------------

    async def _meet(self, old: Member, new: Member) -> bool:
        """They hear of each other; whether there is something to decide."""
        sim = self.sim
        for one in (old, new):
            if not one.is_alive:
                await self._start_again(one)
        await sim.stand_still()
        await sim.until("both are up", lambda: old.is_ready and new.is_ready)
        if _knows(new, old):
            sim.note(f"{old.name} changed nothing")
            await sim.until(f"{old.name} steps down", lambda: old.primary is None)
            return False
        await sim.until(
            "they are known to be apart",
            lambda: any(
                peer.is_apart for one in (old, new) if one.primary for peer in one.pipeline.peers
            ),
        )
        return True

    async def _decide(
        self, old: Member, new: Member, base: check.Snapshot
    ) -> tuple[Member, Member]:
        """The operator decides, on either; the loser and the winner. Both had *base*."""
        sim, rng = self.sim, self.sim.rng
        asked, other = rng.sample((old, new), 2)
        action = rng.choice(_ACTIONS)
        loser, winner = (asked, other) if action == "keep-theirs" else (other, asked)
        before = check.Snapshot(loser.raw, primary=False)
        own = check.Snapshot(loser.raw, primary=True).unreplicated
        outage = Outage(sim)
        followers = {
            one: check.Snapshot(one.raw, primary=False)
            for one in sim.members
            if one.ledger is loser.ledger and one is not loser and not one.is_inconsistent
        }
        if rng.random() < 0.3:
            await self._list(asked, other)
        interference = Interference(sim, old, new)
        sim.nursery.start_soon(interference.run)
        for _ in range(_ATTEMPTS):
            try:
                answer = await sim.operator.command(
                    asked, "split-brain", action=action, peer=other.name
                )
            except ReplfsError as error:
                sim.note(f"{action} on {asked.name}: {error}")
                if action == "keep-both" and (
                    "strict" in str(error) or isinstance(error, DiskFailed)
                ):
                    # Copies are made like any file, and flushed before the decision, or not at all.
                    action = "keep-mine"
                if "promote --force" in str(error):
                    # It stepped down before it was known to have something alone.
                    await self._promote_again(asked)
                elif "promote it there first" in str(error):
                    await self._promote_again(other)
            else:
                sim.note(f"{action} on {asked.name}: {answer['message']!r}")
            await interference.end()
            for one in (old, new):
                if not one.is_alive:
                    await self._start_again(one, before, outage)
            if _knows(winner, loser):
                break
            await trio.sleep(5.0)
        else:
            raise Failure(f"a split brain cannot be decided by {action}")
        await sim.until(f"{loser.name} steps down", lambda: loser.primary is None)
        await sim.until(f"{winner.name} serves", lambda: winner.kernel is not None)
        await _begin_anew(winner)
        self._check_own(winner, f"{winner.name} lacks what it acknowledged", before)
        winner.ledger.read(winner.raw)
        self._join_ledgers(winner, loser)
        if winner in await outage.strike(loser, winner):
            await sim.until(f"{winner.name} serves again", lambda: winner.kernel is not None)
            self._check_own(winner, f"{winner.name} lacks what it had", before)
            winner.ledger.read(winner.raw)
        await sim.recovery.revive()
        sim.resume_all()  # no decision ends what an operator has paused
        await sim.until("it is one volume again", lambda: self._is_one(winner))
        self._check_loser(before, own, base, winner, loser, in_volume=action == "keep-both")
        for one, had in followers.items():
            self._check_follower(one, had, before, base, winner)
        return loser, winner

    async def _promote_again(self, member: Member) -> None:
        """As the operator is told to, where a secondary is to win."""
        try:
            answer = await self.sim.operator.command(member, "promote", force=True)
        except ReplfsError as error:
            self.sim.note(f"promote {member.name}: {error}")
        else:
            self.sim.note(f"promote {member.name}: {answer['message']!r}")

    async def _list(self, asked: Member, other: Member) -> None:
        """What differs is listed, and nothing is changed."""
        sim = self.sim
        try:
            answer = await sim.operator.command(
                asked, "split-brain", action="list", peer=other.name
            )
        except ReplfsError as error:
            sim.note(f"list on {asked.name}: {error}")
            return
        listed = {line.split(": ")[0] for line in answer["paths"]}
        ours = check.Snapshot(asked.raw, primary=True)
        theirs = check.Snapshot(other.raw, primary=True)
        differing = {
            path
            for path in ours.by_path.keys() | theirs.by_path.keys()
            if (one := ours.by_path.get(path)) is None
            or (two := theirs.by_path.get(path)) is None
            or one.data != two.data
            or stat.S_IFMT(one.status.st_mode) != stat.S_IFMT(two.status.st_mode)
        }
        # What has several names is listed under one of them.
        seen = [*ours.by_path.items(), *theirs.by_path.items()]
        known = {one.identity for path, one in seen if _shown(path) in listed}
        named = {path for path, one in seen if one.identity in known}
        unlisted = {_shown(path) for path in differing - named if not _is_below(path, differing)}
        sim.verdict("differs and is not listed", sorted(unlisted - listed))
        sim.note(f"checked: {len(listed)} names listed")

    def _check_own(self, member: Member, what: str, before: check.Snapshot | None = None) -> None:
        """It has all that its applications were told, and copies of the other's besides.

        One that follows the other by now may have that one's instead. *before*: what the other
        had, whose directories are made for the copies.
        """
        store = check.Snapshot(member.raw, primary=False)
        extra = {
            f"{path!r} is there"
            for path, seen in store.by_path.items()
            if COPY.search(path) or is_made_for_copies(seen, before)
        }
        missing = [line for line in member.ledger.missing(store) if line not in extra]
        if member.state.identity().role == "primary":
            self.sim.verdict(what, missing)

    def _join_ledgers(self, winner: Member, loser: Member) -> None:
        """What the loser's side promised to hold is void: it follows now."""
        for one in self.sim.members:
            if one.ledger is loser.ledger:
                winner.ledger.replaced(one.name)
        self.sim.use(winner)

    def _is_one(self, winner: Member) -> bool:
        return self.sim.primary is winner and self.sim.is_in_sync()

    def _check_loser(
        self,
        before: check.Snapshot,
        own: set[bytes],
        base: check.Snapshot,
        winner: Member,
        loser: Member,
        *,
        in_volume: bool,
    ) -> None:
        """Contents that it had alone are kept: in its store beside, or in the volume.

        *before*: what it had; *own*: the paths that had policy `none` there.
        """
        volume = check.Snapshot(winner.raw, primary=False)
        present = {seen.data for seen in volume.by_path.values()}
        there = set(_contents(loser.raw))
        lost = []
        for path, seen in before.by_path.items():
            if not stat.S_ISREG(seen.status.st_mode) or not seen.data:
                continue
            if path in own:
                # It belongs to its node, whatever others have.
                if seen.data not in there:
                    lost.append(f"{path!r}, which is its own: {len(seen.data)} bytes")
                continue
            same = base.by_id.get(seen.identity)
            if same is not None and same.data == seen.data:
                continue
            if seen.data not in (present if in_volume else present | there):
                lost.append(f"{path!r} <{seen.identity.hex()}>: {len(seen.data)} bytes")
        self.sim.verdict(f"what {loser.name} had alone is not beside", lost)
        self.sim.note(f"checked: what {loser.name} had alone is beside")

    def _check_follower(
        self,
        follower: Member,
        had: check.Snapshot,
        before: check.Snapshot,
        base: check.Snapshot,
        winner: Member,
    ) -> None:
        """What it had of the loser's is beside in its own store, too: the loser may be gone."""
        volume = check.Snapshot(winner.raw, primary=False)
        beside = {seen.data for seen in volume.by_path.values()} | set(_contents(follower.raw))
        lost = []
        for path, seen in had.by_path.items():
            same, loser = base.by_id.get(seen.identity), before.by_id.get(seen.identity)
            is_shared = loser is not None and loser.data == seen.data
            is_apart = same is None or same.data != seen.data
            if stat.S_ISREG(seen.status.st_mode) and seen.data and is_shared and is_apart:
                if seen.data not in beside:
                    lost.append(f"{path!r} <{seen.identity.hex()}>: {len(seen.data)} bytes")
        self.sim.verdict(f"what {follower.name} had followed is not beside", lost)
        self.sim.note(f"checked: what {follower.name} had followed is beside")

    async def _put_together(self, primary: Member) -> None:
        """There is one primary, and everybody follows it."""
        sim = self.sim
        sim.use(primary)
        await sim.recovery.revive()
        sim.resume_all()
        await sim.until("all are in sync", sim.is_in_sync)
        rules = [one.name for one in sim.members if one.primary is not None]
        if rules != [primary.name]:
            raise Failure(f"{rules} are primaries after a split brain was decided")
        sim.may_split = False
        sim.verdicts.equal("after a split brain")
        sim.gate.open()

    async def discard(self, name: str) -> bool:
        """Decide for the primary, whatever the other has alone; whether it was decided."""
        sim = self.sim
        for action in (sim.rng.choice(("keep-mine", "keep-both")), "keep-mine"):
            try:
                answer = await sim.operator.command(
                    sim.primary, "split-brain", action=action, peer=name
                )
            except ReplfsError as error:
                sim.note(f"{action}: {error}")
            else:
                sim.note(f"{action}: {answer['message']!r}")
                await _begin_anew(sim.primary)
                sim.ledger.read(sim.primary.raw)
                return True
        return False


async def _begin_anew(member: Member) -> None:
    """Nobody holds anything that the ledger is about to read again."""
    if member.kernel is not None:
        await member.kernel.drop_everything()


def _knows(one: Member, other: Member) -> bool:
    """Whether what *other* is at is, for *one*, an earlier state or its own."""
    mine, theirs = one.state.identity(), other.state.identity()
    return theirs.generation in {mine.generation, *mine.history}


def _shown(path: bytes) -> str:
    return path.decode(errors="backslashreplace")


def _is_below(path: bytes, paths: set[bytes]) -> bool:
    """Whether it is in a directory that is one of them."""
    above = path
    while above := above[: above.rindex(b"/")]:
        if above in paths:
            return True
    return False


def _contents(path: bytes) -> Iterator[bytes]:
    for directory, _, names in os.walk(path):
        for name in names:
            full = directory + b"/" + name
            if stat.S_ISREG(os.lstat(full).st_mode):
                with open(full, "rb") as file:
                    yield file.read()
