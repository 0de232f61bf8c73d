"""A call that leaves an object as it is, is nothing to the peers; any other is."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import acl

from replfs.core import ops
from replfs.core.policy import Ack, Policy
from replfs.node.mounted.volume import Volume
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.store.activity import ActivityLog

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="changes owners")

EVERYTHING = SimpleNamespace(is_empty=True)


class FakePeer:
    """A peer that is in sync, and confirms all that is sent at once."""

    live = diverged = is_whole = True
    log = settling = EVERYTHING
    link = SimpleNamespace(has_room=lambda: True)

    def __init__(self) -> None:
        self.sent: list[ops.AnyOp] = []

    def send(self, op: ops.AnyOp, *_: object) -> bool:
        self.sent.append(op)
        return True

    def marks_durable(self) -> None:
        """Nothing is marked."""


class Place:
    """A volume, the object `o` in it, and what its peer was sent."""

    def __init__(self, tree: Any, tmp_path: Any, *, directory: bool) -> None:
        policies = Policies(
            tree, Policy.SYNC, Ack.OP, used=False, on_used=lambda: None, generation=lambda: b""
        )
        self.pipeline = Pipeline(tree, ActivityLog(str(tmp_path / "activity"), b"n" * 16), policies)
        self.volume = Volume(self.pipeline, dict, None)  # type: ignore[arg-type]  # no fsync here
        self.path = tmp_path / "store/o"
        if directory:
            self.path.mkdir(mode=0o755)
        else:
            self.path.touch(mode=0o644)
        self.path.chmod(0o755 if directory else 0o644)
        self.inode = self.volume.lookup(1, b"o")[0]
        self.nodeid = self.inode.nodeid
        self.peer = FakePeer()
        self.pipeline.peers.append(self.peer)  # type: ignore[arg-type]

    async def setattr(self, **wanted: int) -> list[ops.AnyOp]:
        every = dict.fromkeys(("size", "mode", "uid", "gid", "atime", "mtime"))
        await self.volume.setattr(self.nodeid, None, **{**every, **wanted})
        return self.taken()

    async def setxattr(self, name: bytes, value: bytes) -> list[ops.AnyOp]:
        await self.volume.setxattr(self.nodeid, name, value, uid=0, groups=set)
        return self.taken()

    async def removexattr(self, name: bytes) -> list[ops.AnyOp]:
        await self.volume.removexattr(self.nodeid, name)
        return self.taken()

    def taken(self) -> list[ops.AnyOp]:
        sent, self.peer.sent = self.peer.sent, []
        return sent


@pytest.fixture
def file(tree, tmp_path):
    return Place(tree, tmp_path, directory=False)


@pytest.fixture
def directory(tree, tmp_path):
    return Place(tree, tmp_path, directory=True)


async def test_mode_and_owner(file):
    assert await file.setattr(mode=0o644) == []
    assert await file.setattr(uid=0, gid=0) == []
    assert await file.setattr(mode=0o600) == [ops.SetAttr(file.inode.id, 0o600)]
    (sent,) = await file.setattr(gid=7)
    assert (sent.uid, sent.gid) == (ops.KEEP, 7)
    assert await file.setattr(gid=7) == []


async def test_times_are_sent_even_where_they_are_the_same(file):
    found = file.path.stat()
    (sent,) = await file.setattr(mtime=found.st_mtime_ns)
    assert sent.mtime == found.st_mtime_ns


async def test_a_chown_that_takes_set_id_bits_away(file):
    file.path.chmod(0o4755)
    (sent,) = await file.setattr(uid=0)
    assert sent.mode == 0o755
    # A chmod to the same leaves them, and they are not forgotten for it.
    file.path.chmod(0o4755)
    file.inode.privileges = None
    assert await file.setattr(mode=0o4755) == []
    (sent,) = await file.setattr(gid=0)
    assert sent.mode == 0o755


async def test_a_chown_that_takes_a_capability_away(file):
    # cap_net_raw, version 2 (linux/capability.h)
    capability = bytes.fromhex("0100000200200000000000000000000000000000")
    os.setxattr(file.path, "security.capability", capability)
    assert len(await file.setattr(uid=0)) == 1
    assert os.listxattr(file.path) == ["trusted.replfs"]


async def test_an_attribute_is_sent(file):
    assert len(await file.setxattr(b"user.one", b"1")) == 1
    assert await file.removexattr(b"user.one") == [ops.RemoveXattr(file.inode.id, b"user.one")]


async def test_an_acl_that_was_there(file):
    value = acl.pack(6, 4, 0, users={7: 4})
    assert len(await file.setxattr(b"system.posix_acl_access", value)) == 1
    assert len(await file.removexattr(b"system.posix_acl_access")) == 1
    assert await file.removexattr(b"system.posix_acl_access") == []


async def test_a_default_acl_that_was_not_there(directory):
    assert await directory.removexattr(b"system.posix_acl_default") == []


async def test_what_cannot_be_read_is_sent(file, monkeypatch):
    def damaged(*_: object) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    await file.setxattr(b"user.one", b"1")
    monkeypatch.setattr(file.volume.tree, "get_xattr", damaged)
    assert len(await file.removexattr(b"user.one")) == 1
