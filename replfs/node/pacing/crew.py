"""Doing something for many items, a few at a time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import trio

from replfs.errors import ReplfsError

T = TypeVar("T")


async def each(
    items: Iterable[T],
    work: Callable[[T], Awaitable[object]],
    *,
    tasks: int,
    goes_on: Callable[[], bool] = lambda: True,
) -> None:
    """Do *work* for every item, *tasks* at a time, while *goes_on*.

    The first failure ends it, when what was begun has ended.

    Raises:
        ReplfsError, OSError: that failure.
    """
    limit = trio.Semaphore(tasks)
    failures: list[ReplfsError | OSError] = []

    async def one(item: T) -> None:
        try:
            await work(item)
        except (ReplfsError, OSError) as error:
            failures.append(error)
        finally:
            limit.release()

    async with trio.open_nursery() as nursery:
        for item in items:
            await limit.acquire()
            if failures or not goes_on():
                break
            nursery.start_soon(one, item)
    if failures:
        raise failures[0]
