"""What is kept beside, on a real directory: under its own path, whatever is kept there already."""

from __future__ import annotations

import os

import pytest

from replfs.core.dirty import DirtyLog
from replfs.node.replica.beside import Beside
from replfs.node.replica.limbo import Limbo
from replfs.store.record import ROOT_ID


@pytest.fixture
def beside(tree):
    suspects = DirtyLog()
    suspects.mark_unknown(ROOT_ID, directory=True, deep=True)
    return Beside(tree, suspects, "a-now", lambda path: None)


async def test_a_file_is_kept_where_a_file_has_the_name_of_its_directory(tree, beside, tmp_path):
    """What is wrong with the old tree's names does not stop a resync from keeping it."""
    store, kept = tmp_path / "store", tmp_path / "store/.replfs/kept/a-now"
    (store / "b").write_bytes(b"was there first")
    inode = tree.lookup(tree.root, b"b")[0]
    await beside.keep_contents(inode)
    tree.drop_unused(inode)
    (store / "b").unlink()
    (store / "b/c").mkdir(parents=True)
    (store / "b/c/f").write_bytes(b"came later")
    inode = tree.root
    for name in (b"b", b"c", b"f"):
        inode = tree.lookup(inode, name)[0]
    await beside.keep_contents(inode)
    assert (kept / "b").read_bytes() == b"was there first"
    assert (kept / "b.~1/c/f").read_bytes() == b"came later"
    # And the same directory for what else was in it.
    (store / "b/c/g").write_bytes(b"too")
    inode = tree.lookup(inode.parent, b"g")[0]
    await beside.keep_contents(inode)
    assert (kept / "b.~1/c/g").read_bytes() == b"too"


async def test_what_has_another_name_still_is_not_kept_by_a_link_that_would_change_with_it(
    tree, beside, tmp_path
):
    store = tmp_path / "store"
    for path in (store / "one", store / "two"):
        path.write_bytes(b"x")
    os.link(store / "one", store / "other")
    limbo = Limbo(tree)
    limbo.beside = beside
    for name in (b"one", b"two"):
        inode = tree.lookup(tree.root, name)[0]
        tree.ensure_id(inode)
        beside.taken(tree.root, name, inode)
        limbo.take(tree.root, name, inode)
    assert await limbo.empty(lambda: True)
    assert (store / "other").stat().st_nlink == 1
    assert [path.name for path in (store / ".replfs/kept/a-now").iterdir()] == ["two"]


async def test_what_is_in_a_directory_in_limbo_is_kept_under_the_path_that_it_had(
    tree, beside, tmp_path
):
    store = tmp_path / "store"
    (store / "a/b").mkdir(parents=True)
    (store / "a/b/file").write_bytes(b"mine")
    limbo = Limbo(tree)
    limbo.beside = beside
    directory = tree.lookup(tree.root, b"a")[0]
    tree.ensure_id(directory)
    limbo.take(tree.root, b"a", directory)
    inode = tree.lookup(tree.lookup(directory, b"b")[0], b"file")[0]
    await beside.keep_contents(inode)
    assert (store / ".replfs/kept/a-now/a/b/file").read_bytes() == b"mine"
