"""Run the rows against the targets, interleaved, and print a table with ratios and spread.

    python benchmarks/run.py [--repeat N] [--rows a,b] [--json FILE] [--targets ext4,replfs,alone]

Run nothing beside it. Every figure is a median over the repetitions, with the lowest and highest
behind it; a ratio compares medians of one run and nothing else.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import shutil
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).parent))

import rows
import targets

Target = Callable[[Path], AbstractContextManager[Path]]

TARGETS: Final[dict[str, Target]] = {
    "ext4": targets.ext4,
    "replfs": targets.replfs,
    "alone": lambda base: targets.replfs(base, peers=0),
    "two-peers": lambda base: targets.replfs(base, peers=2),
}


def measure(
    chosen: dict[str, Target], wanted: list[str], repeat: int
) -> dict[str, dict[str, list[float]]]:
    """Rates by row and target, in the order measured."""
    found: dict[str, dict[str, list[float]]] = {row: {} for row in wanted}
    with contextlib.ExitStack() as stack:
        places = {
            name: stack.enter_context(target(stack.enter_context(targets.workspace())))
            for name, target in chosen.items()
        }
        for turn in range(repeat):
            for row in wanted:
                for name, place in places.items():
                    fresh = place / f"{row}{turn}"
                    fresh.mkdir()
                    amount, seconds = rows.ROWS[row](fresh)
                    found[row].setdefault(name, []).append(amount / seconds)
                    shutil.rmtree(fresh)
    return found


def table(found: dict[str, dict[str, list[float]]], base: str) -> str:
    """Markdown: a line a row, a column a target, ratios to *base*."""
    names = list(next(iter(found.values())))
    lines = ["| row | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    for row, by_target in found.items():
        cells = []
        for name in names:
            rates = by_target[name]
            middle = statistics.median(rates)
            cell = f"{middle:,.0f} ({min(rates):,.0f} to {max(rates):,.0f})"
            if name != base:
                cell += f", {middle / statistics.median(by_target[base]):.2f}x"
            cells.append(cell)
        meaning = (rows.ROWS[row].__doc__ or row).strip().rstrip(".")
        lines.append(f"| {meaning} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Parse, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rows", default=",".join(rows.ROWS))
    parser.add_argument("--targets", default="ext4,alone,replfs")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    names = arguments.targets.split(",")
    found = measure(
        {name: TARGETS[name] for name in names}, arguments.rows.split(","), arguments.repeat
    )
    print(
        f"{platform.uname().release}, {platform.python_version()}, {arguments.repeat} repetitions"
    )
    print(table(found, names[0]))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
