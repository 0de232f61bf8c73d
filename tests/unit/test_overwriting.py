"""A primary whose disk has failed to write overwrites nothing that its peer may have newer."""

from __future__ import annotations

import errno
import os
import stat
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import xxhash

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.regions import REGION_SIZE
from replfs.node.pacing.rate import Rate
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.resync.contents import DISK_FAILED, Contents

REGIONS = 4
OURS = b"o" * REGION_SIZE
THEIRS = b"t" * REGION_SIZE


@pytest.fixture
def file(tree):
    inode, *_, fd = tree.make(tree.root, b"file", stat.S_IFREG | 0o644, owner=(0, 0))
    os.pwrite(fd, OURS * REGIONS, 0)
    os.close(fd)
    tree.hold(inode)
    tree.stat(inode)
    return inode


class Peer:
    """Has the file, with some regions as they are here."""

    def __init__(self):
        self.regions = [OURS] * REGIONS
        self.unrepresentable: set[Any] = set()
        self.asked: list[type[ops.Op]] = []

    async def ask(self, op, payload=None):
        self.asked.append(type(op))
        if isinstance(op, ops.Digest):
            return ops.Digests(b"".join(map(xxhash.xxh3_128_digest, self.regions)), 0)
        if isinstance(op, ops.Data):
            for at in range(0, len(payload), REGION_SIZE):
                self.regions[(op.offset + at) // REGION_SIZE] = payload[at : at + REGION_SIZE]
        return ops.Done(0, len(payload or b""))

    def locate(self, *_):
        pass

    def progressed(self):
        pass

    def forget(self, *_):
        pass


@pytest.fixture
def resync(tree):
    """What `data` needs, and what came of it."""
    log, peer = DirtyLog(), Peer()
    failed: list[str] = []

    @asynccontextmanager
    async def claim(_claims):
        yield None

    async def is_placed(_inode):
        return True

    pipeline = SimpleNamespace(unwritten=Unwritten(), applications=SimpleNamespace(are_busy=False))
    pipeline.unwritten.failed(OSError(errno.EIO, "the disk fails"))
    work: Any = SimpleNamespace(
        tree=tree, log=log, peer=peer, claim=claim, is_on_peers=lambda _: True,
        source=SimpleNamespace(open=lambda _: -1), pipeline=pipeline,
        is_waiting=lambda _: False, succeeded=lambda _: None,
        failed=lambda _key, _inode, reason: failed.append(reason),
        progress=SimpleNamespace(files=0, bytes=0),
        find=lambda object_id: tree.table.by_id.get(object_id),
    )  # fmt: skip
    names: Any = SimpleNamespace(is_placed=is_placed)
    contents = Contents(work, names, Rate(0))
    return SimpleNamespace(data=contents.data, log=log, peer=peer, failed=failed)


async def test_what_is_only_to_be_compared_and_differs_stays_there(resync, file):
    resync.peer.regions[2] = THEIRS
    resync.log.mark_tail(file.id, 0, compare=True)
    await resync.data(file.id)
    assert resync.failed == [DISK_FAILED]
    assert resync.peer.regions[2] == THEIRS
    assert resync.peer.asked == [ops.Digest]
    assert not resync.log.data_is_clean(file.id, 0, None)


async def test_what_is_equal_is_found_so(resync, file):
    resync.log.mark_tail(file.id, 0, compare=True)
    await resync.data(file.id)
    assert resync.failed == []
    assert resync.log.is_empty


@pytest.mark.parametrize("is_marked_first", [True, False])
async def test_what_was_changed_here_is_carried(resync, file, is_marked_first):
    """Also where the rest of the file is to be compared, and is equal."""
    resync.peer.regions[1] = THEIRS
    changed = (file.id, REGION_SIZE, 2 * REGION_SIZE)
    if is_marked_first:
        resync.log.mark_data(*changed)
    resync.log.mark_tail(file.id, 0, compare=True)
    if not is_marked_first:
        resync.log.mark_data(*changed)
    await resync.data(file.id)
    assert resync.failed == []
    assert resync.peer.regions == [OURS] * REGIONS
    assert resync.log.is_empty


async def test_not_what_lies_beside_it(resync, file):
    resync.peer.regions[1:3] = [THEIRS] * 2
    resync.log.mark_tail(file.id, 0, compare=True)
    resync.log.mark_data(file.id, REGION_SIZE, 2 * REGION_SIZE)
    await resync.data(file.id)
    assert resync.failed == [DISK_FAILED]
    assert resync.peer.regions[2] == THEIRS
