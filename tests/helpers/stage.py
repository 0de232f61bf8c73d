"""What a test starts, and what is cleaned up whatever happens in between.

class Thing(Stage):
    def start_up(self): ...
    def clean_up(self): ...

with Thing() as thing:
    ...
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self


class Stage(ABC):
    """A context manager that cleans up also where it was only half started."""

    @abstractmethod
    def start_up(self) -> None:
        """Start all of it."""

    @abstractmethod
    def clean_up(self) -> None:
        """End and remove whatever is there; nothing of it may be left afterwards."""

    def notes(self) -> str:
        """What helps to understand a failure."""
        return ""

    def __enter__(self) -> Self:
        try:
            self.start_up()
        except BaseException:
            self.clean_up()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and (notes := self.notes()):
            error.add_note(notes)
        self.clean_up()
