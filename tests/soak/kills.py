"""SIGKILL of mount, agent and both, at random moments under load, again and again.

After each: the store of what survived holds everything that was acknowledged in sync, before
anything was healed. Then everything is started again, and once healed both stores are equal.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter

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

VICTIMS = ("mount", "agent", "both")


def run(count: int, seed: int, story: Story, *, writers: int = 3, rest_s: float = 0.0) -> Report:
    """*count* kills; what the writers did.

    Raises:
        AssertionError: something acknowledged is lost, or the stores do not become equal.
    """
    rng = random.Random(seed)
    tally: Counter[str] = Counter()
    options = ("--peer-timeout", f"{TIMEOUT_S:g}s")
    with Pair(
        mount_arguments=options, prepare=lambda pair: fill(pair, files=200, size=9000)
    ) as pair:
        with (
            record_directory(pair.base) as records,
            Writers(
                pair.mountpoint, records, count=writers, seed=seed, rest_s=rest_s
            ) as all_writers,
        ):
            for number in range(1, count + 1):
                all_writers.wait_more(10)
                # At a random moment: this is the fault, not a wait for anything.
                time.sleep(rng.uniform(0, 0.3))
                victim = rng.choice(VICTIMS)
                state = "in sync" if is_in_sync(pair) else "in the middle of a resync"
                tally[f"{victim}, {state}"] += 1
                _kill(victim, pair, all_writers, rng)
                if rng.random() < 0.7 or number == count:
                    took = wait_in_sync(pair, all_writers)
                    check_equal(pair, all_writers)
                    story.say(f"{number}: {victim} killed {state}; healed in {took:.1f} s")
                else:
                    story.say(f"{number}: {victim} killed {state}; not waited for")
            report = all_writers.stop()
            pair.wait_in_sync()
            pair.assert_equal()
            all_writers.check(pair.primary_store)
            all_writers.check(pair.secondary_store)
    story.say(f"kills: {dict(sorted(tally.items()))}")
    story.say(f"writers: {report}")
    return report


def _kill(victim: str, pair: Pair, writers: Writers, rng: random.Random) -> None:
    """The kill, the check of what is left, and the start."""
    if victim == "agent":
        in_sync, before = is_in_sync(pair), time.monotonic_ns()
        pair.agent.kill9()
        after = time.monotonic_ns()
        if in_sync:
            writers.check(pair.secondary_store, acknowledged_ns=before, begun_ns=after)
        with writers.held():
            writers.check(pair.primary_store)
        pair.agent.start(wait=False)
        return
    with writers.mount_down():
        in_sync, before = is_in_sync(pair), time.monotonic_ns()
        if victim == "both" and rng.random() < 0.5:
            pair.agent.signal(signal.SIGKILL)
        mount_before = time.monotonic_ns()
        pair.mount.kill9()
        if victim == "both":
            pair.agent.kill9()
        after = time.monotonic_ns()
        if in_sync:
            writers.check(pair.secondary_store, acknowledged_ns=before, begun_ns=after)
        writers.check(pair.primary_store, acknowledged_ns=mount_before, begun_ns=after)
        if victim == "both":
            pair.agent.start(wait=False)
        pair.mount.start()
