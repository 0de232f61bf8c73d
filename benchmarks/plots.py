"""Plots, if matplotlib is installed (`pip install 'replfs[bench]'`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.results import Results
from benchmarks.rows import ROWS

_GROUPS: Final = {
    "small files": (
        "create", "rename", "chmod", "unlink", "cp", "rsync", "tar", "rm", "git_clone",
        "git_checkout",
    ),
    "writes": (
        "write_4k", "write_4k_x4", "append_1k", "write_1m", "write_128k", "write_4k_fsync", "mail",
        "sqlite_rollback", "sqlite_wal",
    ),
    "reads": (
        "open_known", "read_small", "stat_known", "list", "stat_cold", "read_cold",
        "read_seq_cold", "read_again", "git_status_cold",
    ),
}  # fmt: skip
_COLOURS: Final = (
    "#bbbbbb",
    "#777777",
    "#e6ab02",
    "#d95f02",
    "#66a61e",
    "#1f78b4",
    "#6a3d9a",
    "#a6cee3",
)


def available() -> bool:
    """Whether there is something to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def comparison(results: Results, base: str, path: Path) -> None:
    """Bars: how many times better than *base*, on a logarithmic scale."""
    pyplot = _pyplot()
    figure, all_axes = pyplot.subplots(len(_GROUPS), 1, figsize=(12, 4 * len(_GROUPS)))
    targets = [target for target in results.titles if target != base]
    width = 0.8 / max(1, len(targets))
    for axes, (group, members) in zip(all_axes, _GROUPS.items(), strict=True):
        rows = [row for row in members if row in results.samples]
        for place, target in enumerate(targets):
            gains = [results.gain(row, target, base) or float("nan") for row in rows]
            middles = [
                index + (place - (len(targets) - 1) / 2) * width for index in range(len(rows))
            ]
            colour = _COLOURS[place % len(_COLOURS)]
            axes.bar(middles, gains, width, label=results.titles[target], color=colour)
        axes.axhline(1, color="black", linewidth=0.8)
        axes.set_yscale("log")
        axes.set_xticks(
            range(len(rows)), [ROWS[row].title for row in rows], rotation=20, ha="right"
        )
        axes.set_ylabel(f"times {results.titles.get(base, base)}")
        axes.set_title(group)
    all_axes[0].legend(ncols=4, fontsize="small")
    _save(figure, path)


def curves(
    panels: Mapping[str, tuple[str, str, Mapping[str, Sequence[tuple[float, float]]]]], path: Path
) -> None:
    """A panel for each title: what is on both axes, and points by the name of their curve."""
    pyplot = _pyplot()
    columns = 2
    lines = -(-len(panels) // columns)
    figure, all_axes = pyplot.subplots(lines, columns, figsize=(12, 4 * lines), squeeze=False)
    flat = [axes for line in all_axes for axes in line]
    for axes in flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, (across, up, by_name)) in zip(flat, panels.items(), strict=False):
        for name, points in by_name.items():
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        axes.set_title(title)
        axes.set_xlabel(across)
        axes.set_ylabel(up)
        axes.legend(fontsize="small")
        places = sorted({point[0] for points in by_name.values() for point in points} - {0})
        if places and places[-1] >= 100 * places[0] >= 100:
            axes.set_xscale("symlog", linthresh=places[0])
            axes.set_yscale("log")
            axes.set_xlim(left=0)
        else:
            axes.set_ylim(bottom=0)
    _save(figure, path)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    # The same figures give the same file.
    mpl.rcParams["svg.hashsalt"] = "replfs"
    from matplotlib import pyplot as plt

    return plt


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    _pyplot().close(figure)
