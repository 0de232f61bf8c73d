"""Nothing grows without end: memory, descriptors and known objects over many operations.

A scaled-down day of work: files are made, written, renamed and removed by the thousand, on a mount
with a peer. Growth is measured after a first round, which fills caches of a fixed size.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from helpers.nodes import Node, Pair, wait_for

pytestmark = [pytest.mark.mounted, pytest.mark.slow, pytest.mark.timeout(400)]

ROUND = 800
ROUNDS = 2
GROWTH_MAX = 4 << 20
"""Bytes of resident memory for all rounds after the first, of each node."""
INODE_MAX = 400
"""Bytes of resident memory for one known object; docs/operations/metrics.md says what it was."""


def process(node: Node) -> dict[str, Any]:
    found: dict[str, Any] = node.status()["process"]
    return found


def churn(directory: Path, number: int) -> None:
    """Make, write, rename, remove: four operations and more for each file."""
    for index in range(number):
        name = directory / f"f{index % 50}"
        with name.open("wb") as file:
            file.write(b"x" * (index % 5000))
        name.rename(directory / "renamed")
        os.unlink(directory / "renamed")


def test_memory_and_descriptors_stay_flat():
    with Pair() as pair:
        nodes = (pair.mount, pair.agent)
        directory = pair.mountpoint / "d"
        directory.mkdir()
        churn(directory, ROUND)
        before = [process(node) for node in nodes]
        for _ in range(ROUNDS):
            churn(directory, ROUND)
        after = [process(node) for node in nodes]
        for then, now in zip(before, after, strict=True):
            assert now["memory_bytes"] - then["memory_bytes"] < GROWTH_MAX, (before, after)
            assert now["descriptors"] <= then["descriptors"] + 10, (before, after)
            assert now["objects"] <= then["objects"] + 100, (before, after)
        pair.wait_in_sync()
        pair.assert_equal()


def test_the_memory_of_a_known_object():
    """What the kernel knows the node must know: a walk over a tree, then the kernel forgets it."""
    number = 10_000

    def prepare(pair: Pair) -> None:
        for index in range(number):
            directory = pair.primary_store / f"directory-{index // 200}"
            if index % 200 == 0:
                directory.mkdir()
            (directory / f"file-with-a-name-{index}").touch()

    with Pair(prepare=prepare) as pair:
        pair.mount.restart()
        pair.wait_in_sync()
        wait_for(lambda: pair.mount.status()["rescan"] is None, 60, "the rescan to end")
        before = process(pair.mount)
        subprocess.run(["find", pair.mountpoint, "-size", "+1"], check=True, capture_output=True)
        after = process(pair.mount)
        known = after["objects"] - before["objects"]
        assert known > number * 0.9, (before, after)
        each = (after["memory_bytes"] - before["memory_bytes"]) / known
        print(f"{each:.0f} bytes for each of {known} known objects")
        assert each < INODE_MAX
        # The kernel gives them back when it is asked to; so does the node.
        Path("/proc/sys/vm/drop_caches").write_text("2\n")
        wait_for(
            lambda: process(pair.mount)["objects"] < before["objects"] + number * 0.1,
            30,
            "the objects to be forgotten",
        )
