"""Two commits of replfs side by side: each in a virtual environment of its own, interleaved."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from benchmarks.errors import BenchmarkError
from benchmarks.processes import run
from benchmarks.results import REPOSITORY, Results
from benchmarks.rows import ROWS
from benchmarks.tables import number
from benchmarks.targets import Replfs

_SLOWER: Final = 0.9
"""A median below this is worth a word, if the ranges do not overlap."""


def install(commit: str, base: Path) -> Replfs:
    """A target that runs *commit*, installed below *base*.

    Raises:
        BenchmarkError: there is no such commit, or it cannot be installed.
    """
    sha = run("git", "-C", REPOSITORY, "rev-parse", "--short=10", f"{commit}^{{commit}}").strip()
    source, environment = base / f"source-{sha}", base / f"environment-{sha}"
    if environment.exists():
        raise BenchmarkError(f"{commit} is {sha}, which is the other one: name two commits")
    source.mkdir()
    archive = base / f"{sha}.tar"
    run("git", "-C", REPOSITORY, "archive", "-o", archive, sha)
    run("tar", "-C", source, "-xf", archive)
    run(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", source)
    return Replfs(f"{commit} ({sha})", python=str(python))


def changes(results: Results, before: str, after: str) -> tuple[list[str], list[str]]:
    """What got slower and what got faster: medians by a tenth, ranges that do not overlap."""
    slower, faster = [], []
    for row in results.rows:
        gain = results.gain(row, after, before)
        if gain is None:
            continue
        old, new = results.of(row, before), results.of(row, after)
        if max(old) >= min(new) and max(new) >= min(old):
            continue
        unit = ROWS[row].unit
        line = f"{ROWS[row].title}: {number(results.median(row, before) or 0)} {unit} before, "
        line += f"{number(results.median(row, after) or 0)} {unit} after, {gain:.2f}x"
        if gain < _SLOWER:
            slower.append(line)
        elif gain > 1 / _SLOWER:
            faster.append(line)
    return slower, faster
