"""Parts of files: random and appended writes, one after another, together, and next to a stream."""

from __future__ import annotations

import multiprocessing
import os
import random
from pathlib import Path
from typing import Final

from benchmarks import timing
from benchmarks.timing import Timed
from benchmarks.workloads.base import Bench, Figures

BLOCK: Final = os.urandom(4096)
MIB: Final = os.urandom(1 << 20)
_FILE_MIB: Final = 16
_MOST: Final = 20_000
_WRITERS: Final = 4


def random_writes(bench: Bench) -> Figures:
    """4 KiB anywhere in a file of 16 MiB, and the end of one."""
    place, seconds = bench.place, bench.sizes.slice_s
    big = make_file(place / "big")
    alone = write_blocks(big, seconds)
    yield "write_4k", alone.rate
    yield "write_4k_p50", alone.percentile_us(50)
    yield "write_4k_fsync", write_blocks(big, seconds, sync=True).rate
    files = [make_file(place / f"big{number}") for number in range(_WRITERS)]
    yield "write_4k_x4", timing.together(write_blocks, [(file, seconds) for file in files])
    log = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    yield "append_1k", timing.repeat(lambda _: os.write(log, BLOCK[:1024]), _MOST, seconds).rate
    os.close(log)
    for path in (big, *files, place / "log"):
        path.unlink()


def beside_a_stream(bench: Bench) -> Figures:
    """The slowest percent of 4 KiB writes: with nothing else, then while 1 MiB writes stream."""
    seconds = 2 * bench.sizes.slice_s
    big = make_file(bench.place / "big")
    yield "write_4k_p99", write_blocks(big, seconds).percentile_us(99)
    streamed = make_file(bench.place / "streamed")
    streamer = multiprocessing.get_context("fork").Process(target=_stream, args=(streamed,))
    streamer.start()
    try:
        yield "write_4k_p99_stream", write_blocks(big, seconds).percentile_us(99)
    finally:
        streamer.terminate()
        streamer.join()
    big.unlink()
    streamed.unlink()


def make_file(path: Path, mib: int = _FILE_MIB) -> Path:
    """A file of so many MiB."""
    with path.open("wb", buffering=0) as file:
        for _ in range(mib):
            file.write(MIB)
    return path


def write_blocks(path: Path, seconds: float, *, sync: bool = False) -> Timed:
    """4 KiB at random places of a file of 16 MiB."""
    blocks = (_FILE_MIB << 20) // len(BLOCK)
    choice = random.Random(blocks)
    offsets = [choice.randrange(blocks) * len(BLOCK) for _ in range(_MOST)]
    descriptor = os.open(path, os.O_RDWR)
    try:

        def write(index: int) -> None:
            os.pwrite(descriptor, BLOCK, offsets[index])
            if sync:
                os.fsync(descriptor)

        return timing.repeat(write, _MOST, seconds)
    finally:
        os.close(descriptor)


def _stream(path: Path) -> None:
    timing.as_a_child()
    descriptor = os.open(path, os.O_WRONLY)
    while True:
        for number in range(_FILE_MIB):
            os.pwrite(descriptor, MIB, number << 20)
