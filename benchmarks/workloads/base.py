"""What a workload is given, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.sources import Sources
from benchmarks.targets import Running


@dataclass(frozen=True)
class Sizes:
    """How much is done. A loop ends after *slice_s* or its number of operations."""

    slice_s: float = 0.3
    small_files: int = 1000
    tree_files: int = 600
    stream_mib: int = 64
    large_tree_files: int = 6000
    """In the tree that shows whether cost grows."""
    large_directory_files: int = 5000
    """In the one directory that shows it."""


@dataclass(frozen=True)
class Bench:
    """A fresh directory *place* on a running target."""

    place: Path
    running: Running
    sizes: Sizes
    sources: Sources


Figures = Iterator[tuple[str, float]]
"""Keys of `ROWS` and values in their units, as they are measured."""

Workload = Callable[[Bench], Figures]
