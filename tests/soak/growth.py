"""Nothing grows without end: memory, descriptors and known objects, minute after minute of load.

The writers never stop, and at times the peer is paused for a moment, so that a resync follows.
The first third of the time fills what has a fixed size; what counts is the slope over the rest.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Final

from helpers.nodes import Node, Pair
from helpers.writer import Report, Writers

from soak.story import Story, check_equal, fill, record_directory

SAMPLE_S: Final = 5.0
PAUSE_EVERY: Final = 6
"""Samples between two pauses of the peer."""
TELL_EVERY: Final = 24
"""Samples between two lines of what is used now."""
GROWTH_MAX: Final = 8 << 20
"""Bytes of resident memory of a node from the first third to the end, besides what its known
objects take."""
OBJECT: Final = 400
"""Bytes that a known object takes, at most."""
DESCRIPTORS_MORE: Final = 100

Sample = dict[str, Any]


def run(
    minutes: float, seed: int, story: Story, *, writers: int = 3, rest_s: float = 0.0
) -> Report:
    """So many *minutes* of load; what the writers did.

    Raises:
        AssertionError: something grew, or the stores are not equal in the end.
    """
    with Pair(prepare=lambda pair: fill(pair, files=500, size=9000)) as pair:
        nodes = {"mount": pair.mount, "agent": pair.agent}
        samples: dict[str, list[Sample]] = {name: [] for name in nodes}
        with (
            record_directory(pair.base) as records,
            Writers(
                pair.mountpoint, records, count=writers, seed=seed, rest_s=rest_s
            ) as all_writers,
        ):
            pair.wait_in_sync()
            began = time.monotonic()
            number = 0
            while time.monotonic() < began + minutes * 60:
                number += 1
                time.sleep(SAMPLE_S)  # load is what is waited for
                if number % PAUSE_EVERY == 0:
                    pair.mount.replfs("pause", pair.mount.target)
                    all_writers.wait_more(20)
                    pair.mount.replfs("resume", pair.mount.target)
                for name, node in nodes.items():
                    samples[name].append(_sample(node, began))
                if number % TELL_EVERY == 0:
                    now = {name: found[-1]["memory_bytes"] / 1e6 for name, found in samples.items()}
                    story.say(", ".join(f"{name} {used:.1f} MB" for name, used in now.items()))
            check_equal(pair, all_writers)
            report = all_writers.stop()
    story.say(f"writers: {report}")
    for name, found in samples.items():
        story.say(f"{name}: {shown(found)}")
    for found in samples.values():
        check(found)
    return report


def _sample(node: Node, began: float) -> Sample:
    found: Sample = node.status()["process"]
    return found | {"time": time.monotonic() - began}


def slope(samples: list[Sample], key: str) -> float:
    """By how much it grows in an hour, over the last two thirds of the time."""
    part = samples[len(samples) // 3 :]
    line = statistics.linear_regression([s["time"] for s in part], [s[key] for s in part])
    return line.slope * 3600


def shown(samples: list[Sample]) -> str:
    """What it was after a third, what it is, and the slope."""
    then, now = samples[len(samples) // 3], samples[-1]
    memory = f"{then['memory_bytes'] / 1e6:.1f} to {now['memory_bytes'] / 1e6:.1f} MB"
    return (
        f"{memory} ({slope(samples, 'memory_bytes') / 1e6:+.1f} MB in an hour), "
        f"{then['descriptors']} to {now['descriptors']} descriptors "
        f"({slope(samples, 'descriptors'):+.0f}), "
        f"{then['objects']} to {now['objects']} objects ({slope(samples, 'objects'):+.0f})"
    )


def check(samples: list[Sample]) -> None:
    """Refuse what grows."""
    then, now = samples[len(samples) // 3], samples[-1]
    objects = max(now["objects"] - then["objects"], 0)
    assert now["memory_bytes"] - then["memory_bytes"] < GROWTH_MAX + objects * OBJECT, samples
    assert now["descriptors"] < then["descriptors"] + DESCRIPTORS_MORE, samples
