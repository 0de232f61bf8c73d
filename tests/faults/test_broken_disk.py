"""A disk that cannot write something back, and goes on: the kernel tells of it once."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from helpers.cases import fails
from helpers.disks import broken_disk
from helpers.nodes import Pair, make_base, remove_base

pytestmark = pytest.mark.mounted

SIZE = 1 << 20
OPTIONS = ("--peer-timeout", "2s", "--checkpoint-interval", "1h")


def prepare(pair: Pair) -> None:
    (pair.primary_store / "file").write_bytes(b"o" * SIZE)
    (pair.primary_store / "other").write_bytes(b"x" * 4096)
    os.sync()


def on_disk(path: Path) -> bytes:
    """The file as the disk has it."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, SIZE, 0)
    finally:
        os.close(fd)


def test_what_the_primary_failed_to_write_is_never_called_stable_and_fetched_at_its_next_start():
    new = b"n" * SIZE
    base = make_base()
    try:
        (base / "primary").mkdir()
        with (
            broken_disk(base, base / "primary") as disk,
            Pair(base=base, mount_arguments=OPTIONS, prepare=prepare) as pair,
        ):
            with disk.breaks(pair.primary_store / "file"):
                fd = os.open(pair.mountpoint / "file", os.O_WRONLY)
                assert os.pwrite(fd, new, 0) == SIZE
                with fails(errno.ENOSPC):
                    os.fsync(fd)
            # The kernel would call the next one a success, and has dropped the bytes.
            with fails(errno.ENOSPC):
                os.fsync(fd)
            os.close(fd)
            other = os.open(pair.mountpoint / "other", os.O_WRONLY)
            os.pwrite(other, b"y", 0)
            os.fsync(other)
            os.close(other)
            assert pair.mount.status()["disk_error"] == os.strerror(errno.ENOSPC)
            assert pair.mount.replfs("sync", pair.mountpoint, check=False).returncode != 0
            pair.mount.kill9()
            assert (pair.primary_store / "file").read_bytes() == new
            pair.mount.start()
            assert b"fetched from" in pair.mount.log_since_start()
            assert on_disk(pair.primary_store / "file") == new
            assert (pair.secondary_store / "file").read_bytes() == new
            assert pair.mount.status()["disk_error"] is None
            pair.wait_in_sync()
            pair.assert_equal()
    finally:
        remove_base(base)
