"""What a resync believes of a directory that the peer has empty, and for how long."""

from __future__ import annotations

import os
import stat
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
from replfs.node.resync import expand
from replfs.node.resync.names import Names
from replfs.node.resync.work import Work
from replfs.store.record import INCOMPLETE, ROOT_ID

NAMES = (b"one", b"three", b"two")


class Link:
    """Answers each listing at once with what *names* the peer has in the root."""

    session = 1

    def __init__(self) -> None:
        self.names: list[bytes] = []
        self.asked = 0
        self.meanwhile: Any = lambda: None

    def has_room(self, _stream):
        return True

    def send(self, op, _payload, question, _stream):
        assert isinstance(op, ops.List)
        self.asked += 1
        entries = [ops.Entry(name, name * 16, complete=True, digest=b"") for name in self.names]
        self.meanwhile()
        question.answered(self, ops.Listing(entries, more=False))


class Peer:
    """One whose resync goes on."""

    state = State.INCREMENTAL

    def __init__(self) -> None:
        self.log = DirtyLog()
        self.link = Link()

    async def fence(self):
        """Nothing is on its way."""

    def locate(self, object_id, stream):
        """The way to it is told."""

    async def ask(self, _op, _payload=None):
        return ops.Done(0)


class Turns(Work):
    """It is this resync's turn at once."""

    @asynccontextmanager
    async def claim(self, claims):
        yield None


@pytest.fixture
def work(tree):
    policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=False, on_used=lambda: None, generation=lambda: b""
    )
    pipeline: Any = SimpleNamespace(
        tree=tree, policies=policies, applications=Applications(lambda: 0)
    )
    peer: Any = Peer()
    source: Any = SimpleNamespace(ensure_id=tree.ensure_id)
    return Turns(pipeline, peer, source)


def expansion_of(work, *, can_fill=False):
    return Names(work, Rate(0), lambda: can_fill).expansion


async def look(work, expansion, *, deep=False):
    """Names of the root that are dirty afterwards."""
    work.log.mark_names_all(ROOT_ID, deep=deep)
    await expansion.expand(("list", ROOT_ID))
    marks = work.log.marks(ROOT_ID)
    return set(marks.names or ()) if marks is not None else set()


async def test_it_is_not_asked_about_what_it_has_just_made(work):
    expansion = expansion_of(work)
    expansion.was_made(work.tree.root)
    await look(work, expansion)
    assert work.peer.link.asked == 0


async def test_nor_is_it_believed_to_be_empty_once_a_name_in_it_was_dealt_with(work):
    names = Names(work, Rate(0), lambda: False)
    names.expansion.was_made(work.tree.root)
    work.log.mark_name(ROOT_ID, b"name")
    work.log.set_gathered(ROOT_ID, b"name")
    await names.place((ROOT_ID, b"name"))
    work.peer.link.names = [b"left"]
    assert await look(work, names.expansion) == {b"left"}


@pytest.mark.parametrize("deep", [False, True])
async def test_one_that_was_empty_is_asked_about_when_it_is_looked_at_again(work, tree, deep):
    """As when all is compared, or the root gets the policy `none`, in the middle of a resync."""
    expansion = expansion_of(work)
    assert await look(work, expansion, deep=deep) == set()
    work.peer.link.names = [b"left"]
    assert await look(work, expansion, deep=deep) == {b"left"}


async def test_it_is_filled_without_being_asked_about_again(work):
    expansion = expansion_of(work, can_fill=True)
    await look(work, expansion)
    assert list(expansion.empty()) == [ROOT_ID]
    assert list(expansion.pending()) == []


async def test_it_is_not_filled_if_something_was_placed_while_it_was_asked_about(work):
    expansion = expansion_of(work, can_fill=True)
    work.peer.link.meanwhile = lambda: expansion.is_placed_in(ROOT_ID)
    await look(work, expansion)
    assert list(expansion.empty()) == []


async def test_one_that_was_just_made_is_kept_in_memory_until_it_is_filled(work, tree):
    names = Names(work, Rate(0), lambda: True)
    made = [tree.make(tree.root, name, stat.S_IFDIR | 0o755, owner=(0, 0))[0] for name in NAMES]
    ids = [tree.ensure_id(one) for one in made]
    for one in made:
        names.mark_contents(one, created=True)
        names.mark_contents(one, created=True)  # again, after the session was lost
        tree.drop_unused(one)
    assert [tree.table.by_id.get(each) for each in ids] == made
    names.expansion.is_placed_in(ids[0])
    assert [each in tree.table.by_id for each in ids] == [False, True, True]
    names.forget()
    assert not any(each in tree.table.by_id for each in ids)
    names.forget()


async def test_but_not_any_number_of_them(work, tree, monkeypatch):
    monkeypatch.setattr(expand, "_HELD_MAX", 2)
    names = Names(work, Rate(0), lambda: True)
    for name in NAMES:
        one = tree.make(tree.root, name, stat.S_IFDIR | 0o755, owner=(0, 0))[0]
        tree.ensure_id(one)
        names.mark_contents(one, created=True)
        tree.drop_unused(one)
    assert len(tree.table.by_id) == 2 + 1
    assert len(list(names.expansion.empty())) == len(NAMES)


async def test_what_a_resync_that_was_cut_off_left_incomplete_here_is_whole_from_then_on(
    work, tree
):
    """This store was promoted over it: nobody else has more of it."""
    for name in (b"k", b"n"):
        inode, *_, fd = tree.make_like(
            tree.root,
            name,
            stat.S_IFREG | 0o644,
            owner=(0, 0),
            object_id=name * 16,
            flags=INCOMPLETE,
        )
        os.close(fd)
        tree.drop_unused(inode)
    work.peer.link.names = [b"k"]
    expansion = expansion_of(work)
    await look(work, expansion)
    # What the peer has not is looked at where it is placed.
    work.child(tree.root, b"n")
    for name in (b"k", b"n"):
        inode, _ = tree.lookup(tree.root, name)
        tree.read_record(inode)
        assert (inode.id, inode.flags) == (name * 16, 0)
