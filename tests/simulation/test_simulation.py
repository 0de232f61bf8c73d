"""The simulation, over as many seeds as there is time for.

A failing seed prints itself and what happened; `python -m simulation SEED -w`, in tests/, runs it
again, and `python -m simulation --seeds N --from S` any number.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

import pytest
from simulation.harness.run import memory, run_seed

SECONDS = 60.0
SEEDS = 400
SLICES = 8

FOUND = {
    39: "a generation that its primary forgot when it lost power, and a peer remembered",
    51: "the same, of a primary that looked outdated to its peer",
    174: "",
    238: "a replica that lost power in its baseline, and what had been carried by then",
    849: "",
    925: "",
    943: "",
    1029: "",
    1072: "",
    1082: "",
    2060: "",
    2641: "",
    3269: "",
    3489: "",
    4174: "",
    4221: "",
    5266: "a state that could not be saved while a peer connected, and ended the node",
}
"""Seeds that failed once, and what they found (empty: before that was written down).

A seed is the same run only while the harness draws the same numbers: what could be tested by
itself has a test of its own.
"""


@pytest.fixture
def base():
    with tempfile.TemporaryDirectory(prefix="replfs-sim-", dir=memory()) as directory:
        yield Path(directory)


def run(seed, base):
    directory = base / str(seed)
    directory.mkdir()
    result = run_seed(seed, directory)
    shutil.rmtree(directory)
    if result.error is not None:
        pytest.fail(result.report(), pytrace=False)
    return result


@pytest.mark.parametrize("seed", FOUND)
def test_a_seed_that_failed_once(seed, base):
    run(seed, base)


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("part", range(SLICES))
def test_seeds(part, base):
    began = time.monotonic()
    for seed in range(1 + part, 1 + SEEDS, SLICES):
        run(seed, base)
        if time.monotonic() - began > SECONDS / SLICES:
            break


def test_a_seed_gives_one_run(base):
    """Twice the same operations, at the same times, with the same results."""
    traces = []
    for number in range(2):
        (base / str(number)).mkdir()
        result = run(3, base / str(number))
        # Inode numbers are the file system's.
        traces.append([line for line in result.trace if "inode" not in line])
    assert traces[0] == traces[1]
