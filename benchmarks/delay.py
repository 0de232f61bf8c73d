"""A longer way between the nodes: what is sent arrives later, in both directions.

The kernel does it (netem) where it can; otherwise `delay_proxy.py`, whose own cost is then part of
what is measured.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from benchmarks.errors import BenchmarkError
from benchmarks.processes import Namespace, end, wait_for_log

_BY_PROXY: Final = 1000
"""Added to a port to get the one at which its proxy listens."""
_PROXY: Final = Path(__file__).with_name("delay_proxy.py")
_START_S: Final = 10.0


@contextlib.contextmanager
def delayed(
    namespace: Namespace, ports: list[int], round_trip_ms: float, base: Path
) -> Iterator[list[int]]:
    """Gives the ports to dial instead of *ports*."""
    if round_trip_ms == 0:
        yield ports
        return
    each_way = round_trip_ms / 2
    with contextlib.ExitStack() as stack:
        try:
            namespace.run(
                "tc", "qdisc", "add", "dev", "lo", "root", "netem", "delay", f"{each_way}ms"
            )
            stack.callback(namespace.run, "tc", "qdisc", "delete", "dev", "lo", "root")
            through = ports
        except BenchmarkError:  # this kernel has no netem
            log = base / "delay.log"
            through = [port + _BY_PROXY for port in ports]
            pairs = [f"{new}:{old}" for new, old in zip(through, ports, strict=True)]
            child = namespace.start(sys.executable, _PROXY, str(each_way), *pairs, log=log)
            stack.callback(end, child)
            wait_for_log(child, log, "listening", _START_S)
        yield through
