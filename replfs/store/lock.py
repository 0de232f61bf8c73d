"""The lock on a STORE: one process has it at a time, and the next one knows how it ended.

`STORE/.replfs/lock` is locked by the process that has the STORE, and holds its number. While a run
is going on, its second line names boot and mount: whoever finds it there knows that the run was
killed, whatever the state says. It is written after the state says that a run has begun, and taken
away before the state may say that it has ended, so that the lock is never the later word.

A third line says how long the log of the state's database was, which never becomes shorter while a
run is going on. Like the rest it is in the kernel's memory when the call returns, and no more: it
says something of a process that was killed, and nothing after a loss of power.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from typing import Final

from replfs.errors import StoreBusy

NAME: Final = "lock"
_SIZE_MAX: Final = 256
"""Bytes; more than there are."""
_DIGITS: Final = 20
"""Of the log's length."""


class Lock:
    """That of an open STORE; closed by whoever opened it."""

    def __init__(self, directory: int, where: str, run: str) -> None:
        """Lock the STORE *where*, whose reserved directory is open on *directory*.

        *run*: this boot and mount; one line.

        Raises:
            StoreBusy: another process has it.
            OSError: the file cannot be opened.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(NAME, flags, 0o600, dir_fd=directory)
        self._this = run.encode()
        self._size = self._at = 0
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            first = os.pread(self._fd, _SIZE_MAX, 0).decode("ascii", "replace").partition("\n")[0]
            os.close(self._fd)
            raise StoreBusy(
                f"{where} is in use by another replfs process ({first or 'unknown'})"
            ) from None
        _, self._run, size, *_ = *os.pread(self._fd, _SIZE_MAX, 0).split(b"\n"), b"", b""
        if self.is_killed and size.isdigit():
            # Else the log is what a loss of power has left of it: what this run makes counts.
            self._size = int(size)
        with contextlib.suppress(OSError):  # a full disk: nothing is missed but a check
            self._note(self._run)

    def close(self) -> None:
        """Give it up."""
        os.close(self._fd)

    @property
    def is_unended(self) -> bool:
        """A run has begun, this one or an earlier one, and not ended."""
        return bool(self._run)

    @property
    def is_killed(self) -> bool:
        """And nothing that it had handed to the kernel has been lost since."""
        return self._run == self._this

    @property
    def log_size(self) -> int:
        """How long the log was at least, in bytes; 0: that is not known."""
        return self._size

    def _note(self, run: bytes) -> None:
        text = b"%d\n%b" % (os.getpid(), run)
        if run:
            self._at = len(text) + 1
            text += b"\n%0*d" % (_DIGITS, self._size)
        os.pwrite(self._fd, text, 0)
        os.ftruncate(self._fd, len(text))
        self._run = run

    def note_log(self, size: int) -> None:
        """The log is that long, in bytes; called after each commit."""
        if size > self._size:
            self._size = size
            if self._run:
                with contextlib.suppress(OSError):  # as above
                    os.pwritev(self._fd, (b"%0*d" % (_DIGITS, size),), self._at)

    def begin(self) -> None:
        """A run has begun, and the state says so on the disk."""
        with contextlib.suppress(OSError):
            self._note(self._this)

    def end(self) -> None:
        """The run is about to have ended. Raises OSError: that must not be said yet."""
        if self._run:
            self._note(b"")
            os.fsync(self._fd)
