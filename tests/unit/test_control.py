"""The control socket, with a real event loop on one side and blocking clients on the other."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio

from replfs.errors import NotInSync, UsageError
from replfs.node.operating import client, control, service
from replfs.node.operating.client import CommandFailed, NodeDown, NodeHung
from replfs.node.operating.control import ControlServer
from replfs.node.settings import rundir


class Node:
    """A server in this process, with commands to call it by."""

    def __init__(self, directory: Path, mountpoint: str | None = None) -> None:
        self.directory = directory
        self.store = str(directory / "store")
        os.makedirs(self.store, exist_ok=True)
        self.mountpoint = mountpoint
        self.last_beat_ns: int | None = None
        self.snapshot: Callable[[], dict[str, Any]] = lambda: {"state": "in-sync"}
        self.seen: list[dict[str, Any]] = []
        self.gate = trio.Event()
        self.server = ControlServer(
            directory / "run",
            self.store,
            mountpoint,
            snapshot=lambda: self.snapshot(),
            commands={
                "echo": self.echo,
                "slow": self.slow,
                "strict": self.strict,
                "enospc": self.enospc,
                "bug": self.bug,
            },
            beat=lambda: self.last_beat_ns or time.monotonic_ns(),
        )

    def echo(self, args):
        self.seen.append(args)
        return {"args": args}

    async def slow(self, args):
        await self.gate.wait()
        return {"message": "at last"}

    def strict(self, args):
        raise NotInSync("b is lost")

    async def enospc(self, args):
        raise OSError(28, "No space left on device", "/s")

    def bug(self, args):
        return args["missing"]

    async def ask(self, command: str, args: Any = None, timeout_s: float = 30.0, target: str = ""):
        return await trio.to_thread.run_sync(
            client.request,
            target or self.store,
            command,
            args,
            timeout_s,
            self.directory / "run",
            abandon_on_cancel=True,
        )


@contextlib.asynccontextmanager
async def running(node: Node) -> AsyncIterator[Node]:
    node.server.start(trio.lowlevel.current_trio_token())
    try:
        yield node
    finally:
        await trio.to_thread.run_sync(node.server.stop)


@pytest.fixture
async def node(tmp_path: Path):
    async with running(Node(tmp_path, "/mnt/somewhere")) as node:
        yield node


async def test_status_comes_from_the_snapshot(node):
    node.snapshot = lambda: {"state": "resync", "peers": [{"name": "b"}]}
    answer = await node.ask("status")
    assert answer["state"] == "resync"
    assert answer["peers"] == [{"name": "b"}]
    assert answer["pid"] == os.getpid()
    assert answer["hung"] is False


async def test_commands_run_in_the_event_loop(node):
    threads = []

    def where(args):
        threads.append(threading.get_ident())
        return {}

    node.server._commands["where"] = where
    await node.ask("where")
    assert threads == [threading.get_ident()]
    answer = await node.ask("echo", {"peer": "b", "full": True})
    assert answer["args"] == {"peer": "b", "full": True}
    assert node.seen == [{"peer": "b", "full": True}]


async def test_a_command_may_take_its_time(node):
    async with trio.open_nursery() as nursery:
        answers = []

        async def ask():
            answers.append(await node.ask("slow"))

        nursery.start_soon(ask)
        # Others are answered meanwhile, on connections of their own.
        for _ in range(3):
            assert (await node.ask("status"))["state"] == "in-sync"
        assert not answers
        node.gate.set()
    assert answers[0]["message"] == "at last"


async def test_errors_carry_their_exit_code(node):
    with pytest.raises(CommandFailed, match="b is lost") as caught:
        await node.ask("strict")
    assert caught.value.exit_code == NotInSync.exit_code
    with pytest.raises(CommandFailed, match=r"No space left on device \(/s\)") as caught:
        await node.ask("enospc")
    assert caught.value.exit_code == 1
    with pytest.raises(CommandFailed, match="knows no command 'nonsense'") as caught:
        await node.ask("nonsense")
    assert caught.value.exit_code == 2


async def test_a_bug_in_a_command_is_logged_and_harms_nothing(node, caplog):
    with pytest.raises(CommandFailed, match="log says why"):
        await node.ask("bug")
    assert "KeyError" in caplog.text
    assert (await node.ask("status"))["ok"]


async def test_a_bug_in_the_snapshot_is_answered(node, caplog):
    node.snapshot = lambda: 1 // 0
    with pytest.raises(CommandFailed, match="log says why"):
        await node.ask("status")
    assert "ZeroDivisionError" in caplog.text
    assert (await node.ask("echo"))["ok"]


async def test_a_hung_loop_is_seen_as_hung(node):
    node.last_beat_ns = time.monotonic_ns() - 60 * 10**9
    answer = await node.ask("status")
    assert answer["hung"] is True
    assert answer["hung_s"] >= 60
    with pytest.raises(NodeHung, match="has not moved"):
        await node.ask("echo")
    assert node.seen == []


async def test_status_is_answered_while_the_loop_stands_still(node):
    # The loop's own thread asks, so the loop does not run until the answer is here.
    answer = client.request(node.store, "status", {}, 30.0, node.directory / "run")
    assert answer["state"] == "in-sync"


async def test_a_command_has_a_deadline(node):
    with pytest.raises(CommandFailed, match="not done in time"):
        await node.ask("slow", {}, 0.05)
    assert (await node.ask("status"))["ok"]
    # The late answer goes nowhere, and above all not to the next one who asks.
    node.gate.set()
    assert (await node.ask("echo"))["args"] == {}


async def test_found_by_store_and_by_mountpoint(node, tmp_path, monkeypatch):
    assert (await node.ask("status", target="/mnt/somewhere"))["ok"]
    assert (await node.ask("status", target="/mnt/../mnt/somewhere/"))["ok"]
    os.symlink(node.store, tmp_path / "link")
    assert (await node.ask("status", target=str(tmp_path / "link")))["ok"]
    monkeypatch.setattr(client, "replfs_mounts", lambda: ["/mnt/somewhere"])
    assert (await node.ask("status", target="/mnt/somewhere/deep/below"))["ok"]


async def test_files_are_private_and_go_away(node, tmp_path):
    directory = tmp_path / "run"
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    names = sorted(entry.name for entry in directory.iterdir())
    assert len(names) == 2
    sockets = client.node_names(directory)
    assert len(sockets) == 1
    assert stat.S_IMODE(os.stat(sockets[0]).st_mode) == 0o600
    assert (await node.ask("status", target=sockets[0]))["ok"]
    await trio.to_thread.run_sync(node.server.stop)
    assert list(directory.iterdir()) == []
    with pytest.raises(NodeDown, match="no node serves"):
        await node.ask("status")


async def test_a_socket_left_over_from_a_killed_node_is_replaced(tmp_path, monkeypatch):
    node = Node(tmp_path)
    monkeypatch.chdir(rundir.make_rundir(tmp_path / "run"))
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(f"{rundir.file_stem(node.store)}.sock")
    with pytest.raises(NodeDown):
        await node.ask("status")
    async with running(node):
        assert (await node.ask("status"))["ok"]


async def test_a_successor_keeps_its_socket(tmp_path):
    first, second = Node(tmp_path), Node(tmp_path)
    async with running(first), running(second):
        await trio.to_thread.run_sync(first.server.stop)
        assert (await second.ask("status"))["ok"]


async def test_run_directories_of_any_length(tmp_path):
    deep = tmp_path / ("d" * 100) / ("e" * 100)
    deep.mkdir(parents=True)
    async with running(Node(deep)) as node:
        assert (await node.ask("status"))["ok"]


async def test_bad_requests_are_answered_and_harm_nothing(node):
    def talk(data: bytes) -> bytes:
        with client.Connection(node.store, node.directory / "run") as connection:
            connection._socket.sendall(data)
            connection._socket.settimeout(30)
            return connection._socket.recv(65536)

    for data in (b"\n", b"[]\n", b'{"command": 5}\n', b"\xff\xfe\n", b'{"args": {}}\n',
                 b'{"command": "echo", "args": 7}\n', b"[" * 10000 + b"\n",
                 b'{"command": "status", "timeout_s": "soon"}\n'):  # fmt: skip
        answer = json.loads(await trio.to_thread.run_sync(talk, data))
        assert answer["ok"] is False
    assert (await node.ask("status"))["ok"]
    with contextlib.suppress(ConnectionError):
        assert await trio.to_thread.run_sync(talk, b"x" * (control.REQUEST_SIZE_MAX + 70000)) == b""
    assert (await node.ask("status"))["ok"]


async def test_requests_on_one_connection_are_answered_in_order(node):
    def talk() -> list[Any]:
        with client.Connection(node.store, node.directory / "run") as connection:
            for n in range(3):
                connection.send("echo", {"n": n}, 30.0)
            answers = [connection.receive(30.0) for _ in range(3)]
            assert connection.pid == os.getpid()
            return answers

    answers = await trio.to_thread.run_sync(talk)
    assert [answer["args"] for answer in answers] == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_clients_that_vanish_are_forgotten(node):
    def vanish() -> None:
        with client.Connection(node.store, node.directory / "run") as connection:
            connection.send("slow", {}, 30.0)

    for _ in range(control.CONNECTIONS_MAX + 10):
        await trio.to_thread.run_sync(vanish)
    with trio.fail_after(60):
        while True:
            try:
                assert (await node.ask("status"))["ok"]
                break
            except NodeDown:
                await trio.sleep(0.01)
    node.gate.set()


async def test_stop_delivers_the_answer_of_the_command_that_led_to_it(tmp_path):
    node = Node(tmp_path)
    done = trio.Event()

    async def stop(args):
        done.set()
        return {"message": "drained"}

    node.server._commands["stop"] = stop
    answers = []

    async def ask():
        answers.append(await node.ask("stop"))

    async with trio.open_nursery() as nursery:
        node.server.start(trio.lowlevel.current_trio_token())
        nursery.start_soon(ask)
        await done.wait()
        await trio.testing.wait_all_tasks_blocked()
        await trio.to_thread.run_sync(node.server.stop)
    assert answers[0]["message"] == "drained"


def test_commands_are_refused_when_the_loop_has_ended(tmp_path):
    """The thread outlives the loop if `stop` was not called: it must not crash."""
    script = f"""
