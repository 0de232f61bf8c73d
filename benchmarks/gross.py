"""A gross regression: replfs beside what it is made of, in the same minute on the same machine.

The yardstick of a read is FUSE in C; that of a change, a change through FUSE in C and then a round
trip to another process over TCP. A slow machine slows the yardstick as it slows replfs: what is
stored is the ratio, and it fails only where the best of several repetitions is a third. On a busy
machine more processes that wait for each other wait longer, so all of it runs before others.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks import timing
from benchmarks.measure import Run
from benchmarks.results import Results
from benchmarks.rows import ROWS
from benchmarks.targets import Passthrough, Replfs, Target
from benchmarks.workloads import Sizes

STORED: Final = Path(__file__).with_name("gross.json")
FACTOR: Final = 3.0
_CHANGES: Final = ("create", "rename", "chmod", "unlink", "write_4k", "write_4k_x4", "append_1k")
_OTHERS: Final = ("write_1m", "write_128k", "read_small")
_WORKLOADS: Final = ("small-files", "random-writes", "sequential", "reads")
_SIZES: Final = Sizes(slice_s=0.15, small_files=300, tree_files=1, stream_mib=16)
_FEWEST: Final = 2
_MOST: Final = 6
_FIRST: Final = -20
_GROUP: Final = Path("/proc/self/autogroup")
"""Of the session, which hides the priorities in it; empty where there are no such groups."""
_TRIP: Final = "round_trip"
_MESSAGE_BYTES: Final = 1024


def check() -> list[str]:
    """Regressions that are left after up to six repetitions; two are enough where there is none."""
    stored = load()
    return regressions(stored, _measure(stored))


def store() -> dict[str, float]:
    """Measure, and keep it as what is to be compared with."""
    found = {row: float(f"{ratio:.3g}") for row, ratio in _measure(None).items()}
    STORED.write_text(json.dumps(found, indent=1) + "\n")
    return found


def load() -> dict[str, float]:
    """The stored ratios."""
    return dict(json.loads(STORED.read_text()))


def regressions(stored: dict[str, float], found: dict[str, float]) -> list[str]:
    """A sentence for each row that is a third of what is stored, or less."""
    return [
        f"{ROWS[row].title}: {found[row]:.3f} of the yardstick, {ratio:.3f} is stored: "
        f"{ratio / found[row]:.1f} times slower"
        for row, ratio in stored.items()
        if found[row] * FACTOR <= ratio
    ]


def _measure(stored: dict[str, float] | None) -> dict[str, float]:
    """Ratios; no more repetitions than it takes to reach *stored*."""
    results = Results({}, {})
    targets: dict[str, Target] = {"passthrough": Passthrough(), "replfs": Replfs("replfs")}
    turns = Run(targets, _SIZES, results).turns(_WORKLOADS, [], _MOST)
    with _before_all_others(), contextlib.closing(turns), _echo() as peer:
        for turn in turns:
            results.add(_TRIP, "passthrough", _round_trips(peer))
            if stored and turn >= _FEWEST and not regressions(stored, ratios(results)):
                break
    return ratios(results)


def ratios(results: Results) -> dict[str, float]:
    """Between the best of replfs and the yardstick made of the best of its parts."""

    def best(row: str, target: str) -> float:
        return max(results.of(row, target))

    trip_s = 1 / best(_TRIP, "passthrough")
    found = {row: best(row, "replfs") * (1 / best(row, "passthrough") + trip_s) for row in _CHANGES}
    for row in _OTHERS:
        found[row] = best(row, "replfs") / best(row, "passthrough")
    return found


@contextlib.contextmanager
def _before_all_others() -> Iterator[None]:
    """With the highest priority, if that may be: what else runs then matters little."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            before = os.getpriority(os.PRIO_PROCESS, 0)
            os.setpriority(os.PRIO_PROCESS, 0, _FIRST)
            stack.callback(os.setpriority, os.PRIO_PROCESS, 0, before)
            if words := _GROUP.read_text().split():
                _GROUP.write_text(str(_FIRST))
                stack.callback(_GROUP.write_text, words[-1])
        yield


@contextlib.contextmanager
def _echo() -> Iterator[socket.socket]:
    """A connection over loopback to a process that answers every message."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = multiprocessing.get_context("fork").Process(target=_answer, args=(listener,))
        child.start()
        try:
            with socket.create_connection(listener.getsockname()) as peer:
                peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                yield peer
        finally:
            child.terminate()
            child.join()


def _answer(listener: socket.socket) -> None:
    timing.as_a_child()
    peer, _ = listener.accept()
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while message := peer.recv(_MESSAGE_BYTES, socket.MSG_WAITALL):
        peer.sendall(message[:1])


def _round_trips(peer: socket.socket) -> float:
    message = bytes(_MESSAGE_BYTES)

    def trip(_: int) -> None:
        peer.sendall(message)
        peer.recv(1)

    return timing.repeat(trip, 10_000, _SIZES.slice_s).rate
