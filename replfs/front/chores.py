"""Work that nobody waits for is done while nobody waits for anything else.

The kernel tells what it has forgotten and closed, and whoever caused it has gone on long since:
often with the next request, which would come in behind the work. So it is put off until there is
nothing better to do: while a peer's answer is awaited, or when no request has come for a while.

It never piles up: beyond `WAITING_MAX` one is done for each that comes; every so many requests,
and before the session sleeps, all are; and where descriptors or space have run out, for which the
work may be the remedy, it is not put off for a while.

What is put off must not care what happens before it: a count that is taken down, a handle that
nobody can use any more.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

WAITING_MAX: Final = 8
"""So many are put off at most: what is done all at once, between two requests, takes no longer than
one of them. Each may hold a descriptor, and the space of a removed file."""
PROMPT: Final = 1000
"""How many are done at once after something has run out."""
_SCARCE: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE})


class Chores:
    """What is put off; first in, first out. In the event loop's thread only.

    Work is put off only between `begin` and `end`: somebody must be there to do it.
    """

    __slots__ = ("_is_served", "_prompt", "_waiting")

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], object]] = deque()
        self._is_served = False
        self._prompt = 0

    def __len__(self) -> int:
        """How many are put off now."""
        return len(self._waiting)

    def begin(self) -> None:
        """From here on somebody calls `do_one` and `finish`."""
        self._is_served = True

    def end(self) -> None:
        """Nobody does any more: nothing is left, and what comes is done at once."""
        self._is_served = False
        self.finish()

    def put(self, work: Callable[[], object]) -> None:
        """Have *work*, which does not wait, done in bounded time. What it raises is logged."""
        self._waiting.append(work)
        if self._prompt:
            self._prompt -= 1
            self.finish()
        elif not self._is_served:
            self.finish()
        elif len(self._waiting) > WAITING_MAX:
            self.do_one()

    def do_one(self) -> bool:
        """Do the oldest; False where there is none."""
        if not self._waiting:
            return False
        work = self._waiting.popleft()
        try:
            work()
        except Exception:
            log.exception("%r failed", work)
        return True

    def finish(self) -> None:
        """Do all of it now."""
        while self.do_one():
            pass

    def failed(self, number: int | None) -> None:
        """A call has failed with this errno: what has run out may be held by what is put off."""
        if number in _SCARCE:
            self._prompt = PROMPT
            self.finish()
