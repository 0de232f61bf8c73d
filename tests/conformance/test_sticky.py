"""Directories with the sticky bit: who may remove and rename in them.

Source: POSIX.1-2024 XBD 4.5 "Directory Protection"; unlink(2), rename(2) EPERM.
"""

from __future__ import annotations

import os

import pytest
from helpers.cases import NOT_DIRECTORY, exists, make, make_owned, outcome, write
from helpers.children import GROUP, OTHER_USER, USER, as_user

# (who owns the directory, who owns the object) -> may USER remove it
OWNERS = {
    (USER, USER): True,
    (USER, OTHER_USER): True,
    (OTHER_USER, USER): True,
    (OTHER_USER, OTHER_USER): False,
    (0, 0): False,
    (0, USER): True,
}
by_owner = pytest.mark.parametrize("owners", OWNERS, ids=lambda pair: f"{pair[0]}-{pair[1]}")


@pytest.fixture
def sticky(tree, owners):
    path = tree / "sticky"
    os.mkdir(path)
    os.chown(path, owners[0], GROUP)
    os.chmod(path, 0o1777)
    return path


def expected(owners) -> str:
    return "ok" if OWNERS[owners] else "EPERM"


@by_owner
def test_unlink(sticky, owners):
    for kind in NOT_DIRECTORY:
        make_owned(kind, sticky / kind, owners[1], GROUP, 0o666)
        assert as_user(outcome, os.unlink, sticky / kind) == expected(owners)
        assert exists(sticky / kind) == (not OWNERS[owners])


@by_owner
def test_rmdir(sticky, owners):
    make_owned("directory", sticky / "object", owners[1], GROUP, 0o777)
    assert as_user(outcome, os.rmdir, sticky / "object") == expected(owners)


@by_owner
def test_rename_from(tree, sticky, owners):
    os.chmod(tree.path, 0o777)
    make_owned("file", sticky / "object", owners[1], GROUP, 0o666)
    make_owned("directory", sticky / "directory", owners[1], GROUP, 0o777)

    def attempt():
        return [
            outcome(os.rename, sticky / "object", sticky / "new name"),
            outcome(os.rename, sticky / "directory", tree / "moved"),
        ]

    assert as_user(attempt) == [expected(owners)] * 2


@by_owner
def test_rename_over(sticky, owners):
    make_owned("file", sticky / "target", owners[1], GROUP, 0o666)
    make_owned("file", sticky / "own", USER, GROUP)
    assert as_user(outcome, os.rename, sticky / "own", sticky / "target") == expected(owners)


def test_without_the_bit_everyone_may(tree):
    os.chmod(tree.path, 0o777)
    for kind in NOT_DIRECTORY:
        make(kind, tree / kind)
        assert as_user(outcome, os.unlink, tree / kind) == "ok"
    os.mkdir(tree / "dir", 0o700)
    assert as_user(outcome, os.rmdir, tree / "dir") == "ok"


def test_the_bit_taken_off_works_at_once(tree):
    os.chmod(tree.path, 0o1777)
    write(tree / "file", b"")
    assert as_user(outcome, os.unlink, tree / "file") == "EPERM"
    os.chmod(tree.path, 0o777)
    assert as_user(outcome, os.unlink, tree / "file") == "ok"
