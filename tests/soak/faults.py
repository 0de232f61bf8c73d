"""Cut cables, one way and both, killed agents and mounts, from the first copy on.

Writers never stop. Each time the pair becomes in sync by itself; at the end both stores are equal.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from helpers.distant import DistantPair
from helpers.hosts import Hosts
from helpers.nodes import Pair
from helpers.writer import Report, Writers

from soak.story import (
    TIMEOUT_S,
    Story,
    check_equal,
    fill,
    is_in_sync,
    record_directory,
    wait_in_sync,
)

CUTS = {"cut both ways": (0, 1), "cut to the mount": (0,), "cut to the agent": (1,)}


def run(
    count: int,
    seed: int,
    story: Story,
    *,
    writers: int = 3,
    files: int = 1500,
    size: int = 60_000,
    rest_s: float = 0.0,
) -> Report:
    """A baseline of a store that is not empty, then *count* faults; what the writers did.

    Raises:
        AssertionError: the pair does not heal, something is lost, or the stores differ.
    """
    rng = random.Random(seed)
    with (
        Hosts() as hosts,
        DistantPair(
            hosts, f"{TIMEOUT_S:g}s", prepare=lambda pair: fill(pair, files=files, size=size)
        ) as pair,
        record_directory(pair.base) as records,
    ):
        pair.mount.start()
        with Writers(
            pair.mountpoint, records, count=writers, seed=seed, rest_s=rest_s
        ) as all_writers:
            all_writers.wait_more()
            pair.agent.start()
            # In the middle of the first copy, or shortly after it.
            time.sleep(rng.uniform(0, 2))
            state = "in sync" if is_in_sync(pair) else "in the middle of the baseline"
            pair.agent.kill9()
            all_writers.wait_more()
            pair.agent.start()
            took = wait_in_sync(pair, all_writers)
            check_equal(pair, all_writers)
            story.say(f"baseline: agent killed {state}; in sync {took:.1f} s after its start")
            last = -1
            for number in range(1, count + 1):
                kinds = [*CUTS, "agent killed", "mount killed", "agent killed and cut"]
                kind = kinds[(last := (last + rng.randrange(1, len(kinds))) % len(kinds))]
                all_writers.wait_more(10)
                # At a random moment, and for a random time: this is the fault, not a wait.
                time.sleep(rng.uniform(0, 0.5))
                length = rng.choice([0.2, 1.5, 4]) * rng.uniform(0.5, 1.5)
                state = "in sync" if is_in_sync(pair) else "in the middle of a resync"
                _fault(kind, pair, hosts, all_writers, length)
                if rng.random() < 0.8 or number == count:
                    took = wait_in_sync(pair, all_writers)
                    if rng.random() < 0.5:
                        check_equal(pair, all_writers)
                    story.say(
                        f"{number}: {kind} for {length:.1f} s {state}; healed in {took:.1f} s"
                    )
                else:
                    story.say(f"{number}: {kind} for {length:.1f} s {state}; not waited for")
            check_equal(pair, all_writers)
            report = all_writers.stop()
            pair.wait_in_sync()
            pair.assert_equal()
            all_writers.check(pair.primary_store)
            all_writers.check(pair.secondary_store)
    story.say(f"writers: {report}")
    return report


def _fault(kind: str, pair: Pair, hosts: Hosts, writers: Writers, length_s: float) -> None:
    """One fault of *length_s* seconds, and its end."""
    if kind == "mount killed":
        with writers.mount_down():
            in_sync, before = is_in_sync(pair), time.monotonic_ns()
            pair.mount.kill9()
            after = time.monotonic_ns()
            if in_sync:
                writers.check(pair.secondary_store, acknowledged_ns=before, begun_ns=after)
            writers.check(pair.primary_store, acknowledged_ns=before, begun_ns=after)
            pair.mount.start()
        return
    heal: list[Callable[[], object]] = []
    if kind in CUTS or kind.endswith("cut"):
        for host in CUTS.get(kind, (0, 1)):
            hosts.drop(host)
        heal.append(hosts.heal)
    if kind.startswith("agent killed"):
        pair.agent.kill9()
        heal.append(lambda: pair.agent.start(wait=False))
    time.sleep(length_s)
    for one in heal:
        one()
