"""Loss of power for real: what the disk had not written is gone, on either side, and on both.

A record outside replfs says what applications were told. Whatever was acknowledged in sync is on
the side that kept its memory at once, and on both when they are in sync again; what was fsynced is
there also when both sides lost power.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers.cases import outcome
from helpers.disks import CrashDisk, crash_disk
from helpers.group import Group
from helpers.nodes import Node, Pair, make_base, remove_base, unmount_all, wait_for

pytestmark = pytest.mark.mounted

NEVER = ("--checkpoint-interval", "1h", "--peer-timeout", "2s")
SLOWLY = (*NEVER, "--resync-rate", "1MiB")
OFTEN = ("--checkpoint-interval", "200ms", "--peer-timeout", "2s")


def whole(written: int | None, data: bytes) -> None:
    """EIO for a short write.

    The kernel sends a part of a page by itself where it must: what the end of the mount cuts off
    between two of its requests is a short write, and no error.
    """
    if written != len(data):
        raise OSError(errno.EIO, os.strerror(errno.EIO))


class Writer(threading.Thread):
    """Changes one directory all the time, and keeps what it was told."""

    def __init__(self, directory: Path, seed: int) -> None:
        super().__init__(daemon=True)
        self.directory = directory
        self.rng = random.Random(seed)
        self.files: dict[str, bytes] = {}
        """What must be there, by name."""
        self.synced: dict[str, bytes] = {}
        """What was fsynced, with its directory, and not touched since."""
        self.doubtful: set[str] = set()
        """Names of the operation that was never answered."""
        self.operations = 0
        self.rests = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(OSError):
            os.mkdir(self.directory)
            while not self.rests.is_set():
                self.step()
                self.operations += 1

    def step(self) -> None:
        names = sorted(self.files.keys() - self.synced.keys())
        kind = self.rng.choice(("make", "write", "write", "append", "rename", "unlink", "sync"))
        if kind == "make" or not names:
            self.make(f"f{self.rng.randrange(40)}")
        elif kind == "write":
            self.write(self.rng.choice(names))
        elif kind == "append":
            self.append(self.rng.choice(names))
        elif kind == "rename":
            self.rename(self.rng.choice(names), f"f{self.rng.randrange(40)}")
        elif kind == "unlink":
            self.unlink(self.rng.choice(names))
        elif len(self.synced) < 30:
            self.sync(f"s{len(self.synced)}")

    @contextmanager
    def about(self, *names: str) -> Iterator[None]:
        self.doubtful = set(names)
        yield
        self.doubtful = set()

    def data(self) -> bytes:
        return self.rng.randbytes(self.rng.choice((10, 5000, 90_000)))

    def make(self, name: str) -> None:
        data = self.data()
        with self.about(name):
            (self.directory / name).write_bytes(data)
        self.files[name] = data

    def write(self, name: str) -> None:
        """Over what is there, in place."""
        old = self.files[name]
        offset = self.rng.randrange(len(old) + 1)
        data = self.data()[:4096]
        with self.about(name), (self.directory / name).open("r+b", buffering=0) as file:
            whole(os.pwrite(file.fileno(), data, offset), data)
        self.files[name] = old[:offset] + data + old[offset + len(data) :]

    def append(self, name: str) -> None:
        data = self.data()[:4096]
        with self.about(name), (self.directory / name).open("ab", buffering=0) as file:
            whole(file.write(data), data)
        self.files[name] += data

    def rename(self, name: str, new: str) -> None:
        with self.about(name, new):
            os.rename(self.directory / name, self.directory / new)
        self.files[new] = self.files.pop(name)

    def unlink(self, name: str) -> None:
        with self.about(name):
            os.unlink(self.directory / name)
        del self.files[name]

    def sync(self, name: str) -> None:
        data = self.data()
        with self.about(name):
            self.write_stable(self.directory / name, data)
            self.files[name] = data
            fd = os.open(self.directory, os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        self.synced[name] = data

    def write_stable(self, path: Path, data: bytes) -> None:
        """In each of the ways in which a program may ask for it."""
        how = self.rng.choice((os.O_SYNC, os.O_DSYNC, os.fsync, os.fdatasync))
        flags = how if isinstance(how, int) else 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        try:
            whole(os.write(fd, data), data)
            if not isinstance(how, int):
                how(fd)
        finally:
            os.close(fd)

    def check(self, store: Path, files: dict[str, bytes], *, exactly: bool) -> None:
        """All of `files` is in `store`, and with `exactly` nothing else."""
        directory = store / self.directory.name
        there = {path.name: path.read_bytes() for path in directory.iterdir()}
        wrong = [
            (name, len(data), len(there[name]) if name in there else None)
            for name, data in files.items()
            if name not in self.doubtful and there.get(name) != data
        ]
        assert not wrong, f"{store}: {wrong} (name, size, size there)"
        if exactly:
            extra = there.keys() - files.keys() - self.doubtful
            assert not extra, f"{store}: {extra} are back"


class Rig:
    """A pair whose stores can lose power, and writers at work on its mount."""

    def __init__(self, pair: Pair, disks: dict[str, CrashDisk], seed: int) -> None:
        self.pair = pair
        self.disks = disks
        self.rng = random.Random(seed)
        self.writers: list[Writer] = []

    def work(self, seconds: float, count: int = 3) -> None:
        """Let writers begin, and work for a while."""
        for _ in range(count):
            name = f"w{len(self.writers)}"
            self.writers.append(Writer(self.pair.mountpoint / name, self.rng.randrange(1000)))
            self.writers[-1].start()
        before = sum(writer.operations for writer in self.writers)
        time.sleep(seconds * (0.5 + self.rng.random()))
        wait_for(
            lambda: sum(writer.operations for writer in self.writers) > before + 100,
            30,
            "writers to write",
        )

    def end_work(self) -> None:
        for writer in self.writers:
            writer.rests.set()
        for writer in self.writers:
            writer.join(30)
            assert not writer.is_alive()

    def lose_power(self, *nodes: Node) -> None:
        """Nodes and disks stop at one moment; what is left is mounted again."""
        for node in nodes:
            node.freeze()
        disks = [self.disks[node.store.name] for node in nodes]
        for disk in disks:
            disk.cut()
        for node in nodes:
            node.kill9()
        for disk in disks:
            disk.come_back()

    def check(self, *stores: Path, synced: bool = False) -> None:
        for store in stores:
            for writer in self.writers:
                writer.check(store, writer.synced if synced else writer.files, exactly=not synced)

    def wait_stable(self) -> None:
        def is_stable() -> bool:
            assert self.pair.peer()["unstable_objects"] == 0
            assert self.pair.agent.status()["unstable_objects"] == 0
            return True

        wait_for(is_stable, 30, "nothing to be unstable", 0.05)


@contextmanager
def rig(
    sides: tuple[str, ...],
    kind: str,
    options: tuple[str, ...],
    seed: int,
    prepare: Callable[[Pair], None] | None = None,
) -> Iterator[Rig]:
    """A pair in sync, everything stable, with the stores of `sides` on disks of their own.

    With *prepare*, which fills the stores, nothing is started.
    """
    base = make_base()
    try:
        with ExitStack() as stack:
            disks = {}
            for side in sides:
                place = base / side
                place.mkdir()
                disks[side] = stack.enter_context(crash_disk(base, place, kind))
            pair = Pair(base=base, mount_arguments=options, prepare=prepare, start=prepare is None)
            found = Rig(stack.enter_context(pair), disks, seed)
            if prepare is None:
                found.wait_stable()
            yield found
            pair.check_alive()
    finally:
        remove_base(base)


@pytest.mark.parametrize(
    ("kind", "options", "seed"),
    [("xfs", NEVER, 1), ("ext4", NEVER, 2), ("xfs", OFTEN, 3), ("ext4", OFTEN, 4)],
)
def test_a_primary_that_lost_power_has_what_its_peer_kept(kind, options, seed):
    with rig(("primary",), kind, options, seed) as found:
        pair = found.pair
        found.work(0.7)
        found.lose_power(pair.mount)
        found.end_work()
        # The survivor has everything that was acknowledged.
        found.check(pair.secondary_store)
        pair.mount.start()
        # And so has the primary, before it serves.
        found.check(pair.mountpoint)
        assert b"fetched from" in pair.mount.log_since_start()
        assert b"everything is compared" not in pair.mount.log_since_start()
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store)
        pair.assert_equal()


@pytest.mark.parametrize(("kind", "options", "seed"), [("xfs", NEVER, 5), ("ext4", OFTEN, 6)])
def test_a_secondary_that_lost_power_is_compared_where_it_may_have_lost_something(
    kind, options, seed
):
    with rig(("secondary",), kind, options, seed) as found:
        pair = found.pair
        found.work(0.7)
        found.lose_power(pair.agent)
        pair.agent.start()
        # Until the primary has noticed, it still says that its peer is in sync.
        wait_for(
            lambda: b"it may have lost are compared" in pair.mount.log_since_start(),
            30,
            "the primary to meet its peer again",
            0.05,
        )
        pair.wait_in_sync()
        found.end_work()
        assert b"everything is compared" not in pair.mount.log_since_start()
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store)
        pair.assert_equal()


@pytest.mark.parametrize(("kind", "seed"), [("xfs", 7), ("ext4", 8)])
def test_what_was_fsynced_survives_when_both_lose_power(kind, seed):
    with rig(("primary", "secondary"), kind, NEVER, seed) as found:
        pair = found.pair
        found.work(0.7)
        wait_for(lambda: sum(len(one.synced) for one in found.writers) > 10, 60, "fsyncs")
        found.lose_power(pair.mount, pair.agent)
        found.end_work()
        found.check(pair.primary_store, pair.secondary_store, synced=True)
        pair.agent.start()
        pair.mount.start()
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store, synced=True)
        pair.assert_equal()


def test_a_primary_that_lost_power_waits_for_its_peer_and_starts_without_it_only_if_told_to():
    with rig(("primary",), "xfs", (*NEVER, "--start-wait", "1s"), 9) as found:
        pair = found.pair
        found.work(0.3)
        found.lose_power(pair.mount)
        found.end_work()
        pair.agent.stop()
        pair.mount.start(wait=False)
        assert pair.mount.wait_ended() == 4
        assert b"Start that node, or give up" in pair.mount.log_since_start()
        assert not os.listdir(pair.mountpoint)
        # With the peer there again nothing is lost.
        pair.agent.start()
        pair.mount.start()
        found.check(pair.mountpoint)
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store)
        pair.assert_equal()


def test_a_primary_that_starts_alone_gives_up_what_it_lost():
    with rig(("primary",), "xfs", (*NEVER, "--start-wait", "500ms", "--start-alone"), 10) as found:
        pair = found.pair
        found.work(0.3)
        found.lose_power(pair.mount)
        found.end_work()
        generation = pair.agent.status()["generation"]
        pair.agent.stop()
        pair.mount.start()
        assert b"starting alone" in pair.mount.log_since_start()
        assert pair.mount.status()["generation"] != generation
        (pair.mountpoint / "alone").write_bytes(b"x")
        pair.agent.start()
        pair.wait_in_sync()
        # What is here counts, and what was fsynced is here.
        found.check(pair.primary_store, pair.secondary_store, synced=True)
        pair.assert_equal()


def test_what_was_fsynced_without_the_peer_is_carried_after_a_loss_of_power():
    """The mark and the generation are as durable as the data, for a call that returned."""
    with rig(("primary", "secondary"), "xfs", NEVER, 11) as found:
        pair = found.pair
        (pair.mountpoint / "file").write_bytes(b"old" * 50_000)
        found.wait_stable()
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        fd = os.open(pair.mountpoint / "file", os.O_WRONLY)
        os.pwrite(fd, b"new" * 50_000, 0)
        os.fsync(fd)
        # Behind it more that nobody was promised.
        os.pwrite(fd, b"lost", 0)
        (pair.mountpoint / "lost").write_bytes(b"x")
        found.lose_power(pair.mount)
        with contextlib.suppress(OSError):
            os.close(fd)
        found.disks["secondary"].cut()
        found.disks["secondary"].come_back()
        assert (pair.primary_store / "file").read_bytes()[4:] == (b"new" * 50_000)[4:]
        pair.agent.start()
        pair.mount.start()
        pair.wait_in_sync()
        assert (pair.secondary_store / "file").read_bytes()[4:] == (b"new" * 50_000)[4:]
        pair.assert_equal()


def wait_carried(path: Path) -> None:
    wait_for(lambda: os.getxattr(path, "user.replfs.state") == b"in-sync", 30, "one file", 0.02)


def write_both(found: Rig, name: str, data: bytes) -> None:
    """A write in the middle of a file, which the replica has when it is acknowledged."""
    fd = os.open(found.pair.mountpoint / name, os.O_WRONLY)
    os.pwrite(fd, data, 1000)
    os.close(fd)
    assert (found.pair.secondary_store / name).read_bytes()[1000 : 1000 + len(data)] == data


def test_what_both_acknowledged_before_a_peer_had_all_survives_a_loss_of_power():
    """During the first copy, and after an fsync put on the disk that the peer lacks the bytes."""
    large = random.Random(15).randbytes(8 << 20)

    def prepare(pair: Pair) -> None:
        (pair.primary_store / "small").write_bytes(b"x" * 100_000)
        (pair.primary_store / "large").write_bytes(large)
        os.sync()

    with rig(("primary",), "xfs", SLOWLY, 15, prepare) as found:
        pair = found.pair
        pair.agent.start()
        pair.mount.start()
        wait_carried(pair.mountpoint / "small")
        assert pair.peer()["state"] == "baseline"
        pair.mount.replfs("pause", pair.mountpoint)
        fd = os.open(pair.mountpoint / "small", os.O_WRONLY)
        os.pwrite(fd, b"recorded", 1000)
        os.fsync(fd)
        os.close(fd)
        pair.mount.replfs("resume", pair.mountpoint)
        wait_carried(pair.mountpoint / "small")
        (pair.mountpoint / "new").write_bytes(b"made by both")
        write_both(found, "small", b"acknowledged")
        found.lose_power(pair.mount)
        assert b"acknowledged" not in (pair.primary_store / "small").read_bytes()
        pair.mount.start()
        assert (pair.mountpoint / "small").read_bytes()[1000:1012] == b"acknowledged"
        assert (pair.mountpoint / "new").read_bytes() == b"made by both"
        # What the replica had half of is here, whole.
        assert (pair.mountpoint / "large").read_bytes() == large


def test_what_was_fsynced_while_everything_is_compared_survives_a_loss_of_power():
    """The peer has an older version, and all that is said of that file is that it may differ."""
    new = random.Random(16).randbytes(6 << 20)
    with rig(("primary",), "xfs", SLOWLY, 16) as found:
        pair = found.pair
        (pair.mountpoint / "file").write_bytes(bytes(len(new)))
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        pair.mount.replfs("resync", "--full", pair.mountpoint)
        fd = os.open(pair.mountpoint / "file", os.O_WRONLY)
        whole(os.pwrite(fd, new, 0), new)
        os.fsync(fd)
        os.close(fd)
        pair.agent.start()
        there = pair.secondary_store / "file"
        # By then the marks that say so are on the disk.
        wait_for(lambda: any(there.read_bytes()[2 << 20 :]), 30, "a part to be carried", 0.02)
        found.lose_power(pair.mount)
        assert there.read_bytes() != new
        pair.mount.start()
        assert (pair.mountpoint / "file").read_bytes() == new


def test_a_replica_whose_disk_dies_is_left_behind_and_comes_back():
    with rig(("secondary",), "xfs", OFTEN, 12) as found:
        pair = found.pair
        found.work(0.3)
        # From here on every access is EIO, and the node lives on.
        found.disks["secondary"].cut()
        wait_for(lambda: pair.peer()["state"] != "in-sync", 30, "the replica to be left behind")
        before = sum(writer.operations for writer in found.writers)
        wait_for(
            lambda: sum(writer.operations for writer in found.writers) > before + 50,
            30,
            "the mount to go on",
        )
        wait_for(lambda: os.strerror(errno.EIO) in str(pair.peer()), 30, "the reason to be told")
        pair.agent.kill9()
        found.disks["secondary"].come_back()
        pair.agent.start()
        pair.wait_in_sync()
        found.end_work()
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store)
        pair.assert_equal()


def test_a_replica_whose_disk_turns_read_only_is_left_behind_and_comes_back():
    with rig(("secondary",), "ext4", OFTEN, 13) as found:
        pair = found.pair
        found.work(0.3)
        found.disks["secondary"].turn_read_only()
        wait_for(lambda: pair.peer()["state"] != "in-sync", 30, "the replica to be left behind")
        found.end_work()
        wait_for(lambda: os.strerror(errno.EROFS) in str(pair.peer()), 30, "the reason to be told")
        found.check(pair.primary_store)
        pair.agent.kill9()
        unmount_all(pair.secondary_store)
        found.disks["secondary"].attach()
        pair.agent.start()
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store)
        pair.assert_equal()


def test_a_primary_whose_disk_dies_says_so_and_has_everything_when_it_comes_back():
    with rig(("primary",), "xfs", OFTEN, 14) as found:
        pair = found.pair
        found.work(0.3)
        found.disks["primary"].cut()
        # Applications are told; nothing that failed counts as done.
        for writer in found.writers:
            writer.join(30)
            assert not writer.is_alive()
        assert outcome(os.mkdir, pair.mountpoint / "dir") == "EIO"
        pair.mount.kill9()
        found.disks["primary"].come_back()
        found.check(pair.secondary_store)
        pair.mount.start()
        pair.wait_in_sync()
        found.check(pair.primary_store, pair.secondary_store)
        pair.assert_equal()


class GroupOnADisk(Group):
    """A group whose first node's store is on a disk that can lose power."""

    def __init__(
        self, count: int, kind: str, options: tuple[str, ...], *, mounted: bool = False
    ) -> None:
        super().__init__(count, mounted=mounted, arguments=options)
        self._kind = kind
        self._disks = ExitStack()
        self.disk: CrashDisk

    def start_up(self) -> None:
        place = self.nodes[0].store
        self.disk = self._disks.enter_context(crash_disk(self.base, place, self._kind))
        super().start_up()

    def clean_up(self) -> None:
        for node in self.nodes:
            node.clean_up()
        self._disks.close()
        super().clean_up()

    def lose_power(self) -> None:
        node = self.nodes[0]
        node.freeze()
        self.disk.cut()
        node.kill9()
        self.disk.come_back()


