"""What happens in a run, and how often: named sets of probabilities.

Each of the others than `default` has more of one kind of trouble, and leaves out policies, with
which less can be said of what a store must hold. One seed is another run in each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True)
class Mix:
    """One of them. The order of `faults`, and of all choices, is part of what a seed means."""

    name: str
    faults: Mapping[str, int] = field(repr=False)
    """How often each kind of fault is drawn, beside the others; those of `Faults`."""
    replicas: tuple[int, ...] = (1, 1, 1, 2, 3)
    rounds: tuple[int, ...] = (0, 2, 5, 10)
    """Faults of a run."""
    outages: float = 0.4
    """The share of the decisions of split brains in which power fails."""
    has_policies: bool = True
    """In half of the runs applications set policies."""


_FAULTS = MappingProxyType({
    "cut": 2, "crash": 2, "replica": 1, "errors": 1, "pause": 1, "still": 2, "compare": 1,
    "restart": 1, "wipe": 1, "power": 2, "in-sync": 1, "promote": 2, "switchover": 2,
    "split brain": 2,
})  # fmt: skip


def _more(name: str, **faults: int) -> Mix:
    """All faults, these so often, and in every run."""
    mixed = {kind.replace("_", " "): weight for kind, weight in faults.items()}
    return Mix(
        name,
        {**dict.fromkeys(_FAULTS, 1), **mixed},
        replicas=(1, 2, 2, 3),
        rounds=(4, 8, 12),
        outages=0.8,
        has_policies=False,
    )


DEFAULT = Mix("default", _FAULTS)
MIXES = {
    one.name: one
    for one in (
        DEFAULT,
        _more("splits", split_brain=20, power=4),
        _more("power", power=20, crash=4, promote=4),
        _more("promotions", promote=20, switchover=10, replica=4, cut=4),
        _more("firstcopies", first_copy=20, promote=4, power=4),
    )
}
