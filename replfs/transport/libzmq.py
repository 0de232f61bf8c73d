"""ZeroMQ sockets of libzmq under trio, each with one owner.

The file descriptor of a ZeroMQ socket is edge-triggered: it tells that commands for the socket
have come since the socket was last found empty. *Any* call on the socket may consume such a
command, `send` included; a message announced by it then waits in the socket, and nobody is woken.
Hence the rule: after any call, receive until `pending()` is false before yielding to trio.
`poke()` and a coarse timer are the net beneath it.
"""

from __future__ import annotations

import contextlib
import math
import select
from collections.abc import Callable
from typing import Final, cast

import trio
import zmq
from zmq.utils.monitor import recv_monitor_message

from replfs.errors import UsageError
from replfs.transport.security import Curve, Zap
from replfs.transport.socket import Malformed, NotSent, Received

NO_COPY_MIN: Final = 512 << 10
"""Bytes from which a payload is sent without copying it; below, the copy is cheaper."""
RECEIVE_QUEUE: Final = 64
"""Messages that ZeroMQ reads ahead per connection: bounds what a stranger can make it hold."""
SEND_QUEUE: Final = 4096

_NOBLOCK: Final = int(zmq.NOBLOCK)
_MORE: Final = int(zmq.NOBLOCK | zmq.SNDMORE)
_POLLIN: Final = int(zmq.POLLIN)


def _prepare(socket: zmq.Socket[bytes], endpoint: str, frame_max: int) -> None:
    """Options that both sides set before they connect or bind.

    IPv6 is off where *endpoint* is an IPv4 address, so that it can be used, and reads back, as one.
    """
    host = endpoint.partition("://")[2].rpartition(":")[0]
    ipv4 = host == "*" or all(part.isdigit() for part in host.split("."))
    socket.setsockopt(zmq.IPV6, 0 if ipv4 else 1)
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.MAXMSGSIZE, frame_max)


class _ZmqSocket:
    """One ZeroMQ socket. Neither thread-safe nor shared: its owner makes every call.

    Args:
        socket: connected or bound by the caller; closed by `close`.
        received: called for each message, inside `receive` and `drain`.
        malformed: called instead for a message with too many frames.
    """

    is_edge_triggered: Final = True

    def __init__(self, socket: zmq.Socket[bytes], received: Received, malformed: Malformed) -> None:
        self._socket = socket
        self._received = received
        self._malformed = malformed
        self._routed = socket.getsockopt(zmq.TYPE) == zmq.ROUTER
        self.fd = cast(int, socket.getsockopt(zmq.FD))
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)
        self._scope: trio.CancelScope | None = None
        self._draining = False
        self.closed = False

    def pending(self) -> bool:
        """Whether a message can be received. False re-arms the descriptor (see above)."""
        return not self.closed and bool(cast(int, self._socket.getsockopt(zmq.EVENTS)) & _POLLIN)

    def readable(self) -> bool:
        """Whether the descriptor says that something may have come: a third of `pending`'s cost."""
        return bool(self._poll.poll(0))

    def receive(self) -> bool:
        """Receive one message and hand it over; False if there is none."""
        recv = self._socket.recv
        identity = b""
        try:
            if self._routed:
                identity = recv(_NOBLOCK)
                frame = recv(_NOBLOCK, copy=False)
            else:
                frame = recv(_NOBLOCK, copy=False)
        except zmq.Again:
            return False
        if not frame.more:
            self._received(identity, frame.bytes, None)
            return True
        payload = recv(_NOBLOCK, copy=False)
        if not payload.more:
            self._received(identity, frame.bytes, payload.buffer)
            return True
        frames = 2
        while payload.more:
            payload = recv(_NOBLOCK, copy=False)
            frames += 1
        self._malformed(identity, f"a message of {frames} frames")
        return True

    def drain(self, limit: int = 1024) -> int:
        """Hand over what has come, at most *limit* messages; how many it was.

        Fewer than *limit* means that the socket is empty. Called again from inside a callback it
        does nothing, because the outer call goes on until the socket is empty.
        """
        if self._draining:
            return 0
        self._draining = True
        count = 0
        try:
            while count < limit and self.pending() and self.receive():
                count += 1
        finally:
            self._draining = False
        return count

    async def wait(self, seconds: float = math.inf) -> None:
        """Sleep until something may have come, `poke`, `close`, or *seconds* have passed.

        Only valid after `pending()` was false, or `drain` stopped below its limit.
        """
        if self.closed:
            await trio.lowlevel.checkpoint()
            return
        closed = contextlib.suppress(trio.ClosedResourceError)
        with trio.move_on_after(seconds) as self._scope, closed:
            await trio.lowlevel.wait_readable(self.fd)
        self._scope = None

    def poke(self) -> None:
        """End a `wait` that is under way."""
        if self._scope is not None:
            self._scope.cancel()

    def close(self, linger_ms: int = 0) -> None:
        """Close it; what has not been sent has *linger_ms* to leave. Idempotent."""
        if self.closed:
            return
        self.closed = True
        trio.lowlevel.notify_closing(self.fd)
        self._socket.close(linger_ms)


