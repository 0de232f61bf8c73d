"""A change of policy that comes between a resync's look at an object and its turn."""

from __future__ import annotations

import os
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.policy import Ack, Policy
from replfs.core.relationship import State
from replfs.node.pacing.courtesy import Applications
from replfs.node.pacing.rate import Rate
from replfs.node.replication.policies import Policies
from replfs.node.resync import fill
from replfs.node.resync.batch import Batches
from replfs.node.resync.contents import Contents
from replfs.node.resync.fill import Filling, can_fill
from replfs.node.resync.names import Names as RealNames
from replfs.node.resync.work import Work
from replfs.store.fresh import read_fresh
from replfs.store.record import PRIVILEGED, ROOT_ID


class Peer:
    """Remembers what is sent."""

    state = State.BASELINE
    link = SimpleNamespace(session=1)

    def __init__(self):
        self.log = DirtyLog()
        self.sent: list[ops.AnyOp] = []
        self.unrepresentable: set[bytes] = set()

    async def ask(self, op, _payload=None):
        self.sent.append(op)
        return ops.Done(0)

    async def fence(self):
        """Nothing is on its way."""

    def understands(self, _op):
        return True

    def progressed(self):
        """Nobody waits for it."""

    def locate(self, object_id, stream):
        """The way to it is told."""


class Names:
    """All is where it should be, and gathered."""

    async def is_placed(self, _inode):
        return True

    def is_all_new(self, _child):
        return True


class Turns(Work):
    """While a turn is awaited the policy is set, unless that is `late`."""

    late = False

    def __init__(self, pipeline, peer, source, inode):
        super().__init__(pipeline, peer, source)
        self._inode = inode

    @asynccontextmanager
    async def claim(self, claims):
        if not self.late:
            self.set_policy()
        yield None

    def set_policy(self):
        self.tree.set_policy(self._inode, Policy.NONE, 0)
        self.policies.changed()


@pytest.fixture
def inode(tree, tmp_path):
    (tmp_path / "store/file").write_bytes(b"contents")
    found = tree.lookup(tree.root, b"file")[0]
    tree.ensure_id(found)
    found.lookups += 1
    return found


@pytest.fixture
def work(tree, inode):
    policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=True, on_used=lambda: None, generation=lambda: b""
    )
    applications = Applications(lambda: 0)
    pipeline: Any = SimpleNamespace(tree=tree, policies=policies, applications=applications)
    peer: Any = Peer()
    source: Any = SimpleNamespace(ensure_id=tree.ensure_id, open=lambda _inode: -1)
    return Turns(pipeline, peer, source, inode)


@pytest.mark.parametrize("size", [8, ops.PAYLOAD_MAX + 1], ids=["small", "large"])
async def test_nothing_of_it_is_sent(work, inode, size):
    os.truncate(work.tree.data_fd(inode), size)
    names: Any = Names()
    contents = Contents(work, names, Rate(0))
    work.log.mark_tail(inode.id, 0)
    await contents.data(inode.id)
    assert work.peer.sent == []


async def test_nor_are_its_attributes(work, inode):
    names: Any = Names()
    work.log.mark_attrs(inode.id)
    await Contents(work, names, Rate(0)).finish(inode.id)
    assert work.peer.sent == []


@pytest.mark.skipif(not PRIVILEGED, reason="placing many at once is root's")
async def test_it_is_not_placed_with_others(work, inode):
    names: Any = Names()
    work.log.mark_name(ROOT_ID, b"file")
    work.log.set_gathered(ROOT_ID, b"file")
    await Batches(work, names, Rate(0)).place((ROOT_ID, (b"file",)))
    assert work.peer.sent == []


@pytest.mark.skipif(not PRIVILEGED, reason="placing many at once is root's")
@pytest.mark.parametrize("late", [False, True], ids=["before it is read", "while it is read"])
async def test_nor_with_all_that_is_in_its_directory(work, tree, late, monkeypatch):
    """Which begins only where no policy keeps anything from the peer."""

    def read(*arguments):
        if late:
            work.set_policy()
        return read_fresh(*arguments)

    work.late = late
    monkeypatch.setattr(fill, "read_fresh", read)
    work.policies = work.pipeline.policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=False, on_used=lambda: None, generation=lambda: b""
    )
    names = RealNames(work, Rate(0), lambda: can_fill(work))
    names.expansion.was_made(work.tree.root)
    work.log.mark_names_all(ROOT_ID)
    assert can_fill(work)
    contents = Contents(work, names, Rate(0))
    await Filling(work, names, Rate(0), contents.finish_held).fill(ROOT_ID)
    assert work.peer.sent == []
    assert not work.log.name_is_clean(ROOT_ID, b"file")


async def test_a_directory_that_is_filled_is_finished_while_it_is_known(work, tree, tmp_path):
    """To find it again would cost as much as a few of its files."""
    work.late = True  # and nobody sets it
    work.policies = work.pipeline.policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=False, on_used=lambda: None, generation=lambda: b""
    )
    for path in ("empty", "full/below"):
        (tmp_path / "store" / path).mkdir(parents=True)
    names = RealNames(work, Rate(0), lambda: can_fill(work))
    contents = Contents(work, names, Rate(0))
    filling = Filling(work, names, Rate(0), contents.finish_held)
    for name in (b"empty", b"full"):
        made = tree.lookup(tree.root, name)[0]
        tree.ensure_id(made)
        names.mark_contents(made, created=True)
        await filling.fill(made.id)
        assert not work.log.marks(made.id) or not work.log.marks(made.id).names_all
    sent = work.peer.sent
    assert [type(op) for op in sent] == [ops.Finish]  # what is below the other one comes first
    assert work.log.marks(sent[0].object) is None
    names.forget()
