"""Users in a user namespace of their own. Source: user_namespaces(7)."""

from __future__ import annotations

import errno
import os

import pytest
from helpers.cases import fails, make_owned, outcome, owner_of, write
from helpers.children import GROUP, OTHER_USER, USER, as_user, run
from helpers.libc import CLONE_NEWUSER, unshare

NOBODY = 65_534


def enter_namespace():
    """Be root in a new user namespace in which only the caller's own ids are mapped."""
    uid, gid = os.getuid(), os.getgid()
    unshare(CLONE_NEWUSER)
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w", encoding="ascii") as file:
            file.write(text)


@pytest.fixture(scope="module")
def namespaces():
    """Skip where the kernel does not let an ordinary user have a namespace."""

    def attempt():
        try:
            as_user(enter_namespace)
        except OSError as error:
            return str(error)
        return ""

    refusal = run(attempt)
    if refusal:
        pytest.skip(f"no user namespaces for ordinary users here: {refusal}")


@pytest.fixture
def home(tree):
    """A directory of USER's."""
    make_owned("directory", tree / "home", USER, GROUP, 0o755)
    return tree / "home"


def test_what_its_root_makes_belongs_to_the_user(namespaces, home):
    def inside():
        enter_namespace()
        assert os.getuid() == 0
        write(home / "file", b"data")
        os.mkdir(home / "dir")
        os.symlink("x", home / "link")
        return [owner_of(home / name) for name in ("file", "dir", "link")]

    assert as_user(inside) == [(0, 0)] * 3
    assert [owner_of(home / name) for name in ("file", "dir", "link")] == [(USER, GROUP)] * 3


def test_its_root_has_no_power_over_others(namespaces, tree, home):
    make_owned("file", tree / "secret", OTHER_USER, GROUP + 1, 0o600)
    make_owned("file", home / "foreign", OTHER_USER, GROUP + 1, 0o600)

    def inside():
        enter_namespace()
        return (
            owner_of(tree / "secret"),
            outcome(os.open, tree / "secret", os.O_RDONLY),
            outcome(os.chmod, tree / "secret", 0o644),
            outcome(os.chown, tree / "secret", 0, 0),
            outcome(os.open, home / "foreign", os.O_RDONLY),
            outcome(os.mkdir, tree / "new"),
        )

    assert as_user(inside) == (
        (NOBODY, NOBODY), "EACCES", "EPERM", "EPERM", "EACCES", "EACCES",
    )  # fmt: skip


def test_ids_that_are_not_mapped_cannot_be_given(namespaces, home):
    write(home / "file", b"")
    os.chown(home / "file", USER, GROUP)

    def inside():
        enter_namespace()
        with fails(errno.EINVAL):
            os.chown(home / "file", 1, -1)
        os.chown(home / "file", 0, 0)
        os.chmod(home / "file", 0o4711)
        os.mkfifo(home / "fifo")
        with fails(errno.EPERM):
            os.mknod(home / "device", 0o020600, os.makedev(1, 3))

    as_user(inside)
    assert owner_of(home / "file") == (USER, GROUP)
