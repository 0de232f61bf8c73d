"""What happened, for those who watch: a bounded list that a client reads from where it was."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import trio

_KEPT: Final = 1000
_WAIT_S: Final = 8.0
"""How long an answer is held back while nothing happens."""


class Events:
    """State changes, numbered."""

    def __init__(self) -> None:
        self.listener: Callable[[dict[str, Any]], None] | None = None
        """Called with each; it returns at once."""
        self._events: deque[dict[str, Any]] = deque(maxlen=_KEPT)
        self._number = 0
        self._news = trio.Event()

    def add(self, kind: str, **fields: Any) -> None:
        """Something happened."""
        self._number += 1
        event = {"number": self._number, "time": time.time(), "event": kind, **fields}
        self._events.append(event)
        if self.listener is not None:
            self.listener(event)
        self._news.set()
        self._news = trio.Event()

    async def answer(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Events after number `after`; waits a while for one if there is none."""
        after = int(arguments.get("after", 0))
        if after >= self._number:
            with trio.move_on_after(_WAIT_S):
                await self._news.wait()
        return {"events": [event for event in self._events if event["number"] > after]}
