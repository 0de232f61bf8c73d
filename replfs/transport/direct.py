"""ZeroMQ's protocol spoken by this process itself, on sockets under trio.

libzmq moves every message through a thread of its own on each side, and each hand-over wakes a
core: four wake-ups a round trip more than the two that the network needs. Here a message goes from
the caller's hand into the kernel, and from the kernel into one buffer, from which it is handed
over. The other side may be libzmq as well (`zmtp`).

What cannot leave at once is queued; a connection's bytes are bounded by the link's window, a
listener's by `QUEUE_MAX`. Descriptors are level-triggered: nothing is lost by not looking.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import select
import socket
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from replfs.errors import ProtocolError
from replfs.transport import zmtp
from replfs.transport.endpoint import Address, bound_to, connected_to, find_dead, name_of
from replfs.transport.socket import Malformed, NotSent, Received

QUEUE_MAX: Final = 64 << 20
"""Bytes that a listener queues for one connection before it refuses to send more."""
CONNECTIONS_MAX: Final = 64
"""Connections to a listener. One more, and the oldest that no session needs is closed."""
HANDSHAKE_S: Final = 10.0
"""How long a connection may take to say who it is."""
_EVENTS: Final = 16
_IDENTITY_BYTES: Final = 8
_READ: Final = select.EPOLLIN
_WRITE: Final = select.EPOLLIN | select.EPOLLOUT

BROKE: Final = "the connection broke"


class _Channel:
    """One connection, from greeting to end. It never waits, and knows nothing of who does."""

    __slots__ = (
        "_decoder", "_early", "_queue_max", "_socket", "gone", "is_empty", "queue", "queued",
    )  # fmt: skip

    def __init__(
        self, connected: socket.socket, socket_type: bytes, frame_max: int, queue_max: int
    ) -> None:
        self._socket = connected
        self._decoder = zmtp.Decoder(socket_type, frame_max)
        self._early: list[bytes] = []
        """What was to be sent before the handshake was through."""
        self._queue_max = queue_max
        self.gone = ""
        """Why it has ended. What came before may still be taken."""
        self.is_empty = False
        """Whether the last `fill` took all that there was."""
        self.queue: deque[memoryview] = deque()
        """What the kernel has not taken yet."""
        self.queued = 0
        """Bytes in the queue."""
        self._put(zmtp.opening(socket_type))
        self.flush()

    @property
    def ready(self) -> bool:
        """Whether the handshake is through."""
        return self._decoder.ready

    def send(self, head: bytes, payload: bytes | None) -> None:
        """Into the kernel, and what it does not take into the queue. Raises `NotSent`."""
        if self.gone:
            raise NotSent(self.gone)
        first, second = zmtp.encode(head, payload)
        if not self._decoder.ready:
            self._early += [first] if second is None else [first, second]
            return
        sent = 0
        if not self.queue:
            try:
                if second is None:
                    sent = self._socket.send(first)
                else:
                    sent = self._socket.sendmsg((first, second))
            except BlockingIOError:
                pass
            except OSError as error:
                self.gone = BROKE
                raise NotSent(BROKE) from error
        elif self.queued > self._queue_max:
            raise NotSent(f"{self.queued} bytes are waiting already")
        if sent < len(first):
            self._put(memoryview(first)[sent:])
            sent = len(first)
        if second is not None and sent - len(first) < len(second):
            self._put(memoryview(second)[sent - len(first) :])

    def _put(self, data: bytes | memoryview) -> None:
        self.queue.append(memoryview(data))
        self.queued += len(data)

    def flush(self) -> None:
        """Send what is queued, as far as it goes."""
        queue = self.queue
        try:
            while queue:
                sent = self._socket.send(queue[0])
                self.queued -= sent
                if sent < len(queue[0]):
                    queue[0] = queue[0][sent:]
                else:
                    queue.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.gone = self.gone or BROKE

    def fill(self) -> None:
        """Receive once, without waiting."""
        space = self._decoder.space()
        try:
            count = self._socket.recv_into(space)
        except BlockingIOError:
            self.is_empty = True
            return
        except OSError:
            count = 0
        if count:
            self._decoder.feed(count)
        else:
            self.gone = self.gone or BROKE
        self.is_empty = count < len(space)

    def next(self) -> zmtp.Message | None:
        """The next message that has come in whole."""
        decoder = self._decoder
        try:
            message = decoder.next()
        except ProtocolError as error:
            self.gone = self.gone or f"what answers is no peer: {error}"
            return None
        if decoder.replies or (self._early and decoder.ready):
            for data in (*self._early, decoder.replies):
                self._put(data)
            self._early.clear()
            decoder.replies = b""
            self.flush()
        return message

    def close(self) -> None:
        """Close it; what the kernel has taken still leaves, what is queued does not."""
        self.gone = self.gone or "closed"
        self.queue.clear()
        # Relies on: close(2) may reset a connection with unread input, and a reset overtakes
        # nothing that was sent before it.
        self._socket.close()


class DirectConnection:
    """A connection to a listener; see `socket.Connection`. `watch` opens it.

    Args:
        endpoint: where to connect.
        received: called for each message, inside `drain`.
        malformed: called instead for a message with too many frames.
        frame_max: bytes of a frame that is accepted.
    """

    is_edge_triggered: Final = False

    def __init__(
        self, endpoint: Address, received: Received, malformed: Malformed, *, frame_max: int
    ) -> None:
        self._address = endpoint
        self._received = received
        self._malformed = malformed
        self._frame_max = frame_max
        self._channel: _Channel | None = None
        self._early: list[tuple[bytes, bytes | None]] = []
        self._poll = select.poll()
        self._scope: trio.CancelScope | None = None
        self._blocked = trio.Event()
        """Set while something is queued, and when the connection has ended."""
        self._watching = trio.CancelScope()
        self._draining = False
        self.fd = -1
        self.closed = False
        self.unreachable = False
        self.gone = ""

    @property
    def established(self) -> bool:
        """Whether the handshake was through."""
        return self._channel is not None and self._channel.ready

    def send(self, head: bytes, payload: bytes | None = None) -> None:
        """Send one message now, or as soon as it can be. Raises `NotSent`."""
        channel = self._channel
        if channel is None:
            if self.gone or self.closed:
                raise NotSent(self.gone or "closed")
            self._early.append((head, payload))
            return
        channel.send(head, payload)
        if channel.queue:
            self._blocked.set()

    def readable(self) -> bool:
        """Whether something may have come, or what waits to be sent can go."""
        channel = self._channel
        return channel is not None and bool(channel.queue or self._poll.poll(0))

    def drain(self, limit: int = 1024) -> int:
        """Hand over what has come, at most *limit* messages; how many it was."""
        channel = self._channel
        if channel is None or self._draining or self.closed:
            return 0
        self._draining = True
        channel.is_empty = False
        count = 0
        received = self._received
        try:
            if channel.queue:
                channel.flush()
            while True:
                message = channel.next()
                if message is None:
                    if channel.is_empty or channel.gone or self.closed:
                        break
                    channel.fill()
                    continue
                count += 1
                payload = message.payload
                if message.wrong:
                    self._malformed(b"", message.wrong)
                else:
                    received(b"", message.head, payload)
                    if payload is not None:
                        payload.release()
                if count >= limit or self.closed:
                    return count
        finally:
            self._draining = False
        if channel.queue:
            self._blocked.set()
        if channel.gone:
            self._ended(channel.gone)
        return count

    async def wait(self, seconds: float = math.inf) -> None:
        """Sleep until something may have come, `poke`, `close`, or *seconds* have passed."""
        if self.closed or self.gone:
            await trio.lowlevel.checkpoint()
            return
        try:
            if seconds == math.inf and self.fd >= 0:
                # Without a scope, which costs more than the wait, before each of most messages.
                await trio.lowlevel.wait_readable(self.fd)
                return
            with trio.move_on_after(seconds) as self._scope:
                if self.fd < 0:
                    await trio.sleep_forever()
                await trio.lowlevel.wait_readable(self.fd)
        except trio.ClosedResourceError:  # by `poke` or `close`
            pass
        self._scope = None

    def poke(self) -> None:
        """End a `wait` that is under way."""
        if self._scope is not None:
            self._scope.cancel()
        elif self.fd >= 0 and not self.closed:
            trio.lowlevel.notify_closing(self.fd)

    async def watch(self) -> None:
        """Connect, and send what is queued when it can go; returns at the end, with `gone` set."""
        with self._watching:
            try:
                connected = await self._connect()
            except OSError as error:
                self.unreachable = True
                self._ended(f"no way to the peer: {error.strerror}")
                return
            if self.closed:
                connected.close()
                return
            await self._send_queued(self._start(connected))

    def _start(self, connected: socket.socket) -> _Channel:
        channel = _Channel(connected, b"DEALER", self._frame_max, 1 << 62)
        with contextlib.suppress(NotSent):  # broken already, which is told below
            for head, payload in self._early:
                channel.send(head, payload)
        self._early.clear()
        self.fd = connected.fileno()
        self._poll.register(self.fd, select.POLLIN)
        self._channel = channel
        if channel.gone:
            self._ended(channel.gone)
        else:
            self.poke()
        return channel

    async def _send_queued(self, channel: _Channel) -> None:
        while not self.gone:
            if channel.queue:
                with contextlib.suppress(trio.ClosedResourceError):  # by `poke`
                    await trio.lowlevel.wait_writable(self.fd)
                channel.flush()
                if channel.gone:
                    self._ended(channel.gone)
            else:
                self._blocked = trio.Event()
                await self._blocked.wait()

    async def _connect(self) -> socket.socket:
        """A connected socket. Raises OSError."""
        address = self._address
        if address.family is not socket.AF_UNSPEC:
            return await connected_to(address.family, address.target)
        found = await trio.socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
        failure: OSError = OSError(errno.EHOSTUNREACH, os.strerror(errno.EHOSTUNREACH))
        for family, _, _, _, target in found:
            try:
                return await connected_to(family, target)
            except OSError as error:
                failure = error
        raise failure

    def _ended(self, reason: str) -> None:
        self.gone = self.gone or reason
        self._blocked.set()
        self.poke()

    def close(self, linger_ms: int = 0) -> None:
        """Close it. What is queued is dropped, whatever *linger_ms* says. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._watching.cancel()
        self.poke()
        if self._channel is not None:
            trio.lowlevel.notify_closing(self.fd)
            self._channel.close()


