"""The attributes of a directory that one process is told of while another changes its names."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.children import Child, ChildDied, spawn

pytestmark = pytest.mark.mounted

ROUNDS = 200


def look(place: Path) -> int:
    """List it again and again: the kernel is told the attributes of what is in it as well."""
    while True:
        os.listdir(place)
        time.sleep(0.005 + random.random() * 0.01)


def keep_busy(_place: Path) -> int:
    """Let nothing of lower priority have this core."""
    while True:
        pass


@contextlib.contextmanager
def slow_onlookers(place: Path) -> Iterator[None]:
    """Processes that list *place*, but take in what they are told only some time later."""
    core = min(os.sched_getaffinity(0))
    children: list[Child] = []

    def start(work: Callable[[Path], int], policy: int) -> None:
        def apart() -> int:
            os.sched_setaffinity(0, {core})
            os.sched_setscheduler(0, policy, os.sched_param(0))
            return work(place)

        children.append(spawn(apart))

    try:
        start(keep_busy, os.SCHED_OTHER)
        for _ in range(6):
            start(look, os.SCHED_BATCH)
        yield
    finally:
        for child in children:
            os.kill(child.pid, signal.SIGKILL)
            with contextlib.suppress(ChildDied):
                child.result()


def test_an_answer_that_is_late_does_not_outlive_a_change(shared_pair, tmp_path_factory):
    """Else the kernel keeps it, and whoever changed the directory sees it as it was before."""
    rng = random.Random(1)
    name = tmp_path_factory.mktemp("directory-attributes").name
    outer = shared_pair.mountpoint / name
    place, beneath = outer / "place", shared_pair.primary_store / name / "place"
    place.mkdir(parents=True)
    (place / "a").touch()
    with slow_onlookers(outer):
        for number in range(ROUNDS):
            for _ in range(rng.randrange(1, 6)):
                os.rename(place / "a", place / "b")
                os.rename(place / "b", place / "a")
            time.sleep(0.003)  # now somebody takes in what it was told meanwhile
            seen, true = os.stat(place), os.stat(beneath)
            assert seen.st_mtime_ns == true.st_mtime_ns, f"in round {number}"
            assert seen.st_ctime_ns == true.st_ctime_ns, f"in round {number}"
