"""Limbo on a real directory: finding what is inside it, and emptying it without a long stop."""

from __future__ import annotations

import os

import trio

from replfs.core.policy import NamePatterns, Policy
from replfs.node.replica.limbo import Limbo
from replfs.node.replica.own import Own
from replfs.store import locators
from replfs.store.record import Record
from replfs.store.syscalls import birth_ns


def make(path, depth=2, width=3):
    path.mkdir()
    for number in range(width):
        (path / f"f{number}").write_bytes(b"x")
        if depth:
            make(path / f"d{number}", depth - 1, width) if number == 0 else None


def take(tree, limbo, name):
    inode = tree.lookup(tree.root, name)[0]
    tree.ensure_id(inode)
    limbo.take(tree.root, name, inode)
    return inode


def path_of(tree):
    return os.readlink(f"/proc/self/fd/{tree.root_fd}")


async def test_what_is_deep_inside_is_found(tree, tmp_path):
    make(tmp_path / "store/top")
    inner = tree.lookup(tree.root, b"top")[0]
    for name in (b"d0", b"d0"):
        inner = tree.lookup(inner, name)[0]
    deep = tree.lookup(inner, b"f1")[0]
    object_id = tree.ensure_id(deep)
    tree.drop_unused(deep)
    limbo = Limbo(tree, Own(tree))
    take(tree, limbo, b"top")
    assert limbo.find(object_id) is None
    assert not limbo.is_indexed
    await limbo.index(lambda: True)
    assert limbo.is_indexed
    found = limbo.find(object_id)
    assert found is not None
    assert found.id == object_id
    assert not limbo.holds(found)  # it is in a directory that was taken, and not itself
    # What is taken later is not lost, and needs no index if it is no directory.
    (tmp_path / "store/file").touch()
    single = take(tree, limbo, b"file")
    assert limbo.is_indexed
    assert limbo.find(single.id) is single


async def test_what_was_moved_aside_is_found_by_no_locator(tree, tmp_path):
    """A store that is promoted before a resync's end knows it there, and would carry it."""
    make(tmp_path / "store/top", depth=0)
    (tmp_path / "store/file").touch()
    inner = tree.lookup(tree.lookup(tree.root, b"top")[0], b"f0")[0]
    file = tree.lookup(tree.root, b"file")[0]
    found = [(tree.ensure_id(one), locators.of(tree, one), one) for one in (inner, file)]
    assert all(locators.find(tree, handle, one_id) is one for one_id, handle, one in found)
    limbo = Limbo(tree, Own(tree))
    take(tree, limbo, b"top")
    take(tree, limbo, b"file")
    assert all(one.named for _, _, one in found)
    assert not any(locators.find(tree, handle, one_id) for one_id, handle, _ in found)


async def made_twice(tree, tmp_path):
    """A directory that got an id, and a younger one, not known any more, that had it before."""
    (tmp_path / "store/adopted").mkdir()
    adopted = tree.lookup(tree.root, b"adopted")[0]
    born = birth_ns(os.fsencode(tmp_path / "store/adopted"), follow=False)
    (tmp_path / "store/top").mkdir()
    with trio.fail_after(10):
        while True:
            (tmp_path / "store/top/twin").mkdir()
            if birth_ns(os.fsencode(tmp_path / "store/top/twin"), follow=False) > born:
                break
            (tmp_path / "store/top/twin").rmdir()
            await trio.sleep(0.001)
    twin = tree.lookup(tree.lookup(tree.root, b"top")[0], b"twin")[0]
    object_id = tree.ensure_id(twin)
    tree.drop_unused(twin)
    tree.set_record(adopted, Record(object_id, 0, 0, 0))
    return adopted, object_id


async def test_what_was_moved_aside_takes_no_id_from_what_was_not(tree, tmp_path):
    adopted, object_id = await made_twice(tree, tmp_path)
    limbo = Limbo(tree, Own(tree))
    take(tree, limbo, b"top")
    await limbo.index(lambda: True)
    assert tree.table.by_id[object_id] is adopted
    assert adopted.id == object_id


async def test_what_a_primary_was_told_of_keeps_its_id(tree, tmp_path):
    adopted, object_id = await made_twice(tree, tmp_path)
    adopted.pins |= 2
    twin = tree.lookup(tree.lookup(tree.root, b"top")[0], b"twin")[0]
    tree.read_record(twin)
    assert tree.table.by_id[object_id] is adopted
    assert not twin.id


async def test_emptying_gives_way_and_stops_when_told(tree, tmp_path):
    make(tmp_path / "store/top", depth=0, width=400)
    limbo = Limbo(tree, Own(tree))
    take(tree, limbo, b"top")
    inside = tmp_path / "store/.replfs/limbo"
    turns = 0
    wanted = True

    async def other():
        nonlocal turns, wanted
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1
            wanted = turns < 3

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        assert not await limbo.empty(lambda: wanted)
        left = sum(len(files) for _, _, files in os.walk(inside))
        assert 0 < left < 400
        assert await limbo.empty(lambda: True)
        assert turns > 4
        nursery.cancel_scope.cancel()
    assert os.listdir(inside) == []


async def test_very_deep_trees_and_large_files_go_too(tree, tmp_path):
    path = tmp_path / "store/deep"
    path.mkdir()
    fd = os.open(path, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    with (tmp_path / "store/large").open("wb") as file:
        file.truncate(1 << 30)
    limbo = Limbo(tree, Own(tree))
    take(tree, limbo, b"deep")
    take(tree, limbo, b"large")
    assert await limbo.empty(lambda: True)
    assert os.listdir(tmp_path / "store/.replfs/limbo") == []
    assert len(tree.table.by_nodeid) < 10


async def test_what_is_this_nodes_own_is_kept(tree, tmp_path):
    store = tmp_path / "store"
    make(store / "top", depth=0)
    (store / "a.tmp").write_bytes(b"by its name")
    (store / "own").write_bytes(b"by its policy")
    (store / "top/b.tmp").write_bytes(b"inside")
    (store / "sync.tmp").write_bytes(b"has another policy")
    limbo = Limbo(tree, Own(tree, NamePatterns(["*.tmp"])))
    own = tree.lookup(tree.root, b"own")[0]
    tree.set_policy(own, Policy.NONE, 0)
    tree.set_policy(tree.lookup(tree.root, b"sync.tmp")[0], Policy.SYNC, 0)
    for name in (b"a.tmp", b"own", b"top", b"sync.tmp"):
        take(tree, limbo, name)
    assert await limbo.empty(lambda: True)
    kept = store / ".replfs/kept"
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == {
        "a.tmp": b"by its name", "own": b"by its policy", "b.tmp": b"inside",
    }  # fmt: skip
    assert os.listdir(store / ".replfs/limbo") == []
