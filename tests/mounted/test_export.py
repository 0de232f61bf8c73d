"""What an NFS server does with a mount: it finds objects by handles, long after their last use."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.nodes import Pair

from replfs.store import syscalls

pytestmark = pytest.mark.mounted


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair(mount_arguments=("--export",)) as found:
        yield found


def handle_of(path: Path) -> bytes:
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return syscalls.name_to_handle(fd, os.fsencode(path.name))
    finally:
        os.close(fd)


def opened(pair: Pair, handle: bytes, flags: int = os.O_RDONLY) -> int:
    mount = os.open(pair.mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        return syscalls.open_by_handle(mount, handle, flags)
    finally:
        os.close(mount)


def contents(pair: Pair, handle: bytes) -> bytes:
    fd = opened(pair, handle)
    try:
        return os.read(fd, 100)
    finally:
        os.close(fd)


def make_kernel_forget() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2\n")


def test_a_handle_is_good_as_long_as_the_node_and_the_object(pair: Pair):
    directory = pair.mountpoint / "d" / "e"
    directory.mkdir(parents=True)
    file = directory / "file"
    file.write_bytes(b"one")
    handle, above = handle_of(file), handle_of(directory)
    make_kernel_forget()
    assert contents(pair, handle) == b"one"
    file.rename(pair.mountpoint / "renamed")
    make_kernel_forget()
    fd = opened(pair, handle, os.O_WRONLY)
    os.pwrite(fd, b"two", 0)
    os.close(fd)
    assert (pair.secondary_store / "renamed").read_bytes() == b"two"
    fd = opened(pair, above)
    assert os.listdir(fd) == []
    os.close(fd)
    (pair.mountpoint / "renamed").unlink()
    make_kernel_forget()
    with pytest.raises(OSError, match="Stale") as caught:
        contents(pair, handle)
    assert caught.value.errno == errno.ESTALE
    pair.assert_equal()


def test_a_handle_never_finds_another_object(pair: Pair):
    """A file system gives the number of what was removed to something new."""
    old = pair.mountpoint / "old"
    handles = {}
    for attempt in range(200):
        old.write_bytes(b"old")
        number = old.stat().st_ino
        handles[number] = handle_of(old)
        old.unlink()
        new = pair.mountpoint / f"new-{attempt}"
        new.write_bytes(b"new")
        if new.stat().st_ino in handles:
            break
    else:
        pytest.skip("this file system does not use numbers again")
    handle = handles[new.stat().st_ino]
    for _ in range(2):
        with pytest.raises(OSError, match="Stale"):
            contents(pair, handle)
        make_kernel_forget()
    assert contents(pair, handle_of(new)) == b"new"


def test_a_handle_does_not_outlive_the_node(pair: Pair):
    """Numbers are the store's, and could be another object's by then."""
    file = pair.mountpoint / "file"
    file.write_bytes(b"one")
    handle = handle_of(file)
    pair.mount.restart()
    assert file.read_bytes() == b"one"
    with pytest.raises(OSError, match="Stale"):
        contents(pair, handle)
    assert contents(pair, handle_of(file)) == b"one"
