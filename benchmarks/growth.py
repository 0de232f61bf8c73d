"""How the cost of an operation grows: with files, their size, writers, peers, and distance."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import images, timing
from benchmarks.delay import delayed
from benchmarks.measure import Report
from benchmarks.targets import Ext4, Passthrough, Replfs, Target, nodes
from benchmarks.timing import Timed
from benchmarks.workloads.blocks import MIB, make_file, write_blocks
from benchmarks.workloads.small_files import create

Point = tuple[str, str, float, float]
"""Panel, curve, what it is a function of, and the value."""

_MOST: Final = 2000
_PASSTHROUGH_FILES: Final = 15_000
"""It keeps a descriptor of every inode that the kernel knows, and 20,000 are a common limit."""


@dataclass(frozen=True)
class Steps:
    """Where the curves have their points."""

    files: tuple[int, ...] = (0, 1000, 10_000, 50_000)
    sizes: tuple[int, ...] = (0, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
    writers: tuple[int, ...] = (1, 2, 4, 8)
    peers: tuple[int, ...] = (0, 1, 2, 3)
    round_trips_ms: tuple[float, ...] = (0, 0.5, 1, 2, 5, 10)
    slice_s: float = 0.3


@dataclass(frozen=True)
class Panel:
    """What stands on the axes."""

    across: str
    up: str


PANELS: Final[dict[str, Panel]] = {
    "files": Panel("files in the directory", "us per create + 1 KiB + close"),
    "size": Panel("bytes in the file", "us per create + write + close"),
    "writers": Panel("writers", "4 KiB writes a second, all together"),
    "peers": Panel("peers", "us per operation"),
    "round trip": Panel("added round trip, ms", "us per operation"),
}


def measure(steps: Steps, repeat: int, report: Report) -> Iterator[Point]:
    """All points, *repeat* times each; repetitions are the outermost loop."""
    targets: dict[str, Target] = {
        "ext4": Ext4(),
        "passthrough_ll": Passthrough(),
        "replfs": Replfs("replfs"),
    }
    for turn in range(1, repeat + 1):
        with contextlib.ExitStack() as stack:
            base = stack.enter_context(images.workspace())
            places = {}
            for name, target in targets.items():
                (base / name).mkdir()
                places[name] = stack.enter_context(target.start(base / name)).mount
            for part in (_by_files, _by_size, _by_writers):
                report(f"{turn}/{repeat} {part.__name__.removeprefix('_')}")
                yield from part(places, steps)
        for peers in steps.peers:
            report(f"{turn}/{repeat} {peers} peers")
            yield from _points("peers", peers, _operations(peers, 0, steps))
        for round_trip in steps.round_trips_ms:
            report(f"{turn}/{repeat} {round_trip} ms")
            yield from _points("round trip", round_trip, _operations(1, round_trip, steps))


def medians(points: list[Point]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """By panel and curve, in order."""
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    ordered = sorted(points, key=lambda point: (point[0], point[1], point[2]))
    for (panel, curve, across), same in itertools.groupby(ordered, key=lambda point: point[:3]):
        value = median(point[3] for point in same)
        found.setdefault(panel, {}).setdefault(curve, []).append((across, value))
    return {panel: found[panel] for panel in PANELS if panel in found}


def _us(timed: Timed) -> float:
    return 1e6 / timed.rate


def _by_files(places: dict[str, Path], steps: Steps) -> Iterator[Point]:
    there = 0
    for place in places.values():
        (place / "many").mkdir()
    for files in steps.files:
        for name, place in places.items():
            if name == "passthrough_ll" and files > _PASSTHROUGH_FILES:
                continue
            for index in range(there, files):
                create(f"{place}/many/f{index}")

            def make(index: int, place: Path = place, files: int = files) -> None:
                create(f"{place}/many/g{files}-{index}")

            few = timing.repeat(make, _MOST // 10, steps.slice_s)
            yield "files", name, files, _us(few)
        there = files


def _by_size(places: dict[str, Path], steps: Steps) -> Iterator[Point]:
    for size in steps.sizes:
        for name, place in places.items():
            (place / f"size{size}").mkdir()

            def write(index: int, place: Path = place, size: int = size) -> None:
                (place / f"size{size}" / str(index)).write_bytes(MIB[:size])

            yield "size", name, size, _us(timing.repeat(write, _MOST // 10, steps.slice_s))


def _by_writers(places: dict[str, Path], steps: Steps) -> Iterator[Point]:
    for writers in steps.writers:
        for name, place in places.items():
            files = [make_file(place / f"writer{number}") for number in range(writers)]
            arguments = [(file, steps.slice_s) for file in files]
            # The disk alone is out of sight above the others.
            if name != "ext4":
                yield "writers", name, writers, timing.together(write_blocks, arguments)
            for file in files:
                file.unlink()


def _operations(peers: int, round_trip_ms: float, steps: Steps) -> dict[str, float]:
    """What operations cost with so many peers so far away, in microseconds."""
    target = Replfs("replfs", peers=peers)
    with (
        images.workspace() as base,
        nodes(target, base) as made,
        made.agents() as ports,
        delayed(made.namespace, ports, round_trip_ms, base) as through,
        made.mounted(through),
    ):
        made.wait_in_sync()
        mount, seconds = made.mount, steps.slice_s
        big = make_file(mount / "big")
        actions: dict[str, Callable[[], Timed]] = {
            "create + 1 KiB + close": lambda: timing.repeat(
                lambda index: create(f"{mount}/f{index}"), _MOST, seconds
            ),
            "rename": lambda: _renames(mount, seconds),
            "4 KiB write": lambda: write_blocks(big, seconds),
            "4 KiB write + fsync": lambda: write_blocks(big, seconds, sync=True),
        }
        return {name: _us(action()) for name, action in actions.items()}


def _renames(mount: Path, seconds: float) -> Timed:
    create(f"{mount}/name0")
    return timing.repeat(
        lambda index: (mount / f"name{index}").rename(mount / f"name{index + 1}"), _MOST, seconds
    )


def _points(panel: str, across: float, values: dict[str, float]) -> Iterator[Point]:
    for name, value in values.items():
        yield panel, name, across, value


def described(steps: Steps) -> dict[str, object]:
    """For the file of results."""
    return dataclasses.asdict(steps)
