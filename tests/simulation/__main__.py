"""Run seeds of the simulation, in tests/: `python -m simulation SEED [FIRST-LAST ...]`.

Prints every failing seed with its trace (`-w`: and what went over the network), with `-v` every
seed's, and at the end what was done. `--base=DIR` says where the stores are made.
"""

from __future__ import annotations

import faulthandler
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from simulation.harness.run import run_seed

_SEED_S = 120
"""Seconds that a seed may take before it counts as hanging."""


def main(arguments: list[str]) -> int:
    """The number of failing seeds, at most 1."""
    verbose, wire = "-v" in arguments, "-w" in arguments
    base = next((one[7:] for one in arguments if one.startswith("--base=")), None)
    seeds: list[int] = []
    for one in arguments:
        if one[0] != "-":
            first, _, last = one.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    faulthandler.register(signal.SIGUSR1)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    began = time.monotonic()
    failed = operations = steps = crashes = 0
    for seed in seeds:
        directory = Path(tempfile.mkdtemp(prefix="replfs-sim-", dir=base))
        signal.alarm(_SEED_S)
        try:
            result = run_seed(seed, directory, wire=wire)
        finally:
            signal.alarm(0)
            shutil.rmtree(directory)
        operations += result.operations
        steps += result.steps
        crashes += result.crashes
        if result.error is not None:
            failed += 1
            print(result.report(), flush=True)
        elif verbose:
            print("\n".join(result.trace), flush=True)
    took = time.monotonic() - began
    print(
        f"{len(seeds)} seeds, {failed} failed, {operations} operations, {crashes} crashes, "
        f"{steps} steps in {took:.1f} s ({operations / took:.0f} operations/s, "
        f"{steps / took:.0f} steps/s)"
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
