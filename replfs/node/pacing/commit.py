"""One flush for all that wait for one."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class GroupCommit:
    """Runs *work* so that each caller has had a run that began after its call, and no more often.

    What a caller did before its call is covered by such a run; callers that come while one is going
    on share the next.
    """

    def __init__(self, work: Callable[[], Awaitable[None]]) -> None:
        self._work = work
        self._lock = trio.Lock()
        self._begun = 0
        self._done = 0

    async def __call__(self) -> None:
        """Have a run. Raises what *work* raised in this caller's."""
        asked = self._begun
        async with self._lock:
            if self._done > asked:
                return
            self._begun = number = self._begun + 1
            await self._work()
            self._done = number
