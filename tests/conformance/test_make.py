"""mkdir, mkfifo, mknod, symlink, and the owner, group, mode and times of what is made.

Source: mkdir(2), mknod(2), symlink(2), inode(7), umask(2).
"""

from __future__ import annotations

import errno
import os
import stat

import pytest
from helpers.cases import (
    KINDS,
    MAKERS,
    PATH_MAX,
    TYPES,
    fails,
    make,
    mode_of,
    outcome,
    owner_of,
    stamps,
    type_of,
    unchanged,
)
from helpers.children import GROUP, OTHER_GROUP, USER, as_user
from helpers.libc import readlink_into

MAKES_MODE = tuple(kind for kind in KINDS if kind != "symlink")
UNPRIVILEGED = tuple(kind for kind in KINDS if kind not in ("block", "character"))


@pytest.mark.parametrize("kind", KINDS)
def test_type_and_owner(tree, kind):
    path = tree / "object"
    make(kind, path)
    status = os.lstat(path)
    assert stat.S_IFMT(status.st_mode) == TYPES[kind]
    assert (status.st_uid, status.st_gid) == (0, 0)
    assert status.st_nlink == (2 if kind == "directory" else 1)
    if kind not in ("directory", "symlink"):
        assert status.st_size == 0


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_owner_is_the_caller(tree, kind):
    os.chmod(tree.path, 0o777)
    as_user(make, kind, tree / "object")
    assert owner_of(tree / "object") == (USER, GROUP)


@pytest.mark.parametrize("kind", KINDS)
def test_time_stamps(tree, kind):
    os.mkdir(tree / "dir")
    with stamps({tree / "dir": "mc", tree.path: ""}):
        make(kind, tree / "dir/object")
    status, directory = os.lstat(tree / "dir/object"), os.stat(tree / "dir")
    assert status.st_mtime_ns <= status.st_ctime_ns
    assert abs(status.st_mtime_ns - directory.st_mtime_ns) < 10**9
    assert abs(status.st_atime_ns - status.st_mtime_ns) < 10**9


@pytest.mark.parametrize("kind", MAKES_MODE)
def test_the_umask(tree, kind):
    for number, (umask, mode) in enumerate(
        (umask, mode)
        for umask in (0o000, 0o022, 0o027, 0o077, 0o124, 0o777)
        for mode in (0o777, 0o666, 0o751, 0o000)
    ):
        os.umask(umask)
        make(kind, tree / str(number), mode)
        assert mode_of(tree / str(number)) == mode & ~umask, (oct(umask), oct(mode))


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_a_set_group_id_directory_gives_its_group(tree, kind):
    os.mkdir(tree / "dir")
    os.chown(tree / "dir", -1, OTHER_GROUP)
    os.chmod(tree / "dir", 0o2777)
    as_user(make, kind, tree / "dir/object", 0o755)
    assert owner_of(tree / "dir/object") == (USER, OTHER_GROUP)
    if kind == "directory":
        assert mode_of(tree / "dir/object") == 0o2755
    elif kind != "symlink":
        assert mode_of(tree / "dir/object") == 0o755


@pytest.mark.parametrize("kind", ["file", "fifo", "socket"])
def test_set_id_bits_at_creation(tree, kind):
    os.chmod(tree.path, 0o777)
    as_user(make, kind, tree / "object", 0o6755)
    assert mode_of(tree / "object") == 0o6755


def test_no_set_group_id_for_a_foreign_group(tree):
    os.mkdir(tree / "dir")
    os.chown(tree / "dir", -1, OTHER_GROUP)
    os.chmod(tree / "dir", 0o2777)
    as_user(make, "file", tree / "dir/foreign", 0o2775)
    as_user(lambda: make("file", tree / "dir/member", 0o2775), groups=[OTHER_GROUP])
    assert mode_of(tree / "dir/foreign") == 0o755
    assert mode_of(tree / "dir/member") == 0o2755


