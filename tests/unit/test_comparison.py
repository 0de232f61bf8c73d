"""Comparing with a store that was changed apart, while applications go on."""

from __future__ import annotations

from typing import Any

from helpers.replicas import DIRECTORY, FILE
from xxhash import xxh3_128_digest

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.marks import ATTRS, NO_TAIL
from replfs.core.policy import Ack, NamePatterns, Policy
from replfs.node.asking import attributes
from replfs.node.failover.comparison import Comparison, Difference
from replfs.node.replication.policies import Policies
from replfs.store import locators
from replfs.store.record import ROOT_ID


def policies(tree):
    """As of a primary of which some objects have policies of their own."""
    return Policies(
        tree, Policy.SYNC, Ack.OP, used=True, on_used=lambda: None, generation=lambda: b"",
        patterns=NamePatterns(["*.tmp"]),
    )  # fmt: skip


async def test_what_goes_while_the_other_side_is_asked_is_only_there(tree, tmp_path):
    (tmp_path / "store/file").touch()
    inode = tree.lookup(tree.root, b"file")[0]
    there = ops.Inspected(tree.ensure_id(inode), True, attributes.inspect(tree, inode))

    class Inspector:
        async def ask(self, _op):
            return ops.Suspected(True, [], [], False)

        async def at(self, path):
            if path != b"file":
                return None
            tree.unlink(tree.root, path, inode, directory=False, links=1)
            return there

    inspector: Any = Inspector()
    mine = DirtyLog()
    mine.mark_name(ROOT_ID, b"file")
    found = await Comparison(tree, policies(tree), inspector, "b").differences(mine)
    assert found == {b"file": Difference("only on b", is_version=True)}


class There:
    """Files of the other side, by name, and which of them it says it has changed."""

    def __init__(self, files, changed):
        self.files = files
        self.changed = changed

    async def ask(self, op):
        if isinstance(op, ops.Suspects):
            one = ops.Suspect(ROOT_ID, ATTRS, NO_TAIL, [], self.changed)
            return ops.Suspected(True, [], [one], False)
        assert isinstance(op, ops.List)
        return ops.Listing([ops.Entry(name, name, True) for name in self.files], False)

    async def at(self, path):
        found = self.files.get(path)
        attributes_of = ops.Attributes(
            mode=FILE if path else DIRECTORY, uid=0, gid=0, rdev=0, size=len(found or b""),
            mtime=0, target=b"", policy=0, ack=0, xattrs={},
        )  # fmt: skip
        if not path:
            return ops.Inspected(ROOT_ID, True, attributes_of)
        return None if found is None else ops.Inspected(path, True, attributes_of)

    async def digests(self, object_id, _start, _count, _size):
        return xxh3_128_digest(self.files[object_id])


async def test_what_is_none_here_is_not_in_the_volume(tree, tmp_path):
    """The other's version is one to be brought beside only where it changed it, and differently."""
    names = [b"changed", b"same", b"untouched", b"by-name.tmp"]
    for name in names:
        (tmp_path / "store" / name.decode()).write_bytes(b"mine")
        tree.set_policy(tree.lookup(tree.root, name)[0], Policy.NONE, 0)
    own = tree.lookup(tree.root, b"by-name.tmp")[0]
    tree.set_policy(own, Policy.INHERIT, 0)
    there: Any = There(
        {b"changed": b"thrs", b"same": b"mine", b"untouched": b"base", b"by-name.tmp": b"its"},
        [b"changed", b"same"],
    )
    mine = DirtyLog()
    for name in names:
        mine.mark_name(ROOT_ID, name)
    found = await Comparison(tree, policies(tree), there, "b").differences(mine)
    assert found == {
        b"changed": Difference("only on b", is_version=True),
        b"same": Difference("only on b", is_version=False),
        b"untouched": Difference("only on b", is_version=False),
    }


async def test_a_directory_that_goes_while_it_is_listed_there_has_no_names_here(tree, tmp_path):
    (tmp_path / "store/d").mkdir()
    inode = tree.lookup(tree.root, b"d")[0]
    there = ops.Inspected(tree.ensure_id(inode), True, attributes.inspect(tree, inode))

    class Inspector:
        async def ask(self, op):
            if isinstance(op, ops.Suspects):
                return ops.Suspected(True, [], [], False)
            tree.rename(
                tree.root, b"d", tree.root, b"e", 0, inode=inode, replaced=None, replaced_links=0
            )
            tree.drop_unused(inode)
            return ops.Listing([], False)

        async def at(self, path):
            return there if path == b"d" else None

    inspector: Any = Inspector()
    mine = DirtyLog()
    mine.mark_names_all(there.object, handle=locators.of(tree, inode))
    assert await Comparison(tree, policies(tree), inspector, "b").differences(mine) == {}


async def test_where_all_there_is_that_stores_own_what_is_here_is_only_here(tree, tmp_path):
    """The other's root was given the policy `none`."""
    (tmp_path / "store/d").mkdir()
    (tmp_path / "store/d/file").touch()

    class Inspector:
        async def ask(self, _op):
            return ops.Suspected(False, [], [], False)

        async def at(self, _path):
            return None

    inspector: Any = Inspector()
    found = await Comparison(tree, policies(tree), inspector, "b").differences(DirtyLog())
    assert found == {b"d": Difference("only here", is_version=True)}
