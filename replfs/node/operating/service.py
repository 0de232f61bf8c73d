"""The service manager's protocol, sd_notify(3): readiness and watchdog, where somebody listens."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(text: str) -> None:
    """Tell the service manager, if there is one: `READY=1`, `STOPPING=1`, `STATUS=...`."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, kind) as sender:
        sender.sendto(text.encode(), address.replace("@", "\0", 1))


class Watchdog:
    """Feeds the service manager's watchdog, twice as often as it asks for."""

    def __init__(self) -> None:
        interval_us = os.environ.get("WATCHDOG_USEC", "")
        ours = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        self._interval_s = int(interval_us) / 2e6 if ours and interval_us.isdigit() else 0.0
        self._due = time.monotonic()

    @property
    def next_s(self) -> float | None:
        """Seconds until it is due; None if nobody asks."""
        return self._due - time.monotonic() if self._interval_s else None

    def feed(self, *, alive: bool) -> None:
        """If it is due, feed it, or let it starve because the node is not *alive*."""
        if self._interval_s and time.monotonic() >= self._due:
            self._due = time.monotonic() + self._interval_s
            if alive:
                notify("WATCHDOG=1")
