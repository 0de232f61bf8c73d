"""What a run has found: a JSON file that is complete at any moment."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.rows import ROWS

REPOSITORY: Final = Path(__file__).resolve().parent.parent


@dataclass
class Results:
    """Samples by row and target, and where they come from."""

    about: dict[str, Any]
    """`when`, `commit`, `machine`, `versions` and `sizes` of the run."""
    titles: dict[str, str]
    """Of the targets, in the order of the columns."""
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)

    def add(self, row: str, target: str, value: float) -> None:
        """One more sample."""
        self.samples.setdefault(row, {}).setdefault(target, []).append(value)

    def of(self, row: str, target: str) -> list[float]:
        """The samples; none if it was not measured."""
        return self.samples.get(row, {}).get(target, [])

    def median(self, row: str, target: str) -> float | None:
        """None if it was not measured."""
        found = self.of(row, target)
        return statistics.median(found) if found else None

    def gain(self, row: str, target: str, base: str) -> float | None:
        """How many times better *target* is than *base*; None if one was not measured."""
        value, other = self.median(row, target), self.median(row, base)
        if value is None or not other:
            return None
        return ROWS[row].gain(value, other)

    @property
    def rows(self) -> list[str]:
        """Those measured on one of the targets, in the order of the table."""
        return [row for row in ROWS if self.titles.keys() & self.samples.get(row, {}).keys()]

    def save(self, path: Path) -> None:
        """So that a reader never sees half of it."""
        rows = ",\n".join(
            f"{json.dumps(row)}: {json.dumps(self._rounded(row))}" for row in self.samples
        )
        text = (
            f'{{"about": {json.dumps(self.about, indent=1)},\n'
            f'"titles": {json.dumps(self.titles, indent=1)},\n'
            f'"samples": {{\n{rows}\n}}}}\n'
        )
        new = path.with_suffix(".new")
        new.write_text(text)
        new.replace(path)

    def _rounded(self, row: str) -> dict[str, list[float]]:
        return {
            target: [float(f"{value:.5g}") for value in values]
            for target, values in self.samples[row].items()
        }


def load(path: Path) -> Results:
    """As saved."""
    return Results(**json.loads(path.read_text()))


def about(sizes: Mapping[str, object], versions: Mapping[str, str | None]) -> dict[str, Any]:
    """When, where, and of which commit."""
    return {
        "when": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "versions": dict(versions),
        "sizes": dict(sizes),
    }


def commit() -> str:
    """Of the repository, short; with a `+` if something is not committed."""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *words], capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", "replfs")
    return (git("rev-parse", "--short=10", "HEAD") or "unknown") + ("+" if changed else "")


def machine() -> str:
    """Processors, memory, kernel and Python, in a line."""
    names = {
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    return (
        f"{os.cpu_count()} x {' and '.join(sorted(names)) or platform.machine()}, "
        f"{memory:.0f} GiB, Linux {platform.release()}, Python {platform.python_version()}"
    )
