"""An object's attributes come last in a resync: when the peer has all of its data."""

from __future__ import annotations

import os
import stat
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.regions import REGION_SIZE
from replfs.node.pacing.rate import Rate
from replfs.node.resync.contents import Contents

SIZE = 4 * REGION_SIZE


@pytest.fixture
def file(tree):
    inode, *_, fd = tree.make(tree.root, b"file", stat.S_IFREG | 0o644, owner=(0, 0))
    os.ftruncate(fd, SIZE)
    os.close(fd)
    tree.hold(inode)
    tree.stat(inode)
    return inode


@pytest.fixture
def contents(tree):
    """With what the peer is asked in *asked*."""
    log = DirtyLog()
    asked: list[Any] = []

    async def ask(op, _payload=None):
        asked.append(op)
        return ops.Done(0)

    @asynccontextmanager
    async def claim(_claims):
        yield None

    async def is_placed(_inode):
        return True

    nothing: Any = lambda *_: None  # noqa: E731
    peer: Any = SimpleNamespace(
        ask=ask, locate=nothing, forget=nothing, progressed=nothing, unrepresentable=set()
    )
    work: Any = SimpleNamespace(
        tree=tree, log=log, peer=peer, source=None, claim=claim, is_on_peers=lambda _: True,
        is_waiting=lambda _: False, succeeded=nothing, progress=SimpleNamespace(files=0),
        find=lambda object_id: tree.table.by_id.get(object_id),
    )  # fmt: skip
    names: Any = SimpleNamespace(is_placed=is_placed)
    found = Contents(work, names, Rate(0))
    return SimpleNamespace(finish=found.finish, log=log, asked=asked)


async def test_not_while_some_of_it_is_dirty(contents, file):
    contents.log.mark_tail(file.id, REGION_SIZE)
    await contents.finish(file.id)
    assert contents.asked == []


async def test_once_only_what_is_beyond_the_end_is(contents, file):
    contents.log.mark_tail(file.id, SIZE)
    await contents.finish(file.id)
    assert [type(op) for op in contents.asked] == [ops.Finish]
    assert contents.log.is_empty


async def test_not_by_the_size_that_a_truncation_would_have_left_which_failed_here(contents, file):
    """The peer's did not: it has nothing from there on."""
    contents.log.mark_tail(file.id, REGION_SIZE)
    file.size = REGION_SIZE
    await contents.finish(file.id)
    assert contents.asked == []
    assert not contents.log.is_empty
