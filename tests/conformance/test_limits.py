"""What a mount cannot do, and exactly how it says so.

The kernel answers these itself, or replfs does; a program has to see an errno it can act on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest
from helpers.cases import fails, fd_of, read, unchanged, write
from helpers.libc import (
    FALLOC_FL_KEEP_SIZE,
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    FICLONE,
    FS_IOC_GETFLAGS,
    fallocate,
)


@pytest.mark.parametrize(
    "mode",
    [0, FALLOC_FL_KEEP_SIZE, FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE],
    ids=["allocate", "keep size", "punch hole", "zero range"],
)
def test_fallocate(on_mount, mode):
    write(on_mount / "file", b"x" * 10_000)
    with (
        unchanged(on_mount / "file"),
        fd_of(on_mount / "file", os.O_RDWR) as fd,
        fails(errno.EOPNOTSUPP),
    ):
        fallocate(fd, mode, 0, 4096)
    assert read(on_mount / "file") == b"x" * 10_000


def test_holes_are_not_shown(on_mount):
    with fd_of(on_mount / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x", 1 << 20)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0
        assert os.lseek(fd, 0, os.SEEK_HOLE) == (1 << 20) + 1
        assert os.lseek(fd, 5000, os.SEEK_DATA) == 5000
        with fails(errno.ENXIO):
            os.lseek(fd, 2 << 20, os.SEEK_DATA)
    for store in on_mount.stores():
        with fd_of(store / "file") as fd:
            assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 20


def test_o_tmpfile(on_mount):
    with fails(errno.EOPNOTSUPP):
        os.open(on_mount, os.O_TMPFILE | os.O_RDWR, 0o600)
    assert os.listdir(on_mount) == []


def test_file_flags(on_mount):
    write(on_mount / "file", b"")
    with fd_of(on_mount / "file") as fd, fails(errno.ENOTTY):
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, struct.pack("l", 0))


def test_clones(on_mount):
    write(on_mount / "file", b"data")
    with (
        fd_of(on_mount / "file") as source,
        fd_of(on_mount / "clone", os.O_CREAT | os.O_WRONLY) as target,
        fails(errno.EOPNOTSUPP, errno.ENOTTY),
    ):
        fcntl.ioctl(target, FICLONE, source)
    assert read(on_mount / "clone") == b""
