"""`-o writeback`: the kernel keeps written data back, and the promise is fsync and close.

What it must not change is in the conformance suite, whose files about contents and times run on
such a mount as well.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from pathlib import Path

import pytest
from helpers.cases import OLD_NS, exists, fails, fd_of, outcome, read, write
from helpers.children import spawn
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted

WRITEBACK = ("--writeback",)
PATIENT = ("--peer-timeout", "60s")
QUICK = ("--peer-timeout", "1s")
HANGS_S = 0.3
MIB = 1 << 20

_libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def one_pair():
    """A pair whose kernel has little room for what is on its way."""
    with Pair(mount_arguments=(*WRITEBACK, *PATIENT, "--max-background", "1")) as fresh:
        yield fresh
        fresh.wait_in_sync()
        fresh.assert_equal()


@pytest.fixture
def stores(one_pair):
    """Both, to be asked the moment a call has returned."""
    return one_pair.primary_store, one_pair.secondary_store


def ended(pid: int) -> bool:
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as line:
        return line.read().rpartition(")")[2].split()[0] == "Z"


def sync_filesystem(fd: int) -> None:
    """The kernel sends pages and times, without waiting for the former."""
    if _libc.syncfs(fd):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# What is promised --------------------------------------------------------------------------------


@pytest.mark.parametrize("call", [os.close, os.fsync, os.fdatasync])
def test_write_does_not_wait_and_close_and_fsync_do(one_pair, stores, call, request):
    path = one_pair.mountpoint / request.node.name
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.fsync(fd)
    one_pair.agent.freeze()
    try:
        os.write(fd, b"x" * 100_000)
        child = spawn(call, fd)
        # The child's close is that of its own descriptor: it sends all the same.
        with pytest.raises(AssertionError, match="waited"):
            wait_for(lambda: ended(child.pid), HANGS_S)
    finally:
        one_pair.agent.thaw()
    child.result()
    for store in stores:
        assert read(store / path.name) == b"x" * 100_000
    os.close(fd)


def test_msync_and_a_synchronous_write_carry_the_pages(one_pair, stores):
    with fd_of(one_pair.mountpoint / "mapped", os.O_RDWR | os.O_CREAT) as fd:
        os.ftruncate(fd, 3 * mmap.PAGESIZE)
        with mmap.mmap(fd, 3 * mmap.PAGESIZE) as mapping:
            mapping[5000:5004] = b"data"
            mapping.flush()
            for store in stores:
                assert read(store / "mapped")[4999:5005] == b"\0data\0"
    with fd_of(one_pair.mountpoint / "sync", os.O_WRONLY | os.O_CREAT | os.O_SYNC) as fd:
        os.write(fd, b"x" * 5000)
        for store in stores:
            assert read(store / "sync") == b"x" * 5000


def test_what_was_flushed_survives_a_kill_and_both_sides_converge():
    with Pair(mount_arguments=(*WRITEBACK, *QUICK)) as pair:
        top = pair.mountpoint
        write(top / "closed", b"c" * 300_000)
        flushed = os.open(top / "flushed", os.O_RDWR | os.O_CREAT)
        os.write(flushed, b"f" * 300_000)
        os.fsync(flushed)
        os.pwrite(flushed, b"late", 300_000)
        written = os.open(top / "written", os.O_RDWR | os.O_CREAT)
        os.write(written, b"w" * 300_000)
        pair.mount.kill9()
        for fd in (flushed, written):
            with contextlib.suppress(OSError):  # what it says of lost data is the kernel's
                os.close(fd)
        for store in (pair.primary_store, pair.secondary_store):
            assert read(store / "closed") == b"c" * 300_000
            assert read(store / "flushed")[:300_000] == b"f" * 300_000
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()
        assert set(read(top / "written")) <= set(b"w\0")


def test_a_lost_peer_is_recorded_when_the_pages_come():
    with Pair(mount_arguments=(*WRITEBACK, *QUICK)) as pair:
        fd = os.open(pair.mountpoint / "file", os.O_RDWR | os.O_CREAT)
        os.fsync(fd)
        os.write(fd, b"x" * 300_000)
        pair.agent.kill9()
        os.close(fd)
        assert read(pair.primary_store / "file") == b"x" * 300_000
        assert pair.peer()["dirty_bytes"] >= 300_000
        pair.agent.start()
        pair.wait_in_sync()
        pair.assert_equal()


def test_an_error_comes_at_fsync_or_close(one_pair):
    path = one_pair.mountpoint / "far"
    # The kernel keeps the error that it got for the one, and that there was one for the other.
    for call, number in ((os.fsync, errno.EFBIG), (os.close, errno.EIO)):
        fd = os.open(path, os.O_RDWR | os.O_CREAT)
        # Farther than the store's filesystem goes, and not than the kernel can count.
        os.pwrite(fd, b"x", 1 << 60)
        with fails(number):
            call(fd)
        with contextlib.suppress(OSError):
            os.close(fd)
        os.unlink(path)
    # And one more for the whole mount, which the next syncfs(2) is told.
    with fd_of(one_pair.mountpoint) as fd, fails(errno.EFBIG):
        sync_filesystem(fd)


# Whose the times and sizes are -------------------------------------------------------------------


def assert_same_times(path: Path, stores: tuple[Path, Path]) -> None:
    seen = os.stat(path).st_mtime_ns
    assert [os.stat(store / path.name).st_mtime_ns for store in stores] == [seen, seen]


def test_mtimes_agree_when_close_and_fsync_return(one_pair, stores):
    path = one_pair.mountpoint / "times"
    for number in range(5):
        with fd_of(path, os.O_RDWR | os.O_CREAT) as fd:
            os.pwrite(fd, b"x" * 10_000, number * 5_000)
            os.fsync(fd)
            assert_same_times(path, stores)
            os.pwrite(fd, b"y", number)
        assert_same_times(path, stores)


def test_a_time_that_did_not_change_is_not_changed_by_pages(one_pair, stores):
    """Within one tick of its clock the kernel has no new time to send."""
    path, beside = one_pair.mountpoint / "tick", one_pair.base / "beside"
    for number in range(100):
        # A file whose time was looked at gets a finer one, and nobody an earlier one after that.
        for _ in range(2):
            write(beside, b"x")
            os.stat(beside)
        for offset in (number, number + 1):
            with fd_of(path, os.O_RDWR | os.O_CREAT) as fd:
                os.pwrite(fd, b"x", offset)
            assert_same_times(path, stores)


def test_pages_that_come_after_their_time_do_not_change_it(one_pair, stores):
    """The kernel sends the mtime it noted while pages still wait for their turn."""
    for number in range(5):
        path = one_pair.mountpoint / f"late{number}"
        with fd_of(path, os.O_RDWR | os.O_CREAT) as fd:
            for _ in range(16):
                os.write(fd, bytes(MIB))
            sync_filesystem(fd)
            if number % 2:
                os.fsync(fd)
                assert_same_times(path, stores)
        assert_same_times(path, stores)


def test_an_explicit_mtime_is_not_overtaken_by_pages(one_pair, stores):
    path = one_pair.mountpoint / "explicit"
    with fd_of(path, os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, bytes(4 * MIB))
        os.utime(path, ns=(OLD_NS, OLD_NS))
        os.fsync(fd)
        assert os.stat(path).st_mtime_ns == OLD_NS
        assert_same_times(path, stores)
        os.write(fd, b"later")
    assert os.stat(path).st_mtime_ns > OLD_NS
    assert_same_times(path, stores)


def test_part_of_a_page_through_a_descriptor_that_cannot_read():
    with Pair(mount_arguments=WRITEBACK) as pair:
        for name in ("file", "other"):
            write(pair.primary_store / name, bytes(range(250)) * 40)
        pair.mount.restart()
        for name in ("file", "other"):
            expected = bytearray(range(250)) * 40
            with fd_of(pair.mountpoint / name, os.O_WRONLY) as fd:
                os.pwrite(fd, b"inside", 4090)
            expected[4090:4096] = b"inside"
            assert read(pair.mountpoint / name) == expected
        pair.wait_in_sync()
        pair.assert_equal()


# What goes with it -------------------------------------------------------------------------------


def test_strict_refuses_it():
    with Pair() as pair:
        top = pair.mountpoint
        write(top / "strict", b"content")
        (top / "dir").mkdir()
        write(top / "sync", b"x")
        for name in ("strict", "dir"):
            os.setxattr(top / name, "user.replfs.policy", b"strict")
        pair.mount.stop()
        pair.mount.command += WRITEBACK
        pair.mount.start()
        pair.wait_in_sync()
        with fails(errno.EINVAL):
            os.setxattr(top / "sync", "user.replfs.policy", b"strict")
        # What became strict without it can be read, and changed by what returns late enough.
        for flags in (os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_TRUNC, os.O_RDWR | os.O_CREAT):
            assert outcome(os.open, top / "strict", flags) == "EOPNOTSUPP"
        assert outcome(os.open, top / "dir" / "new", os.O_RDWR | os.O_CREAT) == "EOPNOTSUPP"
        assert not exists(top / "dir" / "new")
        assert read(top / "strict") == b"content"
        os.chmod(top / "strict", 0o600)
        os.setxattr(top / "strict", "user.replfs.policy", b"sync")
        write(top / "strict", b"new")
        pair.assert_equal()


def test_with_the_acknowledgement_level_close():
    with Pair(mount_arguments=(*WRITEBACK, "--ack", "close")) as pair:
        for number in range(50):
            path = pair.mountpoint / str(number)
            write(path, b"%d" % number * 1000)
            assert read(pair.secondary_store / path.name) == b"%d" % number * 1000
        pair.assert_equal()


def test_a_replicas_mount_sees_sizes_change_all_the_same():
    with Pair(replica_mounted=True, agent_arguments=WRITEBACK) as pair:
        write(pair.mountpoint / "file", b"x")
        there = pair.replica / "file"
        wait_for(lambda: os.stat(there).st_size == 1)
        with fd_of(there):
            write(pair.mountpoint / "file", b"x" * 5000)
            wait_for(lambda: os.stat(there).st_size == 5000)
            assert read(there) == b"x" * 5000