import os, sys, time, trio
from replfs.errors import ReplfsError
from replfs.node.operating import client, control
server = control.ControlServer({str(tmp_path / "run")!r}, {str(tmp_path)!r}, None,
    snapshot=dict, commands={{"x": lambda args: {{}}}}, beat=time.monotonic_ns)
async def main():
    server.start(trio.lowlevel.current_trio_token())
trio.run(main)
try:
    client.request({str(tmp_path)!r}, "x", {{}}, 30.0, {str(tmp_path / "run")!r})
except ReplfsError as error:
    print(error, error.exit_code)
server.stop()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "the node is stopping 4\n"
    assert done.stderr == ""


def test_run_directory_must_be_ours(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to give a directory away")
    theirs = tmp_path / "run"
    theirs.mkdir()
    os.chown(theirs, 12345, 12345)
    with pytest.raises(UsageError, match="not yours"):
        rundir.make_rundir(theirs)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="--rundir"):
        rundir.make_rundir(tmp_path / "file")


def test_default_run_directory(monkeypatch, tmp_path):
    monkeypatch.setenv("REPLFS_RUNDIR", "/somewhere")
    assert rundir.default_rundir() == "/somewhere"
    monkeypatch.delenv("REPLFS_RUNDIR")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert rundir.default_rundir() == "/run/replfs"
    monkeypatch.setattr(os, "geteuid", lambda: 77)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert rundir.default_rundir() == f"{tmp_path}/replfs"
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/does/not/exist")
    assert rundir.default_rundir() == "/tmp/replfs-77"


