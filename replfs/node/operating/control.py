"""The control socket: how a running node answers `replfs status` and its sisters.

A node serves one UNIX stream socket in its run directory; each line is a JSON object, a request one
way and an answer the other. The server is a thread of its own that shares only counters with the
event loop, so that `status` is answered, and says `hung`, while the loop hangs. Every other command
runs in the event loop and has a deadline.

Request:  {"command": str, "args": {...}, "timeout_s": float}
Answer:   {"ok": true, "pid": int, ...} or {"ok": false, "error": sentence, "code": exit code}

Those who ask use `node.operating.client`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Final

from replfs.errors import ReplfsError, UsageError
from replfs.node.operating.client import Json, NodeDown, NodeHung
from replfs.node.operating.scrape import Scrape
from replfs.node.operating.service import Watchdog
from replfs.node.settings.rundir import (
    StrPath,
    make_rundir,
    names_of,
)

if TYPE_CHECKING:
    import trio

log = logging.getLogger(__name__)

REQUEST_SIZE_MAX: Final = 1 << 20
CONNECTIONS_MAX: Final = 64
IDLE_S: Final = 60.0
"""A connection that neither asks nor waits for this long is closed."""
HUNG_S: Final = 5.0
"""An event loop whose last heartbeat is older than this hangs."""

Handler = Callable[[Json], "Awaitable[Json] | Json"]


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
            where = os.path.join(rundir, self._names[0])
            raise UsageError(
                f"control socket {where}: {error.strerror}; move away what is there, or choose "
                "another --rundir"
            ) from None
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
