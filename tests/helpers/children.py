"""Run a function in a forked child: as another user, at the same time, or because it may die.

The child's result, or the exception it ended with, comes back through a pipe. Waiting is bounded.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import pickle
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

USER, OTHER_USER = 10_001, 10_002
GROUP, OTHER_GROUP = 20_001, 20_002
TIMEOUT_S = 90.0
PR_SET_DUMPABLE = 4

_libc = ctypes.CDLL(None, use_errno=True)


class ChildDied(Exception):
    """A child ended by a signal (`signal`), or without a result."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by signal {number}" if number else "ended without a result")
        self.signal = number


class Child:
    """A running child; ask for `result()` exactly once."""

    def __init__(self, pid: int, pipe: int) -> None:
        self.pid = pid
        self._pipe = pipe

    def result(self, timeout_s: float = TIMEOUT_S) -> Any:
        """Wait for the end; returns what the function returned, or raises what it raised.

        Raises:
            ChildDied: it ended by a signal.
            AssertionError: it did not end in time (it is killed).
        """
        deadline = time.monotonic() + timeout_s
        data = b""
        try:
            while True:
                left = deadline - time.monotonic()
                if left <= 0 or not select.select([self._pipe], [], [], left)[0]:
                    os.kill(self.pid, signal.SIGKILL)
                    raise AssertionError(f"child {self.pid} did not end within {timeout_s:g} s")
                part = os.read(self._pipe, 1 << 20)
                if not part:
                    break
                data += part
        finally:
            os.close(self._pipe)
            status = os.waitpid(self.pid, 0)[1]
        if os.WIFSIGNALED(status) or not data:
            raise ChildDied(os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
        value, error, trace = pickle.loads(data)
        if error is not None:
            error.add_note(f"in a child process:\n{trace}")
            raise error
        return value

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        os.kill(self.pid, signal.SIGKILL)
        os.close(self._pipe)
        os.waitpid(self.pid, 0)


def spawn(
    function: Callable[..., Any],
    *arguments: Any,
    uid: int | None = None,
    gid: int = GROUP,
    groups: Sequence[int] = (),
) -> Child:
    """Start `function(*arguments)` in a child; with `uid`, as that user with these groups."""
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(writer)
        return Child(pid, reader)
    try:
        os.close(reader)
        faulthandler.disable()  # a child that is to die shall do so quietly
        outcome: tuple[Any, BaseException | None, str] = None, None, ""
        try:
            if uid is not None:
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
                # Changing the user took /proc/self away from it, unlike in a program of its own.
                _libc.prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)
            outcome = function(*arguments), None, ""
        except BaseException as error:
            outcome = None, error, traceback.format_exc()
        try:
            data = pickle.dumps(outcome)
        except Exception as error:
            data = pickle.dumps((None, AssertionError(f"{outcome!r}: {error}"), outcome[2]))
        while data:
            data = data[os.write(writer, data) :]
    finally:
        os._exit(0)


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call `function(*arguments)` in a child and return what it returns."""
    return spawn(function, *arguments).result()


def as_user(
    function: Callable[..., Any],
    *arguments: Any,
    uid: int = USER,
    gid: int = GROUP,
    groups: Sequence[int] = (),
) -> Any:
    """Call `function(*arguments)` as a user without privileges and return what it returns."""
    return spawn(function, *arguments, uid=uid, gid=gid, groups=groups).result()


def together(*functions: Callable[[], Any]) -> list[Any]:
    """Call several functions at the same time, each in a child of its own; results in order.

    All children start working only when all exist.
    """
    barrier, gate = os.pipe()

    def held(function: Callable[[], Any]) -> Any:
        os.close(gate)
        os.read(barrier, 1)  # end of file: the parent has closed the gate
        return function()

    children = [spawn(held, function) for function in functions]
    os.close(barrier)
    os.close(gate)
    results: list[Any] = []
    failure: BaseException | None = None
    for child in children:
        try:
            results.append(child.result())
        except BaseException as error:
            failure = failure or error
    if failure is not None:
        raise failure
    return results
