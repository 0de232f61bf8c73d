"""Objects that have one id in a store are told apart before it is a primary's."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from replfs.errors import NotInSync
from replfs.node.failover.promotion import promote_stopped
from replfs.store import record as records
from replfs.store import syscalls
from replfs.store.record import Record
from replfs.store.state import State
from replfs.store.tree import Tree
from replfs.store.twins import find_twins, part_stopped, part_twins

pytestmark = pytest.mark.skipif(not records.PRIVILEGED, reason="every type has a record as root")


@pytest.fixture
def store(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        (tmp_path / name / "link").symlink_to(name)
        for path, one in ((tmp_path / name, b"d"), *((tmp_path / name / of, of[:1].encode())
                          for of in ("file", "link"))):  # fmt: skip
            give(path, one * 16)
    (tmp_path / "alone").touch()
    give(tmp_path / "alone", b"o" * 16)
    os.link(tmp_path / "alone", tmp_path / "a" / "other name")
    (tmp_path / "copied").touch()
    value = os.getxattr(tmp_path / "alone", records.XATTR)
    os.setxattr(tmp_path / "copied", records.XATTR, value)
    (tmp_path / ".replfs").mkdir()
    (tmp_path / ".replfs" / "aside").touch()
    give(tmp_path / ".replfs" / "aside", b"o" * 16)
    return tmp_path


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("birth", [0, 7])
def test_where_that_is_not_known_what_a_resync_has_not_finished_does(
    store, root, monkeypatch, birth, is_first
):
    monkeypatch.setattr(syscalls, "birth_ns", lambda *_, **__: birth)
    names = ("a", "z") if is_first else ("z", "a")
    young, old = (store / f"{name} file" for name in names)
    for path, flags in ((old, 0), (young, records.INCOMPLETE)):
        path.touch()
        give(path, b"y" * 16, flags)
    part_stopped(root)
    assert id_of(young) == b"y" * 16
    assert id_of(old) != b"y" * 16


def give(path, object_id, flags=0):
    value = records.pack(Record(object_id, flags, 0, 0), path.lstat().st_ino)
    os.setxattr(path, records.XATTR, value, follow_symlinks=False)


def born_ns(path):
    return syscalls.birth_ns(os.fsencode(path), follow=False)


def id_of(path):
    value = os.getxattr(path, records.XATTR, follow_symlinks=False)
    return records.unpack(value, path.lstat().st_ino).object


@pytest.fixture
def root(store):
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


PAIRS = [[b"a", b"b"], [b"a/file", b"b/file"], [b"a/link", b"b/link"]]


def test_they_are_found_by_their_records_whatever_their_type(root):
    """A second name of one object, a copied record and what is aside are none."""
    assert find_twins(root) == PAIRS


@pytest.mark.parametrize("is_known", [False, True])
async def test_all_but_one_get_an_id_of_their_own(store, root, is_known):
    tree = Tree(root)
    if is_known:
        for path in (b"a", b"a/file"):
            inode = tree.at(path)
            assert inode is not None
            tree.read_record(inode)
    assert await part_twins(tree) == 3
    tree.close_all()
    assert find_twins(root) == []
    for one, other in PAIRS:
        wanted = os.fsdecode(one)[2:3] or "d"
        ids = [id_of(Path(os.fsdecode(os.path.join(os.fsencode(store), path))))
               for path in (one, other)]  # fmt: skip
        assert (wanted * 16).encode() in ids
        assert ids[0] != ids[1]
    assert id_of(store / "alone") == b"o" * 16


@pytest.mark.parametrize("names", [("a", "z"), ("z", "a")], ids=["found last", "found first"])
def test_the_younger_one_keeps_it(store, root, names):
    """It is what the resync has made."""
    old, young = (store / f"{name} file" for name in names)
    old.touch()
    give(old, b"y" * 16)
    while True:  # until the file system's clock ticks
        young.touch()
        if born_ns(young) > born_ns(old):
            break
        young.unlink()
    give(young, b"y" * 16)
    part_stopped(root)
    assert id_of(young) == b"y" * 16
    assert id_of(old) != b"y" * 16


@pytest.fixture
def cut_off(store, root):
    """The state of a store into which a resync was cut off."""
    shutil.rmtree(store / ".replfs")
    state = State(root)
    state.update(
        role="secondary", volume=b"v" * 16, generation=b"g" * 16, inconsistent=True,
        uninitialized=False,
    )  # fmt: skip
    yield state
    state.close()


def test_a_store_that_is_promoted_over_a_resync_has_none(cut_off, root):
    promote_stopped(cut_off, root, force=True, tentative=False)
    assert find_twins(root) == []
    assert cut_off.identity().role == "primary"


def test_where_they_cannot_be_told_apart_it_is_not_promoted(cut_off, root, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Tree, "set_record", fail)
    with pytest.raises(NotInSync, match="No space left on device"):
        promote_stopped(cut_off, root, force=True, tentative=False)
    assert cut_off.identity().role == "secondary"
