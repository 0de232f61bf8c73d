"""Disks that are full: the mount goes on where it can, says what is wrong, and the sides heal."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

import pytest
from helpers.cases import error_name, fails, outcome, read, write
from helpers.compare import wait_equal
from helpers.disks import disk, free_bytes
from helpers.nodes import Pair, make_base, remove_base, wait_for

pytestmark = pytest.mark.mounted

MIB = 1 << 20
DISK = 24 * MIB
OPTIONS = ("--peer-timeout", "2s", "--checkpoint-interval", "500ms")
NO_SPACE = os.strerror(errno.ENOSPC)


@contextmanager
def pair_on_disk(*sides: Literal["primary", "secondary"], inodes: int = 0) -> Iterator[Pair]:
    """A pair of which the stores of *sides* are on small disks."""
    base = make_base()
    try:
        with ExitStack() as disks:
            for side in sides:
                store = base / side
                store.mkdir()
                disks.enter_context(disk(base / f"{side}.image", store, DISK, inodes=inodes))
            with Pair(base=base, mount_arguments=OPTIONS) as pair:
                yield pair
    finally:
        remove_base(base)


def wait_reason(pair: Pair) -> None:
    """Wait until the status says what is wrong."""

    def is_said() -> bool:
        peer = pair.peer()
        assert peer["state"] != "in-sync", peer
        assert NO_SPACE in str([peer.get("stuck"), peer.get("last_error"), peer["reason"]]), peer
        return True

    wait_for(is_said, 60, "the reason")


def fill(path: Path, size: int) -> int:
    """Write `size` bytes in pieces; how many were written before the disk was full."""
    with path.open("wb", buffering=0) as file:
        for done in range(0, size, MIB // 4):
            try:
                file.write(os.urandom(MIB // 4))
            except OSError as error:
                assert error.errno == errno.ENOSPC
                return done
    return size


def test_a_full_replica_does_not_stop_the_mount_and_heals():
    with pair_on_disk("secondary") as pair:
        top = pair.mountpoint
        write(top / "small", b"x" * 5000)
        for number in range(4):
            assert fill(top / f"large-{number}", 8 * MIB) == 8 * MIB
        os.mkdir(top / "dir")
        write(top / "dir" / "later", b"y" * 100)
        os.rename(top / "small", top / "dir" / "small")
        wait_reason(pair)
        assert pair.mount.status()["state"] != "in-sync"
        assert NO_SPACE in pair.mount.replfs("status", pair.mountpoint, check=False).stdout
        # What is unlinked is never carried; what remains fits.
        os.unlink(top / "large-1")
        os.unlink(top / "large-2")
        os.truncate(top / "large-3", MIB)
        pair.wait_in_sync()
        pair.assert_equal()
        write(top / "again", b"z")
        assert read(pair.secondary_store / "again") == b"z"
        pair.check_alive()


def test_a_replica_without_inodes_heals():
    with pair_on_disk("secondary", inodes=96) as pair:
        top = pair.mountpoint
        for number in range(150):
            write(top / f"{number}", b"x")
        wait_reason(pair)
        for number in range(100):
            os.unlink(top / f"{number}")
        pair.wait_in_sync()
        pair.assert_equal()


def test_a_full_primary_is_the_callers_error_and_the_sides_stay_equal():
    with pair_on_disk("primary") as pair:
        top = pair.mountpoint
        write(top / "file", b"before" * 1000)
        written = 0
        for number in range(20):
            written += fill(top / f"large-{number}", 2 * MIB)
        assert written < DISK
        pair.wait_in_sync()
        wait_equal(pair.primary_store, pair.secondary_store)
        # Each kind of change that needs room says so, and changes neither side.
        while outcome(os.mkdir, top / f"dir-{len(os.listdir(top))}") == "ok":
            pass
        failures = {outcome(write, top / "new", b"x" * MIB)}
        failures.add(outcome(fill_fast, top / "file"))
        assert failures == {error_name(errno.ENOSPC)}
        pair.wait_in_sync()
        pair.assert_equal()
        # What needs none works: in place, and giving room back.
        with (top / "file").open("r+b", buffering=0) as file:
            file.write(b"after!")
        assert read(pair.secondary_store / "file").startswith(b"after!before")
        os.unlink(top / "large-0")
        write(top / "new", b"y" * MIB)
        pair.wait_in_sync()
        pair.assert_equal()
        pair.check_alive()


def test_a_write_for_which_neither_side_has_room_leaves_the_same_time_on_both():
    """The kernel changes it, on each side for itself, before it looks for room."""
    with pair_on_disk("primary", "secondary") as pair:
        top = pair.mountpoint
        write(top / "file", b"before")
        pair.wait_in_sync()
        generation = pair.mount.status()["generation"]
        stores = (pair.primary_store, pair.secondary_store)
        # What is saved at a checkpoint, on a full disk, gives back what was kept for that.
        sync(top)
        for store in stores:
            fill_up(store)
        for _ in range(30):  # the kernel's are often of the same tick of its clock
            assert outcome(overwrite, top / "file", MIB) == error_name(errno.ENOSPC)
            times = [(store / "file").stat().st_mtime_ns for store in stores]
            assert times[0] == times[1]
        assert pair.peer()["state"] == "in-sync"
        assert pair.mount.status()["generation"] == generation
        pair.assert_equal()


def sync(directory: Path) -> None:
    """fsync a directory; of the top of a mount it is a checkpoint."""
    fd = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fill_up(store: Path) -> None:
    """Leave no block free, nor one that writing back what is in memory sets free."""
    with (store / ".replfs/ballast").open("wb", buffering=0) as ballast:
        before = -1
        while before != ballast.tell():
            before = ballast.tell()
            for size in (MIB, 4096):
                with fails(errno.ENOSPC):
                    while True:
                        ballast.write(bytes(size))
            sync(store)
            os.fsync(ballast.fileno())


def fill_fast(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for _ in range(40):
            file.write(bytes(MIB))


def overwrite(path: Path, offset: int = 0) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        file.write(b"changed again")


def test_a_full_primary_without_its_peer():
    """Room for marks was kept back: what changes is recorded; what cannot be fails before it is."""
    with pair_on_disk("primary") as pair:
        top = pair.mountpoint
        for number in range(300):
            write(top / f"{number}", b"-" * 5000)
        fill(top / "large", DISK)
        pair.wait_in_sync()
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        while free_bytes(pair.primary_store) > 8192 and fill(top / "more", DISK):
            pass
        changed = 0
        for number in range(300):
            before = read(top / f"{number}")
            try:
                with (top / f"{number}").open("r+b", buffering=0) as file:
                    file.write(b"changed")
            except OSError as error:
                assert error.errno == errno.ENOSPC
                assert read(top / f"{number}") == before
            else:
                changed += 1
        assert changed > 0
        os.unlink(top / "large")
        # A moment later room is kept back again, and everything can be changed.
        wait_for(lambda: outcome(overwrite, top / "0") == "ok", 30, "room for marks")
        pair.agent.start()
        pair.wait_in_sync()
        pair.assert_equal()


def test_errors_of_a_full_disk_do_not_leave_a_directory_behind():
    with pair_on_disk("primary", inodes=64) as pair:
        top = pair.mountpoint
        generation = pair.mount.status()["generation"]
        made = 0
        while outcome(os.mkdir, top / f"{made}") == "ok":
            made += 1
        assert 20 < made < 64
        for name, call in {
            "open": lambda: os.open(top / "new", os.O_CREAT | os.O_WRONLY),
            "symlink": lambda: os.symlink("x" * 200, top / "new"),
            "mknod": lambda: os.mkfifo(top / "new"),
        }.items():
            assert outcome(call) == "ENOSPC", name
        with fails(errno.ENOENT):
            os.lstat(top / "new")
        number = 0
        while outcome(os.setxattr, top / "0", f"user.{number}", bytes(200)) == "ok":
            number += 1
        assert outcome(os.setxattr, top / "0", "user.last", bytes(200)) == "ENOSPC"
        # What did not happen here need not be looked for there.
        assert pair.peer()["state"] == "in-sync"
        assert pair.mount.status()["generation"] == generation
        pair.assert_equal()
        os.rmdir(top / "0")
        # Its inode is free once the kernel has forgotten the directory, which is a moment later.
        wait_for(lambda: outcome(write, top / "new", b"x") == "ok", what="room for a file")
        pair.assert_equal()
