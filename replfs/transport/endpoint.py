"""Endpoints: what they mean, and the kernel's sockets for them."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import Final, NamedTuple

import trio

from replfs.errors import UsageError

KERNEL_BUFFER: Final = 4 << 20
"""Bytes that the kernel may hold, in each direction of each connection."""
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_BACKLOG: Final = 64


class Address(NamedTuple):
    """An endpoint taken apart: for tcp host and port, for ipc a path."""

    family: socket.AddressFamily
    """AF_UNSPEC for a name that has to be looked up."""
    host: str
    port: int
    text: str

    @property
    def target(self) -> tuple[str, int] | str:
        """What bind(2) and connect(2) take."""
        return self.host if self.family is socket.AF_UNIX else (self.host, self.port)


def parse(endpoint: str, *, listening: bool) -> Address | None:
    """*endpoint* taken apart; None if only libzmq knows what it means, or nobody."""
    scheme, _, rest = endpoint.partition("://")
    if scheme == "ipc":
        usable = rest.startswith("/")
        return Address(socket.AF_UNIX, rest, 0, endpoint) if usable else None
    host, colon, port_text = rest.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if listening and port_text == "*":
        port_text = "0"
    if scheme != "tcp" or not colon or not port_text.isdecimal() or int(port_text) > 0xFFFF:
        return None
    port = int(port_text)
    if listening and host == "*":
        host = "0.0.0.0"  # noqa: S104 - asked for
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, host)
            return Address(family, host, port, endpoint)
    if listening or not port or not all(part.isalnum() for part in _labels(host)):
        return None
    return Address(socket.AF_UNSPEC, host, port, endpoint)


def _labels(host: str) -> list[str]:
    return [part.replace("-", "a").replace("_", "a") for part in host.rstrip(".").split(".")]


async def connected_to(family: socket.AddressFamily, target: object) -> socket.socket:
    """A non-blocking socket with a connection. Raises OSError if there is none to be had."""
    made = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        _tune(made)
        code = made.connect_ex(target)  # type: ignore[arg-type]  # whatever this family takes
        if code == errno.EINPROGRESS:
            await trio.lowlevel.wait_writable(made)
            code = made.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
    except BaseException:
        made.close()
        raise
    return made


def _tune(made: socket.socket) -> None:
    """Before it is connected, or listens: no delay, and room for a message of any size.

    With less room a large message goes in many steps, and both sides are woken for each. Without
    the right to ask for so much the kernel's own tuning is better than what could be asked for.
    """
    with contextlib.suppress(PermissionError):
        made.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, KERNEL_BUFFER)
        made.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, KERNEL_BUFFER)
    if made.family is not socket.AF_UNIX:
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def bound_to(address: Address) -> socket.socket:
    """A non-blocking socket that listens. Raises `UsageError` if it cannot be."""
    made = socket.socket(address.family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        if address.family is socket.AF_UNIX:
            _clear_path(address.host)
        else:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _tune(made)
        made.bind(address.target)
        made.listen(_BACKLOG)
    except OSError as error:
        made.close()
        raise UsageError(f"cannot listen on {address.text}: {error.strerror}") from error
    return made


def _clear_path(path: str) -> None:
    """A socket that a process left behind is in the way, anything else stays."""
    with contextlib.suppress(OSError):
        if stat.S_ISSOCK(os.lstat(path).st_mode):
            os.unlink(path)


def name_of(bound: socket.socket, address: Address) -> str:
    """The endpoint of a socket that listens, with the port that it got."""
    if address.family is socket.AF_UNIX:
        return address.text
    host, port = bound.getsockname()[:2]
    return f"tcp://[{host}]:{port}" if address.family is socket.AF_INET6 else f"tcp://{host}:{port}"


def find_dead(connected: socket.socket, silence_s: float) -> None:
    """Let the kernel find out, as ZeroMQ's heartbeats would, that the other host is gone."""
    if connected.family is socket.AF_UNIX:
        return
    third = max(1, int(silence_s / 3))
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, third)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, third)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(silence_s * 1000))
