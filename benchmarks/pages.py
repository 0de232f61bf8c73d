"""The files of results below `docs/`, and what `docs/PERFORMANCE.md` takes from them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from benchmarks import growth, plots, results, tables
from benchmarks.results import REPOSITORY, Results

PERFORMANCE: Final = REPOSITORY / "docs" / "performance"
PAGE: Final = REPOSITORY / "docs" / "PERFORMANCE.md"
_GROWTH: Final = "growth-"
_BASE: Final = "passthrough"
_BLOCK: Final = re.compile(r"(<!-- made: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def base_of(found: Results) -> str:
    """What ratios are to: FUSE in C, or else the first target."""
    return _BASE if _BASE in found.titles else next(iter(found.titles))


def write_run(directory: Path, name: str, found: Results) -> list[Path]:
    """The table and the verdicts, and the plot if there is matplotlib; returns what was written."""
    base = base_of(found)
    page = directory / f"{name}.md"
    parts = [
        f"# Measured: {name}",
        tables.origin(found),
        tables.explanation(found, base),
        tables.comparison(found, base),
    ]
    written = [page]
    if plots.available() and len(found.titles) > 1:
        plot = directory / f"{name}.svg"
        plots.comparison(found, base, plot)
        parts.append(f"![How many times better or worse]({plot.name})")
        written.append(plot)
    if judged := tables.verdicts(found):
        parts += ["## Goals", judged]
    page.write_text("\n\n".join(parts) + "\n")
    return written


def write_points(
    directory: Path, name: str, about: dict[str, Any], points: list[growth.Point]
) -> Path:
    """Only the points, as often as there are new ones."""
    data = directory / f"{_GROWTH}{name}.json"
    lines = ",\n".join(map(json.dumps, points))
    data.write_text(f'{{"about": {json.dumps(about)},\n"points": [\n{lines}\n]}}\n')
    return data


def write_growth(
    directory: Path, name: str, about: dict[str, Any], points: list[growth.Point]
) -> list[Path]:
    """The points and the plot; returns what was written."""
    data = write_points(directory, name, about, points)
    if not plots.available():
        return [data]
    plot = data.with_suffix(".svg")
    panels = {
        title: (growth.PANELS[title].across, growth.PANELS[title].up, curves)
        for title, curves in growth.medians(points).items()
    }
    plots.curves(panels, plot)
    return [data, plot]


def runs() -> list[Path]:
    """The files of results of the runs that were kept."""
    return [
        path for path in sorted(PERFORMANCE.glob("*.json")) if not path.name.startswith(_GROWTH)
    ]


def fresh_page() -> str:
    """`docs/PERFORMANCE.md` with the made parts as the files in `docs/performance` say."""
    kept = {path.stem: results.load(path) for path in runs()}
    parts = {
        "milestones": "None yet.",
        "goals": "None yet.",
        "table": "None yet.",
        "growth": "None yet.",
    }
    if kept:
        name, newest = max(kept.items(), key=lambda item: _rank(item[1]))
        base = base_of(newest)
        parts["milestones"] = tables.milestones(kept)
        parts["goals"] = tables.missed(newest)
        parts["table"] = "\n\n".join(
            [
                tables.origin(newest),
                tables.explanation(newest, base),
                tables.comparison(newest, base),
                *_picture(f"{name}.svg", "How many times better or worse"),
            ]
        )
    if grown := sorted(PERFORMANCE.glob(f"{_GROWTH}*.json"), key=_when):
        parts["growth"] = _growth_part(grown[-1])
    return _BLOCK.sub(
        lambda block: f"{block[1]}\n{parts[block[2]]}\n\n{block[3]}", PAGE.read_text()
    )


def _rank(found: Results) -> tuple[bool, str]:
    """The newest comes last; one of a single target compares nothing, and comes before."""
    return len(found.titles) > 1, found.about["when"]


def _when(path: Path) -> str:
    return str(json.loads(path.read_text())["about"]["when"])


def _growth_part(path: Path) -> str:
    found = json.loads(path.read_text())
    about = found["about"]
    lines = [f"{about['when']}, replfs {about['commit']}, {about['machine']}."]
    lines += _picture(f"{path.stem}.svg", "How cost grows")
    for title, curves in growth.medians([tuple(point) for point in found["points"]]).items():
        panel = growth.PANELS[title]
        across = sorted({x for points in curves.values() for x, _ in points})
        table = [
            f"| {panel.up}, by {panel.across} | " + " | ".join(f"{x:,g}" for x in across) + " |",
            "| --- |" + " ---: |" * len(across),
        ]
        for name, points in curves.items():
            values = dict(points)
            cells = [tables.number(values[x]) if x in values else "" for x in across]
            table.append(f"| {name} | " + " | ".join(cells) + " |")
        lines.append("\n".join(table))
    return "\n\n".join(lines)


def _picture(name: str, what: str) -> list[str]:
    return [f"![{what}](performance/{name})"] if (PERFORMANCE / name).exists() else []