def test_file_stems_are_readable_and_distinct():
    assert rundir.file_stem("/srv/data").startswith("srv-data-")
    stems = {rundir.file_stem(p) for p in ("/", "/a/b", "/a-b", "/a", "/é", "/" + "x" * 300)}
    assert len(stems) == 6
    assert all(len(stem) < 64 and "/" not in stem and stem[0] not in ".-" for stem in stems)


def test_service_manager_hears_of_it(monkeypatch, tmp_path):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    monkeypatch.setenv("WATCHDOG_USEC", "100")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(30)
        manager.bind(str(tmp_path / "notify"))
        service.notify("READY=1")
        assert manager.recv(100) == b"READY=1"
        watchdog = service.Watchdog()
        watchdog.feed(alive=False)
        assert watchdog.next_s is not None
        deadline = time.monotonic() + 30
        while watchdog.next_s > 0 and time.monotonic() < deadline:
            pass
        watchdog.feed(alive=True)
        assert manager.recv(100) == b"WATCHDOG=1"
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert service.Watchdog().next_s is None
    monkeypatch.delenv("NOTIFY_SOCKET")
    service.notify("READY=1")


def test_the_client_loads_neither_trio_nor_zmq_nor_pyfuse3():
    script = (
        "import sys, replfs.cli.operate, replfs.node.operating.client\n"
        "print(sorted({'trio', 'zmq', 'pyfuse3', 'msgspec'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
