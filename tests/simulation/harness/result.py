"""What a run of the simulation came to."""

from __future__ import annotations

import traceback

_TRACE_SHOWN = 3000


class Failure(AssertionError):
    """Something that must hold does not."""


class Result:
    """What a run came to."""

    def __init__(self, seed: int, mix: str) -> None:
        self.seed = seed
        self.mix = mix
        self.operations = 0
        self.steps = 0
        self.delivered = 0
        self.crashes = 0
        self.simulated_s = 0.0
        self.trace: list[str] = []
        self.error: BaseException | None = None

    def report(self) -> str:
        """The failing run, for a person."""
        which = f"{self.seed}" if self.mix == "default" else f"{self.seed} --mix {self.mix}"
        lines = [f"seed {which} failed; the last operations:"]
        lines += self.trace[-_TRACE_SHOWN:]
        if self.error is not None:
            lines += [text.rstrip() for text in traceback.format_exception(self.error)]
        lines.append(f"again: python -m simulation {which}   (in tests/)")
        return "\n".join(lines)