def test_set_id_bits_of_mkdir(tree):
    os.umask(0)
    os.mkdir(tree / "dir", 0o1777)
    assert mode_of(tree / "dir") == 0o1777
    os.mkdir(tree / "other", 0o6755)
    assert mode_of(tree / "other") == 0o755  # mkdir(2): only the sticky bit besides the nine


@pytest.mark.parametrize("kind", ["block", "character"])
def test_device_numbers(tree, kind):
    for number, device in enumerate(((0, 0), (1, 3), (255, 255), (256, 256), (4095, 1048575))):
        path = tree / str(number)
        os.mknod(path, TYPES[kind] | 0o600, os.makedev(*device))
        found = os.lstat(path).st_rdev
        assert (os.major(found), os.minor(found)) == device


@pytest.mark.parametrize("kind", ["block", "character"])
def test_devices_are_for_root(tree, kind):
    os.chmod(tree.path, 0o777)
    with unchanged(tree), fails(errno.EPERM):
        as_user(MAKERS[kind], tree / "device", 0o600)


def test_mknod_of_a_regular_file(tree):
    os.mknod(tree / "typed", stat.S_IFREG | 0o640)
    os.mknod(tree / "untyped", 0o604)
    assert [type_of(tree / name) for name in ("typed", "untyped")] == [stat.S_IFREG] * 2
    assert [mode_of(tree / name) for name in ("typed", "untyped")] == [0o640, 0o604]
    with fails(errno.EPERM, errno.EINVAL):
        os.mknod(tree / "directory", stat.S_IFDIR | 0o755)


def test_link_counts_of_directories(tree):
    for number in range(5):
        os.mkdir(tree / str(number))
        assert os.stat(tree).st_nlink == 3 + number
    make("file", tree / "file")
    os.mkdir(tree / "0/deeper")
    assert os.stat(tree).st_nlink == 7
    assert os.stat(tree / "0").st_nlink == 3
    os.rmdir(tree / "4")
    assert os.stat(tree).st_nlink == 6
    os.rename(tree / "3", tree / "0/3")
    assert (os.stat(tree).st_nlink, os.stat(tree / "0").st_nlink) == (5, 4)


@pytest.mark.parametrize("length", [1, 59, 60, 255, 1023, 1024, 4095])
def test_symlink_targets(tree, length):
    target = os.fsdecode((b"\xff/\xc3" * PATH_MAX)[:length])
    os.symlink(target, tree / "link")
    assert os.readlink(tree / "link") == target
    assert os.lstat(tree / "link").st_size == length
    assert readlink_into(tree / "link", 1) == os.fsencode(target)[:1]


def test_symlink_targets_that_are_refused(tree):
    assert outcome(os.symlink, "", tree / "empty") == "ENOENT"
    assert outcome(os.symlink, "t" * PATH_MAX, tree / "long") == "ENAMETOOLONG"
    assert os.listdir(tree) == []


def test_symlinks_lead_where_they_say(tree):
    os.mkdir(tree / "dir")
    make("file", tree / "dir/file")
    for name, target in (
        ("relative", "dir/file"),
        ("absolute", tree / "dir/file"),
        ("dir/up", "../dir/./file"),
        ("chain", "relative"),
        ("through", "dir/../dir/up"),
    ):
        os.symlink(target, tree / name)
        assert os.path.samefile(tree / name, tree / "dir/file")
    os.unlink(tree / "dir/file")
    for name in ("relative", "absolute", "dir/up", "chain", "through"):
        assert outcome(os.stat, tree / name) == "ENOENT"


def test_readlink_of_what_is_none(tree):
    for kind in MAKES_MODE:
        make(kind, tree / kind)
        assert outcome(os.readlink, tree / kind) == "EINVAL"


def test_the_mode_of_a_symlink(tree):
    os.umask(0o777)
    os.symlink("x", tree / "link")
    assert mode_of(tree / "link") == 0o777


@pytest.mark.parametrize("kind", UNPRIVILEGED)
def test_a_sticky_directory_lets_everyone_create(tree, kind):
    os.chmod(tree.path, 0o1777)
    as_user(make, kind, tree / "object")
    assert owner_of(tree / "object") == (USER, GROUP)
