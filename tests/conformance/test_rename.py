"""rename, renameat2. Source: rename(2), POSIX.1-2024 rename()."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from helpers.cases import (
    KINDS,
    TYPES,
    exists,
    fails,
    fd_of,
    make,
    make_owned,
    outcome,
    owner_of,
    read,
    remove,
    stamps,
    type_of,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_GROUP, OTHER_USER, USER, as_user
from helpers.libc import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT, renameat2

kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
def test_it_keeps_the_object(tree, kind):
    os.mkdir(tree / "dir")
    make(kind, tree / "old")
    before = os.lstat(tree / "old")
    with stamps(
        {tree / "old": "c", tree.path: "mc", tree / "dir": "mc"},
        moved={tree / "old": tree / "dir/new"},
    ):
        os.rename(tree / "old", tree / "dir/new")
    after = os.lstat(tree / "dir/new")
    assert not exists(tree / "old")
    assert os.listdir(tree) == ["dir"]
    assert (after.st_ino, after.st_mode, after.st_nlink, after.st_size, after.st_rdev) == (
        before.st_ino, before.st_mode, before.st_nlink, before.st_size, before.st_rdev
    )  # fmt: skip


@kinds
def test_over_every_kind(tree, kind):
    for number, target in enumerate(KINDS):
        old, new = tree / f"old {number}", tree / f"new {number}"
        make(kind, old)
        make(target, new)
        inode = os.lstat(old).st_ino
        if (kind == "directory") == (target == "directory"):
            os.rename(old, new)
            assert os.lstat(new).st_ino == inode
            assert type_of(new) == TYPES[kind]
            assert not exists(old)
        else:
            wanted = errno.ENOTDIR if kind == "directory" else errno.EISDIR
            with unchanged(old, new, tree), fails(wanted):
                os.rename(old, new)


@kinds
def test_what_is_replaced_loses_a_link(tree, kind):
    make("file", tree / "new")
    os.link(tree / "new", tree / "other name")
    if kind == "directory":
        return
    make(kind, tree / "old")
    with stamps({tree / "other name": "c"}):
        os.rename(tree / "old", tree / "new")
    assert os.stat(tree / "other name").st_nlink == 1


def test_over_a_directory_that_is_not_empty(tree):
    os.makedirs(tree / "old/a")
    os.makedirs(tree / "new/b")
    with unchanged(tree / "old", tree / "new", tree), fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rename(tree / "old", tree / "new")
    os.rmdir(tree / "new/b")
    os.rename(tree / "old", tree / "new")
    assert os.listdir(tree / "new") == ["a"]
    assert os.stat(tree).st_nlink == 3


def test_a_directory_not_into_itself(tree):
    os.makedirs(tree / "dir/deeper")
    with unchanged(tree / "dir", tree / "dir/deeper"):
        for target in ("dir/new", "dir/deeper/new", "dir/deeper"):
            wanted = errno.EINVAL
            with fails(wanted):
                os.rename(tree / "dir", tree / target)
        with fails(errno.ENOTEMPTY, errno.EEXIST):
            os.rename(tree / "dir/deeper", tree / "dir")


def test_dot_and_dot_dot(tree):
    os.makedirs(tree / "dir/deeper")
    os.chdir(tree / "dir")
    for source, target in ((".", "x"), ("..", "x"), ("deeper", "."), ("deeper", "..")):
        assert outcome(os.rename, source, target) in ("EINVAL", "EBUSY", "ENOTEMPTY", "EEXIST")
    assert os.listdir(".") == ["deeper"]


def test_onto_itself(tree):
    write(tree / "file", b"")
    os.mkdir(tree / "dir")
    with unchanged(tree / "file", tree / "dir", tree):
        os.rename(tree / "file", tree / "file")
        os.rename(tree / "dir", tree / "dir")


def test_a_whole_tree(tree):
    os.makedirs(tree / "a/b/c")
    os.mkdir(tree / "x")
    write(tree / "a/b/c/leaf", b"data")
    with fd_of(tree / "a/b") as directory, fd_of(tree / "a/b/c/leaf", os.O_RDWR) as leaf:
        os.rename(tree / "a", tree / "x/y")
        assert read(tree / "x/y/b/c/leaf") == b"data"
        assert not exists(tree / "a")
        os.pwrite(leaf, b"more", 4)
        os.mkdir("made", dir_fd=directory)
        assert os.path.samefile(tree / "x/y/b/..", tree / "x/y")
        assert os.path.samefile(tree / "x/y/..", tree / "x")
    assert read(tree / "x/y/b/c/leaf") == b"datamore"
    assert exists(tree / "x/y/b/made")
    os.rename(tree / "x/y/b", tree / "b")
    assert read(tree / "b/c/leaf") == b"datamore"


def test_back_and_forth_with_other_objects_under_the_name(tree):
    for number in range(10):
        write(tree / "file", b"%d" % number)
        os.rename(tree / "file", tree / f"kept {number}")
    write(tree / "file", b"last")
    assert [read(tree / f"kept {number}") for number in range(10)] == [
        b"%d" % number for number in range(10)
    ]


def test_an_open_file_that_is_replaced(tree):
    write(tree / "old", b"old data")
    write(tree / "new", b"new data")
    with fd_of(tree / "new", os.O_RDWR) as fd:
        os.rename(tree / "old", tree / "new")
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"X", 0)
        assert os.pread(fd, 20, 0) == b"Xew data"
    assert read(tree / "new") == b"old data"


def test_an_open_file_that_moves(tree):
    write(tree / "old", b"data")
    with fd_of(tree / "old", os.O_RDWR | os.O_APPEND) as fd:
        os.rename(tree / "old", tree / "new")
        os.write(fd, b" and more")
    assert read(tree / "new") == b"data and more"


def test_link_counts_of_parents(tree):
    os.makedirs(tree / "a/moved")
    os.mkdir(tree / "b")
    os.rename(tree / "a/moved", tree / "b/moved")
    assert (os.stat(tree / "a").st_nlink, os.stat(tree / "b").st_nlink) == (2, 3)
    os.mkdir(tree / "a/moved")
    os.rename(tree / "a/moved", tree / "b/moved")
    assert (os.stat(tree / "a").st_nlink, os.stat(tree / "b").st_nlink) == (2, 3)


def test_noreplace(tree):
    for kind in KINDS:
        make(kind, tree / f"new {kind}")
        make("file", tree / f"old {kind}")
        with unchanged(tree / f"new {kind}", tree / f"old {kind}"), fails(errno.EEXIST):
            renameat2(tree / f"old {kind}", tree / f"new {kind}", RENAME_NOREPLACE)
    renameat2(tree / "old file", tree / "free", RENAME_NOREPLACE)
    assert exists(tree / "free")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("file", "file"), ("file", "directory"), ("directory", "symlink"),
        ("directory", "directory"), ("fifo", "character"),
    ],
)  # fmt: skip
def test_exchange(tree, first, second):
    os.mkdir(tree / "dir")
    one, two = tree / "one", tree / "dir/two"
    make(first, one)
    make(second, two)
    inodes = os.lstat(one).st_ino, os.lstat(two).st_ino
    with stamps(
        {one: "c", two: "c", tree.path: "mc", tree / "dir": "mc"}, moved={one: two, two: one}
    ):
        renameat2(one, two, RENAME_EXCHANGE)
    assert (os.lstat(two).st_ino, os.lstat(one).st_ino) == inodes
    counts = os.stat(tree).st_nlink, os.stat(tree / "dir").st_nlink
    assert counts == (3 + (second == "directory"), 2 + (first == "directory"))


def test_exchange_of_trees_with_open_files(tree):
    for name in "ab":
        os.mkdir(tree / name)
        write(tree / name / "file", name.encode())
    with fd_of(tree / "a/file", os.O_RDWR) as fd:
        renameat2(tree / "a", tree / "b", RENAME_EXCHANGE)
        os.pwrite(fd, b"written later", 0)
    assert read(tree / "b/file") == b"written later"
    assert read(tree / "a/file") == b"b"


def test_exchange_with_nothing(tree):
    write(tree / "file", b"")
    with fails(errno.ENOENT):
        renameat2(tree / "file", tree / "missing", RENAME_EXCHANGE)
    with fails(errno.EINVAL):
        renameat2(tree / "file", tree / "missing", RENAME_EXCHANGE | RENAME_NOREPLACE)


@kinds
@pytest.mark.parametrize("replaced", [False, True])
def test_whiteout(tree, kind, replaced):
    """What overlayfs needs: a character device 0:0 stands under the old name at once."""
    make(kind, tree / "old")
    if replaced:
        make(kind, tree / "new")
    inode = os.lstat(tree / "old").st_ino
    with stamps({tree.path: "mc"}):
        renameat2(tree / "old", tree / "new", RENAME_WHITEOUT)
    assert os.lstat(tree / "new").st_ino == inode
    left = os.lstat(tree / "old")
    assert (left.st_mode, left.st_rdev, left.st_nlink) == (stat.S_IFCHR, 0, 1)
    assert (left.st_uid, left.st_gid) == (0, 0)
    assert left.st_ino != inode
    os.rename(tree / "old", tree / "moved")
    os.link(tree / "moved", tree / "linked")
    assert os.lstat(tree / "linked").st_nlink == 2
    os.unlink(tree / "moved")
    remove(tree / "new")


def test_whiteout_with_other_flags(tree):
    write(tree / "file", b"1")
    write(tree / "there", b"2")
    with fails(errno.EEXIST):
        renameat2(tree / "file", tree / "there", RENAME_WHITEOUT | RENAME_NOREPLACE)
    with fails(errno.EINVAL):
        renameat2(tree / "file", tree / "there", RENAME_WHITEOUT | RENAME_EXCHANGE)
    os.link(tree / "file", tree / "same")
    renameat2(tree / "file", tree / "same", RENAME_WHITEOUT)
    assert read(tree / "file") == read(tree / "same") == b"1"
    os.mkdir(tree / "dir")
    renameat2(tree / "file", tree / "dir" / "new", RENAME_WHITEOUT | RENAME_NOREPLACE)
    assert sorted(os.listdir(tree)) == ["dir", "file", "same", "there"]
    assert stat.S_ISCHR(os.lstat(tree / "file").st_mode)


@pytest.mark.parametrize("mode", [0o755, 0o2755])
def test_whiteout_by_a_user(tree, mode):
    make_owned("directory", tree / "home", USER, OTHER_GROUP, mode)
    make_owned("file", tree / "home" / "file", OTHER_USER, GROUP)
    as_user(renameat2, tree / "home" / "file", tree / "home" / "new", RENAME_WHITEOUT)
    assert owner_of(tree / "home" / "file") == (USER, OTHER_GROUP if mode & 0o2000 else GROUP)
    with fails(errno.EACCES):
        as_user(renameat2, tree / "home/new", tree / "home/old", RENAME_WHITEOUT, uid=OTHER_USER)


def test_a_directory_changes_parents_only_if_it_may_be_written(tree):
    # Its entry `..` is written by the move.
    os.chmod(tree.path, 0o777)
    os.mkdir(tree / "other", 0o777)
    os.chmod(tree / "other", 0o777)
    make_owned("directory", tree / "foreign", OTHER_USER, GROUP, 0o755)
    make_owned("directory", tree / "own", USER, GROUP, 0o755)
    with fails(errno.EACCES):
        as_user(os.rename, tree / "foreign", tree / "other/foreign")
    as_user(os.rename, tree / "foreign", tree / "renamed")
    as_user(os.rename, tree / "own", tree / "other/own")
    assert sorted(os.listdir(tree)) == ["other", "renamed"]


@kinds
def test_by_a_user(tree, kind):
    make_owned("directory", tree / "home", USER, GROUP, 0o755)
    make_owned(kind, tree / "home/old", OTHER_USER, GROUP)
    make(kind, tree / "home/new")
    os.lchown(tree / "home/new", USER, GROUP)
    if kind == "directory":
        os.chmod(tree / "home/old", 0o755)
    as_user(os.rename, tree / "home/old", tree / "home/new")
    assert owner_of(tree / "home/new") == (OTHER_USER, GROUP)
