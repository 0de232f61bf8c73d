"""The mount of a replica: it shows what the primary's shows, and every change gets EROFS."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

import pytest
from helpers import nodes
from helpers.cases import NOT_SYMLINK, fails, fd_of, make, outcome, read, write
from helpers.children import as_user
from helpers.compare import compare_trees, wait_equal
from helpers.libc import RENAME_EXCHANGE, linkat, renameat2, utimensat

PLAIN = os.environ.get("REPLFS_CONFORMANCE_DIR")


@pytest.fixture(scope="module")
def replicated(nothing_left_behind):
    """A pair whose replica is mounted, too, with one of everything in it."""
    if PLAIN:
        pytest.skip("only on a replfs mount")
    with nodes.Pair(replica_mounted=True) as pair:
        for kind in NOT_SYMLINK:
            make(kind, pair.mountpoint / kind)
        os.chmod(pair.mountpoint / "directory", 0o755)
        os.symlink("file", pair.mountpoint / "symlink")
        write(pair.mountpoint / "file", b"data")
        os.setxattr(pair.mountpoint / "file", "user.x", b"1")
        yield pair
        pair.assert_equal()


@pytest.fixture
def replica(replicated):
    """The root of the replica's mount; nothing in it may change."""
    yield replicated.replica
    replicated.check_alive()
    assert not compare_trees(replicated.secondary_store, replicated.replica)


CHANGES = {
    "chmod": lambda root: os.chmod(root / "file", 0o600),
    "chown": lambda root: os.chown(root / "file", 1, 1),
    "lchown": lambda root: os.lchown(root / "symlink", 1, 1),
    "create": lambda root: os.open(root / "new", os.O_CREAT | os.O_WRONLY),
    "link": lambda root: linkat(-100, root / "file", root / "new", 0),
    "mkdir": lambda root: os.mkdir(root / "new"),
    "mkfifo": lambda root: os.mkfifo(root / "new"),
    "open to truncate": lambda root: os.open(root / "file", os.O_RDONLY | os.O_TRUNC),
    "open to write": lambda root: os.open(root / "file", os.O_WRONLY),
    "open to read and write": lambda root: os.open(root / "file", os.O_RDWR),
    "removexattr": lambda root: os.removexattr(root / "file", "user.x"),
    "rename": lambda root: os.rename(root / "file", root / "new"),
    "exchange": lambda root: renameat2(root / "file", root / "fifo", RENAME_EXCHANGE),
    "rmdir": lambda root: os.rmdir(root / "directory"),
    "setxattr": lambda root: os.setxattr(root / "file", "user.x", b"2"),
    "set policy": lambda root: os.setxattr(root / "file", "user.replfs.policy", b"async"),
    "symlink": lambda root: os.symlink("x", root / "new"),
    "truncate": lambda root: os.truncate(root / "file", 0),
    "unlink": lambda root: os.unlink(root / "file"),
    "utimensat": lambda root: utimensat(root / "file", (1, 1), (1, 1)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_every_change_is_refused(replica, change):
    with fails(errno.EROFS):
        change(replica)


def test_write_access_is_refused(replica):
    assert not os.access(replica / "file", os.W_OK)
    assert os.access(replica / "file", os.R_OK)


def test_what_looks_works(replica):
    assert read(replica / "file") == b"data"
    assert os.readlink(replica / "symlink") == "file"
    assert os.getxattr(replica / "file", "user.x") == b"1"
    assert ".replfs" not in os.listdir(replica)
    assert os.statvfs(replica).f_flag & os.ST_RDONLY
    with fd_of(replica / "file") as fd:
        fcntl.flock(fd, fcntl.LOCK_SH)
        with mmap.mmap(fd, 4, prot=mmap.PROT_READ) as mapping:
            assert mapping[:] == b"data"
    with fd_of(replica / "character", os.O_WRONLY) as fd:
        assert os.write(fd, b"to a device, not to the filesystem") > 0


def test_permissions_count(replicated, replica):
    os.chmod(replicated.mountpoint / "file", 0o600)

    def is_closed():
        return as_user(outcome, os.open, replica / "file", os.O_RDONLY) == "EACCES"

    nodes.wait_for(is_closed, 30, "the mode to be seen at the replica")
    os.chmod(replicated.mountpoint / "file", 0o644)


def test_changes_are_seen(replicated, replica):
    source = replicated.mountpoint / "changing"
    os.mkdir(source)
    write(source / "file", b"first")
    nodes.wait_for(lambda: read(replica / "changing/file") == b"first", 30, "a new file")
    with fd_of(replica / "changing/file") as fd:
        write(source / "file", b"second, longer")
        nodes.wait_for(lambda: os.pread(fd, 99, 0) == b"second, longer", 30, "new contents")
    os.rename(source / "file", source / "moved")
    os.mkdir(source / "sub")
    os.setxattr(source / "moved", "user.y", b"2")
    wait_equal(source, replica / "changing", timeout_s=30)
    os.unlink(source / "moved")
    os.rmdir(source / "sub")
    os.rmdir(source)
    nodes.wait_for(lambda: not os.path.exists(replica / "changing"), 30, "a removal")
