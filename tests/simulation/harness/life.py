"""Lives of simulated processes, and the world they run in: time, randomness, threads, system calls.

All code of a node runs inside its `Life`: every task that it starts, and every call that the
simulated network makes into it. A life can end at any await, or at any system call that changes
something. From that moment nothing of the node changes anything durable: what is left of its tasks
only unwinds.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import itertools
import math
import os
import random
import time
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import trio
from simulation.harness.disk import Disk, birth_ns, births, graves, looked_at
from simulation.harness.files import calls_of, own_calls_of
from trio import Nursery
from trio._core import _run
from trio._core._traps import CancelShieldedCheckpoint, WaitTaskRescheduled

from replfs.node.pacing import flush
from replfs.store import database as database_module
from replfs.store import state as state_module
from replfs.store import syscalls
from replfs.store.activity import ActivityLog
from replfs.store.database import Database
from replfs.store.progress import Progress
from replfs.store.tree import Tree

EPOCH_S = 1_700_000_000
_NURSERY_WAIT = "Nursery._nested_child_finished"
_END_S = 10.0
_FAILURES = (errno.ENOSPC, errno.EIO)


class Crashed(BaseException):
    """The process is dead. No handler of the product may see a way to go on."""


class Life:
    """One run of one process."""

    current: ClassVar[Life | None] = None
    """Whose code is running now."""

    def __init__(self, name: str, rng: random.Random, on_death: Callable[[], None]) -> None:
        self.name = name
        self.rng = rng
        self.dead = False
        self.countdown = 0
        """System calls until it dies; 0: not by a system call."""
        self.error_rate = 0.0
        """Share of system calls that fail."""
        self.errors = 0
        self.calls = 0
        self.steps = 0
        self.scope: trio.CancelScope | None = None
        self.disk: Disk | None = None
        """What its changes of a store go to."""
        self.member: object = None
        """The node that lives."""
        self.died = trio.Event()
        self._on_death = on_death

    def die(self) -> None:
        """Nothing of it happens from here on."""
        if not self.dead:
            self.died.set()  # before: the dead wake nobody
            self.dead = True
            if self.scope is not None:
                self.scope.cancel()
            self._on_death()

    def system_call(self) -> None:
        """It is about to change something outside its memory."""
        if self.dead:
            raise Crashed
        self.calls += 1
        if self.countdown:
            self.countdown -= 1
            if not self.countdown:
                self.die()
                raise Crashed
        if self.error_rate and self.rng.random() < self.error_rate:
            self.errors += 1
            number = self.rng.choice(_FAILURES)
            raise OSError(number, os.strerror(number))

    async def run(self, main: Callable[[], Any]) -> None:
        """Live until *main* ends or death."""
        with trio.CancelScope() as self.scope:
            if self.dead:
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.live, main)

    async def live(self, async_fn: Callable[..., Any], *args: Any, **keywords: Any) -> Any:
        """A task of this life."""
        return await self._drive(async_fn(*args, **keywords))

    @types.coroutine
    def _drive(self, coroutine: Any) -> Any:
        step, value = coroutine.send, None
        while True:
            outer, Life.current = Life.current, self
            self.steps += 1
            try:
                trap = step(value)
            except StopIteration as stop:
                return stop.value
            except BaseException:
                if self.dead:
                    return None
                raise
            finally:
                Life.current = outer
            # A nursery must see its children end, whatever happened: trio insists.
            patient = type(trap) is CancelShieldedCheckpoint or (
                type(trap) is WaitTaskRescheduled
                and trap.abort_func.__qualname__.startswith(_NURSERY_WAIT)
            )
            if not patient:
                trap = self._abortable(trap)
            try:
                value = yield trap
                step = coroutine.send
            except BaseException as error:
                step, value = coroutine.throw, error
            if not self.dead:
                continue
            nurseries = trio.lowlevel.current_task().child_nurseries if patient else []
            if nurseries and not nurseries[-1]._nested_child_running:
                # It ends as it must, but what comes after it does not happen.
                nurseries[-1]._add_exc(Crashed(), reason=None)
            else:
                step, value = coroutine.throw, Crashed()

    def _abortable(self, trap: Any) -> Any:
        """Not even what the product declares not to be cancelled outlives its process."""
        if type(trap) is not WaitTaskRescheduled:
            return trap
        original = trap.abort_func

        def abort(raise_cancel: Any) -> trio.lowlevel.Abort:
            done = original(raise_cancel)
            return trio.lowlevel.Abort.SUCCEEDED if self.dead else done

        return WaitTaskRescheduled(abort)


class acting:  # noqa: N801 - used as a keyword
    """Code of *life* runs inside, called by somebody else; its death ends the block quietly."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def __enter__(self) -> None:
        self._outer = Life.current
        Life.current = self.life

    def __exit__(self, kind: object, error: object, traceback: object) -> bool:
        Life.current = self._outer
        return self.life.dead and error is not None


