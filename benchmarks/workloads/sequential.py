"""Large files: written from the beginning to the end, and read."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from benchmarks import timing
from benchmarks.workloads.base import Bench, Figures
from benchmarks.workloads.blocks import MIB

_SMALLER: Final = 128 << 10


def sequential(bench: Bench) -> Figures:
    """A file written in 1 MiB and one in 128 KiB; the first is read, cold and again."""
    size = bench.sizes.stream_mib << 20
    first, second = bench.place / "first", bench.place / "second"
    cpu = bench.running.cpu_s()
    yield "write_1m", _write(first, size, len(MIB))
    if bench.running.namespace is not None:
        yield "write_cpu", (bench.running.cpu_s() - cpu) * (1 << 30) / size
    yield "write_128k", _write(second, size, _SMALLER)
    second.unlink()
    bench.running.forget()
    yield "read_seq_cold", _read(first)
    yield "read_again", _read(first)
    first.unlink()


def _write(path: Path, size: int, at_once: int) -> float:
    block = MIB[:at_once]

    def work() -> None:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
        for _ in range(size // at_once):
            os.write(descriptor, block)
        os.close(descriptor)  # some filesystems only now send what they have kept

    return size / timing.once(work) / 1e6


def _read(path: Path) -> float:
    buffer = bytearray(len(MIB))

    def work() -> None:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

    return path.stat().st_size / timing.once(work) / 1e6
