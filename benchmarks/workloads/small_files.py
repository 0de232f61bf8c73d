"""Files of 1 KiB: made, looked at, changed, renamed, removed."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Final

from benchmarks import timing
from benchmarks.timing import Timed
from benchmarks.workloads.base import Bench, Figures

BYTES: Final = os.urandom(1024)


def small_files(bench: Bench) -> Figures:
    """One set of files goes through all of it; a slow target makes fewer of them."""
    place, running = bench.place, bench.running

    def all_of(action: Callable[[int], object], most: int = bench.sizes.small_files) -> Timed:
        return timing.repeat(action, most, bench.sizes.slice_s)

    cpu = running.cpu_s()
    made = all_of(lambda index: create(f"{place}/f{index}"))
    yield "create", made.rate
    if running.namespace is not None:
        yield "create_cpu", (running.cpu_s() - cpu) * 1000 / made.count
    yield "stat_new", all_of(lambda index: os.stat(f"{place}/f{index}"), made.count).rate
    yield "chmod", all_of(lambda index: os.chmod(f"{place}/f{index}", 0o640), made.count).rate
    renamed = all_of(lambda index: os.rename(f"{place}/f{index}", f"{place}/g{index}"), made.count)
    yield "rename", renamed.rate
    yield "unlink", all_of(lambda index: os.unlink(f"{place}/g{index}"), renamed.count).rate


def create(path: str) -> None:
    """A new file of 1 KiB."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    os.write(descriptor, BYTES)
    os.close(descriptor)
