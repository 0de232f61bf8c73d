"""What has policy `none` on a replica belongs to its node: no primary's resync touches it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import trio
from helpers.replicas import DIRECTORY, FILE, Store, object_id

from replfs.core import ops
from replfs.core.policy import Policy
from replfs.store import record as records
from replfs.store.record import ROOT_ID

pytestmark = pytest.mark.skipif(not records.PRIVILEGED, reason="owners and records are root's")

FIRST, SECOND, INSIDE = object_id(11), object_id(12), object_id(13)


def attributes(mode: int = FILE, size: int = 0, policy: int = 0) -> ops.Attributes:
    """Of an object of the primary's."""
    return ops.Attributes(
        mode=mode, uid=0, gid=0, rdev=0, size=size, mtime=7, target=b"", policy=policy, ack=0,
        xattrs={},
    )  # fmt: skip


def place(wanted: bytes, name: bytes, mode: int = FILE, parent: bytes = ROOT_ID) -> ops.Place:
    return ops.Place(wanted, parent, name, attributes(mode), [], whole=False)


@pytest.fixture(params=["known", "unknown"])
async def store(tmp_path, request):
    """A file and a directory of policy `none`, of which a primary has objects with their ids.

    They are known in this process, or not seen by it yet.
    """
    made = Store(tmp_path / "store", "*.tmp")
    made.make(11, b"file")
    made.write(11, 0, b"its own")
    made.make(12, b"dir", mode=DIRECTORY)
    made.make(13, b"inside", SECOND)
    made.write(13, 0, b"its own, too")
    for name in (b"file", b"dir"):
        made.tree.set_policy(made.tree.lookup(made.tree.root, name)[0], Policy.NONE, 0)
    made.replica.forget_all()
    if request.param == "unknown":
        made.close()
        made = Store(tmp_path / "store", "*.tmp")
    async with trio.open_nursery() as nursery:
        await nursery.start(made.replica.run)
        yield made
        nursery.cancel_scope.cancel()
    made.close()


def contents(top: Path) -> dict[str, bytes]:
    """Of all files below, by path; what replfs keeps included."""
    return {
        str(path.relative_to(top)): path.read_bytes() for path in top.rglob("*") if path.is_file()
    }


OWN = {"file": b"its own", "dir/inside": b"its own, too"}


async def test_it_stays_where_the_primary_has_nothing(store):
    for name in (b"file", b"dir"):
        await store.asked(ops.Gather(ROOT_ID, [name], [ops.NO_OBJECT]))
        await store.asked(ops.Clear(ROOT_ID, name))
    await store.asked(ops.EmptyLimbo())
    assert contents(store.path) == OWN
    assert store.kept == []


@pytest.mark.parametrize("is_same", [True, False], ids=["the-same-object", "another-one"])
async def test_it_gives_up_a_name_that_the_primary_has_and_is_kept(store, is_same):
    """Also where the primary has under the name the object that became `none` here."""
    wanted = (FIRST, SECOND) if is_same else (object_id(21), object_id(22))
    await store.asked(ops.Gather(ROOT_ID, [b"file", b"dir"], list(wanted)))
    assert await store.asked(place(wanted[0], b"file")) == ops.Placed(complete=False, created=True)
    made = await store.asked(place(wanted[1], b"dir", DIRECTORY))
    assert made == ops.Placed(complete=False, created=True)
    await store.asked(ops.Data(wanted[0], 0), b"the primary's")
    await store.asked(ops.Finish(wanted[0], attributes(size=13)))
    await store.asked(ops.EmptyLimbo())
    assert contents(store.path) == {
        "file": b"the primary's",
        ".replfs/kept/file": b"its own",
        ".replfs/kept/dir/inside": b"its own, too",
    }
    assert store.kept == [".replfs/kept/file", ".replfs/kept/dir"]


async def test_it_is_not_what_the_primary_has_elsewhere(store):
    """No link, and no move: both would let the primary write into it."""
    await store.asked(ops.Locate(FIRST, ROOT_ID, b"file"))
    for op in (
        ops.Gather(ROOT_ID, [b"file", b"dir", b"new"], [ops.NO_OBJECT] * 3),
        place(FIRST, b"new"),
        ops.Data(FIRST, 0),
        place(SECOND, b"moved", DIRECTORY),
        place(INSIDE, b"out"),
    ):
        await store.asked(op, b"the primary's" if isinstance(op, ops.Data) else None)
    found = contents(store.path)
    assert found == {**OWN, "new": b"the primary's", "out": b""}
    assert [os.stat(store.path / name).st_nlink for name in ("file", "new", "out")] == [1, 1, 1]
    assert (store.path / "moved").is_dir()


