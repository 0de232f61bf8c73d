"""What is put off: how much of it, for how long, in which order, and that none is lost."""

from __future__ import annotations

import errno
import logging
import os
import select
from types import SimpleNamespace
from typing import Any, cast

import pyfuse3
import pytest
import trio
import trio.testing
from pyfuse3 import FUSEError, RequestContext

from replfs.front.chores import PROMPT, WAITING_MAX, Chores
from replfs.front.dispatch import Dispatcher
from replfs.front.operations import Mounted, Operations
from replfs.front.session import FuseSession, MountOptions
from replfs.node.replication.flight import Flight
from replfs.node.replication.pipeline import Pipeline

DIRECTORY = 7
CALLER: Any = SimpleNamespace(uid=0, gid=0, pid=1)


@pytest.fixture
def chores():
    served = Chores()
    served.begin()
    return served


# The queue ---------------------------------------------------------------------------------------


def test_they_are_done_in_the_order_they_came_in(chores):
    done: list[int] = []
    for number in range(3):
        chores.put(lambda number=number: done.append(number))
    assert (done, len(chores)) == ([], 3)
    assert chores.do_one()
    assert done == [0]
    chores.finish()
    assert done == [0, 1, 2]
    assert not chores.do_one()


def test_no_more_than_so_many_wait(chores):
    done: list[int] = []
    for number in range(WAITING_MAX + 10):
        chores.put(lambda number=number: done.append(number))
        assert len(chores) <= WAITING_MAX
    assert done == list(range(10))


def test_where_nobody_serves_them_they_are_done_at_once(chores):
    done: list[int] = []
    chores.put(lambda: done.append(1))
    chores.end()
    assert done == [1]
    chores.put(lambda: done.append(2))
    Chores().put(lambda: done.append(3))
    assert done == [1, 2, 3]


def test_one_that_fails_keeps_no_other_from_being_done(chores, caplog):
    done: list[int] = []

    def fails() -> None:
        raise OSError(errno.EIO, "broken")

    chores.put(fails)
    chores.put(lambda: done.append(1))
    with caplog.at_level(logging.ERROR):
        chores.finish()
    assert done == [1]
    assert "broken" in caplog.text


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE])
def test_where_something_has_run_out_none_is_put_off_for_a_while(chores, number):
    done: list[int] = []
    chores.put(lambda: done.append(0))
    chores.failed(errno.ENOENT)
    assert done == []
    chores.failed(number)
    assert done == [0]
    for _ in range(PROMPT):
        chores.put(lambda: done.append(1))
    assert len(done) == PROMPT + 1
    chores.put(lambda: done.append(2))
    assert done[-1] == 1


# Which work is put off ---------------------------------------------------------------------------


class Tree:
    """What is mounted, as far as it is looked up, forgotten, opened and closed."""

    def __init__(self) -> None:
        self.lookups = 0
        self.closes_at_once = True
        self.events: list[object] = []

    def lookup(self, _parent: int, _name: bytes) -> tuple[Any, Any]:
        self.lookups += 1
        return SimpleNamespace(nodeid=DIRECTORY), os.stat("/")

    def forget(self, references: list[tuple[int, int]]) -> list[int]:
        self.lookups -= sum(count for _, count in references)
        return [] if self.lookups else [nodeid for nodeid, _ in references]

    def close(self, number: int) -> None:
        self.events.append(number)

    async def release(self, number: int) -> None:
        await trio.lowlevel.checkpoint()
        self.events.append(("awaited", number))

    def statfs(self) -> os.statvfs_result:
        self.events.append("statfs")
        return os.statvfs("/")

    async def unlink(self, _parent: int, _name: bytes) -> None:
        return

    async def write(self, _number: int, _offset: int, _data: bytes) -> int:
        raise OSError(errno.ENOSPC, "full")


class Kernel:
    """What is told that attributes are others."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def invalidate_inode(self, nodeid: int, *, attr_only: bool) -> None:
        assert attr_only
        self.told.append(nodeid)

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        raise AssertionError((parent, name))


@pytest.fixture
def tree():
    return Tree()


@pytest.fixture
def operations(tree):
    made = Operations(cast(Mounted, tree))
    made.chores.begin()
    return made


async def changes(operations: Operations, *, by: int) -> None:
    who: RequestContext = cast(Any, SimpleNamespace(uid=0, gid=0, pid=by))
    await operations.unlink(cast(Any, DIRECTORY), cast(Any, b"x"), who)


async def test_what_was_looked_up_since_stays_known_to_the_kernel(operations, tree):
    """Whichever comes first, being forgotten or being looked up again."""
    kernel = Kernel()
    operations.served_by(kernel, directly=True)
    await operations.lookup(1, b"d", CALLER)
    await operations.forget([(DIRECTORY, 1)])
    assert tree.lookups == 1
    await operations.lookup(1, b"d", CALLER)
    operations.chores.finish()
    assert tree.lookups == 1
    await changes(operations, by=2)
    assert kernel.told == [DIRECTORY]


async def test_of_what_it_has_forgotten_the_kernel_is_told_nothing(operations, tree):
    kernel = Kernel()
    operations.served_by(kernel, directly=True)
    await operations.lookup(1, b"d", CALLER)
    await operations.forget([(DIRECTORY, 1)])
    operations.chores.finish()
    assert tree.lookups == 0
    await changes(operations, by=2)
    assert kernel.told == []


async def test_a_close_is_put_off_only_where_nothing_is_awaited(operations, tree):
    await operations.release(1)
    assert tree.events == []
    operations.chores.finish()
    assert tree.events == [1]
    tree.closes_at_once = False
    await operations.release(2)
    assert tree.events == [1, ("awaited", 2)]


async def test_the_free_space_that_is_told_counts_what_was_closed_before(operations, tree):
    await operations.release(1)
    await operations.statfs(CALLER)
    assert tree.events == [1, "statfs"]


async def test_a_full_disk_has_what_was_closed_closed(operations, tree):
    await operations.release(1)
    with pytest.raises(FUSEError):
        await operations.write(2, 0, b"x")
    assert tree.events == [1]


# Who does it -------------------------------------------------------------------------------------


class Answers:
    """In place of the dispatcher: for each request, what a test wants."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer


