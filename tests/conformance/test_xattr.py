"""Extended attributes. Source: xattr(7), setxattr(2), getxattr(2), listxattr(2)."""

from __future__ import annotations

import errno
import os
import struct

import pytest
from helpers.cases import fails, make, make_owned, mode_of, outcome, stamps, unchanged, write
from helpers.children import GROUP, OTHER_USER, USER, as_user
from helpers.libc import getxattr_into, listxattr_into

CAPABILITY = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)


def names(path) -> list[str]:
    return sorted(
        name for name in os.listxattr(path, follow_symlinks=False) if name != "security.selinux"
    )


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_set_get_list_remove(tree, kind):
    path = tree / "object"
    make(kind, path)
    assert names(path) == []
    values = {"user.a": b"1", "user.b": b"", "user.c": bytes(range(256)), "trusted.d": b"x" * 1000}
    for name, value in values.items():
        os.setxattr(path, name, value)
    assert names(path) == sorted(values)
    for name, value in values.items():
        assert os.getxattr(path, name) == value
    os.setxattr(path, "user.a", b"another, longer value")
    assert os.getxattr(path, "user.a") == b"another, longer value"
    os.removexattr(path, "user.a")
    assert names(path) == ["trusted.d", "user.b", "user.c"]
    with fails(errno.ENODATA):
        os.getxattr(path, "user.a")
    with unchanged(path), fails(errno.ENODATA):
        os.removexattr(path, "user.a")


def test_create_and_replace(tree):
    write(tree / "file", b"")
    with fails(errno.ENODATA):
        os.setxattr(tree / "file", "user.x", b"1", os.XATTR_REPLACE)
    os.setxattr(tree / "file", "user.x", b"1", os.XATTR_CREATE)
    with fails(errno.EEXIST):
        os.setxattr(tree / "file", "user.x", b"2", os.XATTR_CREATE)
    assert os.getxattr(tree / "file", "user.x") == b"1"
    os.setxattr(tree / "file", "user.x", b"2", os.XATTR_REPLACE)
    assert os.getxattr(tree / "file", "user.x") == b"2"


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_time_stamps(tree, kind):
    path = tree / "object"
    make(kind, path)
    with stamps({path: "c", tree.path: ""}):
        os.setxattr(path, "user.x", b"1")
    with stamps({path: "c"}):
        os.removexattr(path, "user.x")


def test_buffers_that_are_too_small(tree):
    write(tree / "file", b"")
    os.setxattr(tree / "file", "user.x", b"0123456789")
    assert getxattr_into(tree / "file", "user.x", 0) == 10
    assert getxattr_into(tree / "file", "user.x", 10) == 10
    with fails(errno.ERANGE):
        getxattr_into(tree / "file", "user.x", 9)
    length = listxattr_into(tree / "file", 0)
    assert listxattr_into(tree / "file", length) == length >= len("user.x") + 1
    with fails(errno.ERANGE):
        listxattr_into(tree / "file", 3)


def test_limits_of_names_and_values(tree):
    path = tree / "file"
    write(path, b"")
    longest = "user." + "n" * 250
    os.setxattr(path, longest, b"1")
    assert os.getxattr(path, longest) == b"1"
    with fails(errno.ERANGE):
        os.setxattr(path, longest + "n", b"1")
    with fails(errno.E2BIG):
        os.setxattr(path, "user.big", b"x" * 65_537)
    assert outcome(os.setxattr, path, "user.big", b"x" * 65_536) in ("ok", "ENOSPC", "E2BIG")
    os.setxattr(path, "user.big", b"x" * 3_000)
    assert os.getxattr(path, "user.big") == b"x" * 3_000


def test_namespaces_that_are_none(tree):
    write(tree / "file", b"")
    for name in ("colour", "unknown.colour", "user."):
        with unchanged(tree / "file"), fails(errno.EOPNOTSUPP, errno.EINVAL):
            os.setxattr(tree / "file", name, b"1")


