"""What a resync does to a replica, on a real directory: two objects that claim one id."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trio
from helpers.nodes import wait_for
from helpers.replicas import DIRECTORY, FILE, Store, object_id

from replfs.core import ops
from replfs.store import record as records
from replfs.store.record import ROOT_ID
from replfs.store.syscalls import birth_ns

pytestmark = pytest.mark.skipif(not records.PRIVILEGED, reason="owners and records are root's")

ABOVE, MOVED = object_id(11), object_id(12)


def attributes(mode: int) -> ops.Attributes:
    """Of a new object."""
    return ops.Attributes(
        mode=mode, uid=0, gid=0, rdev=0, size=0, mtime=7, target=b"", policy=0, ack=0, xattrs={}
    )


@pytest.fixture(params=[FILE, DIRECTORY], ids=["file", "directory"])
def mode(request):
    """Of the object that is made twice."""
    return request.param


def again(store: Store) -> Store:
    """Another process has the store: it knows nothing yet."""
    store.close()
    return Store(store.path)


@pytest.fixture
async def store(tmp_path, mode):
    """An object stands at `above/old`, and is made a second time at `new`: nobody looked there."""
    first = Store(tmp_path / "store")
    first.make(11, b"above", mode=DIRECTORY)
    first.make(12, b"old", ABOVE, mode=mode)
    if mode == DIRECTORY:
        first.make(13, b"child", MOVED)
    second = again(first)
    wait_for(lambda: is_later(tmp_path / "probe", tmp_path / "store/above/old"), 5, "a later time")
    async with trio.open_nursery() as nursery:
        await nursery.start(second.replica.run)
        answer = await second.asked(place(mode))
        assert answer == ops.Placed(complete=False, created=True)
        nursery.cancel_scope.cancel()
    third = again(second)
    async with trio.open_nursery() as nursery:
        await nursery.start(third.replica.run)
        yield third
        nursery.cancel_scope.cancel()
    third.close()


def is_later(probe: Path, than: Path) -> bool:
    """Whether what is made now is younger, as far as the clock of the filesystem tells."""
    probe.unlink(missing_ok=True)
    probe.touch()
    born = [birth_ns(os.fsencode(one), follow=False) for one in (than, probe)]
    return born[0] < born[1]


def place(mode: int) -> ops.Place:
    """The object is wanted at `new`."""
    return ops.Place(MOVED, ROOT_ID, b"new", attributes(mode), [], whole=False)


async def find_the_old_one_first(store: Store) -> None:
    """It is moved aside, and known by its id."""
    await store.asked(ops.Locate(ABOVE, ROOT_ID, b"above"))
    await store.asked(ops.Gather(ABOVE, [b"old"], [ops.NO_OBJECT]))
    assert os.listdir(store.path / "above") == []
    assert store.tree.table.by_id[MOVED].ino != os.stat(store.path / "new").st_ino


async def test_the_object_is_what_stands_where_the_primary_has_it(store, mode):
    await find_the_old_one_first(store)
    await store.asked(ops.Locate(MOVED, ROOT_ID, b"new"))
    if stat.S_ISDIR(mode):
        assert await store.asked(ops.List(MOVED, b"")) == ops.Listing([], more=False)
        store.make(14, b"later", MOVED)
    else:
        await store.asked(ops.Data(MOVED, 0), b"later")
    await store.asked(ops.EmptyLimbo())
    new = store.path / "new"
    assert (os.listdir(new) if new.is_dir() else new.read_bytes()) in (["later"], b"later")


async def test_what_stands_at_the_wanted_name_is_kept_before_what_was_moved_aside(store, mode):
    stands = os.stat(store.path / "new").st_ino
    await find_the_old_one_first(store)
    answer = await store.asked(place(mode))
    assert answer == ops.Placed(complete=False, created=False)
    assert os.stat(store.path / "new").st_ino == stands


async def test_what_stands_at_the_wanted_name_is_not_moved_aside(store):
    await find_the_old_one_first(store)
    await store.asked(ops.Gather(ROOT_ID, [b"new"], [MOVED]))
    assert (store.path / "new").exists()


async def test_what_was_made_later_remains_the_object_when_the_old_one_is_found(store):
    await store.asked(ops.Locate(MOVED, ROOT_ID, b"new"))
    holder = store.tree.table.by_id[MOVED]
    await store.asked(ops.Locate(ABOVE, ROOT_ID, b"above"))
    await store.asked(ops.Gather(ABOVE, [b"old"], [ops.NO_OBJECT]))
    assert store.tree.table.by_id[MOVED] is holder
    assert holder.id == MOVED


@pytest.mark.parametrize("mode", [FILE], ids=["file"], indirect=True)
async def test_another_name_of_what_was_made_later_is_no_name_of_the_old_one(store):
    await find_the_old_one_first(store)
    hints = [(ROOT_ID, b"new")]
    op = ops.Place(MOVED, ROOT_ID, b"another", attributes(FILE), hints, whole=False)
    assert await store.asked(op) == ops.Placed(complete=False, created=False)
    assert os.stat(store.path / "another").st_ino == os.stat(store.path / "new").st_ino


async def test_what_has_no_id_does_not_take_it_from_what_has(store):
    (store.path / "raw").write_bytes(b"x")
    await find_the_old_one_first(store)
    holder = store.tree.table.by_id[MOVED]
    await store.asked(ops.Locate(MOVED, ROOT_ID, b"raw"))
    assert store.tree.table.by_id[MOVED] is holder
    assert holder.id == MOVED
