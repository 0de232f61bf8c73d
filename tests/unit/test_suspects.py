"""What a replica says that others may lack, on real directories: paged, found again, marked."""

from __future__ import annotations

import errno
import os

import pytest
import trio
from helpers.replicas import DIRECTORY, Store, object_id

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.regions import REGION_SIZE
from replfs.errors import PeerLost, ProtocolError
from replfs.node.asking import suspects
from replfs.store import locators
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree


@pytest.fixture
def stores(tmp_path):
    made = []

    def store(name):
        made.append(Store(tmp_path / name))
        return made[-1]

    yield store
    for one in made:
        one.close()


async def test_nothing_is_known_before_the_first_checkpoint(stores):
    store = stores("a")
    store.make(2, b"f")
    assert await suspects.ask(store.ask, everywhere=False) is None
    store.checkpoint()
    found = await suspects.ask(store.ask, everywhere=False)
    assert found.marks.is_empty


async def test_all_that_was_changed_is_told_with_its_place(stores):
    store = stores("a")
    store.make(2, b"d", mode=DIRECTORY)
    store.make(3, b"old", object_id(2))
    store.make(4, b"removed")
    store.checkpoint()
    store.write(3, 3 * REGION_SIZE, b"x")
    store.write(4, 0, b"x")
    store.apply(ops.Unlink(object_id(4), ROOT_ID, b"removed", False, 7))
    store.make(5, b"new", object_id(2))
    store.apply(ops.SetAttr(object_id(2), mode=0o700))
    found = await suspects.ask(store.ask, everywhere=False)
    assert set(found.marks.objects()) == {ROOT_ID, object_id(2), object_id(3), object_id(5)}
    assert list(found.marks.runs(object_id(3))) == [(3, 4)]
    assert found.marks.marks(object_id(5)).tail == 0
    assert set(found.marks.names_pending()) == {(object_id(2), b"new"), (ROOT_ID, b"removed")}
    assert set(found.marks.objects_with_attrs()) == set(found.marks.objects())
    assert found.places[object_id(3)] == (object_id(2), b"old")
    assert found.places[object_id(2)] == (ROOT_ID, b"d")


async def test_much_comes_in_pages(stores):
    store = stores("a")
    store.checkpoint()
    store.make(2, b"d", mode=DIRECTORY)
    for number in range(1500):
        store.make(100 + number, b"f%d" % number, object_id(2))
    for region in range(0, 12000, 2):
        store.replica.unstable.note(
            ops.Write(object_id(100), region * REGION_SIZE, 7), lambda _: b"", length=1
        )
    pages = 0

    async def ask(op):
        nonlocal pages
        pages += 1
        return await store.ask(op)

    found = await suspects.ask(ask, everywhere=False)
    assert pages > 3
    assert len(list(found.marks.names_pending())) == 1501
    assert found.marks.marks(object_id(100)).tail == 0
    assert len(found.places) == 1501


async def test_a_page_out_of_turn_is_refused(stores):
    store = stores("a")
    store.checkpoint()
    assert (await store.ask(ops.Suspects(3, False))).errno == errno.EINVAL


async def test_suspects_are_marked_where_the_other_side_has_them(stores):
    here, there = stores("here"), stores("there")
    for store in (here, there):
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"f", object_id(2))
        store.checkpoint()
    there.write(3, 2 * REGION_SIZE, b"x")
    there.make(9, b"only there", object_id(2))
    log = DirtyLog()
    found = await suspects.ask(there.ask, everywhere=False)
    here.replica.forget_all()
    assert suspects.mark(here.tree, log, found)
    assert list(log.runs(object_id(3))) == [(2, 3)]
    assert log.marks(object_id(3)).compare
    assert set(log.names_pending()) == {(object_id(2), b"only there")}
    for one in (2, 3):
        assert locators.find(here.tree, log.marks(object_id(one)).handle, object_id(one))


def rename(store, number, name, new_name, parent=ROOT_ID, new_parent=ROOT_ID):
    store.apply(ops.Rename(object_id(number), parent, name, new_parent, new_name, b"", False, 7, 7))