@pytest.mark.parametrize("kind", ["fifo", "character", "block", "socket", "symlink"])
def test_user_attributes_are_for_files_and_directories(tree, kind):
    path = tree / "object"
    make(kind, path)
    with fails(errno.EPERM):
        os.setxattr(path, "user.x", b"1", follow_symlinks=False)
    os.setxattr(path, "trusted.x", b"1", follow_symlinks=False)
    assert os.getxattr(path, "trusted.x", follow_symlinks=False) == b"1"
    assert names(path) == ["trusted.x"]
    os.removexattr(path, "trusted.x", follow_symlinks=False)
    assert names(path) == []


def test_who_may_use_user_attributes(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o644)
    path = tree / "file"
    as_user(os.setxattr, path, "user.x", b"1")
    with fails(errno.EACCES):
        as_user(os.setxattr, path, "user.x", b"2", uid=OTHER_USER)
    assert as_user(os.getxattr, path, "user.x", uid=OTHER_USER) == b"1"
    os.chmod(path, 0o600)
    with fails(errno.EACCES):
        as_user(os.getxattr, path, "user.x", uid=OTHER_USER)
    os.chmod(path, 0o666)
    as_user(os.setxattr, path, "user.x", b"3", uid=OTHER_USER)
    assert os.getxattr(path, "user.x") == b"3"


def test_in_a_sticky_directory_only_the_owner_sets_its_attributes(tree):
    make_owned("directory", tree / "dir", USER, GROUP, 0o1777)
    with fails(errno.EPERM):
        as_user(os.setxattr, tree / "dir", "user.x", b"1", uid=OTHER_USER)
    as_user(os.setxattr, tree / "dir", "user.x", b"1")


def test_trusted_attributes_are_for_root(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o666)
    os.setxattr(tree / "file", "trusted.x", b"1")
    os.setxattr(tree / "file", "user.y", b"1")

    def attempt():
        return (
            outcome(os.getxattr, tree / "file", "trusted.x"),
            outcome(os.setxattr, tree / "file", "trusted.x", b"2"),
            outcome(os.removexattr, tree / "file", "trusted.x"),
            names(tree / "file"),
        )

    assert as_user(attempt) == ("ENODATA", "EPERM", "EPERM", ["user.y"])
    assert os.getxattr(tree / "file", "trusted.x") == b"1"


def test_security_attributes_are_for_root(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o777)
    with fails(errno.EPERM):
        as_user(os.setxattr, tree / "file", "security.capability", CAPABILITY)
    os.setxattr(tree / "file", "security.capability", CAPABILITY)
    assert os.getxattr(tree / "file", "security.capability") == CAPABILITY


@pytest.mark.parametrize("who", ["user", "root"])
@pytest.mark.parametrize("how", ["write", "truncate", "O_TRUNC"])
def test_a_change_of_content_takes_capabilities_away(tree, who, how):
    path = tree / "file"
    write(path, b"program")
    os.chmod(path, 0o777)
    os.setxattr(path, "security.capability", CAPABILITY)

    def change():
        if how == "truncate":
            os.truncate(path, 3)
            return
        flags = os.O_WRONLY | (os.O_TRUNC if how == "O_TRUNC" else 0)
        fd = os.open(path, flags)
        if how == "write":
            os.write(fd, b"P")
        os.close(fd)

    if who == "root":
        change()
    else:
        as_user(change)
    assert "security.capability" not in names(path)


def test_they_follow_a_rename_and_every_link(tree):
    write(tree / "file", b"")
    os.link(tree / "file", tree / "link")
    os.setxattr(tree / "link", "user.x", b"1")
    os.rename(tree / "file", tree / "moved")
    assert os.getxattr(tree / "moved", "user.x") == b"1"
    os.unlink(tree / "link")
    assert os.getxattr(tree / "moved", "user.x") == b"1"
    write(tree / "file", b"")
    assert names(tree / "file") == []


def test_many_of_them(tree):
    write(tree / "file", b"")
    values = {f"user.{number}": b"%d" % number * 5 for number in range(60)}
    for name, value in values.items():
        os.setxattr(tree / "file", name, value)
    for name in list(values)[::2]:
        os.removexattr(tree / "file", name)
        del values[name]
    assert names(tree / "file") == sorted(values)
    assert {name: os.getxattr(tree / "file", name) for name in values} == values


def test_the_mode_stays(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o6755)
    as_user(os.setxattr, tree / "file", "user.x", b"1")
    assert mode_of(tree / "file") == 0o6755
