"""Signals that are never lost and never raise by surprise: a flag, and a descriptor that wakes up.

Python's own KeyboardInterrupt is raised wherever the program happens to be: between starting a
child and noting that it was started, or in a place where it is swallowed. Here the handler only
notes the signal. The program asks at points of its own choosing (`check`), and every wait of it
(`wait`) ends as soon as a signal arrives, also one that arrived just before.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Final, Self

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupted(BaseException):
    """A signal was noted. Not an Exception: `except Exception` must not swallow it."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell reports for this signal."""
        return 128 + self.number


class Interrupts:
    """Notes SIGINT, SIGTERM and SIGHUP while it is entered. Only in the main thread."""

    def __init__(self) -> None:
        self.number: int | None = None
        """The first signal that arrived."""
        self.is_shielded = False
        """While cleaning up, `check` and `wait` let the work go on."""

    def __enter__(self) -> Self:
        self._read, self._write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # The descriptor first: from the first noted signal on, no wait can miss one.
        self._former_fd = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._former = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._former_fd)
        os.close(self._read)
        os.close(self._write)

    def _note(self, number: int, _: FrameType | None) -> None:
        if self.number is None:
            self.number = number

    def check(self) -> None:
        """Raise `Interrupted` if a signal has arrived."""
        if self.number is not None and not self.is_shielded:
            raise Interrupted(self.number)

    def wait(self, fds: Iterable[int], timeout_s: float) -> list[int]:
        """Those of *fds* that are readable, waiting at most *timeout_s* seconds for one.

        Raises:
            Interrupted: a signal has arrived, before or during the wait.
        """
        self.check()
        # Relies on: the C handler writes to the pipe before it returns (signal.set_wakeup_fd), so
        # that a signal between the check and the select makes the select return at once.
        readable, _, _ = select.select([self._read, *fds], [], [], timeout_s)
        if self._read in readable:
            with contextlib.suppress(BlockingIOError):
                os.read(self._read, 4096)
        self.check()
        return [fd for fd in readable if fd != self._read]

    def settle(self) -> int | None:
        """Hold further signals back for good; returns the one that has arrived, if any.

        Called last: what the program exits with is decided from here on.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        pending = signal.sigpending() & set(SIGNALS)
        if self.number is None and pending:
            self.number = min(pending)
        return self.number


def start_thread(work: Callable[[], None], name: str) -> threading.Thread:
    """Run *work* in a thread that takes no signals: they are the main thread's business."""

    def run() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        work()

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
