"""Where conformance cases run, and the comparison of both stores after each of them.

With REPLFS_CONFORMANCE_DIR=/a/directory the same cases run there instead: on a plain ext4 they
judge the cases themselves.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from helpers.cases import Tree
from helpers.compare import wait_equal

PLAIN = os.environ.get("REPLFS_CONFORMANCE_DIR")
HOLE_UNIT = 4096
PASSED = pytest.StashKey[bool]()

_numbers = itertools.count()


def _descriptors() -> list[str]:
    return sorted(os.listdir("/proc/self/fd"))


@pytest.fixture
def cache():
    """How the kernel caches written data; parametrised where it matters."""
    return "write-through"


@pytest.fixture
def tree(request, cache):
    """A fresh directory of root's, mode 755; afterwards it must be equal in both stores."""
    name = f"{os.getpid()}-{next(_numbers):04d}"
    pair = None
    if PLAIN and cache == "write-back":
        pytest.skip("only on a replfs mount")
    if PLAIN:
        place = Tree(Path(PLAIN) / name)
    else:
        shared = "writeback_pairs" if cache == "write-back" else "shared_pairs"
        pair = request.getfixturevalue(shared).get()
        base = pair.mountpoint / "conformance"
        base.mkdir(exist_ok=True)
        inside = Path("conformance") / name
        place = Tree(base / name, pair.primary_store / inside, pair.secondary_store / inside)
    place.path.mkdir(mode=0o755)
    before = _descriptors()
    yield place
    os.chdir("/")
    if _descriptors() != before and request.node.stash.get(PASSED, False):
        raise AssertionError("the case leaves descriptors open")
    if pair is not None:
        pair.check_alive()
        wait_equal(*place.stores(), holes=HOLE_UNIT)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Tell the fixture whether the case passed: a failed one keeps frames, and so descriptors."""
    report = yield
    if report.when == "call":
        item.stash[PASSED] = report.passed
    return report


@pytest.fixture
def on_mount(tree):
    """Only on a replfs mount: what the case expects is particular to it."""
    if not tree.mounted:
        pytest.skip("only on a replfs mount")
    return tree
