"""What was sent and is awaited later, together: the acknowledgement level `close`.

Such an operation returns once it is applied here and sent. It joins the window, where close, fsync,
rename and link wait for it and for all before it; and while one in there is older than `LATEST_NS`,
no further one returns. In number and bytes the window is bounded by what a link has on its way
(`transport.flow`). What a peer did not do, or did not confirm, is recorded by the flight itself.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Final

import trio

from replfs.node.replication.flight import Flight

LATEST_NS: Final = 10_000_000
"""How long one may be unconfirmed while others go on."""


class Window:
    """The operations of a volume that are awaited together, in the order they were sent in.

    Invariant: operations leave in the order of their numbers, so that `confirmed` says it all.
    """

    def __init__(self) -> None:
        self.sent = 0
        """The number of the operation that joined last."""
        self.confirmed = 0
        """All up to this number have been answered by every peer, or are recorded."""
        self._flights: deque[Flight] = deque()
        self._sent_ns: deque[int] = deque()
        self._waiting: list[tuple[int, trio.lowlevel.Task]] = []

    def __len__(self) -> int:
        """How many are not confirmed."""
        return len(self._flights)

    def join(self, flight: Flight) -> int:
        """One was sent, and is about to be detached; its number."""
        self._flights.append(flight)
        self._sent_ns.append(time.monotonic_ns())
        self.sent += 1
        return self.sent

    def is_late(self) -> bool:
        """Whether the oldest has been unconfirmed for too long to let another return."""
        return bool(self._sent_ns) and time.monotonic_ns() - self._sent_ns[0] > LATEST_NS

    def landed(self) -> None:
        """One has been answered or lost, and settled."""
        flights = self._flights
        while flights and not flights[0].waiting:
            flights.popleft()
            self._sent_ns.popleft()
            self.confirmed += 1
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            for number, task in waiting:
                if number <= self.confirmed:
                    trio.lowlevel.reschedule(task)
                else:
                    self._waiting.append((number, task))

    @property
    def is_awaited(self) -> bool:
        """Whether somebody sleeps until it is confirmed."""
        return bool(self._waiting)

    def flight(self, number: int) -> Flight:
        """An operation that is not confirmed yet."""
        return self._flights[number - self.confirmed - 1]

    async def wait(self, number: int) -> None:
        """Sleep until all up to *number*, which are not, are confirmed."""
        self._waiting.append((number, trio.lowlevel.current_task()))
        await trio.lowlevel.wait_task_rescheduled(not_cancelled)


def not_cancelled(_: object) -> trio.lowlevel.Abort:
    """Every such wait ends by itself: within the peer timeout, or one region's transfer."""
    return trio.lowlevel.Abort.FAILED
