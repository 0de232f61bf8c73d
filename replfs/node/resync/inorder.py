"""What was carried out of order, and counts in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT", bound=Hashable)


class InOrder(Generic[ItemT]):
    """Has items cleared in the order in which they were begun.

    What is dirty to the end of a file (a tail) can only be shortened from its beginning: a part
    that is cleared before those in front of it would stay dirty, and be sent again. Whatever is
    begun and never ends keeps all behind it from being cleared.
    """

    def __init__(self, clear: Callable[[ItemT, int], None]) -> None:
        """*clear* is told what to clear, and the version of the marks that it was taken at."""
        self._clear = clear
        self._begun: deque[ItemT] = deque()
        self._ended: dict[ItemT, tuple[ItemT, int] | None] = {}

    def begin(self, item: ItemT) -> None:
        """It is going to be carried."""
        self._begun.append(item)

    def end(self, item: ItemT, carried: ItemT, version: int) -> None:
        """Of it *carried* was, as of *version*."""
        self._ended[item] = carried, version
        self._clear_all()

    def drop(self, item: ItemT) -> None:
        """There was nothing left of it to be carried."""
        self._ended[item] = None
        self._clear_all()

    def _clear_all(self) -> None:
        while self._begun and self._begun[0] in self._ended:
            found = self._ended.pop(self._begun.popleft())
            if found is not None:
                self._clear(*found)
