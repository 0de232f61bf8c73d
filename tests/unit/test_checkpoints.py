"""When a common checkpoint is wanted, and one flush for all that wait for one."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from replfs.core import ops
from replfs.core.relationship import State
from replfs.core.unstable import Unstable
from replfs.node.pacing.commit import GroupCommit
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.recovery.checkpoints import Checkpoints, _Flush
from replfs.store import syscalls


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
    ("number", "failed"), [(errno.EIO, 1), (errno.EROFS, 1), (errno.ETIMEDOUT, 0)]
)
def test_who_does_not_answer_has_not_failed_to_flush(number, failed):
    failures = []
    peer = a_peer(changes=0, flush_failed=failures.append)
    pipeline: Any = SimpleNamespace(peers=[peer], unwritten=Unwritten())
    checkpoints = Checkpoints(pipeline, 5.0, trio.lowlevel.checkpoint, lambda _: None)
    link: Any = None
    flush = _Flush(peer)
    if number != errno.ETIMEDOUT:
        flush.answered(link, ops.Done(number))
    checkpoints._settle([flush], [peer])
    assert len(failures) == failed


@pytest.mark.parametrize("there", [0, errno.EIO])
async def test_a_flush_that_failed_here_counts_for_good(monkeypatch, there):
    """The kernel tells of it once. Nobody forgets what may be gone, whatever succeeds later."""
    failures = []
    noted_at: list[int] = []
    told = []
    link: Any = SimpleNamespace(has_room=lambda: True)

    def begin_checkpoint(_op, flush):
        peer.unstable.begin()
        flush.answered(link, ops.Done(there))
        return True

    peer = a_peer(
        changes=0,
        link=link,
        features=frozenset(),
        understands=lambda _: False,
        begin_checkpoint=begin_checkpoint,
        flush_failed=failures.append,
        tell=told.append,
    )
    object_id = b"i" * 16
    peer.unstable.note(ops.Write(object_id, 0, 0), lambda _: b"handle", length=5)
    pipeline: Any = SimpleNamespace(
        peers=[peer],
        changes=0,
        scheduler=SimpleNamespace(admitted=7),
        tree=SimpleNamespace(root_fd=0),
        unwritten=Unwritten(noted_at.append),
        policies=SimpleNamespace(generation=lambda: b""),
    )
    errors = [OSError(errno.EIO, "disk"), None]

    def syncfs(_fd):
        if error := errors.pop(0):
            raise error

    monkeypatch.setattr(syscalls, "syncfs", syncfs)
    checkpoints = Checkpoints(pipeline, 5.0, trio.lowlevel.checkpoint, lambda _: None)
    for _ in range(2):
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            await checkpoints.take()
    assert not errors
    assert noted_at == [errno.EIO]
    assert not told
    assert len(failures) == (2 if there else 0)
    unstable = peer.unstable.snapshot(everywhere=False)
    assert unstable is not None
    assert set(unstable.objects()) == {object_id}
    assert checkpoints._is_wanted()
    assert checkpoints.count == 0


async def test_an_fsync_that_failed_here_counts_too(monkeypatch):
    """What it could not write a flush of everything does not tell of."""
    monkeypatch.setattr(syscalls, "syncfs", lambda _fd: None)
    unwritten = Unwritten()
    peer = a_peer(live=False, changes=0)
    pipeline: Any = SimpleNamespace(
        peers=[peer],
        scheduler=SimpleNamespace(admitted=7),
        tree=SimpleNamespace(root_fd=0),
        unwritten=unwritten,
    )
    unwritten.failed_for(b"i" * 16, OSError(errno.EIO, "disk"))
    checkpoints = Checkpoints(pipeline, 5.0, trio.lowlevel.checkpoint, lambda _: None)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        await checkpoints.take()
    assert not peer.apart  # what is not on this disk, it may have
    assert checkpoints.count == 0


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