def test_a_primary_that_lost_power_fetches_from_the_peer_that_followed_furthest():
    """Both peers have what was confirmed; one has more, which was acknowledged (`async`)."""
    with GroupOnADisk(3, "xfs", NEVER) as group:
        a, b, c = group.nodes
        (a.top / "queue").write_bytes(b"old")
        os.setxattr(a.top / "queue", "user.replfs.policy", b"async")
        writers = [Writer(a.top / f"w{number}", 20 + number) for number in range(2)]
        for writer in writers:
            writer.start()
        wait_for(lambda: sum(one.operations for one in writers) > 100, 30, "writers to write")
        c.freeze()
        (a.top / "queue").write_bytes(b"acknowledged")
        wait_for(lambda: (b.store / "queue").read_bytes() == b"acknowledged", 30, "b to have it")
        # What is on its way to c does not arrive, and nobody is told of that.
        a.freeze()
        c.kill9()
        group.lose_power()
        for writer in writers:
            writer.rests.set()
            writer.join(30)
            assert not writer.is_alive()
            writer.check(b.store, writer.files, exactly=True)
        assert (c.store / "queue").read_bytes() == b"old"
        c.start()
        a.start()
        for writer in writers:
            writer.check(a.top, writer.files, exactly=True)
        assert (a.top / "queue").read_bytes() == b"acknowledged"
        assert b"fetched from b" in a.log_since_start()
        assert b"fetched from c" not in a.log_since_start()
        group.wait_in_sync(a)
        group.assert_equal()
        for writer in writers:
            writer.check(c.store, writer.files, exactly=True)