@pytest.mark.parametrize("renamed", ["there", "here", "both", "above there", "above both"])
async def test_a_suspect_that_was_renamed_is_marked_all_the_same(stores, renamed):
    here, there = stores("here"), stores("there")
    for store in (here, there):
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"f", object_id(2))
        store.checkpoint()
    log = DirtyLog()
    if renamed in {"here", "both"}:
        rename(here, 3, b"f", b"new here", object_id(2), object_id(2))
        log.mark_name(object_id(2), b"f")
        log.mark_name(object_id(2), b"new here")
    if renamed == "above both":
        rename(here, 2, b"d", b"new here")
        log.mark_name(ROOT_ID, b"d")
        log.mark_name(ROOT_ID, b"new here")
    if renamed in {"there", "both"}:
        rename(there, 3, b"f", b"new there", object_id(2), ROOT_ID)
    if renamed.startswith("above"):
        rename(there, 2, b"d", b"new there")
    there.write(3, 2 * REGION_SIZE, b"x")
    found = await suspects.ask(there.ask, everywhere=False)
    tree = Tree(here.fd)  # which knows nothing yet
    assert suspects.mark(tree, log, found)
    assert list(log.runs(object_id(3))) == [(2, 3)]
    assert not tree._held
    tree.close_all()


async def test_a_suspect_that_was_moved_here_needs_a_look_at_everything(stores):
    here, there = stores("here"), stores("there")
    for store in (here, there):
        store.make(3, b"f")
        store.checkpoint()
    there.write(3, 0, b"x")
    here.apply(ops.Unlink(object_id(3), ROOT_ID, b"f", False, 7))
    log = DirtyLog()
    found = await suspects.ask(there.ask, everywhere=False)
    assert not suspects.mark(here.tree, log, found)
    assert log.marks(ROOT_ID).deep


def test_where_nothing_is_known_everything_is_suspect(stores):
    here = stores("here")
    log = DirtyLog()
    assert not suspects.mark(here.tree, log, None)
    assert log.marks(ROOT_ID).deep


def test_places_in_a_circle_are_refused(stores):
    here = stores("here")
    places = {object_id(2): (object_id(3), b"a"), object_id(3): (object_id(2), b"b")}
    with pytest.raises(ProtocolError):
        suspects.find(here.tree, places, object_id(2))


async def test_a_peer_that_cannot_say_is_not_taken_for_one_that_has_nothing(stores):
    async def ask(_):
        return ops.Done(errno.EIO)

    with pytest.raises(PeerLost):
        await suspects.ask(ask, everywhere=False)


async def test_data_and_xattrs_are_fetched_without_holes(stores):
    store = stores("a")
    store.make(2, b"f")
    path = store.path / "f"
    with path.open("r+b") as file:
        file.write(b"a" * REGION_SIZE)
        file.seek(4 * REGION_SIZE)
        file.write(b"b" * REGION_SIZE)
    os.setxattr(path, "user.k", b"value")
    answers = []

    async def fetch(op):
        store.replica.apply(1, op, None, answers.append)
        with trio.fail_after(5):
            while not answers:
                await trio.sleep(0.001)
        return answers.pop()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.replica.run)
        await trio.testing.wait_all_tasks_blocked()
        got = await fetch(ops.Fetch(object_id(2), 0, ops.PAYLOAD_MAX, b""))
        assert got == ops.Fetched(
            b"a" * REGION_SIZE + b"b" * REGION_SIZE,
            [(REGION_SIZE, 4 * REGION_SIZE)],
            5 * REGION_SIZE,
        )
        got = await fetch(ops.Fetch(object_id(2), 5 * REGION_SIZE - 1, 10, b""))
        assert got == ops.Fetched(b"b", [], 5 * REGION_SIZE)
        nursery.cancel_scope.cancel()
    assert await store.ask(ops.Fetch(object_id(2), 1, 3, b"user.k")) == ops.Fetched(b"alu", [], 5)
    assert (await store.ask(ops.Fetch(object_id(2), 0, 3, b"user.x"))).errno == errno.ENODATA
