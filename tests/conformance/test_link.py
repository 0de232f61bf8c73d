"""link, linkat. Source: link(2)."""

from __future__ import annotations

import errno
import os
import shutil

import pytest
from helpers import nodes
from helpers.cases import (
    NOT_DIRECTORY,
    exists,
    fails,
    fd_of,
    make,
    make_owned,
    read,
    stamps,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_USER, USER, as_user
from helpers.libc import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_FOLLOW, linkat

kinds = pytest.mark.parametrize("kind", NOT_DIRECTORY)


@kinds
def test_names_of_one_object(tree, kind):
    first, second, third = tree / "first", tree / "second", tree / "dir/third"
    os.mkdir(tree / "dir")
    make(kind, first)
    os.link(first, second, follow_symlinks=False)
    os.link(second, third, follow_symlinks=False)
    status = os.lstat(first)
    assert status.st_nlink == 3
    assert os.lstat(second) == status
    assert os.lstat(third) == status
    os.lchown(second, USER, GROUP)
    assert os.lstat(first).st_uid == os.lstat(third).st_uid == USER
    for left, path in ((2, first), (1, third)):
        os.unlink(path)
        assert os.lstat(second).st_nlink == left
    os.unlink(second)
    assert os.listdir(tree) == ["dir"]


@kinds
def test_time_stamps(tree, kind):
    os.mkdir(tree / "dir")
    make(kind, tree / "first")
    with stamps({tree / "first": "c", tree / "dir": "mc", tree.path: ""}):
        os.link(tree / "first", tree / "dir/second", follow_symlinks=False)


@kinds
def test_unlink_of_one_name_changes_ctime_seen_through_the_other(tree, kind):
    make(kind, tree / "first")
    os.link(tree / "first", tree / "second", follow_symlinks=False)
    with stamps({tree / "second": "c", tree.path: "mc"}):
        os.unlink(tree / "first")


def test_content_and_mode_through_either_name(tree):
    write(tree / "first", b"one")
    os.link(tree / "first", tree / "second")
    with open(tree / "second", "ab") as file:
        file.write(b" two")
    assert read(tree / "first") == b"one two"
    os.truncate(tree / "second", 3)
    assert os.stat(tree / "first").st_size == 3
    os.chmod(tree / "first", 0o4711)
    assert os.stat(tree / "second").st_mode & 0o7777 == 0o4711


def test_a_directory_cannot_be_linked(tree):
    os.mkdir(tree / "dir")
    with unchanged(tree, tree / "dir"), fails(errno.EPERM):
        os.link(tree / "dir", tree / "again")


def test_a_failure_changes_nothing(tree):
    write(tree / "first", b"")
    write(tree / "taken", b"")
    with unchanged(tree, tree / "first", tree / "taken"):
        with fails(errno.EEXIST):
            os.link(tree / "first", tree / "taken")
        with fails(errno.EEXIST):
            os.link(tree / "first", tree / "first")


def test_not_to_another_filesystem(tree):
    write(tree / "file", b"")
    elsewhere = nodes.make_base() if os.stat("/dev/shm").st_dev == os.stat(tree).st_dev else None
    target = os.path.join(elsewhere or "/dev/shm", f"replfs-{os.getpid()}")
    with fails(errno.EXDEV):
        os.link(tree / "file", target)
    with fails(errno.EXDEV):
        os.rename(tree / "file", target)
    write(target, b"")
    try:
        with fails(errno.EXDEV):
            os.link(target, tree / "link")
    finally:
        os.unlink(target)
        if elsewhere:
            shutil.rmtree(elsewhere)


def test_a_symlink_itself_or_what_it_points_to(tree):
    write(tree / "file", b"")
    os.symlink("file", tree / "symlink")
    linkat(AT_FDCWD, tree / "symlink", tree / "to the symlink", 0)
    linkat(AT_FDCWD, tree / "symlink", tree / "to the file", AT_SYMLINK_FOLLOW)
    assert os.path.islink(tree / "to the symlink")
    assert not os.path.islink(tree / "to the file")
    assert os.stat(tree / "file").st_nlink == 2


def test_an_open_file_by_its_descriptor(tree):
    write(tree / "file", b"data")
    with fd_of(tree / "file") as fd:
        linkat(fd, "", tree / "by descriptor", AT_EMPTY_PATH)
        linkat(AT_FDCWD, f"/proc/self/fd/{fd}", tree / "by proc", AT_SYMLINK_FOLLOW)
        assert os.fstat(fd).st_nlink == 3
    assert read(tree / "by proc") == b"data"


def test_a_file_without_names_stays_without(tree):
    write(tree / "file", b"data")
    with fd_of(tree / "file") as fd:
        os.unlink(tree / "file")
        with fails(errno.ENOENT):
            linkat(AT_FDCWD, f"/proc/self/fd/{fd}", tree / "back", AT_SYMLINK_FOLLOW)
    assert os.listdir(tree) == []


def test_a_user_links_his_own_file_only(tree):
    os.chmod(tree.path, 0o777)
    make_owned("file", tree / "own", USER, GROUP, 0o600)
    make_owned("file", tree / "foreign", OTHER_USER, GROUP, 0o600)
    as_user(os.link, tree / "own", tree / "own link")
    assert exists(tree / "own link")
    with open("/proc/sys/fs/protected_hardlinks", encoding="ascii") as setting:
        protected = setting.read().strip() == "1"
    if protected:
        with fails(errno.EPERM):
            as_user(os.link, tree / "foreign", tree / "foreign link")
    else:
        as_user(os.link, tree / "foreign", tree / "foreign link")


def test_many_links(tree):
    os.mkdir(tree / "many")
    write(tree / "file", b"")
    for number in range(300):
        os.link(tree / "file", tree / f"many/{number}")
    assert os.stat(tree / "file").st_nlink == 301
    for number in range(0, 300, 2):
        os.unlink(tree / f"many/{number}")
    assert os.stat(tree / "many/1").st_nlink == 151


def test_rename_of_one_link_over_another_does_nothing(tree):
    write(tree / "first", b"")
    os.link(tree / "first", tree / "second")
    with unchanged(tree / "first", tree / "second", tree):
        os.rename(tree / "first", tree / "second")
