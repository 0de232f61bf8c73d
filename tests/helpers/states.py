"""The state of a store, without a node."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from replfs.store.state import State


@contextlib.contextmanager
def opened(store: Path) -> Iterator[State]:
    """The state of a directory, closed at the end."""
    directory = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    try:
        made = State(directory)
        try:
            yield made
        finally:
            made.close()
    finally:
        os.close(directory)