async def test_it_is_not_found_inside_what_was_taken_aside(store):
    """What has lost its directory, which the primary removed, is kept, and not given to others."""
    store.make(14, b"gone", mode=DIRECTORY)
    root, gone = store.tree.root, store.tree.table.by_id[object_id(14)]
    own = store.tree.lookup(root, b"file")[0]
    store.tree.rename(root, b"file", gone, b"file", 0, inode=own, replaced=None, replaced_links=0)
    store.tree.drop_unused(own)
    (store.path / "gone/a.tmp").write_bytes(b"by its name")
    await store.asked(ops.Gather(ROOT_ID, [b"gone"], [ops.NO_OBJECT]))
    made = await store.asked(place(FIRST, b"new"))
    assert made == ops.Placed(complete=False, created=True)
    await store.asked(ops.EmptyLimbo())
    assert contents(store.path) == {
        "dir/inside": b"its own, too",
        "new": b"",
        ".replfs/kept/file": b"its own",
        ".replfs/kept/a.tmp": b"by its name",
    }
    assert sorted(store.kept) == [".replfs/kept/a.tmp", ".replfs/kept/file"]


async def test_it_stays_so_where_the_object_that_has_its_id_was_seen_first(store):
    """What was not known when the primary's was made claims the same id."""
    await store.asked(place(FIRST, b"new"))
    await store.asked(ops.Gather(ROOT_ID, [b"file"], [ops.NO_OBJECT]))
    own = store.tree.lookup(store.tree.root, b"file")[0]
    store.tree.read_record(own)
    assert own.policy == Policy.NONE
    assert store.tree.ensure_id(own) != FIRST
    assert records.unpack(os.getxattr(store.path / "file", records.XATTR), own.ino) == (
        records.Record(own.id, 0, Policy.NONE, 0)
    )
    assert contents(store.path) == {**OWN, "new": b""}


async def test_by_its_name_it_stays_too(store):
    (store.path / "a.tmp").write_bytes(b"by its name")
    await store.asked(ops.Gather(ROOT_ID, [b"a.tmp"], [ops.NO_OBJECT]))
    await store.asked(ops.Clear(ROOT_ID, b"a.tmp"))
    assert contents(store.path) == {**OWN, "a.tmp": b"by its name"}


async def test_what_a_primary_says_to_its_objects_does_not_reach_it(store):
    """The primary learns that it has to look at the names again."""
    for place_of in ((FIRST, ROOT_ID, b"file"), (SECOND, ROOT_ID, b"dir")):
        await store.asked(ops.Locate(*place_of))
    await store.asked(ops.Locate(INSIDE, SECOND, b"inside"))
    for number in (11, 13):
        assert store.try_to(ops.Write(object_id(number), 0, 7), b"overwritten")
    assert store.try_to(ops.Unlink(FIRST, ROOT_ID, b"file", directory=False, parent_mtime=7))
    assert contents(store.path) == OWN


async def test_only_its_name_is_told(store):
    (store.path / "plain").write_bytes(b"x")
    listed = await store.asked(ops.List(ROOT_ID, b"", digests=True))
    assert isinstance(listed, ops.Listing)
    assert {entry.name: entry.object for entry in listed.entries} == {
        b"dir": b"", b"file": b"", b"plain": b"",
    }  # fmt: skip
    assert not any(entry.digest for entry in listed.entries if entry.name != b"plain")
    for name in (b"file", b"dir"):
        found = await store.asked(ops.Inspect(ROOT_ID, name))
        assert found == ops.Inspected(ops.NO_OBJECT, complete=False, attributes=None)


async def test_no_primary_makes_anything_its_own(store):
    """Attributes that were on their way while the policy was set: the object is to be removed."""
    store.make(15, b"late")
    await store.asked(ops.Finish(object_id(15), attributes(policy=Policy.NONE)))
    await store.asked(ops.Clear(ROOT_ID, b"late"))
    await store.asked(ops.EmptyLimbo())
    assert contents(store.path) == OWN


async def test_with_a_root_of_that_policy_everything_is(tmp_path):
    """Whatever the root becomes by the primary that is followed then."""
    made = Store(tmp_path / "store")
    made.make(11, b"file")
    made.write(11, 0, b"its own")
    made.make(12, b"dir", mode=DIRECTORY)
    made.make(13, b"inside", SECOND)
    os.symlink("elsewhere", made.path / "link")
    made.tree.set_policy(made.tree.root, Policy.NONE, 0)
    made.replica.own.claim_root()
    made.replica.forget_all()
    async with trio.open_nursery() as nursery:
        await nursery.start(made.replica.run)
        for name in (b"file", b"dir", b"link"):
            await made.asked(ops.Gather(ROOT_ID, [name], [ops.NO_OBJECT]))
            await made.asked(ops.Clear(ROOT_ID, name))
        await made.asked(place(FIRST, b"new"))
        await made.asked(ops.Finish(ROOT_ID, attributes(DIRECTORY)))
        await made.asked(ops.EmptyLimbo())
        nursery.cancel_scope.cancel()
    assert contents(made.path) == {"file": b"its own", "dir/inside": b"", "new": b""}
    assert os.readlink(made.path / "link") == "elsewhere"
    made.close()
