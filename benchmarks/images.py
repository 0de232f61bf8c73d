"""Fresh filesystems for stores, and the directories around them.

A long-used disk changes create rates twentyfold, so the stores of every target lie on an ext4 made
for this run in a sparse file.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.errors import BenchmarkError
from benchmarks.processes import own_name, run

MEMORY: Final = Path("/dev/shm")
_BYTES: Final = 16 << 30
INODES: Final = 400_000


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A directory for a run, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=own_name("")) as name:
        os.chmod(name, 0o755)  # daemons that run as other users pass through it
        yield Path(name)


@contextlib.contextmanager
def memory_space() -> Iterator[Path]:
    """A directory in memory for what is read while measuring: no cache dropped reaches it."""
    where = MEMORY if MEMORY.is_dir() else None
    with tempfile.TemporaryDirectory(prefix=own_name(""), dir=where) as name:
        yield Path(name)


@contextlib.contextmanager
def fresh(base: Path, inodes: int = INODES) -> Iterator[Path]:
    """A new ext4 of 16 GiB (sparse), mounted below *base*."""
    image, place = base / "stores.img", base / "stores"
    with image.open("wb") as file:
        file.truncate(_BYTES)
    place.mkdir()
    try:
        # Tables are not written in the background later on, in the middle of a measurement: the
        # file reads as zeros anyway.
        lazily = "lazy_itable_init=1,lazy_journal_init=1"
        run("mkfs.ext4", "-q", "-F", "-N", str(inodes), "-E", lazily, image)
        run("mount", "-o", "loop,noinit_itable", image, place)
        yield place
    finally:
        unmount(place)
        image.unlink()


def wait_for_mount(place: Path, seconds: float = 10) -> None:
    """Until something is mounted there.

    Raises:
        BenchmarkError: it does not come.
    """
    until = time.monotonic() + seconds
    while not place.is_mount():
        if time.monotonic() > until:
            raise BenchmarkError(f"nothing is mounted on {place} after {seconds:.0f} s")
        time.sleep(0.01)


def unmount(place: Path) -> None:
    """Take it away, also while it is in use or its daemon is gone; nothing if it is no mount."""
    subprocess.run(["umount", "-l", str(place)], check=False, capture_output=True)


def write_back(*places: Path) -> None:
    """Everything that is dirty there, to the disk."""
    for place in places:
        run("sync", "-f", place)


def drop_caches() -> None:
    """Let the kernel forget all that it has cached and that is not dirty, of all filesystems."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
