"""Run seeds of the simulation, in tests/: `python -m simulation FIRST-LAST`."""

from __future__ import annotations

import argparse
import faulthandler
import logging
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from simulation.harness.mix import MIXES
from simulation.harness.run import memory, run_seed

_SEED_S = 120
"""Seconds that a seed may take before it counts as hanging."""


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m simulation",
        description="Run seeds of the simulation. A failing seed prints itself and its trace.",
    )
    parser.add_argument("seeds", nargs="*", metavar="SEED|FIRST-LAST", help="seeds to run")
    parser.add_argument("--seeds", type=int, metavar="N", dest="count", help="run N seeds")
    parser.add_argument("--from", type=int, default=1, metavar="S", dest="first", help="from S on")
    parser.add_argument("--mix", choices=MIXES, default="default", help="how often what happens")
    parser.add_argument("-v", action="store_true", help="print every trace")
    parser.add_argument("-w", action="store_true", help="and all that goes over the network")
    parser.add_argument("--base", type=Path, help="where the stores are made (default: /dev/shm)")
    return parser


def _numbers(texts: list[str], parser: argparse.ArgumentParser) -> list[int]:
    seeds: list[int] = []
    for one in texts:
        first, _, last = one.partition("-")
        if not (first.isdecimal() and (last or first).isdecimal()):
            parser.error(f"{one} is neither a seed nor FIRST-LAST")
        seeds += range(int(first), int(last or first) + 1)
    return seeds


def main(words: list[str]) -> int:
    """The number of failing seeds, at most 1."""
    parser = _arguments()
    arguments = parser.parse_args(words)
    seeds = _numbers(arguments.seeds, parser)
    if arguments.count is not None:
        seeds += range(arguments.first, arguments.first + arguments.count)
    if not seeds:
        parser.error("which seeds? FIRST-LAST, or --seeds N")
    base = arguments.base or memory()
    logging.disable()
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    began, used = time.monotonic(), time.process_time()
    failed = operations = steps = crashes = 0
    for seed in seeds:
        directory = Path(tempfile.mkdtemp(prefix="replfs-sim-", dir=base))
        signal.alarm(_SEED_S)
        try:
            result = run_seed(seed, directory, MIXES[arguments.mix], wire=arguments.w)
        finally:
            signal.alarm(0)
            shutil.rmtree(directory)
        operations += result.operations
        steps += result.steps
        crashes += result.crashes
        if result.error is not None:
            failed += 1
            print(result.report(), flush=True)
        elif arguments.v:
            print("\n".join(result.trace), flush=True)
    took, used = time.monotonic() - began, time.process_time() - used
    print(
        f"{len(seeds)} seeds, {failed} failed, {operations} operations, {crashes} crashes, "
        f"{steps} steps in {took:.1f} s, {used:.1f} s of a processor ({steps / used:.0f} steps/s)"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
