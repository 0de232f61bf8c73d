"""Names that nobody has looked up: found by a walk, one at a time and not too often."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core.dirty import DirtyLog
from replfs.node.resync.work import Work
from replfs.store import links as links_module
from replfs.store import locators
from replfs.store.links import Links
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "store"
    for name in ("a", "b/c"):
        (path / name).mkdir(parents=True)
    (path / "a/one").write_bytes(b"x")
    os.link(path / "a/one", path / "b/c/other")
    (path / "a/single").touch()
    return path


@pytest.fixture
def tree(store):
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd)
    yield tree
    tree.close_all()
    os.close(fd)


def at(tree, path):
    inode = tree.root
    for name in path.split("/"):
        inode = tree.lookup(inode, name.encode())[0]
    return inode


async def test_every_name_is_learnt_by_a_walk(tree):
    links = Links(tree)
    inode = at(tree, "a/one")
    with tree.held(inode):
        assert await links.learn_names(inode)
        found = sorted((above.path(), name) for above, name in inode.names())
    assert found == [(b"a", b"one"), (b"b/c", b"other")]


async def test_what_is_sought_is_found_though_it_has_one_name(tree, store):
    links = Links(tree)
    number = (store / "a/single").stat().st_ino
    assert links.find(number) is None
    assert links.seek(number)
    await links.walk_for_sought()
    found = links.find(number)
    assert found is not None
    assert found.path() == b"a/single"
    os.rename(store / "a/single", store / "b/c/single")
    tree.drop_unused(found)
    assert links.find(number) is None
    # It was there, so it is worth another walk.
    assert links.seek(number)


async def test_what_no_walk_has_seen_is_not_sought_again(tree):
    links = Links(tree)
    assert links.seek(1 << 40)
    await links.walk_for_sought()
    assert not links.seek(1 << 40)
    links.forget()
    assert links.seek(1 << 40)


async def test_there_is_no_walk_soon_after_another(tree, store, monkeypatch):
    monkeypatch.setattr(links_module, "_REST", 1e9)
    links = Links(tree)
    assert links.seek((store / "a/single").stat().st_ino)
    await links.walk_for_sought()
    assert links.seek((store / "a").stat().st_ino)
    before = links.may_walk_at
    await links.walk_for_sought()
    assert links.may_walk_at == before
    inode = at(tree, "b/c/other")
    with tree.held(inode):
        # The names of objects with several were seen in passing.
        assert await links.learn_names(inode)
    (store / "a/late").touch()
    os.link(store / "a/late", store / "b/late")
    inode = at(tree, "b/late")
    with tree.held(inode):
        assert not await links.learn_names(inode)


class Policies:
    def effective(self, inode):
        return 0


@pytest.fixture
def work(tree, monkeypatch):
    """The resync's view of a log with a changed file, `a/single`, that has lost its place."""
    pipeline: Any = SimpleNamespace(tree=tree, policies=Policies())
    peer: Any = SimpleNamespace(name="peer", log=DirtyLog(), located=(set(), set()))
    source: Any = None  # contents are not read here
    work = Work(pipeline, peer, source)
    inode = at(tree, "a/single")
    tree.ensure_id(inode)
    work.log.mark_attrs(inode.id, handle=locators.of(tree, inode))
    tree.drop_unused(inode)
    # As where the kernel has no path for a file that was opened by its handle.
    monkeypatch.setattr(locators, "find", lambda tree, locator, object_id: None)
    return work


def changed(work):
    (found,) = [one for one in work.log.objects() if one != ROOT_ID]
    return found


async def test_a_changed_object_elsewhere_is_looked_for_and_nothing_else_is_compared(
    work, tree, store
):
    object_id = changed(work)
    os.rename(store / "a/single", store / "b/moved")
    assert work.find(object_id) is None
    assert work.is_waiting(("find", object_id)) or work.stuck
    await work.links.walk_for_sought()
    found = work.find(object_id)
    assert found.path() == b"b/moved"
    assert not work.stuck
    assert work.log.marks(ROOT_ID) is None


async def test_a_changed_object_that_is_gone_is_forgotten(work, store):
    os.unlink(store / "a/single")
    assert work.find(changed(work)) is None
    assert work.log.is_empty


async def test_everything_is_compared_only_where_no_walk_finds_it(work, store, tmp_path):
    object_id = changed(work)
    os.rename(store / "a/single", tmp_path / "outside")
    assert work.find(object_id) is None
    assert work.log.marks(ROOT_ID) is None
    await work.links.walk_for_sought()
    assert work.find(object_id) is None
    assert work.log.marks(ROOT_ID).deep
    assert work.log.marks(object_id) is None