class Clock(trio.abc.Clock):
    """Time that passes only while everybody waits, and then at once.

    Relies on: trio asks how long to sleep only when no task can run, and nothing outside of this
    thread wakes one here. `MockClock` does the same in two turns of the loop, and with the
    statistics of all of it.
    """

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the run began."""
        self._is_at_end = False
        self._sleepers: list[tuple[float, int, list[trio.lowlevel.Task]]] = []
        """A heap: when, in which order, and who, unless that one was cancelled."""
        self._order = itertools.count()

    def start_clock(self) -> None:
        return

    def current_time(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        """`trio.sleep`, without a cancel scope of its own, which costs more than a step does."""
        if seconds <= 0:
            await trio.lowlevel.checkpoint()
            return
        who = [trio.lowlevel.current_task()]
        heapq.heappush(self._sleepers, (self.now + seconds, next(self._order), who))

        def abort(_: object) -> trio.lowlevel.Abort:
            who.clear()
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Nobody can run before *deadline*, or before the next sleeper is to wake: it is then."""
        sleepers = self._sleepers
        while sleepers and not sleepers[0][2]:
            heapq.heappop(sleepers)
        next_s = min(deadline, sleepers[0][0]) if sleepers else deadline
        if next_s == math.inf:
            # At the end of a run trio wakes itself through a pipe, and nobody else waits.
            if self._is_at_end:
                raise RuntimeError("everybody waits, and nothing will ever happen")
            self._is_at_end = True
            return _END_S
        self.now = max(self.now, next_s)
        while sleepers and sleepers[0][0] <= self.now:
            for task in heapq.heappop(sleepers)[2]:
                trio.lowlevel.reschedule(task)
        return 0.0


class World:
    """What the processes share: the clock and the source of randomness."""

    def __init__(self, seed: int) -> None:
        self.clock = Clock()
        self.rng = random.Random(f"{seed} world")
        self._stamp = 0

    def monotonic(self) -> float:
        return 1000.0 + self.clock.now

    def time_ns(self) -> int:
        self._stamp += 1  # no two stamps are equal
        return int((EPOCH_S + self.clock.now) * 1e9) + self._stamp


@contextlib.contextmanager
def simulated(seed: int) -> Iterator[World]:
    """Make the process's time, randomness, threads and system calls those of a simulation."""
    world = World(seed)
    graves.clear()
    births.clear()
    with pytest.MonkeyPatch.context() as patch:
        _patch_time(patch, world)
        _patch_trio(patch, world, seed)
        _patch_system_calls(patch)
        listdir = os.listdir
        patch.setattr(os, "listdir", lambda path=".": sorted(listdir(path)))
        patch.setattr(os, "urandom", world.rng.randbytes)
        # Each node has a umask of its own, and here only one process has them all.
        patch.setattr(Tree, "set_umask", lambda self, umask: os.umask(umask))
        umask = os.umask(0o022)
        try:
            yield world
        finally:
            os.umask(umask)


def _patch_time(patch: pytest.MonkeyPatch, world: World) -> None:
    patch.setattr(time, "monotonic", world.monotonic)
    patch.setattr(time, "monotonic_ns", lambda: int(world.monotonic() * 1e9))
    patch.setattr(time, "time_ns", world.time_ns)
    patch.setattr(time, "time", lambda: world.time_ns() / 1e9)
    patch.setattr(trio, "sleep", world.clock.sleep)
    # Other processes of this machine are not waited for.
    patch.setattr(os, "sched_yield", lambda: None)


