"""A TCP proxy on loopback whose connections can be cut, stalled or refused.

It runs in a thread of its own, so tests of both kinds can use it, trio or not:

    with TcpProxy("127.0.0.1", port) as proxy:
        connect to proxy.port
        proxy.cut()            # every connection is reset, new ones are accepted
        proxy.cut_after(1000)  # the same, once that many more bytes have passed
        proxy.stall()          # nothing passes any more, connections stay up
        proxy.release()        # it passes again
        proxy.refuse()         # cut, and nobody listens until `accept()`
"""

from __future__ import annotations

import contextlib
import selectors
import socket
import struct
import threading
from collections.abc import Callable
from typing import Self

CHUNK = 16384
BACKLOG_MAX = 1 << 20
_RESET = struct.pack("ii", 1, 0)


class _Pipe:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source = source
        self.target = target
        self.backlog = bytearray()
        self.ended = False
        self.shut = False


class _Pair:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.pipes = (_Pipe(client, server), _Pipe(server, client))


class TcpProxy:
    """Forwards connections to `127.0.0.1:port` to *host*:*port*; see above for what else."""

    def __init__(self, host: str, port: int) -> None:
        self.target = (host, port)
        self.passed = 0
        """Bytes forwarded so far, both directions together."""
        self.tap: Callable[[bytes], object] | None = None
        """Called, in the proxy's thread, with all that passes."""
        self.accepted = 0
        self.cuts = 0
        self._listener = self._listen(0)
        self.port: int = self._listener.getsockname()[1]
        self.endpoint = f"tcp://127.0.0.1:{self.port}"
        self._pairs: list[_Pair] = []
        self._stalled = False
        self._budget: int | None = None
        self._orders: list[tuple[Callable[[], None], threading.Event]] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)

    @staticmethod
    def _listen(port: int) -> socket.socket:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(64)
        listener.setblocking(False)
        return listener

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._order(self._stop)
        self._thread.join(30)
        self._wake.close()

    def cut(self) -> None:
        """Reset every connection."""
        self._order(self._cut)

    def cut_after(self, count: int) -> None:
        """Reset every connection when *count* more bytes have passed; the last message is torn."""
        self._order(lambda: setattr(self, "_budget", count))

    def stall(self) -> None:
        """Let nothing pass, without closing anything."""
        self._order(lambda: setattr(self, "_stalled", True))

    def release(self) -> None:
        """End `stall`."""
        self._order(lambda: setattr(self, "_stalled", False))

    def refuse(self) -> None:
        """Reset every connection and stop listening."""

        def act() -> None:
            self._cut()
            self._listener.close()

        self._order(act)

    def accept(self) -> None:
        """End `refuse`."""

        def act() -> None:
            self._listener = self._listen(self.port)

        self._order(act)

    def close_inherited(self) -> None:
        """In a forked child: close what it has of it; a connection is cut when all have closed."""
        self._listener.close()
        for pair in self._pairs:
            for end in pair.sockets:
                end.close()

    # In the thread -------------------------------------------------------------------------------

    def _order(self, act: Callable[[], None]) -> None:
        done = threading.Event()
        with self._lock:
            self._orders.append((act, done))
        # Awake for another reason, it may have done as it was told by now, and be gone.
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            self._wake.send(b"x")
        if not done.wait(30):
            raise RuntimeError("the proxy's thread does not react")

    def _stop(self) -> None:
        self._stopping = True
        self._cut()
        self._listener.close()

    def _cut(self) -> None:
        self._budget = None
        self.cuts += 1
        for pair in self._pairs:
            for end in pair.sockets:
                with contextlib.suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.close()
        self._pairs.clear()

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
        finally:
            self._woken.close()

    def _turn(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, selectors.EVENT_READ)
            if self._listener.fileno() >= 0:
                selector.register(self._listener, selectors.EVENT_READ)
            for pair in self._pairs:
                for end, other in (pair.pipes, pair.pipes[::-1]):
                    wanted = 0
                    if not self._stalled:
                        if not end.ended and len(end.backlog) < BACKLOG_MAX:
                            wanted |= selectors.EVENT_READ
                        if other.backlog:  # what goes to this socket
                            wanted |= selectors.EVENT_WRITE
                    if wanted:
                        selector.register(end.source, wanted)
            ready = {key.fileobj for key, _ in selector.select()}
        if self._woken in ready:
            self._woken.recv(CHUNK)
        with self._lock:
            orders, self._orders = self._orders, []
        for act, done in orders:
            act()
            done.set()
        if self._stopping or orders:
            return
        if self._listener in ready:
            self._connect()
        if not self._stalled:
            for pair in list(self._pairs):
                if pair in self._pairs:  # not cut meanwhile
                    self._forward(pair)

    def _connect(self) -> None:
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        self.accepted += 1
        try:
            server = socket.create_connection(self.target, timeout=10)
        except OSError:
            client.close()
            return
        for end in (client, server):
            end.setblocking(False)
            with contextlib.suppress(OSError):  # reset already
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs.append(_Pair(client, server))

    def _forward(self, pair: _Pair) -> None:
        for pipe in pair.pipes:
            try:
                if not pipe.ended and len(pipe.backlog) < BACKLOG_MAX:
                    data = pipe.source.recv(CHUNK)
                    pipe.backlog += data
                    if self.tap is not None:
                        self.tap(data)
                    pipe.ended = not data
            except BlockingIOError:
                pass
            except OSError:
                pipe.ended = True
            if pipe.backlog and not self._push(pipe):
                return
            if pipe.ended and not pipe.backlog and not pipe.shut:
                pipe.shut = True
                with contextlib.suppress(OSError):
                    pipe.target.shutdown(socket.SHUT_WR)
        if all(pipe.shut for pipe in pair.pipes):
            for end in pair.sockets:
                end.close()
            self._pairs.remove(pair)

    def _push(self, pipe: _Pipe) -> bool:
        """Forward what there is; False if that used up the budget and everything was cut."""
        amount = len(pipe.backlog)
        if self._budget is not None:
            amount = min(amount, self._budget)
        try:
            sent = pipe.target.send(memoryview(pipe.backlog)[:amount]) if amount else 0
        except BlockingIOError:
            return True
        except OSError:
            pipe.ended = True
            pipe.backlog.clear()
            return True
        del pipe.backlog[:sent]
        self.passed += sent
        if self._budget is not None:
            self._budget -= sent
            if self._budget <= 0:
                self._cut()
                return False
        return True
