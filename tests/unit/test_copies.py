"""Copies of another store's versions, of which one cannot be finished."""

from __future__ import annotations

import stat as _stat
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core import ops
from replfs.errors import NotInSync, PeerLost
from replfs.node.failover import splitbrain
from replfs.node.failover.comparison import Difference
from replfs.node.failover.copies import Copies
from replfs.node.failover.splitbrain import SplitBrain

DIRECTORY, FILE, HANDLE = 7, 8, 1


class Volume:
    """Counts the references that its kernel is believed to have, and what is open."""

    def __init__(self) -> None:
        self.tree = SimpleNamespace(root=SimpleNamespace(nodeid=1, is_directory=True))
        self.references: dict[int, int] = {}
        self.open: set[int] = set()
        self.xattrs = {b"system.posix_acl_access": b"of the directory's default"}
        self.done: list[str] = []

    def lookup(self, _parent, name):
        raise FileNotFoundError(name)

    async def make(self, _parent, _name, _mode, **_):
        return self._new(DIRECTORY, is_directory=True), None

    async def create(self, _parent, _name, _mode, _flags, **_):
        self.open.add(HANDLE)
        return SimpleNamespace(number=HANDLE), self._new(FILE, is_directory=False), None

    def _new(self, nodeid, *, is_directory):
        self.references[nodeid] = 1
        return SimpleNamespace(nodeid=nodeid, is_directory=is_directory)

    def listxattr(self, _nodeid):
        return list(self.xattrs)

    async def setxattr(self, _nodeid, name, value, **_):
        self.done.append("xattr")
        self.xattrs[name] = value

    async def removexattr(self, _nodeid, name):
        del self.xattrs[name]

    async def write(self, _number, _offset, _data):
        self.done.append("write")

    async def setattr(self, _nodeid, _number, **changes):
        self.done += [name for name, value in changes.items() if value is not None]

    async def release(self, number):
        self.open.remove(number)

    def forget(self, nodes):
        for nodeid, count in nodes:
            self.references[nodeid] -= count


class Inspector:
    """The other store: it has a file, and is lost before that can be read."""

    def __init__(self, *_: Any) -> None:
        """Of whichever node."""

    async def at(self, _path):
        attributes = ops.Attributes(
            _stat.S_IFREG | 0o644, 0, 0, 0, 5, 0, b"", policy=0, ack=0, xattrs={}
        )
        return ops.Inspected(b"f" * 16, complete=True, attributes=attributes)

    async def fetch(self, *_):
        raise PeerLost("no answer")

    async def run(self, work):
        try:
            return await work()
        except PeerLost as error:
            raise NotInSync("it was lost") from error


async def test_nothing_is_held_of_what_was_begun():
    volume: Any = Volume()
    inspector: Any = Inspector()
    copies = Copies(volume, inspector, b".b")
    with pytest.raises(PeerLost):
        await copies.copy(b"d/f")
    copies.close()
    assert volume.references == {DIRECTORY: 0, FILE: 0}
    assert not volume.open
    assert copies.count == 0


async def test_a_copy_has_the_extended_attributes_of_what_it_is_a_copy_of(monkeypatch):
    """And no others; after all that would take a capability away, before the times."""
    values = {b"security.capability": b"c", b"user.one": b"1"}

    async def at(*_):
        found = ops.Attributes(
            _stat.S_IFREG | 0o644, 0, 0, 0, 5, 7, b"", policy=0, ack=0,
            xattrs=dict.fromkeys(values, b"a digest"),
        )  # fmt: skip
        return ops.Inspected(b"f" * 16, complete=True, attributes=found)

    async def fetch(*_):
        return ops.Fetched(b"12345", [], 5)

    async def xattr(_object_id, name):
        return values[name]

    volume: Any = Volume()
    inspector: Any = SimpleNamespace(at=at, fetch=fetch, xattr=xattr)
    copies = Copies(volume, inspector, b".b")
    await copies.copy(b"f")
    assert volume.xattrs == values
    assert volume.done == ["write", "size", "mode", "xattr", "xattr", "mtime"]
    copies.close()


async def test_the_kernel_is_told_of_what_is_there_all_the_same(monkeypatch):
    """It may believe that there is no such directory: an application looked for it before."""
    told: list[Any] = []

    async def compare(*_):
        return {b"d/f": Difference("only on b", is_version=True)}

    monkeypatch.setattr(splitbrain, "Inspector", Inspector)
    monkeypatch.setattr(SplitBrain, "_compare", compare)
    over = SimpleNamespace(is_set=lambda: False)
    front = SimpleNamespace(session=SimpleNamespace(forget=told.extend), over=over)
    roles: Any = SimpleNamespace(front=front)
    primary: Any = SimpleNamespace(volume=Volume())
    peer: Any = SimpleNamespace(name="b", endpoint="tcp://h:1")
    with pytest.raises(NotInSync):
        await SplitBrain(roles)._copy(primary, peer)
    assert [nodeid for nodeid, _ in told] == [DIRECTORY, FILE]
