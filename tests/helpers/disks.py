"""Small disks that can be full: ext4 in a file, on a loop device. Needs root."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from helpers.nodes import unmount_all


@contextlib.contextmanager
def small_disk(image: Path, place: Path, size: int, *, inodes: int = 0) -> Iterator[None]:
    """An empty ext4 of `size` bytes mounted on the directory `place`, without lost+found.

    Args:
        image: the file to make for it.
        place: where it is mounted.
        size: bytes, its own administration included.
        inodes: how many it has; 0: as many as usual.
    """
    with image.open("wb") as file:
        file.truncate(size)
    options = ["-N", str(inodes)] if inodes else []
    _run("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096", *options, str(image))
    device = _run("losetup", "--find", "--show", str(image))
    try:
        _run("mount", "-t", "ext4", device, str(place))
        try:
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
