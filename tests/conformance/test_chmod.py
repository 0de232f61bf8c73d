"""chmod, fchmod. Source: chmod(2), inode(7)."""

from __future__ import annotations

import errno
import os

import pytest
from helpers.cases import (
    NOT_SYMLINK,
    fails,
    fd_of,
    make,
    make_owned,
    mode_of,
    outcome,
    stamps,
    type_of,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_GROUP, OTHER_USER, USER, as_user

kinds = pytest.mark.parametrize("kind", NOT_SYMLINK)


@kinds
def test_all_twelve_bits(tree, kind):
    path = tree / "object"
    make(kind, path)
    before = type_of(path)
    for mode in (0o000, 0o111, 0o222, 0o444, 0o751, 0o1777, 0o2750, 0o4711, 0o6777, 0o7777, 0o644):
        os.chmod(path, mode)
        assert mode_of(path) == mode
    assert type_of(path) == before


@kinds
def test_it_changes_ctime_only(tree, kind):
    path = tree / "object"
    make(kind, path)
    with stamps({path: "c", tree.path: ""}):
        os.chmod(path, 0o751)
    with stamps({path: "c"}):
        os.chmod(path, 0o751)  # to what it is


@kinds
def test_only_the_owner_and_root_may(tree, kind):
    path = tree / "object"
    make_owned(kind, path, USER, GROUP, 0o666)
    with unchanged(path), fails(errno.EPERM):
        as_user(os.chmod, path, 0o777, uid=OTHER_USER)
    as_user(os.chmod, path, 0o640)
    assert mode_of(path) == 0o640
    os.chmod(path, 0o604)
    assert mode_of(path) == 0o604


def test_it_follows_a_symlink(tree):
    write(tree / "file", b"")
    os.symlink("file", tree / "link")
    os.chmod(tree / "link", 0o705)
    assert mode_of(tree / "file") == 0o705
    assert mode_of(tree / "link") == 0o777


def test_through_a_descriptor(tree):
    write(tree / "file", b"")
    with fd_of(tree / "file") as fd:
        os.fchmod(fd, 0o3711)
        assert os.fstat(fd).st_mode & 0o7777 == 0o3711
    with fd_of(tree) as fd:
        os.fchmod(fd, 0o2775)
    assert mode_of(tree) == 0o2775


def test_a_descriptor_that_is_only_a_path(tree):
    write(tree / "file", b"")
    with fd_of(tree / "file", os.O_PATH) as fd, fails(errno.EBADF):
        os.fchmod(fd, 0o700)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_set_group_id_needs_membership_of_the_group(tree, kind):
    foreign, own, supplementary = tree / "foreign", tree / "own", tree / "supplementary"
    make_owned(kind, foreign, USER, OTHER_GROUP, 0o755)
    make_owned(kind, own, USER, GROUP, 0o755)
    make_owned(kind, supplementary, USER, OTHER_GROUP, 0o755)
    as_user(os.chmod, foreign, 0o2755)
    as_user(os.chmod, own, 0o2755)
    as_user(os.chmod, supplementary, 0o2755, groups=[OTHER_GROUP])
    assert [mode_of(path) for path in (foreign, own, supplementary)] == [0o755, 0o2755, 0o2755]


def test_a_user_may_set_user_id_and_sticky(tree):
    make_owned("file", tree / "file", USER, GROUP)
    as_user(os.chmod, tree / "file", 0o5755)
    assert mode_of(tree / "file") == 0o5755


def test_it_works_at_once_for_others(tree):
    write(tree / "file", b"secret")

    def may_read():
        return outcome(os.open, tree / "file", os.O_RDONLY)

    for mode, expected in ((0o600, "EACCES"), (0o604, "ok"), (0o600, "EACCES"), (0o644, "ok")):
        os.chmod(tree / "file", mode)
        assert as_user(may_read) == expected


def test_what_is_open_stays_open(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o600)

    def use():
        with fd_of(tree / "file", os.O_RDWR) as fd:
            os.chmod(tree / "file", 0)
            os.write(fd, b"still")
            return os.pread(fd, 10, 0)

    assert as_user(use) == b"still"
    assert mode_of(tree / "file") == 0