class ZmqConnection(_ZmqSocket):
    """A DEALER with one connection for life; see `socket.Connection`."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        received: Received,
        malformed: Malformed,
        *,
        secure: Callable[[zmq.Socket[bytes]], None] | None,
        frame_max: int,
    ) -> None:
        """Start connecting. Raises `UsageError` if *endpoint* cannot be understood."""
        socket = context.socket(zmq.DEALER)
        self._monitor: zmq.Socket[bytes] | None = None
        self.established = False
        self.unreachable = False
        self.gone = ""
        try:
            _prepare(socket, endpoint, frame_max)
            socket.setsockopt(zmq.RECONNECT_IVL, -1)
            socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the link's window
            socket.setsockopt(zmq.RCVHWM, 0)  # bounded by the same: an answer an operation
            if secure is not None:
                secure(socket)
            self._monitor = socket.get_monitor_socket(_MONITORED)
            socket.connect(endpoint)
        except BaseException as error:
            self._stop_monitor(socket)
            socket.close(0)
            if isinstance(error, zmq.ZMQError):
                raise UsageError(f"{endpoint} cannot be used: {error.strerror}") from error
            raise
        super().__init__(socket, received, malformed)

    def send(self, head: bytes, payload: bytes | None = None) -> None:
        """Queue one message. Raises `NotSent`."""
        socket = self._socket
        try:
            if payload is None:
                socket.send(head, _NOBLOCK)
                return
            socket.send(head, _MORE)
            socket.send(payload, _NOBLOCK, copy=len(payload) < NO_COPY_MIN)
        except zmq.ZMQError as error:
            raise NotSent(error.strerror) from error

    async def watch(self) -> None:
        """Follow the connection's fate; returns when it has ended, with `gone` set."""
        monitor = self._monitor
        if monitor is None:
            return
        fd = cast(int, monitor.getsockopt(zmq.FD))
        while not self.closed and not self.gone:
            while not self.gone and cast(int, monitor.getsockopt(zmq.EVENTS)) & _POLLIN:
                event = recv_monitor_message(monitor, zmq.NOBLOCK)["event"]
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    self.established = True
                else:
                    self.unreachable = event == zmq.Event.CLOSED and not self.established
                    self.gone = _ENDINGS.get(event, "the connection was lost")
            if not self.gone:
                try:
                    await trio.lowlevel.wait_readable(fd)
                except trio.ClosedResourceError:
                    return
        self.poke()

    def close(self, linger_ms: int = 0) -> None:
        """Close it; what has not been sent has *linger_ms* to leave. Idempotent."""
        if not self.closed:
            self._stop_monitor(self._socket)
        super().close(linger_ms)

    def _stop_monitor(self, socket: zmq.Socket[bytes]) -> None:
        if self._monitor is not None:
            monitor, self._monitor = self._monitor, None
            trio.lowlevel.notify_closing(cast(int, monitor.getsockopt(zmq.FD)))
            socket.disable_monitor()
            monitor.close(0)


_ENDINGS: Final[dict[int, str]] = {
    zmq.Event.CLOSED: "connection refused, or no way to the peer",
    zmq.Event.DISCONNECTED: "the connection broke",
    zmq.Event.HANDSHAKE_FAILED_AUTH: "the peer does not accept this node's key",
    zmq.Event.HANDSHAKE_FAILED_PROTOCOL: "the peer does not speak the same security protocol",
    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL: "the security handshake failed",
}
_MONITORED: Final = int(
    zmq.Event.HANDSHAKE_SUCCEEDED
    | zmq.Event.CLOSED
    | zmq.Event.DISCONNECTED
    | zmq.Event.HANDSHAKE_FAILED_AUTH
    | zmq.Event.HANDSHAKE_FAILED_PROTOCOL
    | zmq.Event.HANDSHAKE_FAILED_NO_DETAIL
)


class ZmqListening(_ZmqSocket):
    """A bound ROUTER; see `socket.Listening`.

    Raises:
        UsageError: it cannot listen there.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        received: Received,
        malformed: Malformed,
        *,
        curve: Curve | None,
        frame_max: int,
        heartbeat_s: float,
        silence_s: float,
    ) -> None:
        self._zap: Zap | None = None
        socket = context.socket(zmq.ROUTER)
        try:
            _prepare(socket, endpoint, frame_max)
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
            # No ROUTER_HANDOVER: links leave their identity to this side, so a connection that
            # claims one that is in use is a stranger's and must not take it over.
            socket.setsockopt(zmq.RCVHWM, RECEIVE_QUEUE)
            socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
            # Connections that died without a word are found by ZeroMQ's own heartbeat.
            socket.setsockopt(zmq.HEARTBEAT_IVL, max(1, int(heartbeat_s * 1000)))
            socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, max(1, int(silence_s * 1000)))
            if curve is not None:
                self._zap = Zap(context, curve.allowed)
                curve.prepare_listening(socket)
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            socket.close(0)
            if self._zap is not None:
                self._zap.close()
            raise UsageError(f"cannot listen on {endpoint}: {error.strerror}") from error
        self.endpoint = bytes(socket.getsockopt(zmq.LAST_ENDPOINT)).rstrip(b"\0").decode()
        super().__init__(socket, received, malformed)

    @property
    def denied(self) -> int:
        """Connections refused for their key."""
        return 0 if self._zap is None else self._zap.denied

    def send(self, head: bytes, identity: bytes) -> None:
        """Queue one message to the connection called *identity*. Raises `NotSent`."""
        try:
            self._socket.send(identity, _MORE)
            self._socket.send(head, _NOBLOCK)
        except zmq.ZMQError as error:
            raise NotSent(error.strerror) from error

    async def watch(self) -> None:
        """Say who may connect."""
        if self._zap is not None:
            await self._zap.run()
