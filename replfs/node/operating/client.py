"""Asking a running node, through its control socket (`node.operating.control`).

Sockets are found by STORE and by MOUNTPOINT: a file name is made from the path *as text*. Nothing
here resolves or stats a mountpoint, because a mount that hangs would hang the one who asks why.

This needs only the standard library and loads fast. It knows nothing of what the commands mean;
`replfs.cli` and the node agree on that.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any, Final, Self

from replfs.errors import LinkError, ReplfsError
from replfs.node.settings.rundir import (
    SYSTEM_RUNDIR,
    StrPath,
    default_rundir,
    file_stem,
    replfs_mounts,
)

ANSWER_SIZE_MAX: Final = 64 << 20

Json = dict[str, Any]


class NodeDown(LinkError):
    """Nobody answers for this TARGET."""


class NodeHung(LinkError):
    """The node is there, but its event loop does not move."""


class CommandFailed(ReplfsError):
    """The node refused or failed a command; `exit_code` is what it said."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


def request(
    target: str,
    command: str,
    args: Json | None = None,
    timeout_s: float = 10.0,
    rundir: StrPath | None = None,
) -> Json:
    """Ask the node of *target* (a STORE or a MOUNTPOINT) and return its answer.

    Raises:
        NodeDown: nobody answers for *target*.
        NodeHung: no answer within *timeout_s* seconds.
        CommandFailed: the node says no.
    """
    with Connection(target, rundir) as connection:
        connection.send(command, args, timeout_s)
        answer = connection.receive(timeout_s + 1.0)
    if answer is None:
        raise NodeHung(f"the node of {target} does not answer")
    return answer


class Connection:
    """One conversation with a node: `send`, then `receive`. A context manager."""

    def __init__(self, target: str, rundir: StrPath | None = None) -> None:
        """Connect.

        Raises:
            NodeDown: nobody answers for *target*.
        """
        self._target = target
        self._socket = _connect(target, rundir)
        self._received = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the conversation."""
        self._socket.close()

    @property
    def pid(self) -> int:
        """Process id of the node, as the kernel says."""
        data = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        return int.from_bytes(data[:4], "little")

    def send(self, command: str, args: Json | None, timeout_s: float) -> None:
        """Send a request. The node gives the command up after *timeout_s* seconds."""
        body = {"command": command, "args": args or {}, "timeout_s": timeout_s}
        self._socket.settimeout(10.0)
        try:
            self._socket.sendall(json.dumps(body).encode() + b"\n")
        except OSError as error:
            raise NodeDown(f"the node of {self._target} went away: {error.strerror}") from None

    def receive(self, timeout_s: float) -> Json | None:
        """The next answer, or None if none came within *timeout_s* seconds.

        Raises:
            NodeDown: the node closed the connection.
            CommandFailed: the answer is a no.
        """
        deadline = time.monotonic() + timeout_s
        while b"\n" not in self._received:
            left = deadline - time.monotonic()
            if left <= 0:
                return None
            self._socket.settimeout(left)
            try:
                chunk = self._socket.recv(1 << 16)
            except TimeoutError:
                return None
            except OSError:
                chunk = b""
            if not chunk:
                raise NodeDown(f"the node of {self._target} ended before it answered")
            self._received += chunk
            if len(self._received) > ANSWER_SIZE_MAX:
                raise NodeDown(f"the node of {self._target} answers nonsense")
        line, _, self._received = self._received.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            raise NodeDown(f"the node of {self._target} answers nonsense") from None
        if not answer.get("ok"):
            sentence = str(answer.get("error", "the node says no, without a reason"))
            if answer.get("hung"):
                raise NodeHung(sentence)
            raise CommandFailed(sentence, int(answer.get("code", 1)))
        return dict(answer)


def node_names(rundir: StrPath | None = None) -> list[str]:
    """What to give as TARGET for each node in the run directory (socket files, not links)."""
    found = []
    for directory in _rundirs(rundir):
        with contextlib.suppress(OSError), os.scandir(directory) as entries:
            found += [e.path for e in entries if e.name.endswith(".sock") and not e.is_symlink()]
    return sorted(found)


def _rundirs(rundir: StrPath | None) -> list[str]:
    if rundir is not None:
        return [os.path.abspath(rundir)]
    return list(dict.fromkeys([default_rundir(), SYSTEM_RUNDIR]))


def _candidates(target: str) -> Iterator[str]:
    path = os.path.abspath(target)
    yield path
    covering = [m for m in replfs_mounts() if path.startswith(m.rstrip("/") + "/")]
    yield from sorted(covering, key=len, reverse=True)
    parent, last = os.path.split(path)
    yield os.path.join(os.path.realpath(parent), last)
    # Only now, and only where no replfs mount is meant, is it safe to follow a link.
    if not covering and path not in replfs_mounts():
        yield os.path.realpath(path)


def _connect(target: str, rundir: StrPath | None) -> socket.socket:
    denied = None
    for directory in _rundirs(rundir):
        if target.endswith(".sock") and os.path.dirname(target) == directory:
            names: Iterator[str] = iter([os.path.basename(target)])
        else:
            names = (f"{file_stem(path)}.sock" for path in _candidates(target))
        for name in names:
            try:
                return _connect_in(directory, name)
            except PermissionError:
                denied = directory
            except OSError as error:
                if error.errno not in {errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR}:
                    raise NodeDown(f"{directory}/{name}: {error.strerror}") from None
    if denied is not None:
        raise NodeDown(f"no permission for {denied}; try again as root")
    if os.path.abspath(target) in replfs_mounts():
        raise NodeDown(
            f"{target} is mounted, but its node is gone; clear it with 'replfs umount {target}'"
        )
    raise NodeDown(f"no node serves {target}; is it started, with the same --rundir?")


def _connect_in(directory: str, name: str) -> socket.socket:
    # The path of a UNIX socket has at most 107 bytes (unix(7)); a descriptor makes any fit.
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(10.0)
            connection.connect(f"/proc/self/fd/{fd}/{name}")
        except BaseException:
            connection.close()
            raise
    finally:
        os.close(fd)
    return connection
