"""What the transport promises never to do is done all the same, and must not go unnoticed.

An operation is answered and never applied, applied twice, or applied before the one it follows:
the peer says so at the next checkpoint, or before it is in sync, and all is put right.
"""

from __future__ import annotations

import pytest
from simulation.harness.network import BULK, LIVE
from simulation.harness.run import run_seed
from simulation.harness.world import Simulation

from replfs.core import ops

SEEDS = (1, 7, 9)


def drop(wire, lane):
    seq, op, payload, _ = lane.queue[0]
    if type(op) not in ops.CHANGES:
        return False
    lane.queue.popleft()
    wire.answer(lane.stream, seq, ops.Done(0, len(payload or b"")))
    return True


def duplicate(_, lane):
    _, op, payload, head = lane.queue[0]
    if type(op) not in ops.CHANGES:
        return False
    lane.queue.insert(1, (0, op, payload, head))
    return True


def reorder(_, lane):
    if len(lane.queue) < 2 or any(type(lane.queue[one][1]) not in ops.CHANGES for one in (0, 1)):
        return False
    lane.queue[0], lane.queue[1] = lane.queue[1], lane.queue[0]
    return True


def drop_carried(wire, lane):
    """Of what a resync carries."""
    seq, op, payload, _ = lane.queue[0]
    if type(op) not in {ops.Data, ops.Finish, ops.Clear}:
        return False
    lane.queue.popleft()
    wire.answer(lane.stream, seq, ops.Done(0, len(payload or b"")))
    return True


class Deceived(Simulation):
    """Both sides are deceived once, and by nothing else."""

    deceive = staticmethod(drop)
    stream = LIVE

    async def _faults(self):
        self.noticed = []
        self.deceived = 0
        self.network.on_disagreement = self.noticed.append
        for one in self.replicas:
            if one.life is None:
                await self.start(one)
        await self.until("in sync", self.is_in_sync)
        self.network.tamper = self._tamper
        if self.stream == BULK:
            for one in self.replicas:
                self.cut_off(one)
        self.budget = 100
        await self.until("the applications are done", lambda: self.budget <= 0 or self.deceived > 0)
        self.budget = 0
        self.join_all()
        await self.until("it was done", lambda: self.deceived > 0)
        await self.until("it is noticed", lambda: len(self.noticed) > 0)

    def _tamper(self, wire, lane):
        if not self.deceived and lane.stream == self.stream and lane.queue:
            self.deceived = int(self.deceive(wire, lane))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("deceive", [drop, duplicate, reorder, drop_carried])
def test_it_is_noticed_and_put_right(deceive, seed, tmp_path):
    kind = type(
        "Kind",
        (Deceived,),
        {"deceive": staticmethod(deceive), "stream": BULK if deceive is drop_carried else LIVE},
    )
    result = run_seed(seed, tmp_path, kind=kind)
    if result.error is not None:
        pytest.fail(result.report(), pytrace=False)
