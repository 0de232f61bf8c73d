"""When a common checkpoint is wanted, and one flush for all that wait for one."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from replfs.core import ops
from replfs.core.relationship import State
from replfs.core.unstable import Unstable
from replfs.node.pacing.commit import GroupCommit
from replfs.node.recovery.checkpoints import Checkpoints, _Flush


def a_peer(**changes):
    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    found = {"live": True, "state": State.IN_SYNC, "unstable": unstable, "apart": False}
    return SimpleNamespace(**(found | {"knows_stable": True} | changes))


@pytest.mark.parametrize(
    ("peer", "wanted"),
    [
        (a_peer(), False),
        (a_peer(unstable=Unstable()), True),
        (a_peer(knows_stable=False), True),
        (a_peer(knows_stable=False, state=State.INCREMENTAL), False),
        (a_peer(live=False), True),
        (a_peer(live=False, apart=True), False),
    ],
)
def test_a_checkpoint_is_wanted_while_something_is_unstable_or_a_peer_does_not_know(peer, wanted):
    pipeline: Any = SimpleNamespace(peers=[peer], scheduler=SimpleNamespace(admitted=-1))
    checkpoints = Checkpoints(pipeline, 5.0, trio.lowlevel.checkpoint, lambda _: None)
    assert checkpoints._is_wanted() == wanted
    pipeline.scheduler.admitted = 7
    assert checkpoints._is_wanted()
    pipeline.peers = []
    assert not checkpoints._is_wanted()


@pytest.mark.parametrize(
    ("number", "is_over", "failed"),
    [
        (errno.EIO, False, 1),
        (errno.EROFS, False, 1),
        (errno.EIO, True, 1),
        (errno.EROFS, True, 0),
        (errno.ETIMEDOUT, False, 0),
    ],
)
def test_who_has_taken_this_nodes_place_has_not_failed_to_flush(number, is_over, failed):
    """It refuses, and what it is said to lack would begin a generation of a former primary."""
    failures = []
    peer = a_peer(changes=0, flush_failed=failures.append)
    pipeline: Any = SimpleNamespace(peers=[peer], is_over=is_over)
    checkpoints = Checkpoints(pipeline, 5.0, trio.lowlevel.checkpoint, lambda _: None)
    link: Any = None
    flush = _Flush(peer)
    if number != errno.ETIMEDOUT:
        flush.answered(link, ops.Done(number))
    checkpoints._settle([flush], [peer])
    assert len(failures) == failed


async def test_callers_share_a_run_that_began_after_they_called():
    runs = []
    gate = trio.Event()

    async def work():
        runs.append(len(runs))
        if len(runs) == 1:
            await gate.wait()

    commit = GroupCommit(work)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(5):
            nursery.start_soon(commit)
        await trio.testing.wait_all_tasks_blocked()
        gate.set()
    # The first run began before the five called: it does not serve them, one more does.
    assert len(runs) == 2
    await commit()
    assert len(runs) == 3


async def test_a_run_that_failed_serves_nobody_else():
    failures = [OSError(5, "disk"), None]

    async def work():
        failure = failures.pop(0)
        await trio.sleep(0)
        if failure:
            raise failure

    commit = GroupCommit(work)
    with pytest.raises(OSError, match="disk"):
        await commit()
    await commit()
    assert not failures