def kept_of(store: Path) -> dict[str, bytes]:
    """What is kept beside, by its name."""
    return {path.name: path.read_bytes() for path in (store / ".replfs/kept").glob("a-*/*")}


def test_a_loser_of_a_split_brain_that_loses_power_has_all_of_its_versions():
    """Of each file the disk has the original or a copy of it, whenever that is."""
    names = [f"f{number}" for number in range(16)]
    theirs = {name: random.Random(name).randbytes(256 << 10) for name in names}
    with GroupOnADisk(
        2, "xfs", ("--checkpoint-interval", "1h", "--resync-rate", "3MiB"), mounted=True
    ) as group:
        a, b = group.nodes
        for name in names:
            (a.top / name).write_bytes(b"before")
        a.stop()
        b.replfs("promote", b.store)
        for name in names:
            (b.top / name).write_bytes(theirs[name][::-1])
        b.kill9()
        a.start()
        for name in names:
            (a.top / name).write_bytes(theirs[name])
        a.replfs("sync", a.store)
        b.start()
        wait_for(lambda: group.peer(b, "a")["state"] == "split-brain", 30, "b to see it", 0.02)
        b.replfs("split-brain", b.store, "keep-mine")
        wait_for(lambda: len(kept_of(a.store)) > 3, 30, "copies to be made", 0.005)
        group.lose_power()
        kept = kept_of(a.store)
        here = {name: (a.store / name).read_bytes() for name in names}
        assert len(kept) > 3
        assert any(here[name] == theirs[name] for name in names), "it was in the middle of it"
        for name in names:
            assert theirs[name] in {here[name], kept.get(name)}
        a.start()
        group.wait_in_sync(b)
        group.assert_equal()
        assert {name: (b.top / name).read_bytes() for name in names} == {
            name: data[::-1] for name, data in theirs.items()
        }
        # Beside what an earlier process had kept, and this one cannot know of.
        kept = kept_of(a.store)
        assert {name: kept[name] for name in names} == theirs
