"""Who followed a split brain's loser, and next meets a node that was promoted after the decision.

The winner decides while its other replica is connected, and is gone before that is connected
anew; the loser is gone, too. What the follower has of the loser's is beside in its own store.
"""

from __future__ import annotations

import pytest
from simulation.harness import check
from simulation.harness.mix import Mix
from simulation.harness.run import run_seed
from simulation.harness.world import Simulation

from replfs.core.relationship import State

MIX = Mix("successor", {}, replicas=(3,), has_policies=False)


class Successor(Simulation):
    """Nodes: the winner, who takes its place, the loser, and who followed that."""

    async def _faults(self):
        winner, heir, loser, follower = self.members
        for one in self.replicas:
            if one.life is None:
                await self.start(one)
        await self._work(winner, {heir, loser, follower})
        base = check.Snapshot(winner.raw, primary=False)
        before, had = await self._change_apart(winner, heir, loser, follower)
        self.cut_off(follower)
        await self._decide(winner, heir, loser)
        for one in (winner, loser):
            one.life.die()
            await self.recovery.buried(one)
        self.apart._join_ledgers(winner, loser)
        assert await self.operator.take_over(heir)
        self.use(heir, winner.ledger)
        self.network.blocked.clear()
        await self.until("it follows", lambda: self._has_in_sync(heir, {follower}))
        self.apart._check_follower(follower, had, before, base, heir)
        self.may_split = False

    async def _change_apart(self, winner, heir, loser, follower):
        """What the loser has, and who follows it, once both sides have changed something."""
        self.apart._divide([winner, heir], [loser, follower])
        for one in (loser, follower):
            one.ledger = winner.ledger.copy()
        self.may_split = True
        await self.until("the loser is alone", lambda: loser.node._roles.reception._session is None)
        await self.operator.command(loser, "promote", force=True)
        self.apart._begin(winner, loser, [loser, follower], is_whole=True)
        await self._work(winner, {heir}, loser, {follower})
        return tuple(check.Snapshot(one.raw, primary=False) for one in (loser, follower))

    async def _decide(self, winner, heir, loser):
        """For the winner, while its heir is connected and stays so."""
        self.network.join(winner.name, loser.name)
        self.network.join(loser.name, winner.name)
        await self.until("they know", lambda: winner.peer(loser.name).state is State.SPLIT_BRAIN)
        session = winner.peer(heir.name).link.session
        await self.operator.command(winner, "split-brain", action="keep-mine", peer=loser.name)
        await self.until("it steps down", lambda: loser.primary is None)
        await self.until("the heir knows", lambda: self._has_in_sync(winner, {heir, loser}))
        assert winner.peer(heir.name).link.session == session

    async def _work(self, *sides):
        """Applications change something, on each primary, and its replicas get it."""
        self.budget = 60
        self.gate.open()
        await self.until("the applications are done", lambda: self.budget <= 0)
        await self.stand_still()
        for primary, replicas in zip(sides[::2], sides[1::2], strict=True):
            await self.until("in sync", lambda: self._has_in_sync(primary, replicas))  # noqa: B023

    @staticmethod
    def _has_in_sync(primary, replicas):
        peers = [primary.peer(one.name) for one in replicas]
        return all(peer.state is State.IN_SYNC and peer.log.is_empty for peer in peers)


@pytest.mark.parametrize("seed", range(3, 7))
def test_what_it_followed_is_beside(seed, tmp_path):
    result = run_seed(seed, tmp_path, MIX, kind=Successor)
    if result.error is not None:
        pytest.fail(result.report(), pytrace=False)
