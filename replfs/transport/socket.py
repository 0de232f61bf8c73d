"""What a link and a listener need of a socket, whoever speaks ZeroMQ's protocol on it.

Two modules keep these promises: `direct`, which speaks ZMTP itself, and `libzmq`. `wire` chooses.
A message is one or two frames (head, payload); anything longer is reported as malformed.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Protocol

Received = Callable[[bytes, bytes, memoryview | None], None]
"""Called with identity (empty on a connection), head and payload of each message.

The payload is valid during the call only.
"""
Malformed = Callable[[bytes, str], None]
"""Called with the identity and what is wrong with a message's frames."""


class NotSent(Exception):
    """A message could not be handed on: the connection is gone, or its queue is full."""


class Waitable(Protocol):
    """What both have in common. One owner makes every call, in the event loop."""

    fd: int
    """Readable when there may be something to do; -1 while there is nothing to wait for yet."""
    closed: bool

    @property
    def is_edge_triggered(self) -> bool:
        """Any call may hide from `fd` that a message has come.

        Then use `pending` or `drain` after each, before yielding to trio.
        """

    async def wait(self, seconds: float = math.inf) -> None:
        """Sleep until something may have come, `poke`, `close`, or *seconds* have passed.

        Only valid after `pending()` was false, or `drain` stopped below its limit.
        """

    def poke(self) -> None:
        """End a `wait` that is under way."""

    async def watch(self) -> None:
        """What has to go on beside it; started once by the owner.

        A connection's returns when it has ended, with `gone` set.
        """

    def close(self, linger_ms: int = 0) -> None:
        """Close it; what has not been sent has *linger_ms* to leave, at most. Idempotent."""


class Connection(Waitable, Protocol):
    """The dialling side: one connection for life. It does not reconnect.

    Whoever wants another connection makes another object, so that nothing of the old one's queue
    can reach the new one.
    """

    unreachable: bool
    """Whether nothing listens there at all."""
    gone: str
    """Why it has ended; empty while it has not."""

    @property
    def established(self) -> bool:
        """Whether the handshake was through."""

    def send(self, head: bytes, payload: bytes | None = None) -> None:
        """Send one message now, or as soon as it can be. Raises `NotSent`."""

    def readable(self) -> bool:
        """Whether something may have come, or what waits to be sent can go."""

    def drain(self, limit: int = 1024) -> int:
        """Hand over what has come, at most *limit* messages; how many it was.

        Fewer than *limit* means that there is nothing more. Called again from inside a callback
        it does nothing, because the outer call goes on.
        """


class Listening(Waitable, Protocol):
    """The listening side: all its connections, each known by an identity given to it here."""

    endpoint: str
    """Where it listens, with the port that it got."""

    @property
    def denied(self) -> int:
        """Connections refused for their key."""

    def send(self, head: bytes, identity: bytes) -> None:
        """Send one message to the connection called *identity*. Raises `NotSent`."""

    def pending(self) -> bool:
        """Whether a message can be received."""

    def receive(self) -> bool:
        """Receive one message and hand it over; False if there is none."""

    def readable(self) -> bool:
        """Whether something may have come: no more than `pending` costs, and may be less sure."""


class Seldom:
    """Lets one event through per interval, and counts the rest: for log lines that input causes."""

    def __init__(self, interval_s: float = 60.0) -> None:
        self._interval_ns = int(interval_s * 1e9)
        self._next_ns = 0
        self._suppressed = 0

    def allow(self) -> int | None:
        """How many were held back since the last one let through; None: hold this one back."""
        now = time.monotonic_ns()
        if now < self._next_ns:
            self._suppressed += 1
            return None
        self._next_ns = now + self._interval_ns
        suppressed, self._suppressed = self._suppressed, 0
        return suppressed
