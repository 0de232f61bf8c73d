"""Programs that do not go on before what they wrote is on the disk."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Final

from benchmarks import timing
from benchmarks.timing import Timed
from benchmarks.workloads.base import Bench, Figures
from benchmarks.workloads.blocks import BLOCK

_DELIVERIES: Final = 4
_MOST: Final = 10_000


def applications(bench: Bench) -> Figures:
    """Mail into one folder from several processes, and a database."""
    seconds = bench.sizes.slice_s
    folder = bench.place / "mail"
    for name in ("", "tmp", "new"):
        (folder / name).mkdir()
    yield (
        "mail",
        timing.together(_deliver, [(folder, number, seconds) for number in range(_DELIVERIES)]),
    )
    yield "sqlite_rollback", _transactions(bench.place / "rollback.db", "delete", seconds)
    yield "sqlite_wal", _transactions(bench.place / "wal.db", "wal", seconds)


def _deliver(folder: Path, number: int, seconds: float) -> Timed:
    """As into a maildir: the message is on the disk before it appears, and so is its name."""
    new = os.open(folder / "new", os.O_RDONLY)

    def message(index: int) -> None:
        name = f"{number}.{index}"
        descriptor = os.open(folder / "tmp" / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.write(descriptor, BLOCK)
        os.fsync(descriptor)
        os.close(descriptor)
        os.rename(folder / "tmp" / name, folder / "new" / name)
        os.fsync(new)

    try:
        return timing.repeat(message, _MOST, seconds)
    finally:
        os.close(new)


def _transactions(path: Path, journal: str, seconds: float) -> float:
    """A row of 100 bytes in each."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute(f"pragma journal_mode={journal}")
        database.execute("pragma synchronous=full")
        database.execute("create table rows (number integer primary key, body blob)")

        def transaction(_: int) -> None:
            database.execute("insert into rows (body) values (?)", (BLOCK[:100],))

        return timing.repeat(transaction, _MOST, seconds).rate
