"""Measure replfs beside other filesystems. Run nothing beside it, and run it as root.

    python -m benchmarks run                      all rows on all targets, into docs/performance
    python -m benchmarks compare BEFORE [AFTER]   two commits of replfs: what got slower
    python -m benchmarks growth                   cost by files, sizes, writers, peers, distance
    python -m benchmarks gross [--store]          is something three times slower than stored?
    python -m benchmarks pages                    make the pages again from the files of results

What a target needs is installed or compiled. What is set up is taken away at the end, also after
Ctrl-C; what was measured until then is kept.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from benchmarks import compare, gross, growth, images, leftovers, packages, pages, results, tables
from benchmarks.errors import BenchmarkError
from benchmarks.measure import Run
from benchmarks.results import Results
from benchmarks.scenarios import SCENARIOS
from benchmarks.targets import TARGETS, USUAL, Target
from benchmarks.workloads import WORKLOADS, Sizes


def main(arguments: Sequence[str]) -> int:
    """Run one command; 0, 1 if it found something slower or failed, 2 for a bad command line."""
    options = _parser().parse_args(arguments)
    try:
        if options.run is not _pages:
            _get_ready()
        return int(options.run(options))
    except BenchmarkError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _get_ready() -> None:
    if os.geteuid() != 0:
        raise BenchmarkError("stores lie on loop-mounted images: run it as root")
    for name in leftovers.clear():
        _say(f"removed what a killed run has left: {name}")


def _run(options: argparse.Namespace) -> int:
    targets = {name: TARGETS[name] for name in options.targets}
    name, into = _where(options)
    found = _results(targets, options)
    path = into / f"{name}.json"
    with _interruptible(), contextlib.suppress(KeyboardInterrupt):
        complete = Run(
            targets,
            _sizes(options),
            found,
            keep=lambda: found.save(path),
            report=_say,
            deadline=time.monotonic() + options.minutes * 60,
        ).measure(options.workloads, options.scenarios, options.repeat)
        if not complete:
            _say(f"{options.minutes:g} minutes are over: the last repetition is not complete")
    if not found.samples:
        raise BenchmarkError("nothing was measured")
    found.save(path)
    written = [path, *pages.write_run(into, name, found)]
    _remake(into)
    print(tables.missed(found))
    print("written:", *written)
    return 0


def _compare(options: argparse.Namespace) -> int:
    with _interruptible(), images.workspace() as base:
        targets: dict[str, Target] = {
            "before": compare.install(options.before, base),
            "after": compare.install(options.after, base),
        }
        found = _results(targets, options)
        with contextlib.suppress(KeyboardInterrupt):
            Run(
                targets,
                _sizes(options),
                found,
                report=_say,
                deadline=time.monotonic() + options.minutes * 60,
            ).measure(options.workloads, [], options.repeat)
    print(tables.origin(found))
    print(tables.explanation(found, "before"))
    print(tables.comparison(found, "before"))
    slower, faster = compare.changes(found, "before", "after")
    for word, lines in (("faster", faster), ("slower", slower)):
        print(f"\n{word}:", *(lines or ["nothing"]), sep="\n  ")
    return 1 if slower else 0


def _growth(options: argparse.Namespace) -> int:
    steps = growth.Steps(files=tuple(options.files), slice_s=options.slice_s)
    name, into = _where(options)
    about = results.about(growth.described(steps), {})
    points: list[growth.Point] = []
    with _interruptible(), contextlib.suppress(KeyboardInterrupt):
        for point in growth.measure(steps, options.repeat, _say):
            points.append(point)
            pages.write_points(into, name, about, points)
    if not points:
        raise BenchmarkError("nothing was measured")
    print("written:", *pages.write_growth(into, name, about, points))
    _remake(into)
    return 0


def _gross(options: argparse.Namespace) -> int:
    with _interruptible():
        if options.store:
            for row, ratio in gross.store().items():
                print(f"{row} {ratio}")
            return 0
        found = gross.check()
    print(*(found or ["nothing is three times slower than stored"]), sep="\n")
    return 1 if found else 0


def _pages(_: argparse.Namespace) -> int:
    for path in pages.runs():
        pages.write_run(path.parent, path.stem, results.load(path))
    _remake(pages.PERFORMANCE)
    return 0


def _remake(into: Path) -> None:
    if into.resolve() == pages.PERFORMANCE:
        pages.PAGE.write_text(pages.fresh_page())


def _results(targets: dict[str, Target], options: argparse.Namespace) -> Results:
    needed = dict.fromkeys(package for each in targets.values() for package in each.packages[:1])
    for each in targets.values():
        packages.install(each.packages)
    versions = {package: packages.version(package) for package in needed}
    about = results.about(dataclasses.asdict(_sizes(options)), versions)
    return Results(about, {name: each.title for name, each in targets.items()})


def _sizes(options: argparse.Namespace) -> Sizes:
    return Sizes(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)}
    )


def _where(options: argparse.Namespace) -> tuple[str, Path]:
    name = options.name or f"{time.strftime('%Y-%m-%d')}-{results.commit().rstrip('+')}"
    options.into.mkdir(parents=True, exist_ok=True)
    return name, options.into


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends it; more of them do not disturb what is done then.

    That is what is taken away, and what was found, written down: until the process ends.
    """
    is_over = False

    def stop(_number: int, _frame: FrameType | None) -> None:
        nonlocal is_over
        is_over = True
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not is_over:
            for number, handler in before.items():
                signal.signal(number, handler)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="all rows on all targets")
    run.set_defaults(run=_run)
    run.add_argument("--targets", type=_among(TARGETS), default=list(USUAL), metavar="NAME,...")
    run.add_argument(
        "--scenarios", type=_among(SCENARIOS), default=list(SCENARIOS), metavar="NAME,..."
    )
    _add_measuring(run, repeat=3, minutes=15)
    _add_place(run)

    compared = commands.add_parser("compare", help="two commits of replfs")
    compared.set_defaults(run=_compare)
    compared.add_argument("before", help="a commit")
    compared.add_argument("after", nargs="?", default="HEAD", help="another (default: HEAD)")
    _add_measuring(compared, repeat=5, minutes=15)

    grown = commands.add_parser("growth", help="how cost grows")
    grown.set_defaults(run=_growth)
    grown.add_argument("--files", type=_numbers, default=list(growth.Steps.files), metavar="N,...")
    grown.add_argument("--slice-s", type=float, default=growth.Steps.slice_s)
    grown.add_argument("--repeat", type=int, default=3)
    _add_place(grown)

    check = commands.add_parser("gross", help="whether something is far slower than stored")
    check.set_defaults(run=_gross)
    check.add_argument("--store", action="store_true", help="store what is measured now")

    commands.add_parser("pages", help="make the pages again").set_defaults(run=_pages)
    return parser


def _add_measuring(parser: argparse.ArgumentParser, *, repeat: int, minutes: float) -> None:
    parser.add_argument(
        "--workloads", type=_among(WORKLOADS), default=list(WORKLOADS), metavar="NAME,..."
    )
    parser.add_argument("--repeat", type=int, default=repeat)
    parser.add_argument(
        "--minutes", type=float, default=minutes, help="nothing new begins after so many"
    )
    for field in dataclasses.fields(Sizes):
        kind: Any = type(field.default)
        option = f"--{field.name.replace('_', '-')}"
        parser.add_argument(option, type=kind, default=field.default, help="(default %(default)s)")


def _add_place(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--into", type=Path, default=pages.PERFORMANCE, metavar="DIR")
    parser.add_argument("--name", type=_name, help="of the milestone (default: date and commit)")


def _among(known: Sequence[str] | dict[str, Any]) -> Any:
    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name and name != "none"]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(
                f"{', '.join(unknown)} is not known; there are {', '.join(known)}, or none"
            )
        return names

    return read


def _name(text: str) -> str:
    if not re.fullmatch(r"\w[\w.-]*", text):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be the name of a file")
    return text


def _numbers(text: str) -> list[int]:
    return sorted(int(word) for word in text.split(","))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
