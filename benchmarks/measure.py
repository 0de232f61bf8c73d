"""Run the workloads on the targets, interleaved: what disturbs the machine disturbs all of them.

The order is repetition, workload, target, and in each repetition another target is the first. All
targets are up for the whole run.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from benchmarks import images, packages, sources
from benchmarks.errors import BenchmarkError
from benchmarks.results import Results
from benchmarks.scenarios import OURS, SCENARIOS
from benchmarks.targets import Replfs, Running, Target
from benchmarks.workloads import WORKLOADS, Bench, Sizes, prepare

_FAILURES: Final = (OSError, BenchmarkError, sqlite3.Error)

_HANGS_S: Final = 180.0

Report = Callable[[str], None]


class OutOfTime(Exception):
    """The time given is over."""


class Run:
    """A run over *targets*.

    *keep* is called whenever there is something new in *results*. Nothing begins after *deadline*,
    in monotonic seconds.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        sizes: Sizes,
        results: Results,
        keep: Callable[[], None] = lambda: None,
        report: Report = lambda _: None,
        deadline: float = float("inf"),
    ) -> None:
        self.targets = targets
        self.sizes = sizes
        self.results = results
        self._keep = keep
        self._report = report
        self._deadline = deadline

    def measure(self, workloads: Iterable[str], scenarios: Iterable[str], repeat: int) -> bool:
        """Everything *repeat* times; False if the deadline came first."""
        try:
            for _ in self.turns(workloads, scenarios, repeat):
                pass
        except OutOfTime:
            return False
        return True

    def turns(
        self, workloads: Iterable[str], scenarios: Iterable[str], repeat: int
    ) -> Generator[int, None, None]:
        """The same, to be looked at after each repetition.

        Raises:
            OutOfTime: the deadline has come.
        """
        with contextlib.ExitStack() as stack:
            base = stack.enter_context(images.workspace())
            made = sources.make(stack.enter_context(images.memory_space()), self.sizes.tree_files)
            running = {name: stack.enter_context(self._start(name, base)) for name in self.targets}
            names = list(running)
            for turn in range(1, repeat + 1):
                for workload in workloads:
                    for name in names:
                        self._work(f"{turn}/{repeat}", workload, name, running[name], made)
                names.append(names.pop(0))
                for scenario in scenarios:
                    self._scenario(f"{turn}/{repeat}", scenario, base)
                for name, target in running.items():
                    if memory := target.resident_mib():
                        self.results.add("memory", name, max(memory))
                yield turn

    @contextlib.contextmanager
    def _start(self, name: str, base: Path) -> Iterator[Running]:
        target = self.targets[name]
        packages.install(target.packages)
        place = base / name
        place.mkdir()
        began = time.monotonic()
        with target.start(place) as running:
            try:
                prepare(running.mount, self.sizes)
                running.settle()
            except OSError as error:
                raise BenchmarkError(f"{target.title} cannot be written to: {error}") from error
            self._report(f"{target.title} is ready after {time.monotonic() - began:.1f} s")
            yield running

    def _work(
        self, turn: str, workload: str, name: str, running: Running, made: sources.Sources
    ) -> None:
        self._look_at_the_clock()
        place = running.mount / f"{workload}-{turn.replace('/', '-')}"
        began = time.monotonic()
        # A call into a filesystem that hangs cannot be interrupted otherwise.
        watchdog = threading.Timer(_HANGS_S, running.kill)
        watchdog.daemon = True  # an interrupted run does not wait for it
        try:
            watchdog.start()
            place.mkdir()
            bench = Bench(place, running, self.sizes, made)
            for row, value in WORKLOADS[workload](bench):
                self.results.add(row, name, value)
            running.settle()
        except _FAILURES as error:
            # One that cannot do it leaves a gap in the table, and does not end the run.
            self._report(f"{turn} {workload} on {name} failed: {error}")
        finally:
            watchdog.cancel()
            if watchdog.is_alive():
                watchdog.join()
        self._keep()
        self._report(f"{turn} {workload} on {name}: {time.monotonic() - began:.1f} s")

    def _scenario(self, turn: str, scenario: str, base: Path) -> None:
        ours = {name: each for name, each in self.targets.items() if isinstance(each, Replfs)}
        if not ours:
            return
        first, target = next(iter(ours.items()))
        self._look_at_the_clock()
        place = base / scenario
        place.mkdir()
        began = time.monotonic()
        try:
            for row, name, value in SCENARIOS[scenario](target, place, self.sizes):
                self.results.add(row, first if name == OURS else name, value)
                self._keep()
        except _FAILURES as error:
            self._report(f"{turn} {scenario} failed: {error}")
        shutil.rmtree(place)
        self._report(f"{turn} {scenario}: {time.monotonic() - began:.1f} s")

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise OutOfTime
