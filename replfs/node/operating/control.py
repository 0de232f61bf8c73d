"""The control socket: how `replfs status` and its sisters talk to a running node.

A node serves one UNIX stream socket in its run directory; each line is a JSON object, a request one
way and an answer the other. The server is a thread of its own that shares only counters with the
event loop, so that `status` is answered, and says `hung`, while the loop hangs. Every other command
runs in the event loop and has a deadline.

Sockets are found by STORE and by MOUNTPOINT: a file name is made from the path *as text*. Nothing
here resolves or stats a mountpoint, because a mount that hangs would hang the one who asks why.

The client half needs only the standard library and loads fast. It knows nothing of what the
commands mean; `replfs.cli` and the node agree on that.

Request:  {"command": str, "args": {...}, "timeout_s": float}
Answer:   {"ok": true, "pid": int, ...} or {"ok": false, "error": sentence, "code": exit code}
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Final, Self

from replfs.errors import LinkError, ReplfsError, UsageError
from replfs.node.operating.scrape import Scrape
from replfs.node.operating.service import Watchdog
from replfs.node.settings.rundir import (
    SYSTEM_RUNDIR,
    StrPath,
    default_rundir,
    file_stem,
    make_rundir,
    names_of,
    replfs_mounts,
)

if TYPE_CHECKING:
    import trio

log = logging.getLogger(__name__)

REQUEST_SIZE_MAX: Final = 1 << 20
ANSWER_SIZE_MAX: Final = 64 << 20
CONNECTIONS_MAX: Final = 64
IDLE_S: Final = 60.0
"""A connection that neither asks nor waits for this long is closed."""
HUNG_S: Final = 5.0
"""An event loop whose last heartbeat is older than this hangs."""

Json = dict[str, Any]
Handler = Callable[[Json], "Awaitable[Json] | Json"]


class NodeDown(LinkError):
    """Nobody answers for this TARGET."""


class NodeHung(LinkError):
    """The node is there, but its event loop does not move."""


class CommandFailed(ReplfsError):
    """The node refused or failed a command; `exit_code` is what it said."""

    def __init__(self, sentence: str, exit_code: int) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


# The client ------------------------------------------------------------------------------------


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


# The server ------------------------------------------------------------------------------------


class _Client:
    """One connection as the server sees it."""

    __slots__ = ("answer_by", "incoming", "last_active", "outgoing", "socket", "waiting")

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.incoming = b""
        self.outgoing = b""
        self.waiting = 0
        """Number of the command it waits for, or 0."""
        self.answer_by = 0.0
        self.last_active = time.monotonic()


class ControlServer:
    """The node's end of the control socket, in a thread of its own.

    Args:
        rundir: the run directory; created if missing.
        store: STORE, absolute.
        mountpoint: MOUNTPOINT, absolute, or None.
        snapshot: what `status` answers. Called in the server's thread while the event loop may
            hang: it reads counters, takes no lock and touches no mount.
        commands: by name; each is called in the event loop with the arguments and returns the
            answer, at once or as a coroutine. A `ReplfsError` or an OSError becomes a no.
        beat: monotonic nanoseconds of the event loop's last heartbeat.
        scrape: also answer Prometheus there.
    """

    def __init__(
        self,
        rundir: StrPath,
        store: str,
        mountpoint: str | None,
        *,
        snapshot: Callable[[], Json],
        commands: Mapping[str, Handler],
        beat: Callable[[], int],
        scrape: Scrape | None = None,
    ) -> None:
        self._rundir = os.fspath(rundir)
        self._names = names_of(store, mountpoint)
        self._snapshot = snapshot
        self._commands = dict(commands)
        self._beat = beat
        self._scrape = scrape
        self._token: trio.lowlevel.TrioToken | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._selector = selectors.DefaultSelector()
        self._clients: dict[int, _Client] = {}
        self._commands_count = 0
        self._results: deque[tuple[int, Json]] = deque()
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._listener: socket.socket | None = None
        self._watchdog = Watchdog()

    def start(self, trio_token: trio.lowlevel.TrioToken) -> None:
        """Bind the socket, lay the links, start the thread.

        Raises:
            UsageError: the run directory or the socket cannot be made.
        """
        rundir = make_rundir(self._rundir)
        self._token = trio_token
        try:
            self._listener = self._bind(rundir)
        except OSError as error:
            raise UsageError(f"control socket in {rundir}: {error.strerror}") from None
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._selector.register(self._wake_read, selectors.EVENT_READ)
        if self._scrape is not None:
            self._scrape.open(self._selector)
        self._thread = threading.Thread(target=self._serve, name="control", daemon=True)
        self._thread.start()

    def also(self, mountpoint: str) -> None:
        """The node is found by this mountpoint, too. Called before something is mounted there."""
        new = [name for name in names_of(mountpoint, None) if name not in self._names]
        self._names += new
        if self._thread is not None:
            fd = os.open(self._rundir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                self._link(fd, new)
            finally:
                os.close(fd)

    def _link(self, rundir: int, names: list[str]) -> None:
        for name in names:
            temporary = f".{name}.{os.getpid()}"
            os.symlink(self._names[0], temporary, dir_fd=rundir)
            os.replace(temporary, name, src_dir_fd=rundir, dst_dir_fd=rundir)

    def stop(self) -> None:
        """Deliver the answers that are ready, end the thread, remove the socket. Idempotent."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        self._stopping = True
        self._wake()
        thread.join(3.0)
        self._unlink()

    def _bind(self, rundir: str) -> socket.socket:
        name, *others = self._names
        fd = os.open(rundir, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            # The store's lock is ours, so a socket of this name is left over from a dead node.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name, dir_fd=fd)
            listener.bind(f"/proc/self/fd/{fd}/{name}")
            os.chmod(name, 0o600, dir_fd=fd)
            listener.listen(CONNECTIONS_MAX)
            self._link(fd, others)
            self._inode = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ino
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(fd)
        return listener

    def _unlink(self) -> None:
        """Remove what is still ours: a successor may have bound the same name already."""
        name, *others = self._names
        with contextlib.suppress(OSError):
            path = os.path.join(self._rundir, name)
            if os.lstat(path).st_ino != self._inode:
                return
            os.unlink(path)
            for other in others:
                link = os.path.join(self._rundir, other)
                if os.readlink(link) == name:
                    os.unlink(link)

    # In the thread

    def _serve(self) -> None:
        try:
            while not self._stopping:
                self._step(self._timeout())
            self._last_words()
        except Exception:
            log.exception("the control socket failed; status and commands no longer work")
        finally:
            for client in list(self._clients.values()):
                client.socket.close()
            if self._listener is not None:
                self._listener.close()
            if self._scrape is not None:
                self._scrape.close()
            self._selector.close()

    def _last_words(self) -> None:
        until = time.monotonic() + 1.0
        self._collect_results()
        while any(c.outgoing for c in self._clients.values()) and time.monotonic() < until:
            self._step(0.05)

    def _timeout(self) -> float | None:
        """Seconds until something is due; None is never, so that an idle node does not wake up."""
        due = [self._watchdog.next_s] if self._watchdog.next_s is not None else []
        if self._scrape is not None and self._scrape.next_s is not None:
            due.append(self._scrape.next_s)
        now = time.monotonic()
        for client in self._clients.values():
            limit = client.answer_by if client.waiting else client.last_active + IDLE_S
            due.append(limit - now)
        return max(0.0, min(due)) if due else None

    def _step(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._listener:
                self._accept()
            elif key.fd == self._wake_read:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_read, 4096)
            elif key.fd in self._clients:
                self._transfer(self._clients[key.fd])
            elif key.data is not None:
                key.data(key.fd)
        self._collect_results()
        self._expire()
        if self._scrape is not None:
            self._scrape.expire()
        self._watchdog.feed(alive=self._age_s() < HUNG_S)

    def _accept(self) -> None:
        if self._listener is None:
            return
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if len(self._clients) >= CONNECTIONS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        self._clients[connection.fileno()] = _Client(connection)
        self._selector.register(connection, selectors.EVENT_READ)

    def _transfer(self, client: _Client) -> None:
        try:
            self._flush(client)
            chunk = client.socket.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            self._close(client)
            return
        client.incoming += chunk
        client.last_active = time.monotonic()
        if not chunk or len(client.incoming) > REQUEST_SIZE_MAX:
            self._close(client)
            return
        self._take_requests(client)

    def _take_requests(self, client: _Client) -> None:
        """What has arrived, up to a command that takes time: a connection has one at a time."""
        while b"\n" in client.incoming and not client.waiting:
            line, _, client.incoming = client.incoming.partition(b"\n")
            self._request(client, line)

    def _request(self, client: _Client, line: bytes) -> None:
        try:
            body = json.loads(line)
            command = body["command"]
            args = dict(body.get("args") or {})
            timeout_s = min(max(float(body.get("timeout_s", 10.0)), 0.0), 7 * 86400.0)
        except (ValueError, TypeError, KeyError, RecursionError):
            self._answer(client, _no("the request is not understood", 2))
            return
        if command == "status":
            self._answer(client, self.status())
        elif command not in self._commands:
            self._answer(client, _no(f"this node knows no command {command!r}", 2))
        elif (age_s := self._age_s()) > HUNG_S:
            self._answer(client, self._hung(age_s))
        else:
            self._commands_count += 1
            client.waiting = self._commands_count
            client.answer_by = time.monotonic() + timeout_s
            self._hand_over(client, command, args)

    def status(self) -> Json:
        """The status, with what only this thread knows: whether the event loop hangs."""
        try:
            answer = {"ok": True, **self._snapshot()}
        except Exception:
            log.exception("status cannot be made")
            return _no("status cannot be made; the node's log says why", 1)
        age_s = self._age_s()
        answer |= {"pid": os.getpid(), "hung": age_s > HUNG_S}
        if age_s > HUNG_S:
            answer["hung_s"] = round(age_s, 1)
        return answer

    def _age_s(self) -> float:
        return (time.monotonic_ns() - self._beat()) / 1e9

    @staticmethod
    def _hung(age_s: float) -> Json:
        sentence = f"the node hangs: its event loop has not moved for {age_s:.0f} s"
        return {**_no(sentence, NodeHung.exit_code), "hung": True}

    def _answer(self, client: _Client, answer: Json) -> None:
        client.waiting = 0
        client.last_active = time.monotonic()
        client.outgoing += json.dumps(answer, default=str).encode() + b"\n"
        try:
            self._flush(client)
        except BlockingIOError:
            pass
        except OSError:
            self._close(client)

    def _flush(self, client: _Client) -> None:
        """Send what the socket takes, and go on when it takes more."""
        if client.outgoing:
            try:
                sent = client.socket.send(client.outgoing, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                sent = 0
            client.outgoing = client.outgoing[sent:]
        events = selectors.EVENT_READ | (selectors.EVENT_WRITE if client.outgoing else 0)
        self._selector.modify(client.socket, events)

    def _close(self, client: _Client) -> None:
        if self._clients.pop(client.socket.fileno(), None) is not None:
            self._selector.unregister(client.socket)
            client.socket.close()

    def _collect_results(self) -> None:
        while self._results:
            number, answer = self._results.popleft()
            for client in list(self._clients.values()):
                if client.waiting == number:
                    self._answer(client, answer)
                    self._take_requests(client)

    def _expire(self) -> None:
        now = time.monotonic()
        for client in list(self._clients.values()):
            if client.waiting:
                if now >= client.answer_by:
                    age_s = self._age_s()
                    late = _no("the command was not done in time; it may still be going on", 1)
                    self._answer(client, self._hung(age_s) if age_s > HUNG_S else late)
            elif now >= client.last_active + IDLE_S:
                self._close(client)

    # Across to the event loop

    def _hand_over(self, client: _Client, command: str, args: Json) -> None:
        import trio

        if self._token is None:
            raise RuntimeError("the server was not started")
        try:
            self._token.run_sync_soon(self._launch, client.waiting, command, args)
        except trio.RunFinishedError:
            self._answer(client, _no("the node is stopping", NodeDown.exit_code))

    def _launch(self, number: int, command: str, args: Json) -> None:
        import trio

        # A system task outlives the node's own nurseries: `stop` is answered while they close.
        try:
            trio.lowlevel.spawn_system_task(self._perform, number, command, args)
        except RuntimeError:
            self._post(number, _no("the node is stopping", NodeDown.exit_code))

    async def _perform(self, number: int, command: str, args: Json) -> None:
        answer = _no("the node is stopping", NodeDown.exit_code)
        try:
            result = self._commands[command](args)
            answer = {
                **(await result if isinstance(result, Awaitable) else result),
                "ok": True,
                "pid": os.getpid(),
            }
        except ReplfsError as error:
            answer = _no(str(error), error.exit_code)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            answer = _no(f"{error.strerror or error}{where}", 1)
        except Exception:
            log.exception("command %s failed", command)
            answer = _no(f"{command} failed unexpectedly; the node's log says why", 1)
        finally:
            self._post(number, answer)

    def _post(self, number: int, answer: Json) -> None:
        self._results.append((number, answer))
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.write(self._wake_write, b"x")


def _no(sentence: str, code: int) -> Json:
    return {"ok": False, "error": sentence, "code": code}
