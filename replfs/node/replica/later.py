"""What a replica does beside everything else, because it takes long: answered when it is done."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from replfs.core import ops

_THREADS_MAX: Final = 16
"""Threads at once that wait for the disk, for flushes and for reading each."""

Reply = Callable[[ops.AnyAnswer], None]


class Later:
    """The work of one replica that is answered later, and the sessions it belongs to."""

    def __init__(self) -> None:
        self.flushes = trio.CapacityLimiter(_THREADS_MAX)
        self.reads = trio.CapacityLimiter(_THREADS_MAX)
        self._nursery: trio.Nursery | None = None
        self._sessions = 0

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Do what takes long, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def run_in(self, nursery: trio.Nursery) -> None:
        """Do it in a nursery that is there already, instead of `run`."""
        self._nursery = nursery

    async def idle(self) -> None:
        """Wait until nothing is going on."""
        while self._nursery is not None and self._nursery.child_tasks:
            await trio.sleep(0.01)

    def begin_session(self) -> None:
        """What is going on belongs to a session that is over, see `still`."""
        self._sessions += 1

    def still(self) -> Callable[[], bool]:
        """Tells whether the session that is current now still is."""
        session = self._sessions
        return lambda: self._sessions == session

    def do(
        self, work: Callable[[], Awaitable[ops.AnyAnswer]], reply: Reply
    ) -> ops.AnyAnswer | None:
        """Begin *work*, and give its answer to *reply* when it is done."""
        if self._nursery is None:
            return ops.Done(errno.EIO)
        self._nursery.start_soon(self._answer_with, work, reply)
        return None

    def start(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Begin *work* that nobody waits for, and that does not fail. False: it cannot be."""
        if self._nursery is None:
            return False
        self._nursery.start_soon(work)
        return True

    @staticmethod
    async def _answer_with(work: Callable[[], Awaitable[ops.AnyAnswer]], reply: Reply) -> None:
        try:
            answer = await work()
        except OSError as error:
            answer = ops.Done(error.errno or errno.EIO)
        reply(answer)
