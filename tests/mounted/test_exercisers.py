"""Random operations on a mount, from fixed seeds; afterwards both stores are equal.

REPLFS_EXERCISE=20 does twenty times as many, with seeds of its own.
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from pathlib import Path

import pytest
from helpers.children import together
from helpers.compare import wait_equal
from helpers.exercisers import FileExerciser, stress

FACTOR = int(os.environ.get("REPLFS_EXERCISE", "1"))
PLAIN = os.environ.get("REPLFS_CONFORMANCE_DIR")
HOLE_UNIT = 4096
SHIFT = 1000 * (FACTOR - 1)

_numbers = itertools.count()


@pytest.fixture
def ack():
    """The acknowledgement level; parametrised where another one is of interest."""
    return "op"


@pytest.fixture
def place(request, ack):
    """A fresh directory on the mount; afterwards equal in both stores, holes included."""
    name = f"exercise-{os.getpid()}-{next(_numbers)}"
    if PLAIN:
        path = Path(PLAIN) / name
        path.mkdir()
        yield path
        return
    pair = request.getfixturevalue("shared_pair")
    path = pair.mountpoint / name
    path.mkdir()
    os.setxattr(path, "user.replfs.ack", ack.encode())
    yield path
    pair.check_alive()
    wait_equal(
        pair.primary_store / name, pair.secondary_store / name, timeout_s=30, holes=HOLE_UNIT
    )


@pytest.mark.parametrize(("seed", "ack"), [(1, "op"), (2, "op"), (3, "op"), (4, "close")])
def test_one_file(place, seed):
    FileExerciser(place / "file", seed + SHIFT).run(1000 * FACTOR)


def test_several_files_at_once(place):
    exercisers = [FileExerciser(place / str(number), 10 + number + SHIFT) for number in range(3)]
    together(*[lambda exerciser=exerciser: exerciser.run(300 * FACTOR) for exerciser in exercisers])
    for exerciser in exercisers:
        for fd in exerciser.fds:
            os.close(fd)


@pytest.mark.parametrize("seed", [1, 2])
def test_one_process_in_a_tree(place, seed):
    done = stress(place, seed + SHIFT, processes=1, operations=1000 * FACTOR)
    check_real_work(done)


@pytest.mark.parametrize(("seed", "ack"), [(3, "op"), (4, "op"), (5, "close")])
def test_several_processes_in_a_tree(place, seed):
    done = stress(place, seed + SHIFT, processes=4, operations=400 * FACTOR)
    # How they meet is chance, and with it whether, say, any rmdir finds a directory empty.
    check_real_work(done, each=False)


def test_a_wrong_byte_does_not_go_unseen(tmp_path):
    class Corrupting(FileExerciser):
        def flush(self):
            super().flush()
            if self.model:
                os.pwrite(self.fds[0], bytes([self.model[-1] ^ 1]), len(self.model) - 1)

    with pytest.raises(AssertionError, match=r"seed 1: .*differ at(.|\n)*flush"):
        Corrupting(tmp_path / "file", 1).run(300)


def check_real_work(done, *, each=True):
    """Most operations must have succeeded, and with *each* some of every kind tried often."""
    tried: Counter[str] = Counter()
    succeeded: Counter[str] = Counter()
    for name, count in done.items():
        operation, result = name.split()
        tried[operation] += count
        succeeded[operation] += count if result == "ok" else 0
    assert succeeded.total() > tried.total() * 0.5, done
    for operation, count in tried.items() if each else ():
        assert succeeded[operation] or count < 20, done