class Served:
    """A session that serves a pipe."""

    def __init__(self, tmp_path) -> None:
        self.chores = Chores()
        self.done: list[bytes] = []
        self._out, self._in = os.pipe()
        os.set_blocking(self._out, False)
        poll = select.poll()
        poll.register(self._out, select.POLLIN)
        session = self.session = FuseSession(
            cast(pyfuse3.Operations, None),
            str(tmp_path),
            MountOptions(),
            chores=self.chores,
            spin_ns=0,
        )
        session._fd = self._out
        session._poll = poll.poll
        session._dispatcher = cast(Dispatcher, Answers(self.answer))
        self.waits = trio.Event()

    def request(self, what: bytes) -> None:
        os.write(self._in, what)

    async def answer(self, request: bytes) -> None:
        self.chores.put(lambda: self.done.append(request))
        if request == b"wait":
            await self.waits.wait()

    async def has_done(self, *requests: bytes) -> None:
        with trio.fail_after(10):
            while self.done != list(requests):
                await trio.sleep(0.001)

    async def run(self) -> None:
        await self.session._run_our_wait()

    def close(self) -> None:
        os.close(self._out)
        os.close(self._in)


@pytest.fixture
def served(tmp_path):
    one = Served(tmp_path)
    yield one
    one.close()


async def test_all_is_done_before_the_session_sleeps(served):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.run)
        await trio.testing.wait_all_tasks_blocked()
        served.request(b"one")
        await served.has_done(b"one")
        served.request(b"wait")  # its worker waits, and another one sleeps
        await served.has_done(b"one", b"wait")
        served.waits.set()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("cancelled", [False, True])
async def test_nothing_is_left_at_the_end(served, cancelled):
    async with trio.open_nursery() as nursery:
        nursery.start_soon(served.run)
        await trio.testing.wait_all_tasks_blocked()
        served.request(b"wait")
        await served.has_done(b"wait")
        await trio.testing.wait_all_tasks_blocked()
        served.chores.put(lambda: served.done.append(b"late"))
        assert served.done == [b"wait"]
        if cancelled:
            nursery.cancel_scope.cancel()
        else:
            served.session.stop()
            served.waits.set()
    assert served.done == [b"wait", b"late"]
    served.chores.put(lambda: served.done.append(b"after"))
    assert served.done[-1] == b"after"


async def test_one_is_done_before_an_operation_sleeps_until_its_answer(chores):
    pipeline = Pipeline(cast(Any, None), cast(Any, None), cast(Any, None))
    pipeline.do_chore = chores.do_one
    flight = Flight(pipeline, "write")
    flight.waiting = 1
    pipeline.flights = 2  # another one is on its way: it does not watch
    done: list[int] = []
    chores.put(lambda: done.append(1))
    chores.put(lambda: done.append(2))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(pipeline.confirmed, flight)
        await trio.testing.wait_all_tasks_blocked()
        assert done == [1]
        flight.waiting = 0
        assert flight.task is not None
        trio.lowlevel.reschedule(flight.task)


async def test_it_is_done_while_an_answer_is_awaited(chores, monkeypatch):
    pipeline = Pipeline(cast(Any, None), cast(Any, None), cast(Any, None))
    pipeline.do_chore = chores.do_one
    patience = SimpleNamespace(begin=lambda: True, go_on=lambda: True, paid=lambda: None)
    monkeypatch.setattr(pipeline, "_patience", patience)
    flight = Flight(pipeline, "write")
    flight.waiting = pipeline.flights = 1
    done: list[int] = []

    def pump() -> None:
        if done:
            flight.waiting = 0

    pipeline.peers = cast(Any, [SimpleNamespace(live=True, link=SimpleNamespace(pump=pump))])
    chores.put(lambda: done.append(1))
    await pipeline.confirmed(flight)
    assert done == [1]
