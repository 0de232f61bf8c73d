"""Placing many objects with one message, on a real directory."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import trio
from helpers import acl

from replfs.core import ops
from replfs.node.replica.replica import Replica
from replfs.store import locators
from replfs.store import record as records
from replfs.store.record import LIMBO_ID, ROOT_ID
from replfs.store.tree import Tree

NOW = 1_700_000_000_123_456_789

pytestmark = pytest.mark.skipif(not records.PRIVILEGED, reason="owners and records are root's")


@pytest.fixture
def store(tmp_path):
    path = tmp_path / "store"
    path.mkdir()
    return path


@pytest.fixture
async def replica(store):
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd)
    replica = Replica(tree, lambda _op: None)
    async with trio.open_nursery() as nursery:
        await nursery.start(replica.run)
        yield replica
        nursery.cancel_scope.cancel()
    tree.close_all()
    os.close(fd)


def item(number, data=b"", **changes):
    found = {
        "mode": 0o100640, "uid": 1000, "gid": 2000, "rdev": 0, "size": len(data), "mtime": NOW,
        "target": b"", "policy": 0, "ack": 0, "xattrs": {},
    }  # fmt: skip
    attributes = ops.Attributes(**{**found, **changes})
    return ops.Item(bytes([number]) * 16, b"n%d" % number, attributes)


async def asked(replica, op, payload=None):
    send, receive = trio.open_memory_channel[ops.AnyAnswer](1)
    answer = replica.apply(1, op, payload, send.send_nowait)
    return await receive.receive() if answer is None else answer


async def placed(replica, *items_and_data):
    op = ops.PlaceMany(ROOT_ID, [one for one, _ in items_and_data])
    payload = b"".join(data for _, data in items_and_data)
    answer = await asked(replica, op, payload or None)
    assert isinstance(answer, ops.PlacedMany), answer
    return answer.results


NEW = ops.Placed(complete=True, created=True)


async def test_each_gets_all_there_is_to_it(replica, store):
    os.setxattr(store, acl.DEFAULT, acl.pack(7, 5, 5, users={7: 5}))
    own = acl.pack(6, 4, 0, users={9: 4})
    items = [
        (item(1, b"first"), b"first"),
        (item(2, policy=3, ack=1, mtime=-5), b""),
        (item(3, b"set-id", mode=0o106755), b"set-id"),
        (item(4, mode=0o120777, target=b"somewhere"), b""),
        (item(5, b"x", xattrs={b"user.a": b"b", b"system.posix_acl_access": own}), b"x"),
    ]
    assert await placed(replica, *items) == [NEW] * 5
    for one, data in items:
        path = store / one.name.decode()
        found = path.lstat()
        wanted = one.attributes
        assert (found.st_uid, found.st_gid, found.st_mtime_ns) == (1000, 2000, wanted.mtime)
        record = records.unpack(
            os.getxattr(path, records.XATTR, follow_symlinks=False), found.st_ino
        )
        assert record == (one.object, 0, wanted.policy, wanted.ack)
        if stat.S_ISLNK(wanted.mode):
            assert os.readlink(path) == "somewhere"
            continue
        assert path.read_bytes() == data
        assert found.st_mode & ~0o070 == wanted.mode & ~0o070
        xattrs = {name: os.getxattr(path, name) for name in map(os.fsencode, os.listxattr(path))}
        del xattrs[records.XATTR]
        assert xattrs == wanted.xattrs
    assert (store / "n3").stat().st_mode == 0o106755
    # Nothing of it is kept in memory.
    assert set(replica.tree.table.by_id) == {ROOT_ID, LIMBO_ID}


async def test_a_directory_is_gone_on_with(replica, store):
    results = await placed(replica, (item(1, mode=0o040700), b""), (item(2, b"x"), b"x"))
    assert results == [ops.Placed(complete=False, created=True), NEW]
    assert (store / "n1").is_dir()
    inode = replica.tree.table.by_id[item(1).object]
    assert inode.flags == records.INCOMPLETE
    below = ops.PlaceMany(item(1).object, [item(3, b"y")])
    assert await asked(replica, below, b"y") == ops.PlacedMany([NEW])
    assert (store / "n1" / "n3").read_bytes() == b"y"


async def test_they_are_unstable_until_the_next_checkpoint(replica):
    replica.unstable.begin()
    replica.unstable.settle(everywhere=True)
    assert await placed(replica, (item(1, b"x"), b"x"), (item(2), b"")) == [NEW] * 2
    log = replica.unstable.snapshot(everywhere=True)
    assert log is not None
    for number in (1, 2):
        assert not log.name_is_clean(ROOT_ID, b"n%d" % number)
        marks = log.marks(bytes([number]) * 16)
        assert marks is not None
        assert marks.handle


async def test_what_is_in_the_way_is_for_the_single_place(replica, store):
    (store / "n1").write_bytes(b"an earlier copy")
    (store / "n2").mkdir()
    assert await placed(replica, (item(3, b"as it was"), b"as it was")) == [NEW]
    (store / "n3").rename(store / "elsewhere")
    located = ops.Locate(item(3).object, ROOT_ID, b"elsewhere")
    replica.apply(1, located, None, print)
    results = await placed(
        replica,
        (item(1, b"new"), b"new"),
        (item(2, b"file"), b"file"),
        (item(3, b"as it is"), b"as it is"),
        (item(4, b"last"), b"last"),
    )
    assert results == [
        ops.Placed(complete=False, created=False),  # adopted, to be compared
        NEW,  # the directory was taken aside
        ops.Placed(complete=True, created=False),  # linked, as it was
        NEW,
    ]
    assert (store / "n1").read_bytes() == b"an earlier copy"
    assert (store / "n2").read_bytes() == b"file"
    assert (store / "n3").samefile(store / "elsewhere")
    # What has to be gone on with stays known.
    assert item(1).object in replica.tree.table.by_id


async def test_one_that_fails_is_not_complete_and_does_not_stop_the_others(replica, store):
    results = await placed(
        replica,
        (item(1, b"x", xattrs={b"no.such": b"prefix"}), b"x"),
        (item(2, b"y"), b"y"),
    )
    assert results == [ops.Done(errno.EOPNOTSUPP), NEW]
    assert (store / "n2").read_bytes() == b"y"
    record = records.unpack(os.getxattr(store / "n1", records.XATTR), (store / "n1").stat().st_ino)
    assert record == (item(1).object, records.INCOMPLETE, 0, 0)


async def test_what_was_made_is_known_as_unstable_with_its_place(replica):
    replica.unstable.begin()
    replica.unstable.settle(everywhere=True)
    assert await placed(replica, (item(1, b"x"), b"x"), (item(2), b"")) == [NEW, NEW]
    marks = replica.unstable.snapshot(everywhere=True)
    for number in (1, 2):
        found = marks.marks(item(number).object)
        assert found.tail == 0
        inode = locators.find(replica.tree, found.handle, item(number).object)
        assert inode.name == b"n%d" % number
        assert not marks.name_is_clean(ROOT_ID, b"n%d" % number)


async def test_an_unknown_directory_is_stale(replica):
    op = ops.PlaceMany(b"?" * 16, [item(1)])
    assert await asked(replica, op) == ops.Done(errno.ESTALE)


async def test_it_ends_with_the_session(replica, store, monkeypatch):
    monkeypatch.setattr("replfs.node.pacing.courtesy._SLICE_NS", 0)
    op = ops.PlaceMany(ROOT_ID, [item(number) for number in range(1, 100)])
    answers: list[ops.AnyAnswer] = []
    assert replica.apply(1, op, None, answers.append) is None
    while not os.path.lexists(store / "n3"):
        await trio.lowlevel.checkpoint()
    replica.forget_all()
    while not answers:
        await trio.lowlevel.checkpoint()
    assert answers == [ops.Done(errno.EINTR)]
    assert not os.path.lexists(store / "n99")


async def test_what_a_crash_leaves_is_adopted_and_compared(replica, store, monkeypatch):
    def dies(*_args, **_keywords):
        raise SystemExit

    # Its id is written last; whatever is done after the crash is not done.
    with monkeypatch.context() as patch:
        patch.setattr(os, "setxattr", dies)
        patch.setattr(os, "unlink", dies)
        with pytest.raises(BaseExceptionGroup):
            async with trio.open_nursery() as nursery:
                replica.run_in(nursery)
                op = ops.PlaceMany(ROOT_ID, [item(1, b"data")])
                assert replica.apply(1, op, b"data", print) is None
    assert (store / "n1").read_bytes() == b"data"
    replica.forget_all()
    async with trio.open_nursery() as nursery:
        replica.run_in(nursery)
        results = await placed(replica, (item(1, b"data"), b"data"))
    assert results == [ops.Placed(complete=False, created=False)]
