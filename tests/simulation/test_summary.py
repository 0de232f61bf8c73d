"""What the transport promises never to do is done all the same, and must not go unnoticed.

An operation is answered and never applied, applied twice, or applied before the one it follows:
the peer says so at the next checkpoint, or before it is in sync, and all is put right. Where the
session is lost before that, its primary finds out at the beginning of the next one.
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
        noticed = self._listen()
        self.deceived = 0
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
        await self.until("it is noticed", lambda: len(noticed) > 0)

    def _listen(self):
        """What is noticed, from here on; anything else is trouble."""
        noticed = []
        self.network.on_disagreement = noticed.append
        return noticed

    def _tamper(self, wire, lane):
        if not self.deceived and lane.stream == self.stream and lane.queue:
            self.deceived = int(self.deceive(wire, lane))


class Lost(Deceived):
    """The session in which it happens is lost, before anything is compared in it."""

    deceived_wire = None
    is_lost = False

    def _listen(self):
        noticed = []

        def differs(text):
            peers = self.primary.pipeline.peers
            reasons = [peer.last_error.reason for peer in peers if peer.last_error is not None]
            assert any("session that was lost" in reason for reason in reasons)
            noticed.append(text)

        self.network.on_difference = differs
        return noticed

    def _tamper(self, wire, lane):
        super()._tamper(wire, lane)
        if self.deceived and self.deceived_wire is None:
            self.deceived_wire = wire
        if wire is not self.deceived_wire or not lane.queue:
            return
        if not self.is_lost and isinstance(lane.queue[0][1], ops.Summary):
            self.is_lost = True
            wire.link.lose()
        if self.is_lost:
            lane.queue.clear()


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("deceive", [drop, duplicate, reorder, drop_carried])
@pytest.mark.parametrize("how", [Deceived, Lost])
def test_it_is_noticed_and_put_right(how, deceive, seed, tmp_path):
    kind = type(
        "Kind",
        (how,),
        {"deceive": staticmethod(deceive), "stream": BULK if deceive is drop_carried else LIVE},
    )
    result = run_seed(seed, tmp_path, kind=kind)
    if result.error is not None:
        pytest.fail(result.report(), pytrace=False)
