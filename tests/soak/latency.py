"""What a resync and a verification cost an application: 4 KiB writes, in pairs of in sync and not.

One writer, which waits for each write; its file is in sync all the time.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from helpers.nodes import REPLFS, Pair, environment

from soak.story import Story, is_in_sync

SIZE: Final = 4096
FILE: Final = 4 << 20
_ASK_EVERY: Final = 100

Times = list[int]
"""How long each write took, nanoseconds."""


def run(
    rounds: int, seed: int, story: Story, *, megabytes: int = 256, seconds: float = 5.0
) -> None:
    """*rounds* times: in sync, during a resync of so many megabytes, during a verification of them.

    Prints p50, p99 and the longest of each, and the medians of the ratios.
    """
    rng = random.Random(seed)
    with Pair() as pair:
        file = pair.mountpoint / "measured"
        file.write_bytes(bytes(FILE))
        _change_tree(pair.mountpoint, megabytes, rng)
        pair.wait_in_sync()
        ratios: dict[str, list[float]] = {"resync": [], "verify": []}
        fd = os.open(file, os.O_WRONLY)
        try:
            for number in range(1, rounds + 1):
                before = measure(fd, rng, seconds)
                story.say(f"{number}: in sync: {shown(before)}")
                pair.mount.replfs("pause", pair.mount.target)
                _change_tree(pair.mountpoint, megabytes, rng)
                pair.mount.replfs("resume", pair.mount.target)
                # Before that, writes are recorded only, and wait for nobody.
                pair.wait_state("incremental", "in-sync")
                during = measure(fd, rng, 120, lambda: not is_in_sync(pair))
                story.say(f"{number}: resync:  {shown(during)}")
                pair.wait_in_sync()
                command = [*REPLFS, "verify", str(pair.mountpoint), "--rundir", str(pair.rundir)]
                with subprocess.Popen(
                    command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                    env=environment(), cwd="/",
                ) as verify:  # fmt: skip
                    meanwhile = measure(fd, rng, 120, lambda: verify.poll() is None)  # noqa: B023
                assert verify.returncode == 0, "verify finds differences"
                story.say(f"{number}: verify:  {shown(meanwhile)}")
                after = measure(fd, rng, seconds)
                story.say(f"{number}: in sync: {shown(after)}")
                in_sync = (quantile(before, 0.99) + quantile(after, 0.99)) / 2
                ratios["resync"].append(quantile(during, 0.99) / in_sync)
                ratios["verify"].append(quantile(meanwhile, 0.99) / in_sync)
        finally:
            os.close(fd)
        pair.assert_equal()
    for what, found in ratios.items():
        story.say(
            f"p99 during {what}: {statistics.median(found):.2f} times that in sync "
            f"({min(found):.2f} to {max(found):.2f})"
        )


def _change_tree(top: Path, megabytes: int, rng: random.Random) -> None:
    """Give every file other contents: half of them in one file, the rest in files of all sizes."""
    tree = top / "tree"
    tree.mkdir(exist_ok=True)
    with (tree / "large").open("wb") as large:
        for _ in range(megabytes // 2):
            large.write(rng.randbytes(1 << 20))
    left, number = megabytes << 19, 0
    while left > 0:
        size = rng.choice([100, 4000, 4000, 30_000, 300_000, 2_000_000])
        directory = tree / str(number % 50)
        directory.mkdir(exist_ok=True)
        (directory / str(number)).write_bytes(rng.randbytes(size))
        left -= size
        number += 1


def measure(
    fd: int, rng: random.Random, seconds: float, goes_on: Callable[[], bool] = lambda: True
) -> Times:
    """Write to a file of `FILE` bytes as long as *goes_on*, at most so many seconds."""
    times: Times = []
    data = rng.randbytes(SIZE)
    until = time.monotonic() + seconds
    clock = time.perf_counter_ns
    while time.monotonic() < until and goes_on():
        for _ in range(_ASK_EVERY):
            offset = rng.randrange(FILE // SIZE) * SIZE
            began = clock()
            os.pwrite(fd, data, offset)
            times.append(clock() - began)
    return times


def quantile(times: Times, share: float) -> int:
    """What that share of all is at most, nanoseconds."""
    ordered = sorted(times)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def shown(times: Times) -> str:
    """One line, in microseconds."""
    return (
        f"{len(times)} writes, p50 {quantile(times, 0.5) / 1e3:.0f} us, "
        f"p90 {quantile(times, 0.9) / 1e3:.0f} us, p99 {quantile(times, 0.99) / 1e3:.0f} us, "
        f"longest {max(times) / 1e6:.1f} ms"
    )
