"""Replication policies per file and directory, on a real mount."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cases import exists, fails, outcome, read, write
from helpers.children import USER, as_user, spawn
from helpers.cluster import Cluster
from helpers.compare import compare_trees, wait_equal
from helpers.libc import RENAME_EXCHANGE, renameat2
from helpers.nodes import Pair, run_replfs, wait_for

pytestmark = pytest.mark.mounted

MIB = 1 << 20
POLICY = "user.replfs.policy"
LONG_S = 20.0
"""What nothing may take whose limit is a peer timeout of one or two seconds."""
PATIENT = ("--peer-timeout", "60s")
QUICK = ("--peer-timeout", "1s")


@pytest.fixture
def quick_pair():
    """A pair whose primary gives a peer up after one second."""
    with Pair(mount_arguments=QUICK) as fresh:
        yield fresh


def set_policy(path: Path, policy: str) -> None:
    os.setxattr(path, POLICY, policy.encode())


def get(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.replfs.{name}").decode()


def effective(path: Path) -> tuple[str, str]:
    """The effective policy and where it comes from."""
    return get(path, "policy.effective"), get(path, "policy.source")


def wait_exists(path: Path, *, there: bool = True) -> None:
    wait_for(lambda: exists(path) == there, what=f"{path} {'there' if there else 'gone'}")


def wait_state(path: Path, state: str) -> None:
    wait_for(lambda: get(path, "state") == state, what=f"{path} to be {state}")


def wait_there(pair: Pair, *names: str) -> None:
    """Wait until the replica has these, equal, and the peer is in sync again."""
    pair.wait_in_sync()
    for name in names:
        wait_exists(pair.secondary_store / name)


def wait_gone(pair: Pair, *names: str) -> None:
    """Wait until the replica has not got these any more, and the peer is in sync again."""
    for name in names:
        wait_exists(pair.secondary_store / name, there=False)
    pair.wait_in_sync()


def assert_only_missing(pair: Pair, *names: str) -> None:
    """The replica lacks exactly these."""

    def is_so() -> bool:
        found = [
            difference
            for difference in compare_trees(pair.primary_store, pair.secondary_store)
            # A directory's mtime is its own side's where names were made in one of them only.
            if difference.kind != "mtime"
        ]
        missing = sorted(os.fsdecode(d.path) for d in found if (d.left, d.right) == (True, False))
        assert len(missing) == len(found), [str(d) for d in found]
        assert missing == sorted(names)
        return True

    wait_for(is_so, what="the replica to lack just what it must")


@contextlib.contextmanager
def within(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.1f} s"


# The attributes ----------------------------------------------------------------------------------


def test_inheritance_and_its_virtual_names(pair):
    top = pair.mountpoint
    (top / "a" / "b").mkdir(parents=True)
    deep = top / "a" / "b" / "file"
    write(deep, b"x")
    assert effective(deep) == ("sync", "default")
    set_policy(top / "a", "async")
    assert effective(deep) == ("async", "inherited:/a")
    assert effective(top / "a") == ("async", "local")
    assert effective(top) == ("sync", "default")
    set_policy(top, "strict")
    assert effective(deep) == ("async", "inherited:/a")
    assert effective(top) == ("strict", "local")
    set_policy(deep, "none")
    assert effective(deep) == ("none", "local")
    set_policy(deep, "inherit")
    assert effective(deep) == ("async", "inherited:/a")
    assert outcome(os.getxattr, deep, POLICY) == "ENODATA"
    os.removexattr(top / "a", POLICY)
    assert effective(deep) == ("strict", "inherited:/")
    write(top / "a" / "new", b"x")
    assert effective(top / "a" / "new") == ("strict", "inherited:/")
    os.rename(top / "a" / "b", top / "c")
    set_policy(top / "c", "async")
    assert effective(top / "c" / "file") == ("async", "inherited:/c")
    os.rename(top / "c", top / "a" / "c")
    assert effective(top / "a" / "c" / "file") == ("async", "inherited:/a/c")
    os.removexattr(top, POLICY)
    assert effective(top / "a" / "new") == ("sync", "default")
    pair.assert_equal()


def test_errors(pair):
    top = pair.mountpoint
    write(top / "file", b"x")
    os.mkdir(top / "dir")
    os.symlink("file", top / "link")
    os.mkfifo(top / "fifo")
    os.chown(top / "file", USER, -1)
    for path in (top / "file", top / "dir"):
        for value in (b"", b"Sync", b"sync ", b"full", b"sync\n\n", b"\xff", b"x" * 1000):
            assert outcome(os.setxattr, path, POLICY, value) == "EINVAL"
        for name in ("policy.effective", "policy.source", "state", "dirty_bytes", "status", "x"):
            assert outcome(os.setxattr, path, f"user.replfs.{name}", b"sync") == "EOPNOTSUPP"
            assert outcome(os.removexattr, path, f"user.replfs.{name}") == "EOPNOTSUPP"
        for name in ("policy", "ack", "x", "policy.x"):
            assert outcome(os.getxattr, path, f"user.replfs.{name}") == "ENODATA"
        assert outcome(os.removexattr, path, POLICY) == "ENODATA"
        assert os.listxattr(path) == []
    # The kernel's answers for `user.` on what is neither file nor directory; never ENOSYS.
    for path in (top / "link", top / "fifo"):
        with fails(errno.ENODATA):
            os.getxattr(path, POLICY, follow_symlinks=False)
        with fails(errno.EPERM):
            os.setxattr(path, POLICY, b"sync", follow_symlinks=False)
    # Owner and root may, nobody else, whatever the mode.
    os.chmod(top / "file", 0o666)
    os.chmod(top / "dir", 0o777)
    assert as_user(outcome, os.setxattr, top / "file", POLICY, b"async") == "ok"
    assert as_user(outcome, os.removexattr, top / "file", POLICY) == "ok"
    assert as_user(outcome, os.setxattr, top / "dir", POLICY, b"async") == "EPERM"
    set_policy(top / "dir", "async")
    assert as_user(outcome, os.removexattr, top / "dir", POLICY) == "EPERM"
    assert as_user(get, top / "dir", "policy") == "async"
    # An acknowledgement level is inherited in the same way and has the same errors.
    assert outcome(os.setxattr, top / "dir", "user.replfs.ack", b"sometimes") == "EINVAL"
    os.setxattr(top / "dir", "user.replfs.ack", b"close")
    assert get(top / "dir", "ack") == "close"
    os.removexattr(top / "dir", "user.replfs.ack")
    assert outcome(os.getxattr, top / "dir", "user.replfs.ack") == "ENODATA"
    pair.assert_equal()


def test_a_replica_shows_policies_and_takes_none():
    with Pair(replica_mounted=True) as pair:
        (pair.mountpoint / "dir").mkdir()
        write(pair.mountpoint / "dir" / "file", b"x")
        there = pair.replica / "dir" / "file"
        wait_for(lambda: exists(there))
        assert effective(there) == ("sync", "default")
        assert get(there, "state") == "in-sync"
        set_policy(pair.mountpoint / "dir", "async")
        wait_for(lambda: effective(there) == ("async", "inherited:/dir"))
        set_policy(pair.mountpoint / "dir" / "file", "strict")
        wait_for(lambda: get(there, "policy") == "strict")
        for call in (lambda: set_policy(there, "none"), lambda: os.removexattr(there, POLICY)):
            with fails(errno.EROFS):
                call()
        assert os.listxattr(there) == []
        assert effective(there) == ("strict", "local")
        assert json.loads(get(pair.replica, "status"))["role"] == "secondary"


def test_policies_survive_a_remount_and_are_the_mounts_own_default():
    with Pair(mount_arguments=("--policy", "async")) as pair:
        write(pair.mountpoint / "file", b"x")
        os.mkdir(pair.mountpoint / "dir")
        assert effective(pair.mountpoint / "file") == ("async", "default")
        set_policy(pair.mountpoint / "dir", "none")
        write(pair.mountpoint / "dir" / "inside", b"x")
        pair.mount.restart()
        assert effective(pair.mountpoint / "dir" / "inside") == ("none", "inherited:/dir")
        assert effective(pair.mountpoint / "file") == ("async", "default")
        wait_gone(pair, "dir")
        assert_only_missing(pair, "dir")


def test_past_the_queue_of_async_the_log_takes_over():
    """No write waits for a peer that stands still, and what it is to get is bounded in bytes."""
    arguments = ("--policy", "async", "-o", "async-queue=2MiB")
    with Pair(mount_arguments=arguments) as pair:
        pair.wait_in_sync()
        pair.agent.freeze()
        for number in range(8):
            write(pair.mountpoint / f"{number}", os.urandom(1 << 20))
        peer = pair.peer()
        assert 2 << 20 <= peer["lag_bytes"] < 4 << 20
        assert peer["dirty_bytes"] > 0
        pair.agent.thaw()
        pair.wait_in_sync()
        wait_equal(pair.primary_store, pair.secondary_store)


def test_tools_neither_copy_policies_nor_wipe_them(pair):
    top = pair.mountpoint
    (top / "tree").mkdir()
    write(top / "tree" / "file", b"content")
    os.setxattr(top / "tree" / "file", "user.mine", b"1")
    set_policy(top / "tree", "async")
    set_policy(top / "tree" / "file", "strict")
    outside = pair.base / "outside"
    for command in (
        ["cp", "-a", top / "tree", outside],
        ["rsync", "-aX", f"{top / 'tree'}/", pair.base / "rsynced"],
        ["tar", "--xattrs", "--xattrs-include=*", "-cf", pair.base / "t.tar", "-C", top, "tree"],
    ):
        done = subprocess.run(command, check=True, capture_output=True)
        assert done.stderr == b""
    for copy in (outside / "file", pair.base / "rsynced" / "file"):
        assert os.listxattr(copy) == ["user.mine"]
    assert b"replfs" not in read(pair.base / "t.tar")
    write(outside / "file", b"newer content")
    os.setxattr(outside / "file", "user.other", b"2")
    os.removexattr(outside / "file", "user.mine")
    subprocess.run(["rsync", "-aX", "--delete", f"{outside}/", f"{top / 'tree'}/"], check=True)
    subprocess.run(["tar", "--xattrs", "-xf", pair.base / "t.tar", "-C", top], check=True)
    assert effective(top / "tree") == ("async", "local")
    # rsync(1) and tar(1) put a new file in the old one's place, which inherits.
    assert effective(top / "tree" / "file") == ("async", "inherited:/tree")
    set_policy(top / "tree" / "file", "strict")
    subprocess.run(
        ["rsync", "-aX", "--inplace", "--delete", f"{outside}/", f"{top / 'tree'}/"], check=True
    )
    assert effective(top / "tree" / "file") == ("strict", "local")
    assert os.listxattr(top / "tree" / "file") == ["user.other"]
    pair.wait_in_sync()
    pair.assert_equal()


# none --------------------------------------------------------------------------------------------


def test_what_has_policy_none_is_not_on_the_replica(pair):
    top = pair.mountpoint
    os.mkdir(top / "scratch")
    set_policy(top / "scratch", "none")
    wait_gone(pair, "scratch")
    before = pair.peer()["sent_ops"]
    (top / "scratch" / "deep").mkdir()
    for number in range(20):
        path = top / "scratch" / "deep" / str(number)
        write(path, b"x" * 10_000)
        os.chmod(path, 0o600)
        os.setxattr(path, "user.x", b"y")
        os.truncate(path, 100)
    os.rename(top / "scratch" / "deep" / "0", top / "scratch" / "0")
    os.link(top / "scratch" / "0", top / "scratch" / "deep" / "0")
    os.unlink(top / "scratch" / "deep" / "1")
    with (top / "scratch" / "0").open("r+b") as file:
        os.fsync(file.fileno())
    assert get(top / "scratch" / "0", "state") == "local"
    assert pair.peer()["sent_ops"] - before < 10  # heartbeats at most
    assert_only_missing(pair, "scratch")
    # A name is replicated if its directory is and the object is not `none` itself.
    write(top / "file", b"x")
    set_policy(top / "file", "none")
    wait_gone(pair, "file")
    write(top / "file", b"y" * 1000)
    os.link(top / "file", top / "another name")
    os.rename(top / "file", top / "third name")
    assert_only_missing(pair, "scratch", "another name", "third name")
    assert read(top / "third name") == b"y" * 1000
    # Below a directory that is not there nothing can be, whatever its own policy.
    for policy in ("sync", "strict", "async"):
        (top / "scratch" / policy).mkdir()
        set_policy(top / "scratch" / policy, policy)
        write(top / "scratch" / policy / "file", b"x")
        os.rename(top / "scratch" / policy / "file", top / "scratch" / policy / "moved")
        write(top / "scratch" / f"{policy} file", b"x")
        set_policy(top / "scratch" / f"{policy} file", policy)
        write(top / "scratch" / f"{policy} file", b"yy")
    pair.wait_in_sync()
    assert_only_missing(pair, "scratch", "another name", "third name")
    peer = pair.peer()
    assert peer["dirty_objects"] == peer["dirty_names"] == 0
    assert "stuck" not in peer
    pair.check_alive()


def test_from_none_to_sync_carries_a_tree_and_an_open_file(pair):
    top = pair.mountpoint
    (top / "tree" / "deep").mkdir(parents=True)
    set_policy(top / "tree", "none")
    wait_gone(pair, "tree")
    for number in range(10):
        write(top / "tree" / "deep" / str(number), os.urandom(50_000 * number))
    os.link(top / "tree" / "deep" / "3", top / "tree" / "linked")
    os.symlink("linked", top / "tree" / "link")
    os.mkfifo(top / "tree" / "fifo", 0o600)
    os.setxattr(top / "tree" / "linked", "user.x", b"y")
    os.chown(top / "tree" / "deep", 5, 6)
    with (top / "tree" / "open").open("w+b", buffering=0) as file:
        file.write(b"a" * 200_000)
        os.removexattr(top / "tree", POLICY)
        # It may be written at once, while it is carried.
        for number in range(200):
            os.pwrite(file.fileno(), b"b" * 777, number * 1000)
        wait_there(pair, "tree/open", "tree/deep/9", "tree/link", "tree/fifo")
        file.write(b"c")
        pair.assert_equal()
    assert get(top / "tree", "state") == "in-sync"


def test_from_sync_to_none_removes_it_there_and_says_while_it_cannot(quick_pair):
    pair = quick_pair
    top = pair.mountpoint
    (top / "tree" / "deep").mkdir(parents=True)
    write(top / "tree" / "deep" / "file", b"x" * 100_000)
    write(top / "tree" / "one", b"1")
    os.link(top / "tree" / "one", top / "two")
    with (top / "tree" / "deep" / "file").open("r+b", buffering=0) as file:
        set_policy(top / "tree", "none")
        file.write(b"still written")
        wait_gone(pair, "tree")
        # An object is there while one of its names is.
        assert read(pair.secondary_store / "two") == b"1"
        assert_only_missing(pair, "tree", "tree/one") if exists(
            pair.secondary_store / "tree"
        ) else None
        assert read(top / "tree" / "deep" / "file").startswith(b"still written")
    assert get(top / "tree", "state") == "local"
    assert not os.listdir(pair.secondary_store / ".replfs" / "limbo")

    write(top / "file", b"secret")
    os.mkdir(top / "dir")
    write(top / "dir" / "inside", b"secret")
    pair.agent.kill9()
    pair.wait_state("out-of-sync")
    set_policy(top / "file", "none")
    set_policy(top / "dir", "none")
    assert get(top / "file", "state") == "removal-pending"
    assert get(top / "dir", "state") == "removal-pending"
    assert read(pair.secondary_store / "file") == b"secret"
    # It is remembered by a primary that ends, too.
    pair.mount.restart()
    assert get(top / "file", "state") == "removal-pending"
    pair.agent.start()
    wait_gone(pair, "file", "dir")
    assert get(top / "file", "state") == "local"
    assert get(top / "dir", "state") == "local"
    assert read(top / "dir" / "inside") == b"secret"


def test_renames_across_policies(pair):
    top = pair.mountpoint
    for name in ("kept", "local"):
        os.mkdir(top / name)
    set_policy(top / "local", "none")
    wait_gone(pair, "local")

    def fill(path: Path) -> None:
        (path / "deep").mkdir(parents=True)
        write(path / "deep" / "file", b"content" * 1000)
        os.link(path / "deep" / "file", path / "linked")

    # Out and back, a tree and a file.
    fill(top / "kept" / "tree")
    os.rename(top / "kept" / "tree", top / "local" / "tree")
    wait_gone(pair, "kept/tree")
    assert read(top / "local" / "tree" / "linked") == b"content" * 1000
    write(top / "local" / "tree" / "deep" / "more", b"more")
    os.rename(top / "local" / "tree", top / "kept" / "back")
    wait_there(pair, "kept/back/deep/more")
    wait_equal(top / "kept", pair.secondary_store / "kept")
    write(top / "kept" / "back" / "deep" / "more", b"live again")
    wait_equal(top / "kept", pair.secondary_store / "kept")
    # Over something, in each direction.
    write(top / "kept" / "a", b"a")
    write(top / "local" / "a", b"from local")
    os.rename(top / "local" / "a", top / "kept" / "a")
    wait_for(lambda: read(pair.secondary_store / "kept" / "a") == b"from local")
    write(top / "kept" / "b", b"b")
    write(top / "local" / "b", b"local b")
    os.rename(top / "kept" / "b", top / "local" / "b")
    wait_gone(pair, "kept/b")
    assert read(top / "local" / "b") == b"b"
    # Exchanged.
    write(top / "kept" / "x", b"was kept")
    write(top / "local" / "x", b"was local")
    renameat2(top / "kept" / "x", top / "local" / "x", RENAME_EXCHANGE)
    wait_for(lambda: read(pair.secondary_store / "kept" / "x") == b"was local")
    renameat2(top / "local" / "x", top / "kept" / "x", RENAME_EXCHANGE)
    wait_for(lambda: read(pair.secondary_store / "kept" / "x") == b"was kept")
    # What is `none` itself stays so wherever it is moved to, and what it replaces vanishes there.
    write(top / "kept" / "own", b"own")
    set_policy(top / "kept" / "own", "none")
    wait_gone(pair, "kept/own")
    write(top / "kept" / "replaced", b"r")
    os.rename(top / "kept" / "own", top / "kept" / "replaced")
    wait_gone(pair, "kept/replaced")
    write(top / "kept" / "new", b"new")
    os.rename(top / "kept" / "new", top / "kept" / "replaced")
    wait_there(pair, "kept/replaced")
    pair.wait_in_sync()
    assert_only_missing(pair, "local")
    # A directory moved where it inherits something else.
    fill(top / "kept" / "moved")
    set_policy(top / "kept" / "moved", "strict")
    os.rename(top / "kept" / "moved", top / "moved")
    assert effective(top / "moved" / "linked") == ("strict", "inherited:/moved")
    assert exists(pair.secondary_store / "moved" / "linked")
    assert_only_missing(pair, "local")
    assert not os.listdir(pair.secondary_store / ".replfs" / "limbo")


def test_links_across_policies(pair):
    top = pair.mountpoint
    for name in ("kept", "strict", "local"):
        os.mkdir(top / name)
        write(top / name / "file", b"x")
    set_policy(top / "local", "none")
    set_policy(top / "strict", "strict")
    wait_gone(pair, "local")
    with fails(errno.EXDEV):
        os.link(top / "kept" / "file", top / "local" / "link")
    with fails(errno.EXDEV):
        os.link(top / "local" / "file", top / "kept" / "link")
    os.link(top / "local" / "file", top / "local" / "link")
    os.link(top / "kept" / "file", top / "strict" / "link")
    assert not exists(top / "local" / "link") or os.stat(top / "local" / "link").st_nlink == 2
    # Acknowledged by the rule of the name it was last looked up by.
    assert get(top / "strict" / "link", "policy.effective") in ("strict", "sync")
    # An own policy takes all its names away, or brings them all.
    set_policy(top / "kept" / "file", "none")
    wait_gone(pair, "kept/file", "strict/link")
    os.removexattr(top / "kept" / "file", POLICY)
    wait_there(pair, "kept/file", "strict/link")
    assert_only_missing(pair, "local")


def test_a_policy_changes_under_a_writer(pair):
    path = pair.mountpoint / "file"
    write(path, b"")

    def work() -> None:
        with path.open("r+b", buffering=0) as file:
            for number in range(1500):
                os.pwrite(file.fileno(), b"%07d\n" % number * 40, number * 97 % 200_000)
                if number % 100 == 99:
                    os.ftruncate(file.fileno(), 150_000)

    writer = spawn(work)
    for policy in ("none", "sync", "async", "none", "strict", "async", "none", "inherit") * 2:
        set_policy(path, policy)
    writer.result()
    wait_there(pair, "file")
    pair.assert_equal(timeout_s=30)
    set_policy(path, "none")
    wait_gone(pair, "file")


@pytest.mark.parametrize("given", ["--none", "configuration"])
def test_names_that_are_never_replicated(tmp_path, given):
    if given == "--none":
        arguments = ["--none", "*.tmp:node_modules/"]
    else:
        (tmp_path / "replfs.toml").write_text('none = ["*.tmp", "node_modules/"]\n')
        arguments = ["--config", str(tmp_path / "replfs.toml")]
    with Pair(mount_arguments=arguments) as pair:
        top = pair.mountpoint
        (top / "node_modules" / "deep").mkdir(parents=True)
        write(top / "node_modules" / "deep" / "file", b"x")
        write(top / "a.tmp", b"x")
        write(top / "a.tmpx", b"x")
        (top / "dir").mkdir()
        write(top / "dir" / "node_modules", b"a file, not a directory")
        assert effective(top / "a.tmp") == ("none", "pattern:*.tmp")
        assert get(top / "node_modules" / "deep" / "file", "policy.effective") == "none"
        assert get(top / "a.tmp", "state") == "local"
        assert_only_missing(pair, "node_modules", "a.tmp")
        # As many programs save a file.
        os.rename(top / "a.tmp", top / "saved")
        wait_there(pair, "saved")
        os.rename(top / "saved", top / "b.tmp")
        wait_gone(pair, "saved")
        assert_only_missing(pair, "node_modules", "b.tmp")


# strict ------------------------------------------------------------------------------------------


def changes(top: Path) -> dict[str, object]:
    """One of each kind of change, on `top / "file"`, `top / "dir"` and new names."""
    return {
        "write": lambda: write_at(top / "file", b"changed"),
        "truncate": lambda: os.truncate(top / "file", 1),
        "O_TRUNC": lambda: os.close(os.open(top / "file", os.O_WRONLY | os.O_TRUNC)),
        "chmod": lambda: os.chmod(top / "file", 0o600),
        "chown": lambda: os.chown(top / "file", 3, 4),
        "utime": lambda: os.utime(top / "file", ns=(1, 2)),
        "setxattr": lambda: os.setxattr(top / "file", "user.x", b"y"),
        "create": lambda: os.close(os.open(top / "new", os.O_CREAT | os.O_WRONLY)),
        "mkdir": lambda: os.mkdir(top / "new"),
        "mknod": lambda: os.mkfifo(top / "new"),
        "symlink": lambda: os.symlink("x", top / "new"),
        "link": lambda: os.link(top / "file", top / "new"),
        "rename": lambda: os.rename(top / "file", top / "new"),
        "unlink": lambda: os.unlink(top / "file"),
        "rmdir": lambda: os.rmdir(top / "dir"),
        "fsync": lambda: sync(top / "file"),
    }


def write_at(path: Path, data: bytes) -> None:
    with path.open("r+b", buffering=0) as file:
        file.write(data)


def sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def test_strict_fails_before_anything_is_applied_when_the_peer_is_lost(quick_pair):
    pair = quick_pair
    top = pair.mountpoint / "strict"
    (top / "dir").mkdir(parents=True)
    write(top / "file", b"unchanged")
    set_policy(top, "strict")
    for change in changes(top).values():
        change()  # type: ignore[operator]
        subprocess.run(["rm", "-rf", top / "file", top / "dir", top / "new"], check=True)
        os.mkdir(top / "dir")
        write(top / "file", b"unchanged")
        wait_equal(pair.primary_store, pair.secondary_store)
    before = [os.lstat(path) for path in (top, top / "file", top / "dir")]
    pair.agent.kill9()
    pair.wait_state("out-of-sync")
    for name, change in changes(top).items():
        with within(LONG_S):
            assert outcome(change) == "EIO", name  # type: ignore[arg-type]
    # Nothing was applied, and reads go on.
    assert sorted(os.listdir(top)) == ["dir", "file"]
    assert read(top / "file") == b"unchanged"
    after = [os.lstat(path) for path in (top, top / "file", top / "dir")]
    for old, new in zip(before, after, strict=True):
        assert (old.st_mode, old.st_uid, old.st_size, old.st_mtime_ns, old.st_ctime_ns) == (
            new.st_mode, new.st_uid, new.st_size, new.st_mtime_ns, new.st_ctime_ns
        )  # fmt: skip
    wait_equal(pair.primary_store, pair.secondary_store, timeout_s=0)
    # Others go on, and a policy can be changed so that these do, too.
    write(pair.mountpoint / "other", b"x")
    set_policy(top / "file", "sync")
    write_at(top / "file", b"changed")
    set_policy(top / "file", "strict")
    assert outcome(write_at, top / "file", b"again") == "EIO"
    pair.agent.start()
    pair.wait_in_sync()
    write_at(top / "file", b"again")
    assert read(pair.secondary_store / "strict" / "file") == b"againeded"
    pair.assert_equal()


def test_strict_fails_within_the_timeout_when_the_peer_hangs(quick_pair):
    pair = quick_pair
    top = pair.mountpoint / "strict"
    top.mkdir()
    set_policy(top, "strict")
    write(top / "file", b"before")
    pair.agent.freeze()
    with within(LONG_S), fails(errno.EIO):
        write_at(top / "file", b"after!")  # applied here, unconfirmed
    with within(LONG_S), fails(errno.EIO):
        os.mkdir(top / "dir")  # known to be lost by now
    assert not exists(top / "dir")
    assert read(pair.secondary_store / "strict" / "file") == b"before"
    pair.agent.thaw()
    pair.wait_in_sync()
    # Names are what they are here, whatever the kernel was told: it looks again.
    pair.agent.freeze()
    assert not exists(top / "new")
    with within(LONG_S), fails(errno.EIO):
        os.rename(top / "file", top / "new")  # applied here, unconfirmed
    wait_for(lambda: exists(top / "new") and not exists(top / "file"), what="the new name")
    pair.agent.thaw()
    pair.wait_in_sync()
    os.rename(top / "new", top / "file")
    pair.wait_in_sync()
    pair.assert_equal()
    write_at(top / "file", b"again!")
    assert read(pair.secondary_store / "strict" / "file") == b"again!"


def test_strict_can_wait_for_a_lost_peer():
    arguments = (*QUICK, "--strict-on-loss", "suspend", "--suspend-timeout", "1min")
    with Pair(mount_arguments=arguments) as pair:
        path = pair.mountpoint / "file"
        write(path, b"before")
        write(pair.mountpoint / "other", b"other")
        set_policy(path, "strict")
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        writer = spawn(write_at, path, b"after!")
        wait_for(lambda: pair.mount.status()["suspended"] == 1, what="the write to be suspended")
        # Nothing is applied. (The mount is not asked: the kernel locks the page of a write.)
        assert read(pair.primary_store / "file") == b"before"
        assert read(pair.mountpoint / "other") == b"other"
        pair.agent.start()
        writer.result()
        assert read(pair.secondary_store / "file") == b"after!"
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        writer = spawn(outcome, write_at, path, b"never!")
        wait_for(lambda: pair.mount.status()["suspended"] == 1, what="the write to be suspended")
        run_replfs("resume", pair.mountpoint, "--rundir", pair.mount.rundir)
        assert writer.result() == "EIO"
        assert read(path) == b"after!"


def test_strict_takes_what_it_touches_in_sync_first():
    """While a long resync goes on, a strict change need not wait for all of it."""
    with Pair(mount_arguments=("--peer-timeout", "10s", "--resync-rate", "2MiB")) as pair:
        top = pair.mountpoint
        write(top / "strict", b"1" * 100_000)
        set_policy(top / "strict", "strict")
        for name in ("dir", "attributes"):
            (top / name).mkdir()
            set_policy(top / name, "strict")
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        for number in range(10):
            write(top / f"bulk-{number}", os.urandom(MIB))
        set_policy(top / "strict", "sync")
        write(top / "strict", b"2" * 200_000)
        set_policy(top / "strict", "strict")
        set_policy(top / "dir", "sync")
        write(top / "dir" / "while away", b"x")
        set_policy(top / "dir", "strict")
        set_policy(top / "attributes", "sync")
        os.chmod(top / "attributes", 0o700)
        set_policy(top / "attributes", "strict")
        pair.agent.start()
        pair.wait_state("incremental")
        write_at(top / "strict", b"3")
        assert read(pair.secondary_store / "strict") == b"3" + b"2" * 199_999
        assert get(top / "strict", "state") == "in-sync"
        write(top / "dir" / "new", b"y")
        assert read(pair.secondary_store / "dir" / "new") == b"y"
        os.chmod(top / "attributes", 0o711)
        assert (pair.secondary_store / "attributes").stat().st_mode & 0o777 == 0o711
        assert pair.peer()["dirty_bytes"] > MIB  # the rest is not there yet
        assert get(top, "state") == "resync"
        pair.wait_in_sync()
        pair.assert_equal()


def test_strict_with_several_peers():
    with Cluster(2, mount_arguments=QUICK) as cluster:
        path = cluster.mountpoint / "file"
        write(path, b"0")
        set_policy(path, "strict")
        write_at(path, b"1")
        cluster.agents[1].kill9()
        cluster.wait_peer(1, "out-of-sync")
        with fails(errno.EIO):
            write_at(path, b"2")
        assert read(path) == b"1"
    with Cluster(2, mount_arguments=(*QUICK, "--strict-peers", "1")) as cluster:
        path = cluster.mountpoint / "file"
        write(path, b"0")
        set_policy(path, "strict")
        # One that hangs is waited for, once, and then one confirmation is enough.
        cluster.agents[1].freeze()
        with within(LONG_S):
            write_at(path, b"1")
        cluster.wait_peer(1, "out-of-sync")
        write_at(path, b"2")
        assert read(cluster.stores[0] / "file") == b"2"
        cluster.agents[0].kill9()
        cluster.wait_peer(0, "out-of-sync")
        with fails(errno.EIO):
            write_at(path, b"3")
        cluster.agents[1].thaw()
        cluster.agents[0].start()
        cluster.wait_in_sync()
        cluster.assert_equal()


# async -------------------------------------------------------------------------------------------


def test_async_returns_while_the_peer_hangs():
    with Pair(mount_arguments=PATIENT) as pair:
        top = pair.mountpoint / "async"
        (top / "dir").mkdir(parents=True)
        write(top / "file", b"x" * 1000)
        set_policy(top, "async")
        pair.agent.freeze()
        with within(LONG_S):
            for number in range(300):
                write_at(top / "file", b"%d" % number)
        assert read(pair.secondary_store / "async" / "file") == b"x" * 1000
        # A barrier is one for `async`, too: it returns once the peer has it.
        child = spawn(sync, top / "file")
        pair.agent.thaw()
        child.result()
        assert read(pair.secondary_store / "async" / "file") == b"299" + b"x" * 997
        pair.agent.freeze()
        with within(LONG_S):
            calls = {name: call for name, call in changes(top).items() if name != "fsync"}
            for name, change in calls.items():
                assert outcome(change) == "ok", name  # type: ignore[arg-type]
                subprocess.run(["rm", "-rf", top / "file", top / "dir", top / "new"], check=True)
                os.mkdir(top / "dir")
                write(top / "file", b"unchanged")
            # More than any queue holds.
            with (top / "large").open("wb", buffering=0) as file:
                for _ in range(80):
                    file.write(os.urandom(MIB))
        assert not exists(pair.secondary_store / "async" / "large")
        pair.agent.thaw()
        pair.wait_in_sync()
        pair.assert_equal(timeout_s=30)


@pytest.mark.parametrize("victim", ["agent", "mount"])
def test_async_loses_nothing_when_a_process_is_killed(victim):
    with Pair(mount_arguments=(*QUICK, "--policy", "async")) as pair:
        pair.agent.freeze()
        for number in range(100):
            write(pair.mountpoint / str(number), b"x" * (number * 100))
            os.rename(pair.mountpoint / str(number), pair.mountpoint / f"r{number}")
        if victim == "mount":
            pair.mount.kill9()
            pair.agent.thaw()
            assert len(os.listdir(pair.primary_store)) == 101
            pair.mount.start()
        else:
            pair.agent.kill9()
            pair.wait_state("out-of-sync")
            pair.agent.start()
        pair.wait_in_sync()
        assert len(os.listdir(pair.secondary_store)) == 101
        pair.assert_equal()


# What is said about objects ----------------------------------------------------------------------


def test_states_of_objects(quick_pair):
    pair = quick_pair
    top = pair.mountpoint
    (top / "dir" / "deep").mkdir(parents=True)
    (top / "other").mkdir()
    write(top / "dir" / "deep" / "file", b"x" * MIB)
    write(top / "other" / "file", b"x")
    write(top / "mine", b"x")
    set_policy(top / "mine", "none")
    wait_gone(pair, "mine")
    everything = (top, top / "dir", top / "dir" / "deep" / "file", top / "other" / "file")
    for path in everything:
        assert get(path, "state") == "in-sync"
        assert get(path, "dirty_bytes") == "0"
    assert get(top / "mine", "state") == "local"
    pair.agent.kill9()
    pair.wait_state("out-of-sync")
    write_at(top / "dir" / "deep" / "file", b"y")
    for path in (top / "dir" / "deep" / "file", top / "dir" / "deep", top / "dir", top):
        wait_state(path, "dirty")
    assert get(top / "other" / "file", "state") == "out-of-sync"
    assert get(top / "mine", "state") == "local"
    assert 0 < int(get(top / "dir" / "deep" / "file", "dirty_bytes")) < MIB
    status = json.loads(get(top / "dir", "status"))
    assert [peer["state"] for peer in status["peers"]] == ["out-of-sync"]
    pair.agent.start()
    pair.wait_in_sync()
    for path in everything:
        wait_state(path, "in-sync")
        assert get(path, "dirty_bytes") == "0"
    report = run_replfs("policy", "report", top).stdout
    assert f"none    inherit  {top / 'mine'}" in report
    assert "1 of 7 objects have a policy of their own" in report
