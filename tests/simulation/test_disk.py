"""The simulation's disk: what a loss of power takes is what a disk may lose, and no more."""

from __future__ import annotations

import os
import random
import stat

import pytest
import trio
from simulation.harness.disk import AT_FDCWD, PAGE, Disk, graves
from simulation.harness.life import Life, acting, simulated

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.node.replica.beside import Beside
from replfs.node.replica.replica import Replica
from replfs.store import syscalls
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

NAMES = ("a", "b", "c")


def seen(root):
    """Everything of a tree that a loss of power can change."""
    found = {}
    for directory, below, files in os.walk(root):
        for name in [".", *below, *files]:
            path = f"{directory}/{name}"
            status = os.lstat(path)
            data = b""
            if stat.S_ISREG(status.st_mode):
                with open(path, "rb") as file:
                    data = file.read()
            xattrs = {
                one: os.getxattr(path, one, follow_symlinks=False)
                for one in os.listxattr(path, follow_symlinks=False)
            }
            found[path] = (
                status.st_ino, status.st_mode, status.st_uid, status.st_mtime_ns, data, xattrs,
                0 if stat.S_ISDIR(status.st_mode) else status.st_nlink,
            )  # fmt: skip
    return found


class Busy:
    """Makes random changes in a store, and flushes nothing."""

    def __init__(self, root, rng):
        self.root = root
        self.rng = rng

    def path(self):
        parts = [self.rng.choice(NAMES) for _ in range(self.rng.choice((1, 1, 2)))]
        return "/".join([str(self.root), *parts])

    def change(self):
        rng, path = self.rng, self.path()
        kind = rng.randrange(12)
        if kind == 0:
            os.mkdir(path)
        elif kind == 1:
            os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o644))
        elif kind == 2:
            os.unlink(path)
        elif kind == 3:
            os.rmdir(path)
        elif kind == 4:
            os.rename(path, self.path())
        elif kind == 5:
            one, other = os.fsencode(path), os.fsencode(self.path())
            syscalls.renameat2(AT_FDCWD, one, AT_FDCWD, other, syscalls.RENAME_EXCHANGE)
        elif kind == 6:
            os.link(path, self.path())
        elif kind == 7:
            os.symlink("x", path)
        elif kind == 8:
            os.setxattr(path, b"user.x", rng.randbytes(4), follow_symlinks=False)
        elif kind == 9:
            os.chown(path, rng.randrange(5), 0, follow_symlinks=False)
        else:
            self.contents(path, truncate=kind == 10)

    def contents(self, path, *, truncate):
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        try:
            if truncate:
                os.ftruncate(fd, self.rng.randrange(3 * PAGE))
            else:
                size = self.rng.randrange(1, 2 * PAGE)
                os.pwrite(fd, self.rng.randbytes(size), self.rng.randrange(3 * PAGE))
                syscalls.utimens(fd, None, self.rng.randrange(1 << 40))
        finally:
            os.close(fd)


class Loss(random.Random):
    """Chooses how many changes are kept, and that no bytes are lost or kept besides."""

    def __init__(self, kept):
        super().__init__(0)
        self.kept = kept

    def choice(self, values):
        return self.kept if len(values) == 4 else values[0]


@pytest.fixture
def world():
    with simulated(0) as world:
        yield world


@pytest.fixture
def life(tmp_path, world):
    store = os.fsencode(tmp_path / "store")
    os.mkdir(store)
    life = Life("test", random.Random(0), lambda: None)
    life.disk = Disk(store, store + b"-graveyard")
    return life


@pytest.mark.parametrize("seed", range(40))
def test_a_loss_leaves_the_state_after_some_change(life, seed):
    disk = life.disk
    root = os.fsdecode(disk.path)
    rng = random.Random(seed)
    busy = Busy(root, rng)
    after = {0: seen(root)}
    with acting(life):
        for _ in range(60):
            try:
                busy.change()
            except OSError:
                pass
            after[disk.pending] = seen(root)
    assert disk.pending > 5
    kept = rng.choice(sorted(after))
    disk.lose_power(Loss(kept))
    assert seen(root) == after[kept]
    assert disk.pending == 0
    assert not graves


def test_what_is_flushed_stays(life):
    disk = life.disk
    root = os.fsdecode(disk.path)
    for seed in range(40):
        rng = random.Random(seed)
        with acting(life):
            fd = os.open(f"{root}/file", os.O_CREAT | os.O_RDWR, 0o644)
            data = rng.randbytes(rng.randrange(3 * PAGE))
            os.pwrite(fd, data, 0)
            os.fdatasync(fd)
            os.pwrite(fd, b"later", len(data))
            os.close(fd)
            os.mkdir(f"{root}/later")
        disk.lose_power(rng)
        with open(f"{root}/file", "rb") as file:
            assert file.read(len(data)) == data
        with acting(life):
            if os.path.exists(f"{root}/later"):
                os.rmdir(f"{root}/later")
            os.unlink(f"{root}/file")


