"""What a benchmark command can fail with."""

from __future__ import annotations


class BenchmarkError(Exception):
    """The run cannot go on: one sentence, what is wrong and what to do."""
