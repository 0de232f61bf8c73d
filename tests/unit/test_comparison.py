"""Comparing with a store that was changed apart, while applications go on."""

from __future__ import annotations

from typing import Any

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.node.asking import attributes
from replfs.node.failover.comparison import Comparison
from replfs.store.record import ROOT_ID


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
    found = await Comparison(tree, inspector, "b").differences(mine)
    assert found == {b"file": "only on b"}
