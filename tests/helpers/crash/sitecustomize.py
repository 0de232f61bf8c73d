"""Kills the process at a chosen step of the program, for tests of what a crash leaves behind.

With this directory on PYTHONPATH, CRASH_AT="module:NAME:before:2" kills it as if by kill -9 when
NAME (a function, or CLASS.METHOD) is called for the second time; with `after`, when it returns.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import inspect
import os
import signal
import sys


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _wrap(function, when, number):
    calls = 0

    def is_due():
        nonlocal calls
        calls += 1
        return calls == number

    if inspect.iscoroutinefunction(function):

        @functools.wraps(function)
        async def wrapped(*args, **keywords):
            due = is_due()
            if due and when == "before":
                _die()
            result = await function(*args, **keywords)
            if due:
                _die()
            return result

    else:

        @functools.wraps(function)
        def wrapped(*args, **keywords):
            due = is_due()
            if due and when == "before":
                _die()
            result = function(*args, **keywords)
            if due:
                _die()
            return result

    return wrapped


class _Patch(importlib.abc.MetaPathFinder):
    def __init__(self, module, name, when, number):
        self.module, self.name, self.when, self.number = module, name, when, number

    def find_spec(self, fullname, path, target=None):
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        loader = spec.loader
        run = loader.exec_module

        def exec_module(module):
            run(module)
            *owners, last = self.name.split(".")
            owner = functools.reduce(getattr, owners, module)
            setattr(owner, last, _wrap(getattr(owner, last), self.when, self.number))

        setattr(loader, "exec_module", exec_module)  # noqa: B010 - mypy
        return spec


_where = os.environ.get("CRASH_AT")
if _where:
    _module, _name, _when, _number = _where.split(":")
    sys.meta_path.insert(0, _Patch(_module, _name, _when, int(_number)))