def _patch_trio(patch: pytest.MonkeyPatch, world: World, seed: int) -> None:
    patch.setattr(_run, "_ALLOW_DETERMINISTIC_SCHEDULING", True)
    patch.setattr(_run, "_r", random.Random(f"{seed} trio"))
    start_soon, start = Nursery.start_soon, Nursery.start
    reschedule = trio.lowlevel.reschedule
    rng = random.Random(f"{seed} threads")

    def start_soon_in_life(nursery: Any, async_fn: Any, *args: Any, name: object = None) -> None:
        life = Life.current
        if life is None:
            start_soon(nursery, async_fn, *args, name=name)
        else:
            start_soon(nursery, life.live, async_fn, *args, name=name or async_fn)

    async def start_in_life(nursery: Any, async_fn: Any, *args: Any, name: object = None) -> Any:
        life = Life.current
        if life is None:
            return await start(nursery, async_fn, *args, name=name)
        return await start(nursery, life.live, async_fn, *args, name=name or async_fn)

    def reschedule_the_living(task: Any, *args: Any) -> None:
        if Life.current is None or not Life.current.dead:
            reschedule(task, *args)

    async def run_sync(call: Callable[..., Any], *args: Any, **_: Any) -> Any:
        with trio.CancelScope(shield=True):
            await trio.sleep(rng.choice((0, 0, 0.0005, 0.02)))
        return call(*args)

    patch.setattr(Nursery, "start_soon", start_soon_in_life)
    patch.setattr(Nursery, "start", start_in_life)
    patch.setattr(trio.lowlevel, "reschedule", reschedule_the_living)
    patch.setattr(trio.to_thread, "run_sync", run_sync)
    patch.setattr(flush, "_kernel", lambda: None)  # then it is done in a thread


def _patch_system_calls(patch: pytest.MonkeyPatch) -> None:
    for name, call in calls_of(lambda: Life.current).items():
        patch.setattr(os, name, call)
    for name, call in own_calls_of(lambda: Life.current).items():
        patch.setattr(syscalls, name, call)
    patch.setattr(syscalls, "birth_ns", birth_ns)
    for name in ("stat", "lstat", "fstat"):
        patch.setattr(os, name, _looking(getattr(os, name)))
    patch.setattr(state_module, "boot_id", lambda: f"boot {_disk().boot}")
    patch.setattr(state_module, "mount_id", lambda _: "mount")
    patch.setattr(database_module, "_CHECKPOINT_COMMITS", 1 << 30)
    patch.setattr(Database, "execute", _never_failing(_committing(Database.execute)))
    patch.setattr(Database, "leave", _left)
    patch.setattr(ActivityLog, "begin", _never_failing(_guarded(ActivityLog.begin)))
    patch.setattr(Progress, "__init__", _never_failing(Progress.__init__))


def _disk() -> Disk:
    life = Life.current
    if life is None or life.disk is None:
        raise RuntimeError("a node has a disk")
    return life.disk


def _looking(call: Callable[..., os.stat_result]) -> Callable[..., os.stat_result]:
    def look(*args: Any, **keywords: Any) -> os.stat_result:
        found = call(*args, **keywords)
        return looked_at(found) if found.st_ino in graves else found

    return look


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    def guard(*args: Any, **keywords: Any) -> Any:
        if Life.current is not None:
            Life.current.system_call()
        return call(*args, **keywords)

    return guard


def _committing(call: Callable[..., Any]) -> Callable[..., Any]:
    def execute(database: Any, changes: Any) -> None:
        life = Life.current
        if life is None or life.disk is None:
            call(database, changes)
            return
        life.system_call()
        life.disk.committing(database._log)
        call(database, changes)
        life.disk.committed(database._log)

    return execute


def _left(database: Any) -> None:
    """The process ends before long, and with it what is open; what it leaves is as it is now."""
    put_back = _disk().keep_state()
    database.abandon()
    put_back()


def _never_failing(call: Callable[..., Any]) -> Callable[..., Any]:
    """What replfs keeps space for, or has on tmpfs, does not fail when STORE does."""

    def safe(*args: Any, **keywords: Any) -> Any:
        life = Life.current
        if life is None:
            return call(*args, **keywords)
        rate, life.error_rate = life.error_rate, 0.0
        try:
            return call(*args, **keywords)
        finally:
            life.error_rate = rate

    return safe
