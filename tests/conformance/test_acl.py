"""POSIX ACLs: permission by them, their mask, inheritance, and the umask. Source: acl(5)."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from helpers import acl
from helpers.cases import fails, make, make_owned, mode_of, outcome, stamps, unchanged, write
from helpers.children import GROUP, OTHER_GROUP, OTHER_USER, USER, as_user

MASK = (acl.MASK, acl.NO_ID)


def set_acl(path, name=acl.ACCESS, **entries):
    os.setxattr(path, name, acl.pack(**entries))


def may(path, uid, gid=12345, groups=()):
    """The permissions to a file that the kernel grants, as a digit."""

    def attempt():
        read = outcome(os.open, path, os.O_RDONLY) == "ok"
        write = outcome(os.open, path, os.O_WRONLY) == "ok"
        return 4 * read + 2 * write

    return as_user(attempt, uid=uid, gid=gid, groups=groups)


def test_named_users_and_groups(tree):
    path = tree / "file"
    write(path, b"")
    set_acl(path, owner=6, group=0, other=4, users={USER: 6, OTHER_USER: 0}, groups={GROUP: 2})
    assert may(path, USER) == 6
    assert may(path, OTHER_USER) == 0
    assert may(path, 777, gid=GROUP) == 2
    assert may(path, 777, groups=[5, GROUP]) == 2
    assert may(path, 777) == 4
    assert may(path, 777, gid=0) == 0


def test_the_mask_limits_and_is_the_group_bits(tree):
    path = tree / "file"
    write(path, b"")
    set_acl(path, owner=6, group=6, other=0, users={USER: 6}, mask=4)
    assert mode_of(path) == 0o640
    assert may(path, USER) == 4
    os.chmod(path, 0o660)
    assert acl.get(path)[MASK] == 6
    assert acl.get(path)[acl.GROUP_OBJ, acl.NO_ID] == 6
    assert may(path, USER) == 6
    os.chmod(path, 0o600)
    assert may(path, USER) == 0
    assert acl.get(path)[acl.USER, USER] == 6


def test_an_acl_that_is_just_a_mode(tree):
    write(tree / "file", b"")
    set_acl(tree / "file", owner=7, group=5, other=1)
    assert mode_of(tree / "file") == 0o751
    assert not acl.has(tree / "file")


def test_removal(tree):
    path = tree / "file"
    write(path, b"")
    set_acl(path, owner=6, group=4, other=0, users={USER: 6})
    os.removexattr(path, acl.ACCESS)
    assert not acl.has(path)
    assert may(path, USER) == 0
    assert mode_of(path) == 0o660  # what was the mask stays in the group's bits


def test_who_may_set_one(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o666)
    value = acl.pack(6, 4, 0, users={OTHER_USER: 4})
    with unchanged(tree / "file"), fails(errno.EPERM):
        as_user(os.setxattr, tree / "file", acl.ACCESS, value, uid=OTHER_USER)
    as_user(os.setxattr, tree / "file", acl.ACCESS, value)
    assert acl.get(tree / "file")[acl.USER, OTHER_USER] == 4
    assert outcome(as_user, os.getxattr, tree / "file", acl.ACCESS) == "ok"


def test_what_is_refused(tree):
    write(tree / "file", b"")
    os.symlink("file", tree / "link")
    with fails(errno.EACCES, errno.EPERM, errno.EINVAL):
        os.setxattr(tree / "file", acl.DEFAULT, acl.pack(7, 7, 7))  # default ACL of a file
    with fails(errno.EINVAL):
        os.setxattr(tree / "file", acl.ACCESS, acl.pack(7, 7, 7)[:-8])  # an entry is missing
    with fails(errno.EOPNOTSUPP, errno.EINVAL):
        os.setxattr(tree / "file", acl.ACCESS, b"\1\0\0\0" + acl.pack(7, 7, 7)[4:])
    with fails(errno.EOPNOTSUPP, errno.EPERM):
        os.setxattr(tree / "link", acl.ACCESS, acl.pack(7, 7, 7), follow_symlinks=False)


def test_time_stamps(tree):
    write(tree / "file", b"")
    os.mkdir(tree / "dir")
    with stamps({tree / "file": "c", tree / "dir": "c", tree.path: ""}):
        set_acl(tree / "file", owner=6, group=4, other=0, users={USER: 6})
        set_acl(tree / "dir", acl.DEFAULT, owner=6, group=4, other=0, users={USER: 6})


def test_setting_one_clears_set_group_id_of_a_foreign_group(tree):
    make_owned("file", tree / "file", USER, OTHER_GROUP, 0o2755)
    value = acl.pack(7, 5, 5, users={OTHER_USER: 4})
    as_user(os.setxattr, tree / "file", acl.ACCESS, value)
    assert mode_of(tree / "file") == 0o755
    os.chmod(tree / "file", 0o2755)
    as_user(os.setxattr, tree / "file", acl.ACCESS, value, groups=[OTHER_GROUP])
    assert mode_of(tree / "file") == 0o2755


@pytest.fixture
def inheriting(tree):
    """A directory whose default ACL gives USER rw and the group rwx, others nothing."""
    path = tree / "dir"
    os.mkdir(path)
    set_acl(path, acl.DEFAULT, owner=7, group=7, other=0, users={USER: 6})
    return path


@pytest.mark.parametrize("umask", [0, 0o022, 0o077, 0o777])
def test_a_default_acl_takes_the_place_of_the_umask(inheriting, umask):
    os.umask(umask)
    write(inheriting / "file", b"")
    entries = acl.get(inheriting / "file")
    assert entries[acl.USER, USER] == 6
    assert entries[acl.GROUP_OBJ, acl.NO_ID] == 7
    assert entries[MASK] == 6  # open(2) asked for 0666
    assert mode_of(inheriting / "file") == 0o660


@pytest.mark.parametrize("kind", ["file", "directory", "fifo", "socket", "character"])
def test_every_kind_inherits(inheriting, kind):
    os.umask(0o077)
    path = inheriting / "object"
    make(kind, path, 0o770 if kind == "directory" else 0o640)
    entries = acl.get(path)
    assert entries[acl.USER, USER] == 6
    if kind == "directory":
        assert mode_of(path) == 0o770
        assert acl.get(path, acl.DEFAULT) == acl.get(inheriting, acl.DEFAULT)
    else:
        assert mode_of(path) == 0o640
        assert entries[MASK] == 4
        assert not acl.has(path, acl.DEFAULT)


def test_the_mode_asked_for_limits_what_is_inherited(inheriting):
    os.umask(0)
    for mode, expected in ((0o777, 0o770), (0o600, 0o600), (0o070, 0o070), (0o007, 0o000)):
        path = inheriting / oct(mode)
        make("file", path, mode)
        assert mode_of(path) == expected


def test_a_default_acl_that_is_just_a_mode(tree):
    os.mkdir(tree / "dir")
    set_acl(tree / "dir", acl.DEFAULT, owner=7, group=5, other=0)
    os.umask(0o077)
    os.mkdir(tree / "dir/sub", 0o777)
    make("file", tree / "dir/file", 0o666)
    assert mode_of(tree / "dir/sub") == 0o750
    assert mode_of(tree / "dir/file") == 0o640
    assert not acl.has(tree / "dir/file")
    assert acl.has(tree / "dir/sub", acl.DEFAULT)


def test_inheritance_goes_on_below(inheriting):
    os.umask(0o777)
    os.makedirs(inheriting / "a", 0o777)
    os.mkdir(inheriting / "a/b", 0o777)
    write(inheriting / "a/b/file", b"")
    assert may(inheriting / "a/b/file", USER) == 0  # no search permission: rw- on directories
    assert acl.get(inheriting / "a/b/file")[acl.USER, USER] == 6
    assert os.stat(inheriting / "a/b").st_mode == stat.S_IFDIR | 0o770


def test_without_a_default_acl_the_umask_counts_again(inheriting):
    os.removexattr(inheriting, acl.DEFAULT)
    os.umask(0o077)
    make("file", inheriting / "file", 0o666)
    assert mode_of(inheriting / "file") == 0o600
    assert not acl.has(inheriting / "file")


def test_a_symlink_inherits_nothing(inheriting):
    os.symlink("x", inheriting / "link")
    assert mode_of(inheriting / "link") == 0o777


def test_in_a_directory(tree):
    os.mkdir(tree / "dir", 0o700)
    write(tree / "dir/file", b"")
    os.chmod(tree / "dir/file", 0o666)
    set_acl(tree / "dir", owner=7, group=0, other=0, users={USER: 1, OTHER_USER: 7})

    def attempt():
        return (
            outcome(os.listdir, tree / "dir"),
            outcome(os.stat, tree / "dir/file"),
            outcome(os.mkdir, tree / f"dir/{os.getuid()}"),
        )

    assert as_user(attempt) == ("EACCES", "ok", "EACCES")
    assert as_user(attempt, uid=OTHER_USER) == ("ok", "ok", "ok")
    assert as_user(attempt, uid=777) == ("EACCES", "EACCES", "EACCES")


def test_chown_moves_the_owner_s_entry(tree):
    path = tree / "file"
    write(path, b"")
    set_acl(path, owner=6, group=0, other=0, users={OTHER_USER: 4})
    os.chown(path, USER, -1)
    assert may(path, USER) == 6
    assert may(path, OTHER_USER) == 4
