"""What loses its last name on a replica: its blocks are freed once that is answered."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.replicas import Store, object_id

from replfs.core import ops
from replfs.store.record import ROOT_ID

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="as root")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "store")
    store.make(11, b"file")
    yield store
    store.close()


def open_without_a_name(store: Store) -> int:
    """How many descriptors keep what has no name any more."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
            links = os.fstat(int(name)).st_nlink
        except OSError:
            continue  # of the listing itself
        found += target.startswith(f"{store.path}/") and not links
    return found


def unlink(number: int, name: bytes) -> ops.Unlink:
    return ops.Unlink(object_id(number), ROOT_ID, name, False, 9)


def rename(number: int, name: bytes, new_name: bytes, replaced: bytes) -> ops.Rename:
    return ops.Rename(object_id(number), ROOT_ID, name, ROOT_ID, new_name, replaced, False, 9, 9)


@pytest.mark.parametrize("was_open", [True, False])
def test_an_unlink_is_answered_first(store: Store, was_open: bool) -> None:
    if not was_open:
        os.close(store.tree.take_data_fd(store.tree.table.by_id[object_id(11)]))
    store.apply(unlink(11, b"file"))
    assert not (store.path / "file").exists()
    assert open_without_a_name(store) == 1
    store.replica.catch_up()
    assert open_without_a_name(store) == 0


def test_the_next_operation_frees_it_too(store: Store) -> None:
    store.make(12, b"other")
    store.apply(unlink(11, b"file"))
    store.apply(unlink(12, b"other"))
    assert open_without_a_name(store) == 1


def test_a_rename_over_it(store: Store) -> None:
    store.make(12, b"new")
    store.apply(rename(12, b"new", b"file", object_id(11)))
    assert open_without_a_name(store) == 1
    store.replica.catch_up()
    assert open_without_a_name(store) == 0
    store.write(12, 0, b"still there")
    assert (store.path / "file").read_bytes() == b"still there"


def test_what_has_another_name_stays_as_it_is(store: Store) -> None:
    store.apply(ops.Link(object_id(11), ROOT_ID, b"link", 8))
    store.apply(unlink(11, b"file"))
    assert open_without_a_name(store) == 0
    store.write(11, 0, b"here")
    assert (store.path / "link").read_bytes() == b"here"


def test_one_that_failed_leaves_the_file_as_it_was(store: Store) -> None:
    assert store.try_to(ops.Unlink(object_id(11), ROOT_ID, b"file", True, 9))  # it is no directory
    store.write(11, 0, b"whole")
    assert (store.path / "file").read_bytes() == b"whole"