class _Guest:
    """One connection of a listener."""

    __slots__ = ("channel", "fd", "identity", "since", "writing")

    def __init__(self, channel: _Channel, fd: int) -> None:
        self.channel = channel
        self.fd = fd
        self.identity = secrets.token_bytes(_IDENTITY_BYTES)
        self.since = time.monotonic()
        self.writing = False
        """Whether it waits until it can be written to."""


class DirectListening:
    """A listener's socket and all its connections; see `socket.Listening`.

    Args:
        endpoint: where to listen.
        received: called for each message, inside `receive`.
        malformed: called instead for a message with too many frames.
        frame_max: bytes of a frame that is accepted.
        silence_s: how long a connection may be dead before it is closed.
        is_needed: whether the connection of this identity must not be closed to make room.

    Raises:
        UsageError: it cannot listen there.
    """

    is_edge_triggered: Final = False

    def __init__(
        self,
        endpoint: Address,
        received: Received,
        malformed: Malformed,
        *,
        frame_max: int,
        silence_s: float,
        is_needed: Callable[[bytes], bool],
    ) -> None:
        self._received = received
        self._malformed = malformed
        self._frame_max = frame_max
        self._silence_s = silence_s
        self._is_needed = is_needed
        self._socket = bound_to(endpoint)
        self._path = endpoint.host if endpoint.family is socket.AF_UNIX else ""
        self.endpoint = name_of(self._socket, endpoint)
        self._guests: dict[int, _Guest] = {}
        self._by_identity: dict[bytes, _Guest] = {}
        self._ready: deque[tuple[_Guest, zmtp.Message]] = deque()
        """Of each connection at most one message that has come in whole."""
        self._taken: _Guest | None = None
        """Whose message was handed over last; whether there is another is looked for in time."""
        self._epoll = select.epoll()
        self._epoll.register(self._socket, _READ)
        self._accepts = True
        self._scope: trio.CancelScope | None = None
        self.fd = self._epoll.fileno()
        self.denied = 0
        self.closed = False

    def send(self, head: bytes, identity: bytes) -> None:
        """Send one message to the connection called *identity*. Raises `NotSent`."""
        guest = self._by_identity.get(identity)
        if guest is None:
            raise NotSent("this connection is closed")
        channel = guest.channel
        channel.send(head, None)
        if channel.queue:
            self._watch_writing(guest)

    def pending(self) -> bool:
        """Whether a message can be received."""
        taken = self._taken
        if taken is not None:
            self._taken = None
            if taken.identity in self._by_identity:
                self._advance(taken)
        return bool(self._ready) or self._look()

    def receive(self) -> bool:
        """Receive one message and hand it over; False if there is none."""
        if not self.pending():
            return False
        guest, message = self._ready.popleft()
        self._taken = guest
        payload = message.payload
        if message.wrong:
            self._malformed(guest.identity, message.wrong)
        else:
            self._received(guest.identity, message.head, payload)
            if payload is not None:
                payload.release()
        return True

    def readable(self) -> bool:
        """Whether a message can be received."""
        return self.pending()

    def _look(self) -> bool:
        """Receive from every connection that has something; whether a message is there now.

        Only while `_ready` is empty: a message that waits in it lies in its connection's buffer.
        """
        if self.closed or self._ready:
            return bool(self._ready)
        for fd, events in self._epoll.poll(0, _EVENTS):
            guest = self._guests.get(fd)
            if guest is None:
                if fd == self._socket.fileno():
                    self._accept()
                continue
            if events & select.EPOLLOUT:
                guest.channel.flush()
            if events & ~select.EPOLLOUT:
                guest.channel.fill()
            self._advance(guest)
        return bool(self._ready)

    def _advance(self, guest: _Guest) -> None:
        """Take the next message of a connection, or the consequences if there will be none."""
        channel = guest.channel
        message = channel.next()
        if message is not None:
            self._ready.append((guest, message))
        elif channel.gone:
            self._drop(guest)
            return
        if bool(channel.queue) is not guest.writing:
            self._watch_writing(guest)

    def _watch_writing(self, guest: _Guest) -> None:
        writing = bool(guest.channel.queue)
        if writing is not guest.writing:
            guest.writing = writing
            self._epoll.modify(guest.fd, _WRITE if writing else _READ)

    # Connections -------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connected, _ = self._socket.accept()
        except BlockingIOError:
            return
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS):
                self._epoll.unregister(self._socket)  # `watch` tries again
                self._accepts = False
            return
        connected.setblocking(False)
        find_dead(connected, self._silence_s)
        while len(self._guests) >= CONNECTIONS_MAX and self._make_room():
            pass
        channel = _Channel(connected, b"ROUTER", self._frame_max, QUEUE_MAX)
        guest = _Guest(channel, connected.fileno())
        self._guests[guest.fd] = guest
        self._by_identity[guest.identity] = guest
        self._epoll.register(guest.fd, _READ)
        self._watch_writing(guest)

    def _make_room(self) -> bool:
        for guest in self._guests.values():
            if not self._is_needed(guest.identity):
                self._drop(guest)
                return True
        return False

    def _drop(self, guest: _Guest) -> None:
        """Close a connection. What of it waits in `_ready` is still handed over."""
        del self._guests[guest.fd]
        del self._by_identity[guest.identity]
        self._epoll.unregister(guest.fd)
        guest.channel.close()

    async def watch(self) -> None:
        """Close connections that do not say who they are, and accept again after a shortage."""
        while not self.closed:
            await trio.sleep(1.0)
            late = time.monotonic() - HANDSHAKE_S
            for guest in list(self._guests.values()):
                if not guest.channel.ready and guest.since < late:
                    self._drop(guest)
            if not self._accepts and not self.closed:
                self._epoll.register(self._socket, _READ)
                self._accepts = True

    # Waiting -------------------------------------------------------------------------------------

    async def wait(self, seconds: float = math.inf) -> None:
        """Sleep until something may have come, `poke`, `close`, or *seconds* have passed."""
        if self.closed:
            await trio.lowlevel.checkpoint()
            return
        try:
            if seconds == math.inf:
                await trio.lowlevel.wait_readable(self.fd)
                return
            with trio.move_on_after(seconds) as self._scope:
                await trio.lowlevel.wait_readable(self.fd)
        except trio.ClosedResourceError:  # by `poke` or `close`
            pass
        self._scope = None

    def poke(self) -> None:
        """End a `wait` that is under way."""
        if self._scope is not None:
            self._scope.cancel()
        elif not self.closed:
            trio.lowlevel.notify_closing(self.fd)

    def close(self, linger_ms: int = 0) -> None:
        """Close it and all connections. What is queued is dropped, whatever *linger_ms* says."""
        if self.closed:
            return
        self.closed = True
        self._ready.clear()
        trio.lowlevel.notify_closing(self.fd)
        for guest in list(self._guests.values()):
            self._drop(guest)
        self._socket.close()
        self._epoll.close()
        if self._path:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
