"""`--metrics`: what Prometheus asks over HTTP, answered by the control socket's thread.

So a node whose event loop hangs still answers, with `replfs_hung 1`. It knows `GET /metrics` and
nothing else, answers one request a connection, and reads nothing that is longer than a request.
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import time
from collections.abc import Callable
from typing import Final

from replfs.errors import UsageError
from replfs.node.operating.metrics import CONTENT_TYPE

CONNECTIONS_MAX: Final = 16
REQUEST_MAX: Final = 16 << 10
PATIENCE_S: Final = 10.0
"""How long a request may take to arrive, and its answer to be taken."""


class _Visitor:
    """One connection."""

    __slots__ = ("incoming", "outgoing", "socket", "until")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.incoming = b""
        self.outgoing = b""
        self.until = time.monotonic() + PATIENCE_S


class Scrape:
    """The listening end. It has no thread: its owner's selector calls `ready` and `expire`.

    Args:
        address: `HOST:PORT`, as `parse_address` takes it; port 0: any.
        page: makes the text of `/metrics`.
    """

    def __init__(self, address: str, page: Callable[[], str]) -> None:
        self._page = page
        self._visitors: dict[int, _Visitor] = {}
        self._selector: selectors.BaseSelector | None = None
        host, _, port = address.rpartition(":")
        try:
            found = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
            self._listener = socket.create_server(
                found[0][4][:2], family=found[0][0], backlog=CONNECTIONS_MAX
            )
        except OSError as error:
            raise UsageError(f"metrics: {address} cannot be used: {error.strerror}") from None
        self._listener.setblocking(False)
        bound = self._listener.getsockname()
        self.address = f"[{bound[0]}]:{bound[1]}" if ":" in bound[0] else f"{bound[0]}:{bound[1]}"
        """Where it listens."""

    def open(self, selector: selectors.BaseSelector) -> None:
        """From now on be called by *selector*'s owner, through `key.data`."""
        self._selector = selector
        selector.register(self._listener, selectors.EVENT_READ, self.ready)

    def close(self) -> None:
        """End everything. Idempotent."""
        for visitor in list(self._visitors.values()):
            self._leave(visitor)
        self._listener.close()

    @property
    def next_s(self) -> float | None:
        """Seconds until `expire` is due; None: never."""
        if not self._visitors:
            return None
        return min(visitor.until for visitor in self._visitors.values()) - time.monotonic()

    def expire(self) -> None:
        """Send those away who take too long."""
        now = time.monotonic()
        for visitor in list(self._visitors.values()):
            if visitor.until <= now:
                self._leave(visitor)

    def ready(self, fd: int) -> None:
        """Something may be done with descriptor *fd*."""
        if fd == self._listener.fileno():
            self._accept()
        elif fd in self._visitors:
            visitor = self._visitors[fd]
            try:
                self._talk(visitor)
            except BlockingIOError:
                return
            except OSError:
                self._leave(visitor)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            connection, _ = self._listener.accept()
            if self._selector is None or len(self._visitors) >= CONNECTIONS_MAX:
                connection.close()
                return
            connection.setblocking(False)
            self._visitors[connection.fileno()] = _Visitor(connection)
            self._selector.register(connection, selectors.EVENT_READ, self.ready)

    def _talk(self, visitor: _Visitor) -> None:
        if visitor.outgoing:
            self._send(visitor)
            return
        chunk = visitor.socket.recv(REQUEST_MAX)
        visitor.incoming += chunk
        if b"\r\n\r\n" in visitor.incoming or b"\n\n" in visitor.incoming:
            visitor.outgoing = self._answer(visitor.incoming.split(b"\n", 1)[0])
            if self._selector is not None:
                self._selector.modify(visitor.socket, selectors.EVENT_WRITE, self.ready)
            self._send(visitor)
        elif not chunk or len(visitor.incoming) > REQUEST_MAX:
            self._leave(visitor)

    def _send(self, visitor: _Visitor) -> None:
        sent = visitor.socket.send(visitor.outgoing, socket.MSG_NOSIGNAL)
        visitor.outgoing = visitor.outgoing[sent:]
        if not visitor.outgoing:
            self._leave(visitor)

    def _leave(self, visitor: _Visitor) -> None:
        if self._visitors.pop(visitor.socket.fileno(), None) is None:
            return
        if self._selector is not None:
            self._selector.unregister(visitor.socket)
        visitor.socket.close()

    def _answer(self, line: bytes) -> bytes:
        words = line.split()
        method = words[0] if words else b""
        path = words[1].split(b"?", 1)[0] if len(words) == 3 else b""
        if method not in {b"GET", b"HEAD"}:
            status, text = "405 Method Not Allowed", "only GET is understood\n"
        elif path != b"/metrics":
            status, text = "404 Not Found", "there is /metrics, and nothing else\n"
        else:
            status, text = "200 OK", self._page()
        body = text.encode()
        kind = CONTENT_TYPE if status.startswith("200") else "text/plain; charset=utf-8"
        head = (
            f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n\r\n"
        )
        return head.encode() + (b"" if method == b"HEAD" else body)
