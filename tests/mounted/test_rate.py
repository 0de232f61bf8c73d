"""`resync-rate`: what is carried or compared keeps to it, and applications do not wait for it."""

from __future__ import annotations

import os
import random
import subprocess
import time
from collections.abc import Callable

import pytest
from helpers.nodes import REPLFS, Pair, environment

pytestmark = [pytest.mark.mounted, pytest.mark.slow]

KIB = 1 << 10
MIB = 1 << 20
SIZE = 3 * MIB
RATE = 512 * KIB
REGION = 64 * KIB
PAUSE_S = MIB / RATE
"""For the rate's sake nothing is carried for so long after a transfer of the largest size."""
LEAST_S = (SIZE - MIB) / RATE - 0.5
"""The first transfer has nothing to pay for."""


def write_everywhere(pair: Pair, name: str, is_over: Callable[[], bool]) -> float:
    """Write to each region of a file, again and again until it is over; the longest write, in s."""
    longest = 0.0
    fd = os.open(pair.mountpoint / name, os.O_RDWR)
    try:
        while not is_over():
            for start in range(0, SIZE, REGION):
                began = time.monotonic()
                os.pwrite(fd, b"written", start)
                longest = max(longest, time.monotonic() - began)
                time.sleep(0.002)
    finally:
        os.close(fd)
    return longest


def test_a_write_to_what_is_being_carried_does_not_wait_for_the_rate():
    def prepare(pair: Pair) -> None:
        (pair.primary_store / "large").write_bytes(random.Random(1).randbytes(SIZE))

    arguments = ("--resync-rate", f"{RATE}")
    with Pair(prepare=prepare, start=False, mount_arguments=arguments) as pair:
        pair.agent.start()
        began = time.monotonic()
        pair.mount.start()
        longest = write_everywhere(pair, "large", lambda: pair.peer()["state"] == "in-sync")
        assert time.monotonic() - began > LEAST_S
        assert longest < PAUSE_S / 2
        pair.assert_equal()


def test_a_write_to_what_is_being_compared_does_not_wait_for_the_rate():
    with Pair(mount_arguments=("--resync-rate", f"{RATE}")) as pair:
        (pair.mountpoint / "large").write_bytes(random.Random(1).randbytes(SIZE))
        began = time.monotonic()
        command = (*REPLFS, "verify", str(pair.mountpoint), "--rundir", str(pair.rundir))
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment(), cwd="/"
        ) as verify:
            longest = write_everywhere(pair, "large", lambda: verify.poll() is not None)
            assert verify.stdout is not None
            said = verify.stdout.read()
        assert verify.returncode == 0, said
        assert "no differences" in said
        assert time.monotonic() - began > LEAST_S
        assert longest < PAUSE_S / 2
