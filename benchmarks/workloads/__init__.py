"""What is done on every target. A workload measures several rows, so that files are made once."""

from __future__ import annotations

from typing import Final

from benchmarks.workloads.applications import applications
from benchmarks.workloads.base import Bench, Sizes, Workload
from benchmarks.workloads.blocks import beside_a_stream, random_writes
from benchmarks.workloads.reads import prepare, reads
from benchmarks.workloads.sequential import sequential
from benchmarks.workloads.small_files import small_files
from benchmarks.workloads.trees import git, trees

WORKLOADS: Final[dict[str, Workload]] = {
    "small-files": small_files,
    "random-writes": random_writes,
    "sequential": sequential,
    "reads": reads,
    "applications": applications,
    "stream": beside_a_stream,
    "git": git,
    "trees": trees,
}

__all__ = ["WORKLOADS", "Bench", "Sizes", "Workload", "prepare"]
