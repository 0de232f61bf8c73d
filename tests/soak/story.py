"""What all scenarios have in common: a store that is not empty, a place for records, a report."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from helpers.nodes import Pair, wait_for
from helpers.writer import Writers

TIMEOUT_S: Final = 1.0
"""The peer timeout in all scenarios, seconds."""
PAUSE_MAX_MS: Final = 1000 * (TIMEOUT_S + 6)
"""What no call may take: one peer timeout, and what a busy machine adds."""


class Story:
    """Prints what happens, with the time since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()

    def say(self, text: str) -> None:
        """One line."""
        print(f"{time.monotonic() - self._began:8.1f} s  {text}", flush=True)


@contextlib.contextmanager
def record_directory(stores: Path) -> Iterator[Path]:
    """A directory for records on another filesystem than the stores."""
    for parent in ("/dev/shm", "/run", "/var/tmp"):
        if os.path.isdir(parent) and os.stat(parent).st_dev != stores.stat().st_dev:
            found = Path(tempfile.mkdtemp(prefix="replfs-record-", dir=parent))
            break
    else:
        raise AssertionError("there is no other filesystem for the record")
    try:
        yield found
    finally:
        if not os.environ.get("REPLFS_KEEP"):
            shutil.rmtree(found)


def fill(pair: Pair, *, files: int, size: int) -> None:
    """Put files of up to *size* bytes into the primary's store, for a baseline to carry."""
    rng = random.Random(7)
    for number in range(files):
        directory = pair.primary_store / f"old/{number % 23}/{number % 7}"
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / str(number)
        path.write_bytes(rng.randbytes(rng.randrange(size)))
        if number % 10 == 0:
            os.link(path, directory / f"{number}-link")
        if number % 15 == 0:
            os.setxattr(path, "user.number", b"%d" % number)
        if number % 20 == 0:
            (directory / f"{number}-symlink").symlink_to(f"{number}")


def is_in_sync(pair: Pair) -> bool:
    """What the mount's log says last, also when it has ended."""
    states = [line for line in pair.mount.log_since_start().splitlines() if b": peer " in line]
    return bool(states) and b": in_sync" in states[-1]


def check_equal(pair: Pair, writers: Writers) -> None:
    """With the writers held: both stores are equal, and hold all that was acknowledged."""
    with writers.held():
        pair.wait_in_sync()
        pair.assert_equal()
        writers.check(pair.primary_store)
        writers.check(pair.secondary_store)
    for record in writers.records:
        if record.is_long:
            with writers.held():
                record.shorten()


def wait_in_sync(pair: Pair, writers: Writers, timeout_s: float = 120.0) -> float:
    """Wait until the pair is in sync by itself, while the writers go on; how long it took."""
    began = time.monotonic()

    def in_sync() -> bool:
        writers.check_alive()
        pair.check_alive()
        return is_in_sync(pair)

    wait_for(in_sync, timeout_s, "the pair to be in sync by itself", 0.02)
    return time.monotonic() - began
