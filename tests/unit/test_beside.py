"""What is kept beside, on a real directory: under its own path, whatever is kept there already."""

from __future__ import annotations

import os

import pytest
import trio
from helpers import acl
from helpers.replicas import DIRECTORY, FILE, Store, object_id

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.node.replica.beside import Beside
from replfs.node.replica.limbo import Limbo
from replfs.node.replica.own import Own
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


async def test_a_file_is_kept_with_its_extended_attributes_and_acl(tree, beside, tmp_path):
    path = tmp_path / "store/file"
    path.write_bytes(b"alone")
    path.chmod(0o640)
    os.setxattr(path, "user.one", b"1")
    os.setxattr(path, acl.ACCESS, acl.pack(6, 0, 0, users={1: 4}))
    found = path.stat()
    inode = tree.lookup(tree.root, b"file")[0]
    record = tree.ensure_id(inode)
    await beside.keep_contents(inode)
    kept = tmp_path / "store/.replfs/kept/a-now/file"
    for name in ("user.one", acl.ACCESS):
        assert os.getxattr(kept, name) == os.getxattr(path, name)
    assert kept.stat().st_mode == found.st_mode
    assert kept.stat().st_mtime_ns == found.st_mtime_ns
    assert record
    assert not any("replfs" in name for name in os.listxattr(kept))


@pytest.fixture
def unknown(tree, tmp_path):
    """Nothing is known of a directory, and all else is as on the primary."""
    (tmp_path / "store/dir/sub").mkdir(parents=True)
    (tmp_path / "store/dir/file").write_bytes(b"alone")
    (tmp_path / "store/dir/sub/deep").write_bytes(b"alone, too")
    (tmp_path / "store/other").write_bytes(b"the same there")
    suspects = DirtyLog()
    inode = tree.lookup(tree.root, b"dir")[0]
    suspects.mark_unknown(tree.ensure_id(inode), directory=True, deep=True)
    return Beside(tree, suspects, "a-now", lambda path: None)


def at(tree, path):
    """What stands there, with an id."""
    inode = tree.root
    for name in path.split(b"/"):
        inode = tree.lookup(inode, name)[0]
        tree.ensure_id(inode)
    return inode


def test_below_what_is_unknown_everything_may_be_here_alone(tree, unknown):
    directory = at(tree, b"dir")
    assert unknown.holds_contents(at(tree, b"dir/file"))
    assert unknown.holds_contents(at(tree, b"dir/sub/deep"))
    assert not unknown.holds_contents(at(tree, b"other"))
    assert unknown.is_suspect_name(directory, b"new")
    assert unknown.is_suspect_name(at(tree, b"dir/sub"), b"new")
    assert not unknown.is_suspect_name(tree.root, b"new")


@pytest.mark.parametrize("taken", [b"file", b"sub"])
async def test_what_leaves_an_unknown_directory_is_unknown_where_it_comes_to(tree, unknown, taken):
    """The primary has it elsewhere: it goes there through limbo, and is overwritten only there."""
    inode = at(tree, b"dir/" + taken)
    limbo = Limbo(tree, Own(tree))
    limbo.beside = unknown
    limbo.take(at(tree, b"dir"), taken, inode)
    tree.rename(
        inode.parent, inode.name, tree.root, b"new", 0, inode=inode, replaced=None, replaced_links=0
    )
    assert unknown.holds_contents(at(tree, b"new" if taken == b"file" else b"new/deep"))


@pytest.mark.parametrize("size", [1, 9], ids=["shorter", "longer"])
async def test_a_file_that_gets_another_size_is_kept(tmp_path, size):
    """Also where nothing is written: it was cut off here, and is as long as before there."""
    store = Store(tmp_path / "store")
    store.make(11, b"file")
    store.write(11, 0, bytes(5))
    suspects = DirtyLog()
    suspects.mark_tail(object_id(11), 5)
    store.replica.keep_beside(Beside(store.tree, suspects, "a-now", lambda _: None))
    attributes = ops.Attributes(
        mode=FILE, uid=0, gid=0, rdev=0, size=size, mtime=7, target=b"", policy=0, ack=0, xattrs={}
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(store.replica.run)
        assert await store.asked(ops.Finish(object_id(11), attributes)) == ops.Done(0)
        nursery.cancel_scope.cancel()
    assert (store.path / "file").stat().st_size == size
    assert (store.path / ".replfs/kept/a-now/file").read_bytes() == bytes(5)
    store.close()


async def test_what_has_another_name_still_is_not_kept_by_a_link_that_would_change_with_it(
    tree, beside, tmp_path
):
    store = tmp_path / "store"
    for path in (store / "one", store / "two"):
        path.write_bytes(b"x")
    os.link(store / "one", store / "other")
    limbo = Limbo(tree, Own(tree))
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
    limbo = Limbo(tree, Own(tree))
    limbo.beside = beside
    directory = tree.lookup(tree.root, b"a")[0]
    tree.ensure_id(directory)
    limbo.take(tree.root, b"a", directory)
    inode = tree.lookup(tree.lookup(directory, b"b")[0], b"file")[0]
    await beside.keep_contents(inode)
    assert (store / ".replfs/kept/a-now/a/b/file").read_bytes() == b"mine"


@pytest.mark.parametrize("is_below", [True, False], ids=["in a suspect directory", "by itself"])
async def test_what_the_primary_could_not_find_is_not_whole_where_it_is_placed(tmp_path, is_below):
    """It was moved and changed here, out of a directory that was then removed."""
    store = Store(tmp_path / "store")
    store.make(11, b"known", mode=DIRECTORY)
    store.make(12, b"dir", mode=DIRECTORY)
    store.make(13, b"moved", object_id(12))
    store.make(14, b"same", object_id(12))
    suspects = DirtyLog()
    if is_below:
        suspects.mark_unknown(object_id(12), directory=True, deep=True)
    else:
        suspects.mark_data(object_id(13), 0, 5)

    def place(number: int, name: bytes, mode: int) -> ops.Place:
        attributes = ops.Attributes(
            mode=mode, uid=0, gid=0, rdev=0, size=0, mtime=7, target=b"", policy=0, ack=0, xattrs={}
        )
        return ops.Place(object_id(number), object_id(11), name, attributes, [], whole=True)

    async def entries(*, digests: bool) -> dict[bytes, bool]:
        listing = await store.asked(ops.List(object_id(12), b"", digests))
        assert isinstance(listing, ops.Listing)
        return {entry.name: entry.complete for entry in listing.entries}

    async with trio.open_nursery() as nursery:
        await nursery.start(store.replica.run)
        assert await entries(digests=False) == {b"moved": True, b"same": True}
        store.replica.keep_beside(Beside(store.tree, suspects, "a-now", lambda _: None))
        assert await entries(digests=False) == {b"moved": False, b"same": not is_below}
        # Who compares all that is in them needs no doubts.
        assert await entries(digests=True) == {b"moved": True, b"same": True}
        moved = await store.asked(place(13, b"moved", FILE))
        assert moved == ops.Placed(complete=False, created=False)
        same = await store.asked(place(14, b"same", FILE))
        assert same == ops.Placed(complete=not is_below, created=False)
        again = await store.asked(place(13, b"moved", FILE))
        assert again == ops.Placed(complete=False, created=False)
        store.replica.keep_beside(None)
        again = await store.asked(place(13, b"moved", FILE))
        assert again == ops.Placed(complete=True, created=False)
        nursery.cancel_scope.cancel()
    store.close()
