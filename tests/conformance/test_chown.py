"""chown, fchown, lchown. Source: chown(2)."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from helpers.cases import (
    KINDS,
    fails,
    fd_of,
    make,
    make_owned,
    mode_of,
    owner_of,
    stamps,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_GROUP, OTHER_USER, USER, as_user

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
"""cap_net_bind_service+ep as a `security.capability` value of version 2."""


@pytest.mark.parametrize("kind", KINDS)
def test_root_gives_anything_to_anyone(tree, kind):
    path = tree / "object"
    make(kind, path)
    assert owner_of(path) == (0, 0)
    for uid, gid, expected in (
        (USER, GROUP, (USER, GROUP)),
        (-1, OTHER_GROUP, (USER, OTHER_GROUP)),
        (OTHER_USER, -1, (OTHER_USER, OTHER_GROUP)),
        (-1, -1, (OTHER_USER, OTHER_GROUP)),
        (2**32 - 2, 2**31, (2**32 - 2, 2**31)),
        (0, 0, (0, 0)),
    ):
        os.lchown(path, uid, gid)
        assert owner_of(path) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_ctime_only(tree, kind):
    path = tree / "object"
    make(kind, path)
    with stamps({path: "c", tree.path: ""}):
        os.lchown(path, USER, GROUP)


@pytest.mark.parametrize("kind", KINDS)
def test_leaving_both_as_they_are_is_a_change_too(tree, kind):
    path = tree / "object"
    make_owned(kind, path, USER, GROUP, 0o755)
    with stamps({path: "c", tree.path: ""}):
        os.lchown(path, -1, -1)
    assert owner_of(path) == (USER, GROUP)


def test_leaving_both_as_they_are_clears_set_id_bits(tree):
    path = tree / "file"
    make_owned("file", path, USER, GROUP, 0o6755)
    os.chown(path, -1, -1)
    assert mode_of(path) == 0o755


def test_it_follows_a_symlink_unless_told_not_to(tree):
    write(tree / "file", b"")
    os.symlink("file", tree / "link")
    os.chown(tree / "link", USER, GROUP)
    assert (owner_of(tree / "file"), owner_of(tree / "link")) == ((USER, GROUP), (0, 0))
    os.lchown(tree / "link", OTHER_USER, OTHER_GROUP)
    assert owner_of(tree / "file") == (USER, GROUP)
    assert owner_of(tree / "link") == (OTHER_USER, OTHER_GROUP)


def test_through_a_descriptor(tree):
    write(tree / "file", b"")
    with fd_of(tree / "file") as fd:
        os.fchown(fd, USER, GROUP)
    with fd_of(tree) as fd:
        os.fchown(fd, OTHER_USER, -1)
    assert (owner_of(tree / "file"), owner_of(tree)) == ((USER, GROUP), (OTHER_USER, 0))


def test_an_owner_may_choose_among_his_groups(tree):
    path = tree / "file"
    make_owned("file", path, USER, GROUP)
    as_user(os.chown, path, -1, OTHER_GROUP, groups=[OTHER_GROUP])
    assert owner_of(path) == (USER, OTHER_GROUP)
    as_user(os.chown, path, USER, GROUP, groups=[OTHER_GROUP])
    assert owner_of(path) == (USER, GROUP)


def test_an_owner_may_not_do_more(tree):
    path = tree / "file"
    make_owned("file", path, USER, GROUP)
    with unchanged(path):
        with fails(errno.EPERM):
            as_user(os.chown, path, OTHER_USER, -1)
        with fails(errno.EPERM):
            as_user(os.chown, path, -1, OTHER_GROUP)
        with fails(errno.EPERM):
            as_user(os.chown, path, OTHER_USER, GROUP, groups=[OTHER_GROUP])


def test_others_may_nothing(tree):
    path = tree / "file"
    make_owned("file", path, USER, GROUP, 0o666)
    with unchanged(path):
        for arguments in ((OTHER_USER, -1), (-1, GROUP), (USER, GROUP)):
            with fails(errno.EPERM):
                as_user(os.chown, path, *arguments, uid=OTHER_USER)


@pytest.mark.parametrize(
    ("before", "after"),
    [(0o4755, 0o755), (0o2755, 0o755), (0o6775, 0o775), (0o2745, 0o2745), (0o1755, 0o1755)],
)
@pytest.mark.parametrize("by", ["owner", "root"])
def test_it_clears_set_id_bits_of_a_file(tree, before, after, by):
    path = tree / "file"
    make_owned("file", path, USER, GROUP, before)
    if by == "root":
        os.chown(path, USER, OTHER_GROUP)
    else:
        as_user(os.chown, path, -1, OTHER_GROUP, groups=[OTHER_GROUP])
    assert mode_of(path) == after


@pytest.mark.parametrize("by", ["owner", "root"])
def test_it_keeps_set_id_bits_of_a_directory(tree, by):
    path = tree / "directory"
    make_owned("directory", path, USER, GROUP, 0o7755)
    if by == "root":
        os.chown(path, USER, OTHER_GROUP)
    else:
        as_user(os.chown, path, -1, OTHER_GROUP, groups=[OTHER_GROUP])
    assert mode_of(path) == 0o7755


def test_it_takes_capabilities_away(tree):
    write(tree / "file", b"program")
    os.setxattr(tree / "file", "security.capability", CAPABILITY)
    os.chown(tree / "file", USER, GROUP)
    assert "security.capability" not in os.listxattr(tree / "file")


def test_chmod_after_chown_gives_the_bits_back(tree):
    write(tree / "file", b"program")
    os.chown(tree / "file", USER, GROUP)
    os.chmod(tree / "file", 0o6755)
    assert mode_of(tree / "file") == 0o6755
