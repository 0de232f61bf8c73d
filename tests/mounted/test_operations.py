"""What a mount promises beyond single calls: open files without names, starts, ends, the replica.

Each test has its own pair of nodes.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
import subprocess
from collections import Counter
from pathlib import Path

import pytest
from helpers import real_tree
from helpers.cases import exists, fails, read, write
from helpers.children import spawn
from helpers.compare import compare_trees, describe
from helpers.libc import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, Directory, renameat2
from helpers.nodes import Node, Pair, mounts_below, run_replfs, wait_for

pytestmark = pytest.mark.mounted

KIB, MIB = 1 << 10, 1 << 20
BLOCK = 4096
QUICK = ("--peer-timeout", "2s")
FOLLOWS_S = 5.0
"""Far below a kernel cache without a limit, far above one second on a machine that is busy."""


@pytest.fixture
def quick_pair():
    """A pair whose primary gives a peer up after two seconds."""
    with Pair(mount_arguments=QUICK) as fresh:
        yield fresh


def deleted_files(node: Node, below: Path) -> list[str]:
    """What the process keeps open although it has no name any more."""
    found = []
    for entry in os.scandir(f"/proc/{node.pid}/fd"):
        try:
            target = os.readlink(entry.path)
        except OSError:
            continue  # closed meanwhile
        if target.endswith(" (deleted)") and target.startswith(f"{below}/"):
            found.append(target)
    return found


def assert_nothing_left(pair: Pair) -> None:
    """Neither store keeps anything that has no name; the kernel forgets a moment later."""

    def is_so() -> bool:
        for store in (pair.primary_store, pair.secondary_store):
            for name in ("limbo", "kept"):
                left = os.listdir(store / ".replfs" / name)
                assert not left, (store, name, left)
        for node, store in ((pair.mount, pair.primary_store), (pair.agent, pair.secondary_store)):
            left = deleted_files(node, store)
            assert not left, left
        return True

    wait_for(is_so, what="nothing to be left")


def lose_agent(pair: Pair) -> None:
    """Kill the agent, and wait until the primary knows."""
    pair.agent.kill9()
    pair.wait_state("out-of-sync")


# Files without a name ----------------------------------------------------------------------------


def test_an_unlinked_open_file_works_through_a_reconnect(quick_pair):
    pair = quick_pair
    path = pair.mountpoint / "file"
    with path.open("w+b", buffering=0) as file:
        file.write(b"a" * 100_000)
        os.unlink(path)
        assert not exists(pair.secondary_store / "file")
        file.write(b"b" * 50_000)
        lose_agent(pair)
        file.write(b"c" * 50_000)
        os.ftruncate(file.fileno(), 190_000)
        os.fchmod(file.fileno(), 0o600)
        os.fchown(file.fileno(), 1, 2)
        os.utime(file.fileno(), ns=(1, 2))
        os.setxattr(file.fileno(), "user.x", b"y")
        os.fsync(file.fileno())
        pair.agent.start()
        pair.wait_in_sync()
        file.seek(0)
        assert file.read() == b"a" * 100_000 + b"b" * 50_000 + b"c" * 40_000
        assert os.fstat(file.fileno()).st_nlink == 0
        file.write(b"d")
        assert os.pread(file.fileno(), 1, 190_000) == b"d"
        again = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDONLY)
        assert os.pread(again, 1, 0) == b"a"
        os.close(again)
        pair.assert_equal()
    assert_nothing_left(pair)
    assert pair.peer()["state"] == "in-sync"


def test_a_file_that_loses_its_name_while_the_peer_is_away(quick_pair):
    pair = quick_pair
    with (pair.mountpoint / "file").open("w+b", buffering=0) as file:
        file.write(b"x" * MIB)
        assert read(pair.secondary_store / "file") == b"x" * MIB
        lose_agent(pair)
        file.write(b"y" * MIB)
        os.unlink(pair.mountpoint / "file")
        file.write(b"z" * MIB)
        sent = pair.peer()["sent_bytes"]
        pair.agent.start()
        pair.wait_in_sync()
        # What has no name is not carried.
        assert pair.peer()["sent_bytes"] - sent < MIB
        assert os.pread(file.fileno(), 1, 3 * MIB - 1) == b"z"
        pair.assert_equal()
    assert_nothing_left(pair)


def test_a_file_that_keeps_one_of_its_names(quick_pair):
    pair = quick_pair
    write(pair.mountpoint / "one", b"1")
    os.link(pair.mountpoint / "one", pair.mountpoint / "two")
    with (pair.mountpoint / "one").open("r+b", buffering=0) as file:
        os.unlink(pair.mountpoint / "one")
        file.write(b"2")
        assert read(pair.secondary_store / "two") == b"2"
        lose_agent(pair)
        os.rename(pair.mountpoint / "two", pair.mountpoint / "three")
        file.write(b"3")
        pair.agent.start()
        pair.wait_in_sync()
        file.write(b"4")
        assert read(pair.secondary_store / "three") == b"234"
        write(pair.mountpoint / "other", b"other")
        os.rename(pair.mountpoint / "other", pair.mountpoint / "three")
        file.write(b"5")
        assert os.pread(file.fileno(), 9, 0) == b"2345"
        assert read(pair.secondary_store / "three") == b"other"
    pair.assert_equal()
    assert_nothing_left(pair)


def test_a_removed_directory_that_is_still_open(quick_pair):
    pair = quick_pair
    os.mkdir(pair.mountpoint / "dir")
    fd = os.open(pair.mountpoint / "dir", os.O_RDONLY)
    try:
        os.rmdir(pair.mountpoint / "dir")
        assert os.listdir(fd) == []
        with fails(errno.ENOENT):
            os.mkdir("x", dir_fd=fd)
        lose_agent(pair)
        os.fchmod(fd, 0o700)
        os.fsync(fd)
        pair.agent.start()
        pair.wait_in_sync()
        assert os.fstat(fd).st_mode & 0o777 == 0o700
    finally:
        os.close(fd)
    pair.assert_equal()
    assert_nothing_left(pair)


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("connected", [True, False])
def test_renames_with_flags(quick_pair, connected):
    pair = quick_pair
    top = pair.mountpoint
    for name in ("a", "b", "c"):
        os.mkdir(top / name)
        write(top / name / "inside", name.encode() * 100)
    write(top / "file", b"file")
    os.symlink("file", top / "link")
    if not connected:
        lose_agent(pair)
    with fails(errno.EEXIST):
        renameat2(top / "a", top / "b", RENAME_NOREPLACE)
    renameat2(top / "a", top / "new", RENAME_NOREPLACE)
    renameat2(top / "b", top / "c", RENAME_EXCHANGE)
    renameat2(top / "file", top / "new", RENAME_EXCHANGE)  # a file and a directory
    renameat2(top / "c" / "inside", top / "b" / "inside", RENAME_EXCHANGE)
    renameat2(top / "link", top / "b", RENAME_EXCHANGE)
    with fails(errno.ENOENT):
        renameat2(top / "b", top / "nothing", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(top / "c", top / "c" / "inside", RENAME_EXCHANGE)
    write(top / "covered", b"x")
    renameat2(top / "covered", top / "uncovered", RENAME_WHITEOUT)
    renameat2(top / "uncovered", top / "covered", RENAME_WHITEOUT)  # replaces the whiteout
    with fails(errno.EINVAL):
        renameat2(top / "c", top / "d", RENAME_EXCHANGE | RENAME_NOREPLACE)
    assert read(top / "c" / "inside") == b"c" * 100
    assert read(top / "link" / "inside") == b"b" * 100
    assert read(top / "file" / "inside") == b"a" * 100
    assert read(top / "new") == b"file"
    assert os.readlink(top / "b") == "file"
    if not connected:
        sent = pair.peer()["sent_bytes"]
        pair.agent.start()
        pair.wait_in_sync()
        assert pair.peer()["sent_bytes"] - sent < 64 * KIB
    pair.assert_equal()
    assert_nothing_left(pair)


def test_a_renamed_tree_is_not_carried_again(quick_pair):
    pair = quick_pair
    top = pair.mountpoint
    (top / "old" / "deep").mkdir(parents=True)
    for number in range(6):
        write(top / "old" / "deep" / str(number), random.Random(number).randbytes(MIB))
    lose_agent(pair)
    os.rename(top / "old" / "deep", top / "moved")
    os.rename(top / "moved" / "0", top / "0")
    os.rename(top / "moved" / "1", top / "moved" / "0")
    os.rename(top / "old", top / "moved" / "old")
    write(top / "moved" / "1", b"new")
    sent = pair.peer()["sent_bytes"]
    pair.agent.start()
    pair.wait_in_sync()
    pair.assert_equal()
    assert pair.peer()["sent_bytes"] - sent < 64 * KIB
    assert_nothing_left(pair)


def test_reading_directories_while_they_change():
    with Pair(replica_mounted=True) as pair:
        for number in range(400):
            write(pair.mountpoint / f"stays-{number}", b"")
            write(pair.mountpoint / f"goes-{number}", b"")
        stays = {f"stays-{number}".encode() for number in range(400)}
        wait_for(lambda: len(os.listdir(pair.replica)) == 800, what="the replica to follow")
        streams = [Directory(pair.mountpoint), Directory(pair.replica)]
        seen: list[Counter[bytes]] = [Counter(), Counter()]
        places = []
        for stream, names in zip(streams, seen, strict=True):
            for _ in range(300):
                entry = stream.read()
                assert entry is not None
                names[entry[0]] += 1
            position, following = stream.tell(), stream.read()
            assert following is not None
            names[following[0]] += 1
            places.append((position, following[0]))
        for number in range(400):
            os.unlink(pair.mountpoint / f"goes-{number}")
            write(pair.mountpoint / f"comes-{number}", b"")
        for stream, names in zip(streams, seen, strict=True):
            while (entry := stream.read()) is not None:
                names[entry[0]] += 1
        for stream, names, (position, name) in zip(streams, seen, places, strict=True):
            assert max(names.values()) == 1
            assert stays <= names.keys()
            if name in stays:
                stream.seek(position)
                again = stream.read()
                assert again is not None
                assert again[0] == name
            stream.rewind()
            wait_size(stream, 800)
            stream.close()
        pair.assert_equal()


def wait_size(stream: Directory, size: int) -> None:
    """Wait until reading a directory again gives so many names."""

    def again() -> bool:
        stream.rewind()
        return len(stream.names()) == size

    wait_for(again, FOLLOWS_S, f"{size} names")


def test_names_of_any_bytes(quick_pair):
    pair = quick_pair
    (pair.mountpoint / "live").mkdir()
    real_tree.odd_names(pair.mountpoint / "live")
    pair.assert_equal()
    lose_agent(pair)
    (pair.mountpoint / "later").mkdir()
    real_tree.odd_names(pair.mountpoint / "later")
    live = os.fsencode(pair.mountpoint / "live")
    for name in os.listdir(live):
        if len(name) < 250:
            os.rename(live + b"/" + name, live + b"/" + name + b"\xff")
    pair.agent.start()
    pair.wait_in_sync()
    pair.assert_equal()
    assert b"\n\xff" in os.listdir(os.fsencode(pair.secondary_store / "live"))
    subprocess.run(["rm", "-rf", pair.mountpoint / "live", pair.mountpoint / "later"], check=True)
    assert os.listdir(pair.secondary_store) == [".replfs"]
    assert_nothing_left(pair)


def test_the_state_directory_cannot_be_seen_or_made():
    with Pair(replica_mounted=True, over_store=True) as pair:
        for place in (pair.mountpoint, pair.replica):
            assert ".replfs" not in os.listdir(place)
            assert not exists(place / ".replfs")
            with fails(errno.ENOENT):
                os.open(place / ".replfs" / "state.db", os.O_RDONLY)
        with fails(errno.EPERM):
            os.mkdir(pair.mountpoint / ".replfs")
        with fails(errno.EPERM):
            write(pair.mountpoint / ".replfs", b"")
        write(pair.mountpoint / "file", b"")
        with fails(errno.EPERM):
            os.rename(pair.mountpoint / "file", pair.mountpoint / ".replfs")
        assert exists(pair.secondary_store / ".replfs" / "state.db")
        pair.assert_equal()


# The beginning -----------------------------------------------------------------------------------


def data_size(top: Path) -> int:
    """Bytes on the disk of all files below `top`."""
    return sum(
        os.lstat(os.path.join(directory, name)).st_blocks * 512
        for directory, _, names in os.walk(top)
        for name in names
    )


def test_a_store_that_is_not_empty_and_a_peer_that_is():
    def prepare(pair: Pair) -> None:
        real_tree.make(pair.primary_store / "tree", 300)
        os.chmod(pair.primary_store, 0o1777)

    with Pair(prepare=prepare) as pair:
        pair.assert_equal(holes=BLOCK)
        size = data_size(pair.primary_store / "tree")
        assert size / 4 < pair.peer()["sent_bytes"] < size * 1.2 + 2 * MIB  # no holes
        write(pair.mountpoint / "tree" / "new", b"x")
        pair.assert_equal()
        assert_nothing_left(pair)


def test_a_peer_that_was_filled_before_gets_only_the_differences():
    def prepare(pair: Pair) -> None:
        tree = pair.primary_store / "tree"
        real_tree.make(tree, 400)
        for number in range(8):
            write(tree / f"large {number}", random.Random(number).randbytes(4 * MIB))
        subprocess.run(
            ["rsync", "-aHAX", f"{pair.primary_store}/", f"{pair.secondary_store}/"], check=True
        )
        # Here:
        with (tree / "large 0").open("r+b") as file:
            file.seek(3 * MIB + 17)
            file.write(b"changed")
        os.truncate(tree / "large 1", MIB + 1)
        os.unlink(tree / "large 2")
        os.chmod(tree / "large 3", 0o600)
        write(tree / "new", b"new" * 1000)
        os.setxattr(tree / "large 4", "user.new", b"1")
        os.utime(tree / "library", ns=(5, 6))
        # And there:
        other = pair.secondary_store / "tree"
        write(other / "only there", b"x" * MIB)
        (other / "directory there" / "deep").mkdir(parents=True)
        os.unlink(other / "special" / "links" / "two")
        write(other / "special" / "links" / "two", b"three names\n")
        os.unlink(other / "special" / "special_files" / "fifo")
        os.mkdir(other / "special" / "special_files" / "fifo")
        os.symlink("elsewhere", other / "special" / "links" / "again")

    with Pair(prepare=prepare) as pair:
        pair.assert_equal(holes=BLOCK)
        # 32 MiB and more are there already; a kilobyte or so a file tells what they are.
        assert pair.peer()["sent_bytes"] < 2 * MIB
        assert_nothing_left(pair)


def test_changes_during_the_baseline():
    def prepare(pair: Pair) -> None:
        real_tree.make(pair.primary_store / "tree", 600)
        write(pair.primary_store / "large", random.Random(1).randbytes(12 * MIB))

    with Pair(prepare=prepare, start=False, mount_arguments=("--resync-rate", "16MiB")) as pair:
        pair.agent.start()
        pair.mount.start()
        # The mount can be used before anything was carried.
        assert pair.peer()["state"] == "baseline"
        library = pair.mountpoint / "tree" / "library"
        names = sorted(name for name in os.listdir(library) if name.endswith(".py"))
        for number, name in enumerate(names):
            action = number % 4
            if action == 0:
                os.unlink(library / name)
            elif action == 1:
                os.rename(library / name, pair.mountpoint / name)
            elif action == 2:
                write(library / name, b"replaced")
            else:
                with (library / name).open("ab") as file:
                    file.write(b"appended")
        os.rename(pair.mountpoint / "tree" / "special", pair.mountpoint / "special")
        rng = random.Random(2)
        with (pair.mountpoint / "large").open("r+b", buffering=0) as large:
            for _ in range(200):
                large.seek(rng.randrange(12 * MIB))
                large.write(rng.randbytes(rng.randrange(1, 20_000)))
        pair.wait_in_sync()
        pair.assert_equal()
        assert_nothing_left(pair)


def test_the_mount_covers_its_own_store():
    def prepare(pair: Pair) -> None:
        real_tree.special(pair.primary_store / "special")

    with Pair(prepare=prepare, over_store=True) as pair:
        top = pair.primary_store
        assert mounts_below(top) == [top]
        write(top / "special" / "new", b"through the old path")
        assert read(pair.secondary_store / "special" / "new") == b"through the old path"
        pair.assert_equal()
        run_replfs("umount", top, "--rundir", pair.rundir)
        assert pair.mount.wait_ended() == 0
        assert not mounts_below(top)
        pair.assert_equal(holes=BLOCK)
        # Once more, and this time it is killed.
        pair.mount.start()
        pair.wait_in_sync()
        write(top / "again", b"1")
        pair.mount.kill9()
        assert read(top / "again") == b"1"
        pair.mount.start()
        pair.wait_in_sync()
        write(top / "again", b"2")
        assert pair.mount.stop() == 0
        assert not mounts_below(top)
        assert read(top / "again") == b"2"
        pair.assert_equal(holes=BLOCK)


# The end -----------------------------------------------------------------------------------------

ENDS = {
    "umount": lambda pair: subprocess.run(["umount", pair.mountpoint], check=True),
    "replfs umount": lambda pair: run_replfs("umount", pair.mountpoint, "--rundir", pair.rundir),
    "replfs stop": lambda pair: run_replfs("stop", pair.mountpoint, "--rundir", pair.rundir),
    "SIGTERM": lambda pair: pair.mount.signal(signal.SIGTERM),
    "SIGINT": lambda pair: pair.mount.signal(signal.SIGINT),
}


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_cleanly(quick_pair, end):
    pair = quick_pair
    for number in range(50):
        write(pair.mountpoint / str(number), b"x" * 10_000)
    ENDS[end](pair)
    assert pair.mount.wait_ended() == 0
    assert b"drained, both sides are flushed" in pair.mount.log_since_start()
    assert not mounts_below(pair.base)
    pair.assert_equal(timeout_s=0)
    # The next start believes what this one left: at most digests of the last changes travel.
    pair.mount.start()
    pair.wait_in_sync()
    assert pair.peer()["sent_bytes"] < 64 * KIB
    assert pair.mount.stop() == 0
    assert pair.agent.stop() == 0


def test_it_ends_cleanly_without_its_peer(quick_pair):
    pair = quick_pair
    lose_agent(pair)
    write(pair.mountpoint / "file", b"x" * 100_000)
    assert pair.mount.stop() == 0
    pair.mount.start()
    assert pair.peer()["dirty_names"] > 0
    pair.agent.start()
    pair.wait_in_sync()
    pair.assert_equal()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_it_ends_under_writers(quick_pair, number):
    """Whatever ends it: what was acknowledged is on both, then and after another start."""
    pair = quick_pair
    reports = [pair.base / f"report-{worker}" for worker in range(3)]

    def work(report: Path, target: Path) -> None:
        with report.open("wb", buffering=0) as out:
            for count in itertools.count():
                try:
                    with (target / f"{count}").open("wb", buffering=0) as file:
                        file.write(b"%d\n" % count)
                        # The kernel sends a page at a time where it must: what the end of the
                        # mount cuts off between two of them is a short write, and no error.
                        if file.write(b"x" * 5000) != 5000:
                            raise OSError(errno.EIO, "cut off")
                    if count % 5 == 4:
                        os.rename(target / f"{count - 1}", target / f"r{count - 1}")
                        os.unlink(target / f"{count - 2}")
                except OSError as error:
                    out.write(b"end %d" % (error.errno or 0))
                    return
                out.write(b"%d\n" % count)

    children = []
    for report in reports:
        (pair.mountpoint / report.name).mkdir()
        children.append(spawn(work, report, pair.mountpoint / report.name))
    wait_for(lambda: min(report.stat().st_size for report in reports) > 200, what="writers")
    if number == signal.SIGTERM:
        assert pair.mount.stop() == 0
    else:
        pair.mount.kill9()
    for child in children:
        child.result()
    if number == signal.SIGKILL:
        pair.mount.start()
        pair.wait_in_sync()
    pair.assert_equal()
    for report in reports:
        lines = report.read_bytes().splitlines()
        assert lines[-1].startswith(b"end ")
        for store in (pair.primary_store, pair.secondary_store):
            for line in lines[:-1]:
                count = int(line)
                names = [f"{count}"]
                if count % 5 in (3, 4):
                    names.append(f"r{count}")
                found = [store / report.name / name for name in names]
                if count % 5 == 2 and count + 2 > len(lines) - 4:
                    continue  # perhaps unlinked by the call that was never answered
                if count % 5 == 2:
                    assert not any(map(exists, found))
                else:
                    content = next(read(path) for path in found if exists(path))
                    assert content == b"%d\n" % count + b"x" * 5000


def test_an_agent_ends_cleanly_with_its_mount():
    with Pair(replica_mounted=True, mount_arguments=QUICK) as pair:
        write(pair.mountpoint / "file", b"x")
        assert pair.agent.stop() == 0
        assert mounts_below(pair.base) == [pair.mountpoint]
        write(pair.mountpoint / "file", b"y")
        pair.agent.start()
        pair.wait_in_sync()
        wait_for(lambda: read(pair.replica / "file") == b"y")
        # Without its mount it goes on.
        subprocess.run(["umount", pair.replica], check=True)
        write(pair.mountpoint / "file", b"z")
        assert read(pair.secondary_store / "file") == b"z"
        pair.check_alive()


# The replica's own mount -------------------------------------------------------------------------


def test_the_replica_follows_and_is_read_only():
    with Pair(replica_mounted=True) as pair:
        here, there = pair.mountpoint, pair.replica

        def follows(what: str, condition: object) -> None:
            wait_for(condition, FOLLOWS_S, what)  # type: ignore[arg-type]

        assert not exists(there / "file")
        write(here / "file", b"1" * 5000)
        follows("a new name", lambda: read(there / "file") == b"1" * 5000)
        with (there / "file").open("rb", buffering=0) as file:
            assert os.pread(file.fileno(), 1, 4999) == b"1"
            with (here / "file").open("r+b", buffering=0) as writer:
                writer.write(b"2" * 5000)
                follows("data in an open file", lambda: os.pread(file.fileno(), 1, 4999) == b"2")
                writer.write(b"3" * 5000)
            follows("a size", lambda: os.stat(there / "file").st_size == 10_000)
            follows("data past the old end", lambda: os.pread(file.fileno(), 1, 9999) == b"3")
            os.truncate(here / "file", 3)
            follows("a truncation", lambda: os.pread(file.fileno(), 100, 0) == b"222")
            os.unlink(here / "file")
            follows("a name that went", lambda: not exists(there / "file"))
            assert os.pread(file.fileno(), 100, 0) == b"222"
        write(here / "file", b"another")
        follows("a name that came back", lambda: read(there / "file") == b"another")
        os.chmod(here / "file", 0o604)
        follows("a mode", lambda: os.stat(there / "file").st_mode & 0o777 == 0o604)
        os.chown(here / "file", 7, 8)
        follows("an owner", lambda: os.stat(there / "file").st_uid == 7)
        os.utime(here / "file", ns=(5, 1_234_567_890))
        follows("a time", lambda: os.stat(there / "file").st_mtime_ns == 1_234_567_890)
        os.setxattr(here / "file", "user.a", b"b")
        follows("an xattr", lambda: os.listxattr(there / "file") == ["user.a"])
        os.mkdir(here / "dir")
        os.rename(here / "file", here / "dir" / "moved")
        follows("a rename", lambda: os.listdir(there / "dir") == ["moved"])
        os.symlink("one", here / "link")
        follows("a link", lambda: os.readlink(there / "link") == "one")
        os.unlink(here / "link")
        os.symlink("two", here / "link")
        follows("another target", lambda: os.readlink(there / "link") == "two")

        moved = there / "dir" / "moved"
        attempts = {
            "open": lambda: os.open(moved, os.O_WRONLY),
            "truncate": lambda: os.truncate(moved, 0),
            "create": lambda: os.open(there / "x", os.O_CREAT | os.O_WRONLY),
            "mkdir": lambda: os.mkdir(there / "x"),
            "mknod": lambda: os.mkfifo(there / "x"),
            "symlink": lambda: os.symlink("x", there / "x"),
            "link": lambda: os.link(moved, there / "x"),
            "unlink": lambda: os.unlink(moved),
            "rmdir": lambda: os.rmdir(there / "dir"),
            "rename": lambda: os.rename(moved, there / "x"),
            "chmod": lambda: os.chmod(moved, 0o777),
            "chown": lambda: os.chown(moved, 1, 1),
            "utime": lambda: os.utime(moved),
            "setxattr": lambda: os.setxattr(moved, "user.x", b"1"),
            "removexattr": lambda: os.removexattr(moved, "user.a"),
            "policy": lambda: os.setxattr(moved, "user.replfs.policy", b"none"),
        }
        for attempt in attempts.values():
            with fails(errno.EROFS):
                attempt()
        found = compare_trees(here, there)
        assert not found, describe(here, there, found)
