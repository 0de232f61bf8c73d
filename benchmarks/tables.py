"""Markdown of results: the table, the verdicts, a row per milestone."""

from __future__ import annotations

from benchmarks import goals
from benchmarks.results import Results
from benchmarks.rows import ROWS

_KEY_ROWS = ("create", "rename", "write_4k", "write_1m", "cp", "write_4k_fsync")


def number(value: float) -> str:
    """Three digits that count, or the whole part."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def cell(results: Results, row: str, target: str, base: str) -> str:
    """Median, how many times better than *base* that is, and the lowest and highest."""
    found = results.of(row, target)
    median = results.median(row, target)
    if median is None:
        return ""
    text = f"**{number(median)}**"
    if target != base and (gain := results.gain(row, target, base)) is not None:
        text += f" {number(gain)}x"
    if len(found) > 1:
        text += f" ({number(min(found))} to {number(max(found))})"
    return text


def comparison(results: Results, base: str) -> str:
    """A line for each row and a column for each target; ratios are to *base*."""
    titles = results.titles
    lines = [
        "| " + " | ".join(["", "unit", *titles.values()]) + " |",
        "| --- | --- |" + " ---: |" * len(titles),
    ]
    for row in results.rows:
        cells = [cell(results, row, target, base) for target in titles]
        lines.append("| " + " | ".join([ROWS[row].title, ROWS[row].unit, *cells]) + " |")
    return "\n".join(lines)


def explanation(results: Results, base: str) -> str:
    """What the figures of the table are."""
    counts = [len(found) for by_target in results.samples.values() for found in by_target.values()]
    fewest, most = (min(counts), max(counts)) if counts else (0, 0)
    times = f"{most}" if fewest == most else f"{fewest} to {most}"
    return (
        f"Medians of {times} interleaved repetitions, with the lowest and the highest. `x` is how "
        f"many times better than {results.titles.get(base, base)}, where below 1 is worse."
    )


def origin(results: Results) -> str:
    """When, where, what."""
    about = results.about
    versions = [f"{name} {found}" for name, found in about["versions"].items() if found]
    sizes = ", ".join(f"{name} {value:,}" for name, value in about["sizes"].items())
    return "\n".join(
        [
            f"- {about['when']}, replfs {about['commit']}",
            f"- {about['machine']}",
            f"- {', '.join(versions)}" if versions else "- nothing else installed",
            f"- sizes: {sizes}",
        ]
    )


def verdicts(results: Results) -> str:
    """A table for each section of the goals."""
    parts = []
    for section, judged in goals.judge(results).items():
        met = sum(verdict.met for verdict in judged)
        lines = [
            f"**{section}**: {met} of {len(judged)} met",
            "",
            "| goal | asked | found | |",
            "| --- | ---: | ---: | --- |",
        ]
        for verdict in judged:
            word = "met" if verdict.met else "missed"
            lines.append(f"| {verdict.goal} | {verdict.asked} | {verdict.found} | {word} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def missed(results: Results) -> str:
    """One line for each section: how many goals are met, and which are missed by how much."""
    lines = ["| goals | met | missed: found instead of asked |", "| --- | ---: | --- |"]
    for section, judged in goals.judge(results).items():
        not_met = [verdict for verdict in judged if not verdict.met]
        said = "; ".join(
            f"{verdict.goal.partition(': ')[0]} {verdict.found} ({verdict.asked})"
            for verdict in not_met
        )
        lines.append(f"| {section} | {len(judged) - len(not_met)} of {len(judged)} | {said} |")
    return "\n".join(lines)


def milestones(found: dict[str, Results]) -> str:
    """A line for each run that was kept, the oldest first; names link to their pages."""
    heads = [f"{ROWS[row].title}, {ROWS[row].unit}" for row in _KEY_ROWS]
    lines = [
        "| " + " | ".join(["milestone", "commit", "machine", *heads, "goals met"]) + " |",
        "| --- | --- | --- |" + " ---: |" * (len(_KEY_ROWS) + 1),
    ]
    for name, results in sorted(found.items(), key=lambda item: item[1].about["when"]):
        judged = [verdict for section in goals.judge(results).values() for verdict in section]
        figures = [results.median(row, "replfs") for row in _KEY_ROWS]
        cells = ["" if figure is None else number(figure) for figure in figures]
        met = f"{sum(verdict.met for verdict in judged)} of {len(judged)}"
        about = results.about
        line = [f"[{name}](performance/{name}.md)", about["commit"], about["machine"], *cells, met]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines)
