"""Several things of one kind on their way at once, but one only while applications are at work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

import trio

from replfs.errors import ReplfsError
from replfs.node.pacing.courtesy import Applications

T = TypeVar("T")


async def ahead(
    items: Iterator[T],
    work: Callable[[T], Awaitable[bool]],
    applications: Applications,
    *,
    tasks: int,
) -> bool:
    """Do *work* for every item, up to *tasks* at a time, taking an item when its turn has come.

    Between two items it gives way to *applications*. The first failure ends it, when what was
    begun has ended, and so does the first work that returns False; whether none did.

    Raises:
        ReplfsError, OSError: that failure.
    """
    failures: list[ReplfsError | OSError] = []
    stopped = False

    async def serve(number: int) -> None:
        nonlocal stopped
        while not (failures or stopped or (number and applications.are_busy)):
            item = next(items, None)
            if item is None:
                return
            try:
                stopped |= not await work(item)
            except (ReplfsError, OSError) as error:
                failures.append(error)
            else:
                await applications.give_way()

    async with trio.open_nursery() as nursery:
        for number in range(tasks):
            nursery.start_soon(serve, number)
    if failures:
        raise failures[0]
    return not stopped
