"""A TCP proxy on loopback that passes everything on later, in both directions.

    python delay_proxy.py MILLISECONDS LISTEN:TARGET...

Threads, because a sleeping thread wakes within some 60 us of the time, an event loop within 1 ms.
It imports nothing of this package: it is a program of its own.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import sys
import threading
import time
from typing import Final

_CHUNK: Final = 1 << 18
_CHUNKS: Final = 1024


def _forward(source: socket.socket, target: socket.socket, seconds: float) -> None:
    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(_CHUNKS)

    def send() -> None:
        while True:
            due, data = waiting.get()
            if (left := due - time.monotonic()) > 0:
                time.sleep(left)
            if not data:
                with contextlib.suppress(OSError):
                    target.shutdown(socket.SHUT_WR)
                return
            try:
                target.sendall(data)
            except OSError:
                return

    threading.Thread(target=send, daemon=True).start()
    data = b"x"
    while data:
        try:
            data = source.recv(_CHUNK)
        except OSError:
            data = b""
        waiting.put((time.monotonic() + seconds, data))


def _accept(listener: socket.socket, target: int, seconds: float) -> None:
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", target))
        for one, other in ((near, far), (far, near)):
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=_forward, args=(one, other, seconds), daemon=True).start()


def main(arguments: list[str]) -> None:
    """Run proxies until killed."""
    seconds = float(arguments[0]) / 1000
    threads = []
    for pair in arguments[1:]:
        port, _, target = pair.partition(":")
        listener = socket.create_server(("127.0.0.1", int(port)))
        threads.append(threading.Thread(target=_accept, args=(listener, int(target), seconds)))
    for thread in threads:
        thread.start()
    print("listening", flush=True)
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(sys.argv[1:])
