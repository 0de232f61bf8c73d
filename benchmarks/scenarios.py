"""What only a replicated directory does: a first copy, a resync; and whether cost grows with size.

A scenario sets up nodes of its own. For comparison it also gives figures of `ext4`: those of
`rsync -a` between two directories of one filesystem. A copy or a comparison takes from when the
mount begins it until the peer is in sync, with everything flushed there, which `rsync` leaves out;
what it takes to start a node, or a command that waits for it, is no part of that.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Final

from benchmarks import sources, timing
from benchmarks.processes import run
from benchmarks.rows import REPEATED
from benchmarks.targets import Nodes, Replfs, nodes
from benchmarks.timing import Timed
from benchmarks.workloads.base import Sizes
from benchmarks.workloads.blocks import make_file, write_blocks
from benchmarks.workloads.small_files import create

Found = Iterator[tuple[str, str, float]]
"""Rows, targets and values."""

OURS: Final = "replfs"
"""The target whose nodes a scenario sets up, whatever its options."""

_LARGE_FILES: Final = 4
_ROUNDS: Final = 5
"""How often it is each tree's turn."""


def large_files(target: Replfs, base: Path, sizes: Sizes) -> Found:
    """A first copy of some large files."""
    if not target.peers:
        return
    each = 2 * sizes.stream_mib
    amount = _LARGE_FILES * each * (1 << 20) / 1e6
    with nodes(target, base) as made:
        for number in range(_LARGE_FILES):
            make_file(made.store / f"large{number}", each)
        yield "first_copy_large", "ext4", amount / _rsync(made)
        with made.agents(), made.mounted():
            made.wait_in_sync()
            yield "first_copy_large", OURS, amount / made.resync_seconds()


def large_tree(target: Replfs, base: Path, sizes: Sizes) -> Found:
    """A tree of many files and a directory of many, copied, compared and worked in."""
    files = sizes.large_tree_files + sizes.large_directory_files
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(nodes(target, base, inodes=4 * files + 100_000))
        _fill(made.store, sizes)
        if target.peers:
            yield "first_copy_small", "ext4", files / _rsync(made)
        stack.enter_context(made.agents())
        stack.enter_context(made.mounted())
        if target.peers:
            made.wait_in_sync()
            yield "first_copy_small", OURS, files / made.resync_seconds()
            made.replfs("resync", "--full")
            made.wait_in_sync()
            yield "compare_all", OURS, files / made.resync_seconds()
            for row, value in _beside_a_resync(made, sizes):
                yield row, OURS, value
        for row, value in _growth(target, base, made, sizes):
            yield row, OURS, value
        run("find", made.mount, "-size", "+1000000")  # asks for the attributes of everything
        yield "memory_known", OURS, max(made.running.resident_mib())


SCENARIOS: Final[dict[str, Callable[[Replfs, Path, Sizes], Found]]] = {
    "large-files": large_files,
    "large-tree": large_tree,
}


def _fill(store: Path, sizes: Sizes) -> None:
    sources.make_tree(store / "tree", sizes.large_tree_files)
    (store / "directory").mkdir()
    for index in range(sizes.large_directory_files):
        create(f"{store}/directory/file{index}")


def _rsync(made: Nodes) -> float:
    """Seconds; what was copied is removed."""
    copied = made.running.stores / "copied"
    # .replfs is there from the start of the first node on, which is later.
    seconds = timing.once(lambda: run("rsync", "-a", f"{made.store}/", copied))
    run("rm", "-rf", copied)
    return seconds


def _beside_a_resync(made: Nodes, sizes: Sizes) -> Iterator[tuple[str, float]]:
    seconds = sizes.slice_s
    big = make_file(made.mount / "big")
    yield "write_4k_p99_in_sync", write_blocks(big, 2 * seconds).percentile_us(99)
    made.replfs("pause")
    other = make_file(made.mount / "other", 2 * sizes.stream_mib)
    made.replfs("resume")
    meanwhile: list[float] = []
    while not made.in_sync() or not meanwhile:
        meanwhile += write_blocks(big, seconds / 10).latencies_s
    yield "write_4k_p99_resync", Timed(meanwhile).percentile_us(99)
    other.unlink()
    big.unlink()


def _growth(target: Replfs, base: Path, made: Nodes, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """The same operations in turn in an empty tree, in the large one, in the large directory."""
    empty_base = base / "empty"
    empty_base.mkdir()
    with target.start(empty_base) as empty:
        deep = made.mount / "tree" / "d00000" / "place"
        deep.mkdir()
        places = {"empty": empty.mount, "tree": deep, "directory": made.mount / "directory"}
        costs: dict[tuple[str, str], list[float]] = {}
        count = sizes.small_files // (2 * _ROUNDS)
        for _ in range(_ROUNDS):
            for name, place in places.items():
                # A node that was idle is slower at first, whatever its tree.
                list(_operations(place, max(1, count // 4)))
                for operation, rate in _operations(place, count):
                    costs.setdefault((operation, name), []).append(1 / rate)
        for where in ("tree", "directory"):
            for operation in REPEATED:
                grown = mean(costs[operation, where]) / mean(costs[operation, "empty"])
                yield f"{operation}_large_{where}", grown


def _operations(place: Path, count: int) -> Iterator[tuple[str, float]]:
    actions: dict[str, Callable[[int], None]] = {
        "create": lambda index: create(f"{place}/new{index}"),
        "rename": lambda index: os.rename(f"{place}/new{index}", f"{place}/moved{index}"),
        "chmod": lambda index: os.chmod(f"{place}/moved{index}", 0o600),
        "unlink": lambda index: os.unlink(f"{place}/moved{index}"),
    }
    for operation in REPEATED:
        # No limit of time: what was created is renamed and removed, all of it.
        yield operation, timing.repeat(actions[operation], count, float("inf")).rate
