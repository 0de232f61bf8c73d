"""Asking a peer something on the bulk stream, and waiting for what it says."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Collection

import trio

from replfs.core import ops
from replfs.core.messages import BULK
from replfs.errors import PeerLost
from replfs.transport.link import Link

Ask = Callable[[ops.AnyOp], Awaitable[ops.AnyAnswer]]


class Question:
    """A sink that one task waits for."""

    __slots__ = ("_answer", "_done", "_task")

    def __init__(self) -> None:
        self._answer: ops.AnyAnswer | None = None
        self._done = False
        self._task: trio.lowlevel.Task | None = None

    def answered(self, link: Link, answer: ops.AnyAnswer) -> None:
        """The peer's answer."""
        del link
        self._answer = answer
        self._finish()

    def lost(self, link: Link) -> None:
        """There will be none."""
        del link
        self._finish()

    def _finish(self) -> None:
        self._done = True
        if self._task is not None:
            trio.lowlevel.reschedule(self._task)
            self._task = None

    async def answer(self) -> ops.AnyAnswer:
        """Wait for it. Raises PeerLost if the session ends first."""
        if not self._done:
            self._task = trio.lowlevel.current_task()

            def abandon(_: object) -> trio.lowlevel.Abort:
                self._task = None
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abandon)
        if self._answer is None:
            raise PeerLost("the session ended")
        return self._answer


def begin(link: Link, op: ops.AnyOp, payload: bytes | None = None) -> Question:
    """Send *op* on the bulk stream, in which there is room; its answer is waited for later.

    Raises:
        PeerLost: there is no session.
    """
    question = Question()
    link.send(op, payload, question, BULK)
    return question


async def ask(link: Link, op: ops.AnyOp, payload: bytes | None = None) -> ops.AnyAnswer:
    """Send *op* on the bulk stream and wait for the answer. Raises PeerLost."""
    if not link.has_room(BULK):
        await link.wait_room(BULK)
    return await begin(link, op, payload).answer()


async def list_all(
    asked: Ask, directory: ops.ObjectId, known: Collection[bytes] = ()
) -> dict[bytes, ops.Entry] | ops.AnyAnswer:
    """All that the peer has in a directory, by name; or the answer that was no listing.

    *asked* asks the peer one thing. Names in *known* are left out, and take no memory. A page
    that is empty and not the last one counts as a failure (EPROTO): what follows it is not known,
    and to ask for it again would never end.
    """
    found: dict[bytes, ops.Entry] = {}
    after = b""
    while True:
        answer = await asked(ops.List(directory, after))
        if not isinstance(answer, ops.Listing):
            return answer
        for entry in answer.entries:
            if entry.name not in known:
                found[entry.name] = entry
        if not answer.more:
            return found
        if not answer.entries:
            return ops.Done(errno.EPROTO)
        after = answer.entries[-1].name
