"""Running one seed."""

from __future__ import annotations

import contextlib
import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from simulation.harness.life import simulated
from simulation.harness.mix import DEFAULT, Mix
from simulation.harness.nodes import replace_surroundings
from simulation.harness.result import Failure, Result
from simulation.harness.world import Simulation

from replfs.core import ops
from replfs.node.pacing import courtesy as courtesy_module
from replfs.node.replica import writeback as writeback_module
from replfs.node.resync import batch as batch_module
from replfs.node.resync import contents as contents_module
from replfs.node.resync import expand as expand_module
from replfs.node.resync import fill as fill_module
from replfs.node.resync import names as names_module
from replfs.store import activity as activity_module
from replfs.store import look as look_module
from replfs.store import reach as reach_module


def _tighten(rng: random.Random, patch: pytest.MonkeyPatch) -> None:
    """In some runs limits are so low that a few files are many."""
    if rng.random() < 0.5:
        # Still more than are ever used here: making them takes time.
        patch.setattr(activity_module, "SLOTS", 256)
        return
    patch.setattr(activity_module, "SLOTS", 64)
    names = rng.choice((1, 3, 1000))
    patch.setattr(ops, "NAMES_PER_MESSAGE", names)
    patch.setattr(names_module, "_HINTS_MAX", min(names, 16))
    for module, name, values in (
        (expand_module, "_NAMES_AHEAD", (1, 3)),
        (expand_module, "_MARKS_TOGETHER", (1, 3)),
        (look_module, "PRIVILEGED", (False, True)),
        (batch_module, "PRIVILEGED", (False, True)),
        (batch_module, "_MANY", (1, 3)),
        (contents_module, "_REGIONS_AT_ONCE", (1, 3)),
        (courtesy_module, "TASKS", (1, 2)),
        (writeback_module, "_EVERY", (1, 5000)),
        (reach_module, "_DIRECTORIES_OPEN_MAX", (4, 6)),
        (reach_module, "_FILES_OPEN_MAX", (1, 2)),
        (fill_module, "PRIVILEGED", (False, True)),
        (fill_module, "_MANY", (1, 3)),
        (fill_module, "_AT_ONCE", (1, 3)),
        (writeback_module, "_SMALL_FILES", (1, 3)),
    ):
        if rng.random() < 0.5:
            patch.setattr(module, name, rng.choice(values))


@contextlib.contextmanager
def _no_collector() -> Iterator[None]:
    """Garbage of a run is collected after it: it is small, and nothing depends on when."""
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()
        gc.unfreeze()


def memory() -> Path | None:
    """Where stores are fast; None: wherever temporary files are."""
    shared = Path("/dev/shm")
    return shared if shared.is_dir() and os.access(shared, os.W_OK) else None


def run_seed(
    seed: int,
    base: Path,
    mix: Mix = DEFAULT,
    *,
    wire: bool = False,
    kind: type[Simulation] = Simulation,
) -> Result:
    """Run *seed* in the empty directory *base*; *wire*: note what goes over the network too.

    *mix*: how often what happens. *kind*: another run than one of random faults.
    """
    result = Result(seed, mix.name)
    descriptors = set(os.listdir("/proc/self/fd"))
    with _no_collector(), simulated(seed) as world, pytest.MonkeyPatch.context() as patch:
        replace_surroundings(patch)
        _tighten(random.Random(f"{seed} limits"), patch)
        simulation = kind(seed, base, world, result, mix)
        simulation.wire = wire
        try:
            trio.run(simulation.main, clock=world.clock)
        except BaseException as error:  # noqa: BLE001 - reported by the caller
            result.error = error
    if result.error is None:
        left = {}
        for number in set(os.listdir("/proc/self/fd")) - descriptors:
            with contextlib.suppress(FileNotFoundError):  # it is what lists them
                left[number] = os.readlink(f"/proc/self/fd/{number}")
        if left and not result.crashes:
            result.error = Failure(f"descriptors are left open: {left}")
        for number in left:  # what a dead process had open is closed for it
            with contextlib.suppress(OSError):
                os.close(int(number))
    return result
