"""What replfs keeps for itself: it cannot be seen, set or created through the mount."""

from __future__ import annotations

import errno
import os

import pytest
from helpers.cases import exists, fails, make, outcome, unchanged, write
from helpers.children import as_user

NAME = ".replfs"


@pytest.fixture
def root(on_mount, shared_pair):
    """The root of the mount."""
    return shared_pair.mountpoint


def test_the_reserved_directory_is_not_there(root, shared_pair):
    assert exists(shared_pair.primary_store / NAME)
    assert NAME not in os.listdir(root)
    for call in (os.stat, os.listdir, os.rmdir, os.unlink, os.readlink):
        with fails(errno.ENOENT):
            call(root / NAME)
    with fails(errno.ENOENT):
        os.stat(root / NAME / "state.db")
    with fails(errno.ENOENT):
        os.rename(root / NAME, root / "stolen")
    assert not exists(root / "stolen")


def test_the_reserved_name_cannot_be_made(root, on_mount):
    write(on_mount / "file", b"")
    os.mkdir(on_mount / "dir")
    attempts = (
        lambda: os.mkdir(root / NAME),
        lambda: os.close(os.open(root / NAME, os.O_CREAT | os.O_WRONLY)),
        lambda: os.mkfifo(root / NAME),
        lambda: os.symlink("x", root / NAME),
        lambda: os.link(on_mount / "file", root / NAME),
        lambda: os.rename(on_mount / "file", root / NAME),
        lambda: os.rename(on_mount / "dir", root / NAME),
    )
    for attempt in attempts:
        with pytest.raises(OSError):
            attempt()
        assert not exists(root / NAME)
    assert sorted(os.listdir(on_mount)) == ["dir", "file"]


def test_deeper_the_name_is_free(on_mount):
    os.mkdir(on_mount / NAME)
    write(on_mount / NAME / "state.db", b"mine")
    assert os.listdir(on_mount) == [NAME]


@pytest.mark.parametrize("kind", ["file", "directory", "symlink", "fifo"])
def test_the_hidden_attribute_is_not_listed(on_mount, kind):
    path = on_mount / "object"
    make(kind, path)
    assert not [
        name
        for name in os.listxattr(path, follow_symlinks=False)
        if name.startswith(("trusted.replfs", "user.replfs"))
    ]


@pytest.mark.parametrize("name", ["trusted.replfs.id", "trusted.replfs"])
def test_the_hidden_attribute_cannot_be_used(on_mount, name):
    path = on_mount / "file"
    write(path, b"")
    with fails(errno.ENODATA):
        os.getxattr(path, name)
    for call in (lambda: os.setxattr(path, name, b"x"), lambda: os.removexattr(path, name)):
        with pytest.raises(OSError) as refusal:
            call()
        assert refusal.value.errno in (errno.EPERM, errno.EOPNOTSUPP, errno.ENODATA)
    with fails(errno.ENODATA):
        os.getxattr(path, name)


def test_unknown_names_of_replfs(on_mount):
    path = on_mount / "file"
    write(path, b"")
    with unchanged(path):
        assert outcome(os.getxattr, path, "user.replfs.unknown") == "ENODATA"
        assert outcome(os.setxattr, path, "user.replfs.unknown", b"1") == "EOPNOTSUPP"
        assert outcome(os.removexattr, path, "user.replfs.unknown") == "EOPNOTSUPP"


def test_read_only_names(on_mount):
    path = on_mount / "file"
    write(path, b"")
    assert os.getxattr(path, "user.replfs.policy.effective") == b"sync"
    assert os.getxattr(path, "user.replfs.policy.source") == b"default"
    assert os.getxattr(path, "user.replfs.state") == b"in-sync"
    for name in ("policy.effective", "policy.source", "state", "dirty_bytes", "status"):
        assert outcome(os.setxattr, path, f"user.replfs.{name}", b"sync") == "EOPNOTSUPP"
        assert outcome(os.removexattr, path, f"user.replfs.{name}") == "EOPNOTSUPP"


def test_the_policy_attribute(on_mount):
    path = on_mount / "file"
    write(path, b"")
    assert outcome(os.getxattr, path, "user.replfs.policy") == "ENODATA"
    assert outcome(os.setxattr, path, "user.replfs.policy", b"sometimes") == "EINVAL"
    os.setxattr(path, "user.replfs.policy", b"strict")
    assert os.getxattr(path, "user.replfs.policy") == b"strict"
    assert os.getxattr(path, "user.replfs.policy.source") == b"local"
    assert os.listxattr(path) == []
    os.chmod(path, 0o666)
    assert as_user(outcome, os.setxattr, path, "user.replfs.policy", b"async") == "EPERM"
    os.removexattr(path, "user.replfs.policy")
    assert outcome(os.getxattr, path, "user.replfs.policy") == "ENODATA"
