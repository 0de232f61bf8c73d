"""Trees, as programs copy and remove them."""

from __future__ import annotations

from pathlib import Path

from benchmarks import timing
from benchmarks.processes import run
from benchmarks.workloads.base import Bench, Figures


def trees(bench: Bench) -> Figures:
    """cp, rsync and tar write the same tree; the first is removed."""
    sources, place = bench.sources, bench.place
    yield "cp", _files_a_second(bench, "cp", "-a", sources.tree, place / "copied")
    yield "rsync", _files_a_second(bench, "rsync", "-a", f"{sources.tree}/", place / "synced")
    yield "tar", _files_a_second(bench, "tar", "-C", place, "-xf", sources.archive)
    yield "rm", _files_a_second(bench, "rm", "-rf", place / "copied")


def git(bench: Bench) -> Figures:
    """A clone through git's own protocol, another branch, and what has changed."""
    sources, clone = bench.sources, bench.place / "clone"
    command = sources.git
    url = f"file://{sources.repository}"
    yield "git_clone", _files_a_second(bench, *command, "clone", "-q", url, clone)
    in_it: tuple[str | Path, ...] = (*command, "-C", clone)
    # Half of the files differ.
    yield "git_checkout", _files_a_second(bench, *in_it, "checkout", "-q", "next") / 2
    bench.running.forget()
    yield "git_status_cold", _files_a_second(bench, *in_it, "status", "--short")


def _files_a_second(bench: Bench, *command: str | Path) -> float:
    return bench.sources.files / timing.once(lambda: run(*command))