def test_bytes_that_are_flushed_stay_where_their_time_does_not(life):
    """fdatasync after a write in place, which has no size to flush: only the time may go."""
    root = os.fsdecode(life.disk.path)
    with acting(life):
        fd = os.open(f"{root}/file", os.O_CREAT | os.O_RDWR, 0o644)
        os.pwrite(fd, b"o" * 2 * PAGE, 0)
        os.fsync(fd)
        os.pwrite(fd, b"new", 10)
        syscalls.utimens(fd, None, 1 << 40)
        os.fdatasync(fd)
        os.close(fd)
    life.disk.lose_power(Loss(0))
    with open(f"{root}/file", "rb") as file:
        assert file.read(20) == b"o" * 10 + b"new" + b"o" * 7
        assert os.fstat(file.fileno()).st_mtime_ns != 1 << 40


def test_pages_are_lost_one_by_one(life):
    disk = life.disk
    root = os.fsdecode(disk.path)
    found = set()
    for seed in range(60):
        with acting(life):
            fd = os.open(f"{root}/{seed}", os.O_CREAT | os.O_RDWR, 0o644)
            os.pwrite(fd, b"o" * 3 * PAGE, 0)
            os.fsync(fd)
            os.pwrite(fd, b"n" * 3 * PAGE, 0)
            os.close(fd)
        disk.lose_power(random.Random(seed))
        with open(f"{root}/{seed}", "rb") as file:
            found.add(file.read()[::PAGE])
    assert found >= {b"ooo", b"nnn", b"onn", b"nno"}


def test_an_unlinked_file_has_no_links_left(life):
    root = os.fsdecode(life.disk.path)
    with acting(life):
        fd = os.open(f"{root}/a", os.O_CREAT | os.O_RDWR, 0o644)
        os.link(f"{root}/a", f"{root}/b")
        os.unlink(f"{root}/a")
        assert os.fstat(fd).st_nlink == 1
        os.unlink(f"{root}/b")
        assert os.fstat(fd).st_nlink == 0
        os.close(fd)


def test_what_a_resync_made_is_stable_before_it_is_over(life, world):
    disk = life.disk
    at_the_end, pending = [], []

    async def main():
        fd = os.open(disk.path, os.O_RDONLY | os.O_DIRECTORY)
        tree = Tree(fd)
        replica = Replica(tree, lambda _: at_the_end.append(disk.pending))
        attributes = ops.Attributes(0o100644, 0, 0, 0, 0, 0, b"", 0, 0, {})
        place = ops.Place(b"o" * 16, ROOT_ID, b"name", attributes, [])
        over = ops.Phase(inconsistent=False, generation=b"g" * 16, history=[])
        answers = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(replica.run)
            await trio.sleep(1.0)
            for op in (place, over):
                assert replica.apply(1, op, None, answers.append) is None
                await trio.sleep(1.0)
                pending.append(disk.pending)
            nursery.cancel_scope.cancel()
        tree.close_all()
        os.close(fd)
        assert answers == [ops.Placed(complete=False, created=True), ops.Done(0)]

    with acting(life):
        trio.run(main, clock=world.clock)
    assert pending[0] > 0
    assert at_the_end == [0]


@pytest.mark.parametrize("seed", range(8))
def test_what_is_kept_beside_is_on_the_disk_before_its_original_changes(life, world, seed):
    """Whatever a loss of power takes of what came after, one of the two is there."""
    disk = life.disk
    root = os.fsdecode(disk.path)
    mine = random.Random(seed).randbytes(3 * PAGE + 100)
    suspects = DirtyLog()
    suspects.mark_unknown(ROOT_ID, directory=True, deep=True)

    async def main():
        fd = os.open(disk.path, os.O_RDONLY | os.O_DIRECTORY)
        tree = Tree(fd)
        beside = Beside(tree, suspects, "a-now", lambda _: None)
        inode = tree.lookup(tree.lookup(tree.root, b"above")[0], b"file")[0]
        await beside.keep_contents(inode)
        os.pwrite(tree.data_fd(inode), bytes(len(mine)), 0)
        tree.close_all()
        os.close(fd)

    with acting(life):
        os.mkdir(f"{root}/above")
        fd = os.open(f"{root}/above/file", os.O_CREAT | os.O_RDWR, 0o644)
        os.pwrite(fd, mine, 0)
        os.fsync(fd)
        os.close(fd)
        trio.run(main, clock=world.clock)
    disk.lose_power(random.Random(seed))
    found = []
    for path in ("above/file", ".replfs/kept/a-now/above/file"):
        if os.path.exists(f"{root}/{path}"):
            with open(f"{root}/{path}", "rb") as file:
                found.append(file.read())
    assert mine in found
