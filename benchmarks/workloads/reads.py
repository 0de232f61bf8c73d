"""Files of 1 KiB that have been there for a while: looked at and read, known and cold."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from benchmarks import timing
from benchmarks.workloads.base import Bench, Figures, Sizes
from benchmarks.workloads.small_files import BYTES, create

_KNOWN: Final = "known"
_ROUNDS: Final = 10
_LISTINGS: Final = 50
_PREPARED_SLICES: Final = 3


def prepare(mount: Path, sizes: Sizes) -> None:
    """Make the files, once for all repetitions; a slow target makes fewer of them."""
    place = mount / _KNOWN
    place.mkdir()
    timing.repeat(
        lambda index: create(f"{place}/f{index}"),
        sizes.small_files,
        _PREPARED_SLICES * sizes.slice_s,
    )


def reads(bench: Bench) -> Figures:
    """Cold first; what is known afterwards has been asked for once."""
    place = bench.running.mount / _KNOWN
    paths = [f"{place}/{name}" for name in sorted(os.listdir(place))]
    count, seconds = len(paths), bench.sizes.slice_s
    bench.running.forget()
    yield "stat_cold", timing.repeat(lambda index: os.stat(paths[index]), count, seconds).rate
    bench.running.forget()
    yield "read_cold", timing.repeat(lambda index: _read(paths[index]), count, seconds).rate
    listed = timing.repeat(lambda _: os.listdir(place), _LISTINGS, seconds)
    yield "list", listed.rate * count
    many = _ROUNDS * count
    for path in paths:
        _read(path)
        os.stat(path)
    yield "stat_known", timing.repeat(lambda i: os.stat(paths[i % count]), many, seconds).rate
    yield "open_known", timing.repeat(lambda i: _open(paths[i % count]), many, seconds).rate
    yield "read_small", timing.repeat(lambda i: _read(paths[i % count]), many, seconds).rate


def _open(path: str) -> None:
    os.close(os.open(path, os.O_RDONLY))


def _read(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.read(descriptor, len(BYTES))
    os.close(descriptor)
