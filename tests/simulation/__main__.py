"""Run seeds of the simulation: `python -m simulation SEED [SEED...]`, `python -m simulation A-B`.

Prints every failing seed with its trace (with `-w` also what went over the network), with `-v` every
one, and what was done at the end. `--base=DIR` says where the stores are made. In tests/.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path

from simulation.harness.world import run_seed


def main(arguments: list[str]) -> int:
    """The number of failing seeds, at most 1."""
    verbose, wire = "-v" in arguments, "-w" in arguments
    base = next((one[7:] for one in arguments if one.startswith("--base=")), None)
    seeds: list[int] = []
    for one in arguments:
        if one[0] != "-":
            first, _, last = one.partition("-")
            seeds += range(int(first), int(last or first) + 1)
    began = time.monotonic()
    failed = operations = steps = crashes = 0
    for seed in seeds:
        directory = Path(tempfile.mkdtemp(prefix="replfs-sim-", dir=base))
        try:
            result = run_seed(seed, directory, wire=wire)
        finally:
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
