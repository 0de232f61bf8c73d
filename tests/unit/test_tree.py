"""The store's tree of objects, as it is known and as it is."""

from __future__ import annotations

import os
import stat

from replfs.store.inode import Inode
from replfs.store.tree import Tree


def test_a_number_that_now_belongs_to_an_object_of_another_type(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").touch()
    tree = Tree(os.open(tmp_path, os.O_RDONLY))
    try:
        # What was known was removed behind the node's back, and its number given to a directory.
        old = Inode(os.stat(tmp_path / "d").st_ino, stat.S_IFLNK)
        old.id = b"i" * 16
        old.add_name(tree.root, b"link")
        old.pins = 1
        tree.table.add(old)
        found = tree.lookup(tree.root, b"d")[0]
        assert found is not old
        assert found.is_directory
        assert tree.lookup(found, b"file")[0].type == stat.S_IFREG
        assert old.gone
        assert not old.named
        assert tree.table.by_id.get(old.id) is not old
    finally:
        tree.close_all()
