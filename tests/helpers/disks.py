"""Disks of their own: a file system in a file, on a loop device. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.nodes import unmount_all

MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
"""How each kind of file system is made."""
SIZE_MIN = {"ext4": 4 << 20, "xfs": 300 << 20, "btrfs": 120 << 20}
"""Bytes below which none can be made."""


@contextlib.contextmanager
def disk(
    image: Path, place: Path, size: int, kind: str = "ext4", *, inodes: int = 0
) -> Iterator[None]:
    """An empty file system of `size` bytes mounted on the directory `place`.

    Args:
        image: the file to make for it.
        place: where it is mounted.
        size: bytes, its own administration included.
        kind: which of `MAKE`.
        inodes: how many it has (ext4 only); 0: as many as usual.
    """
    with image.open("wb") as file:
        file.truncate(size)
    options = ["-N", str(inodes)] if inodes else []
    _run(*MAKE[kind], *options, str(image))
    device = _run("losetup", "--find", "--show", str(image))
    try:
        _run("mount", "-t", kind, device, str(place))
        try:
            if kind == "ext4":
                os.rmdir(place / "lost+found")
            yield
        finally:
            unmount_all(place)
    finally:
        _run("losetup", "--detach", device)
        image.unlink()


def free_bytes(place: Path) -> int:
    """What can still be written."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()
