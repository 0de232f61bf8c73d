"""What became of an operation here and on a peer: equal for certain, or recorded."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core import ops
from replfs.core.policy import Ack, Policy
from replfs.errors import NotInSync
from replfs.node.mounted.volume import Volume
from replfs.node.replication.flight import Flight
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.store import syscalls
from replfs.store.activity import KIND_ATTRS, KIND_NAMES, ActivityLog, recover

EVERYTHING = SimpleNamespace(is_empty=True)
WRITE = ops.Write(b"o" * 16, 0, 1)
TRUNCATE = ops.Truncate(b"o" * 16, 0, 1)
LINK = ops.Link(b"o" * 16, b"d" * 16, b"name", 1)
UNLINK = ops.Unlink(b"o" * 16, b"d" * 16, b"name", False, 1)  # noqa: FBT003
SIZE = 4096
ALL, NONE, SOME = (0, SIZE), (0, 0), (0, 100)


def done(outcome: tuple[int, int] | int) -> ops.Done:
    return ops.Done(outcome) if isinstance(outcome, int) else ops.Done(*outcome)


class FakePeer:
    """A peer that is in sync; it answers when it is asked whether it has."""

    live = diverged = is_whole = True
    log = settling = EVERYTHING
    unawaited = landed = 0

    def __init__(self) -> None:
        self.link: Any = SimpleNamespace(has_room=lambda: True, pump=self.pump)
        self.waited: Callable[[int, int], None] = lambda _began, _ended: None
        self.flights: list[Flight] = []
        self.failures: list[tuple[ops.AnyOp, int]] = []
        self.answer: ops.Done | None = None
        """None: that everything was done."""

    def send(
        self, op: ops.AnyOp, _payload: object, flight: Flight, start: int, _queue_bytes: int
    ) -> bool:
        flight.sent(self, op, start)
        self.flights.append(flight)
        return True

    def pump(self) -> None:
        while self.flights:
            flight = self.flights.pop()
            flight.answered(self.link, self.answer or ops.Done(0, flight.length))

    def failed(self, op: ops.AnyOp, number: int, **_: object) -> None:
        self.failures.append((op, number))


OWNER: Any = SimpleNamespace(flights=0, detached=0, activity=None, confirmations_needed=lambda: 1)


def settled(
    op: ops.AnyOp, here: ops.Done | None, there: ops.Done, *, strict: bool = False
) -> list[int]:
    """The errors that are recorded of the peer."""
    peer = FakePeer()
    flight = Flight(OWNER, "write", SIZE if isinstance(op, ops.Write) else 0)
    flight.sent(peer, op, 0)
    flight.here = here
    flight.answered(peer.link, there)
    flight.settle(strict=strict)
    return [number for _, number in peer.failures]


@pytest.mark.parametrize(
    ("op", "outcome"),
    [
        (WRITE, ALL),
        (WRITE, SOME),
        (WRITE, errno.ENOSPC),
        (WRITE, errno.EDQUOT),
        (WRITE, errno.EFBIG),
        (TRUNCATE, 0),
        (TRUNCATE, errno.EFBIG),
        (LINK, errno.EMLINK),
    ],
)
def test_equal_for_certain(op, outcome):
    assert settled(op, done(outcome), done(outcome)) == []


@pytest.mark.parametrize(
    ("op", "here", "there", "recorded"),
    [
        (WRITE, ALL, SOME, 0),
        (WRITE, SOME, ALL, 0),
        (WRITE, NONE, SOME, 0),
        (WRITE, ALL, errno.ENOSPC, errno.ENOSPC),
        (WRITE, errno.ENOSPC, ALL, errno.ENOSPC),
        (WRITE, errno.ENOSPC, NONE, errno.ENOSPC),
        (WRITE, errno.ENOSPC, errno.EDQUOT, errno.EDQUOT),
        # All was written, and the time was not set: on one side, on both.
        (WRITE, (errno.EIO, SIZE), ALL, errno.EIO),
        (WRITE, (errno.EIO, SIZE), errno.EIO, errno.EIO),
        (WRITE, (errno.EIO, SIZE), (errno.EIO, SIZE), errno.EIO),
        # Nobody knows what was done; nor of a store that says what is said of one that is lost.
        (WRITE, errno.EIO, errno.EIO, errno.EIO),
        (WRITE, errno.ETIMEDOUT, errno.ETIMEDOUT, errno.ETIMEDOUT),
        (TRUNCATE, 0, errno.EFBIG, errno.EFBIG),
        (TRUNCATE, errno.EIO, errno.EIO, errno.EIO),
        (TRUNCATE, errno.ENOSPC, errno.ENOSPC, errno.ENOSPC),
        (LINK, errno.EMLINK, 0, errno.EMLINK),
        (UNLINK, errno.EPERM, 0, errno.EPERM),
        (UNLINK, errno.EIO, errno.EIO, errno.EIO),
    ],
)
def test_what_may_differ_is_recorded(op, here, there, recorded):
    assert settled(op, done(here), done(there)) == [recorded]


def test_a_short_write_is_confirmed_by_one_as_short():
    assert settled(WRITE, done(SOME), done(SOME), strict=True) == []
    with pytest.raises(NotInSync):
        settled(WRITE, done(SOME), done(ALL), strict=True)
    # What failed here needs no confirmation: the caller gets the error.
    assert settled(WRITE, done(errno.ENOSPC), done(ALL), strict=True) == [errno.ENOSPC]


@pytest.fixture(params=["awaited", "ack=close", "async"])
def volume(request, tree, tmp_path):
    """With one peer, and one file, `file`; each way of acknowledgement."""
    policy = Policy.ASYNC if request.param == "async" else Policy.SYNC
    ack = Ack.CLOSE if request.param == "ack=close" else Ack.OP
    policies = Policies(tree, policy, ack, used=False, on_used=lambda: None, generation=lambda: b"")
    pipeline = Pipeline(tree, ActivityLog(str(tmp_path / "activity"), b"n" * 16), policies)
    pipeline.peers.append(FakePeer())  # type: ignore[arg-type]
    (tmp_path / "store/file").touch()
    return Volume(pipeline, dict, None)  # type: ignore[arg-type]  # no fsync here


@pytest.mark.parametrize("kind", ["write", "truncate"])
async def test_a_time_that_cannot_be_set_is_recorded(volume, kind, monkeypatch):
    """The bytes are on both sides, and the times differ."""
    peer = volume.pipeline.peers[0]
    inode, _ = volume.lookup(1, b"file")
    handle = await volume.open(inode.nodeid, os.O_RDWR)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(syscalls, "utimens", fail)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        if kind == "write":
            await volume.write(handle.number, 0, b"x" * 100)
        else:
            await volume.truncate(inode, 100, None, handle.fd)
    peer.pump()
    ((op, number),) = peer.failures
    assert (op.object, number) == (inode.id, errno.EIO)
    await volume.release(handle.number)


async def test_an_object_is_in_flight_itself_while_it_is_made(volume, tmp_path, monkeypatch):
    """A peer that dies over it has it under its name, perhaps without its mode and times."""
    peer = volume.pipeline.peers[0]
    noted: set[tuple[bytes, int]] = set()
    send = peer.send

    def sent(op: ops.AnyOp, *arguments: Any) -> bool:
        found = recover(str(tmp_path / "activity"))
        noted.update((one.object, one.kind) for one in found)
        return bool(send(op, *arguments))

    monkeypatch.setattr(peer, "send", sent)
    owner = os.geteuid(), os.getegid()
    inode, _ = await volume.make(1, b"new", 0o40755, owner=owner, kind="mkdir")
    assert noted == {(volume.tree.root.id, KIND_NAMES), (inode.id, KIND_ATTRS)}
    peer.pump()
