"""Faults under load for any length, in tests/: `python -m soak SCENARIO [OPTION ...]`."""

from __future__ import annotations

import argparse
import faulthandler
import signal

from soak import faults, growth, kills, latency, operators, verifications
from soak.story import Story


def main() -> int:
    """0 if all went well; a failure raises."""
    parser = argparse.ArgumentParser(prog="python -m soak", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--writers", type=int, default=3)
    parser.add_argument("--rest", type=float, default=0.0, metavar="SECONDS",
                        help="between two operations of a writer")  # fmt: skip
    scenarios = parser.add_subparsers(dest="scenario", required=True)
    for module in (kills, faults, operators, verifications, growth, latency):
        name = module.__name__.rpartition(".")[2]
        scenario = scenarios.add_parser(name, help=(module.__doc__ or "").splitlines()[0])
        scenario.add_argument("count", type=int)
    options = parser.parse_args()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    story = Story()
    if options.scenario == "latency":
        latency.run(options.count, options.seed, story)
    else:
        run = {
            "kills": kills.run,
            "faults": faults.run,
            "operators": operators.run,
            "verifications": verifications.run,
            "growth": growth.run,
        }
        run[options.scenario](
            options.count, options.seed, story, writers=options.writers, rest_s=options.rest
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
