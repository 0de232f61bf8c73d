"""The first copy of a store that holds something, on each kind of file system people use."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from helpers import compare, real_tree
from helpers.disks import SIZE_MIN, disk
from helpers.nodes import Pair, make_base, remove_base, wait_for

pytestmark = pytest.mark.mounted

MIB = 1 << 20
KINDS = ("btrfs", "ext4", "xfs")
LARGE = 12 * MIB
SLOW = ("--resync-rate", "5M", "--peer-timeout", "2s")


@contextmanager
def pair_on(kind: str, prepare: Callable[[Pair], None], *arguments: str) -> Iterator[Pair]:
    """A pair, not started, of which both stores are file systems of this kind."""
    base = make_base()
    try:
        with ExitStack() as disks:
            for name in ("primary", "secondary"):
                (base / name).mkdir()
                size = max(SIZE_MIN[kind], 256 * MIB)
                disks.enter_context(disk(base / f"{name}.image", base / name, size, kind))
            with Pair(base=base, prepare=prepare, mount_arguments=arguments, start=False) as pair:
                yield pair
    finally:
        remove_base(base)


def fill(pair: Pair) -> None:
    """Many small files, each special case, and one large file with a hole."""
    real_tree.make(pair.primary_store / "tree", 300)
    with (pair.primary_store / "large").open("wb") as file:
        file.write(os.urandom(LARGE))
        file.seek(8 * LARGE)
        file.write(b"the end")


def seed(pair: Pair) -> None:
    """As `fill`, and copied before."""
    fill(pair)
    source, target = f"{pair.primary_store}/", str(pair.secondary_store)
    subprocess.run(["rsync", "-aHAXS", source, target], check=True, timeout=60)
    (pair.secondary_store / "only there").write_bytes(b"x" * 1000)
    with (pair.secondary_store / "large").open("r+b") as file:
        file.seek(10 * MIB)
        file.write(b"changed")


def carried(pair: Pair) -> int:
    """Bytes sent since the mount started."""
    sent: int = pair.peer()["sent_bytes"]
    return sent


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_that_holds_something(kind):
    with pair_on(kind, fill) as pair:
        pair.start()
        pair.assert_equal(holes=1 << 16)
        assert pair.mount.status()["snapshots"] == ("btrfs" if kind == "btrfs" else "live")
        # Small files go together, and are marked nowhere on the way.
        found = [path.stat() for path in pair.primary_store.rglob("*") if path.is_file()]
        assert pair.peer()["sent_ops"] < len(found)
        # Nothing of a large one goes twice.
        assert carried(pair) < sum(min(one.st_size, one.st_blocks * 512) for one in found) + 2 * MIB


@pytest.mark.parametrize("kind", KINDS)
def test_to_a_peer_that_has_an_earlier_copy(kind):
    with pair_on(kind, seed) as pair:
        pair.start()
        # What it had is recognised: attributes and digests travel, and what differs.
        assert carried(pair) < 2 * MIB
        pair.assert_equal(holes=1 << 16)


def compare_all(pair: Pair) -> int:
    """Have everything compared, and wait for the end; how many messages that took."""
    before: int = pair.peer()["sent_ops"]
    pair.mount.replfs("resync", pair.mount.target, "--full")
    pair.wait_in_sync()
    after: int = pair.peer()["sent_ops"]
    return after - before


def differ(tree: Path) -> None:
    """Change one file in each way that can be seen, and some other things."""
    files = sorted(path for path in (tree / "library").rglob("*.py") if path.stat().st_size > 100)
    mtimes = [path.stat().st_mtime_ns for path in files[:9]]
    files[0].write_bytes(b"x" * files[0].stat().st_size)
    with files[1].open("ab") as file:
        file.write(b"x")
    files[2].chmod(0o611)
    os.chown(files[3], 17, 18)
    os.setxattr(files[4], "user.new", b"value")
    files[5].unlink()
    files[6].rename(files[6].with_name("renamed"))
    os.link(files[7], files[7].with_name("one more"))
    with files[8].open("r+b") as file:
        file.truncate(0)
        file.truncate(100_000)
    for path, mtime in zip(files[:9], mtimes, strict=True):
        if path.exists():
            os.utime(path, ns=(mtime, mtime))
    os.utime(files[10], ns=(0, 0))
    (tree / "library" / "only there").mkdir()
    os.setxattr(tree / "library", "user.new", b"value")
    (tree / "other").symlink_to("elsewhere")
    (tree / "other").rename(tree / "special" / "links" / "relative")


def test_a_comparison_asks_once_a_directory_and_misses_nothing():
    with pair_on("ext4", fill) as pair:
        pair.start()
        directories = sum(1 for path in pair.primary_store.rglob("*") if path.is_dir())
        files = sum(1 for path in pair.primary_store.rglob("*") if path.is_file())
        # Locates, a listing and a place to be found again for each; single files as an exception.
        assert compare_all(pair) < 4 * directories + files // 3
        pair.assert_equal(holes=1 << 16)
        differ(pair.secondary_store / "tree")
        compare_all(pair)
        pair.assert_equal(holes=1 << 16)


def halfway(pair: Pair) -> int:
    """Wait until some of it has been carried; how much."""

    def is_under_way() -> int:
        done: int = pair.peer().get("progress", {}).get("bytes", 0)
        assert done > LARGE // 2, pair.peer()
        return done

    return wait_for(is_under_way, 60, "half a baseline", 0.02)


@pytest.mark.parametrize("victim", ["agent", "mount"])
def test_what_has_arrived_is_not_sent_again(victim):
    with pair_on("ext4", fill, *SLOW) as pair:
        pair.agent.start(wait=False)
        pair.mount.start()
        done = halfway(pair)
        before = carried(pair)
        if victim == "agent":
            pair.agent.kill9()
            pair.agent.start()
        else:
            pair.mount.kill9()
            pair.mount.start()
            before = 0
        pair.wait_in_sync()
        total = sum(p.stat().st_size for p in pair.primary_store.rglob("*") if p.is_file())
        total -= 7 * LARGE  # the hole
        assert carried(pair) - before < total - done + 4 * MIB
        pair.assert_equal(holes=1 << 16)


class Writer(threading.Thread):
    """Writes through the mount until it is told to stop."""

    def __init__(self, pair: Pair) -> None:
        super().__init__(daemon=True)
        self._pair = pair
        self._ending = threading.Event()
        self.rounds = 0
        self.error: OSError | None = None

    def run(self) -> None:
        """Append to fifty files, and change one large one here and there."""
        try:
            while not self._ending.is_set():
                self.rounds += 1
                with (self._pair.mountpoint / f"written {self.rounds % 50}").open("ab") as file:
                    file.write(b"%d\n" % self.rounds * 100)
                fd = os.open(self._pair.mountpoint / "large", os.O_WRONLY)
                try:
                    os.pwrite(fd, b"%08d" % self.rounds, self.rounds * 37_003 % LARGE)
                finally:
                    os.close(fd)
        except OSError as error:
            self.error = error

    def end(self) -> None:
        """Stop, and raise what went wrong."""
        self._ending.set()
        self.join(30)
        assert not self.is_alive()
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("kind", KINDS)
def test_written_to_all_the_while(kind):
    with pair_on(kind, fill, "--resync-rate", "12M") as pair:
        pair.agent.start(wait=False)
        pair.mount.start()
        writer = Writer(pair)
        writer.start()
        snapshots = pair.primary_store / ".replfs" / "snapshots"
        if kind == "btrfs":
            wait_for(lambda: [*snapshots.glob("baseline-*/tree")], 30, "the baseline's snapshot")
        wait_for(lambda: writer.rounds > 100, 30, "writes")
        pair.wait_in_sync()
        writer.end()
        pair.assert_equal(holes=1 << 16)
        assert not [*snapshots.glob("*")]


def test_the_state_before_a_resync_is_kept_until_its_end():
    with pair_on("btrfs", fill, *SLOW) as pair:
        pair.start()
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        before = pair.base / "before"
        subprocess.run(["cp", "-a", "--sparse=always", pair.secondary_store, before], check=True)
        (pair.mountpoint / "large").write_bytes(os.urandom(LARGE))
        (pair.mountpoint / "tree" / "new").write_bytes(b"new")
        pair.agent.start()
        halfway(pair)
        pair.mount.replfs("pause", pair.mount.target)
        status = pair.agent.status()
        assert status["state"] == "inconsistent"
        kept = pair.secondary_store / status["state_before_resync"]
        assert not compare.compare_trees(before, kept)
        # A restart in the middle keeps the older state, which is the whole one.
        pair.agent.kill9()
        pair.agent.start()
        assert pair.agent.status()["state"] == "inconsistent"
        assert not compare.compare_trees(before, kept)
        pair.mount.replfs("resume", pair.mount.target)
        pair.wait_in_sync()
        pair.assert_equal(holes=1 << 16)
        wait_for(lambda: not kept.exists(), 10, "the snapshot to go")
        assert pair.agent.status()["state_before_resync"] is None
