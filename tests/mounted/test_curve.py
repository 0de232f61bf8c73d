"""Encrypted and authenticated links between real nodes: only known keys get anything."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import zmq
from helpers import nodes
from helpers.cases import read, write
from helpers.nodes import Pair, run_replfs, wait_for
from helpers.tcp_proxy import TcpProxy

pytestmark = pytest.mark.mounted

SECRET = b"the most secret words " * 50


class Keys:
    """Key files made by `replfs keygen`, and allow-lists."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.lines: dict[str, str] = {}

    def make(self, name: str) -> Path:
        """A new key pair; the path of its file."""
        path = self.directory / f"{name}.key"
        done = run_replfs("keygen", path, "--name", name)
        assert path.stat().st_mode & 0o777 == 0o600
        self.lines[name] = done.stdout.splitlines()[-1]
        assert self.lines[name].startswith(f"{name} = ")
        return path

    def allow(self, node: str, *names: str, **renamed: str) -> Path:
        """The allow-list of a node; *renamed*: a key under another's name."""
        path = self.directory / f"{node}.allowed"
        lines = [self.lines[name] for name in names]
        lines += [f"{name} = {self.lines[of].split()[-1]}" for name, of in renamed.items()]
        path.write_text("\n".join(lines) + "\n")
        return path


@pytest.fixture
def keys(tmp_path):
    made = Keys(tmp_path)
    for name in ("primary", "secondary", "stranger"):
        made.make(name)
    return made


def options(keys: Keys, node: str, allowed: Path) -> list[str | Path]:
    key = keys.directory / f"{node}.key"
    return ["--key-file", key, "--peer-keys", allowed, "--peer-timeout", "2s"]


class NamedPair(Pair):
    """A pair whose primary knows its peer by the name of its key."""

    def __init__(self, agent_options: list[str | Path], mount_options: list[str | Path],
                 **more: object) -> None:  # fmt: skip
        def through(endpoint: str) -> str:
            dialled = more.get("dialled")
            return f"secondary={dialled(endpoint) if callable(dialled) else endpoint}"

        super().__init__(
            agent_arguments=agent_options,
            mount_arguments=mount_options,
            through=through,
            start=bool(more.get("start")),
        )


def test_known_keys_replicate_and_nobody_can_read_along(keys):
    proxies: list[TcpProxy] = []
    seen = bytearray()

    def dialled(endpoint: str) -> str:
        proxies.append(TcpProxy("127.0.0.1", int(endpoint.rpartition(":")[2])))
        proxies[-1].tap = seen.extend
        proxies[-1].__enter__()
        return proxies[-1].endpoint

    try:
        with NamedPair(
            options(keys, "secondary", keys.allow("secondary", "primary")),
            options(keys, "primary", keys.allow("primary", "secondary")),
            dialled=dialled,
            start=True,
        ) as pair:
            write(pair.mountpoint / "file", SECRET)
            assert read(pair.secondary_store / "file") == SECRET
            pair.agent.kill9()
            pair.wait_state("out-of-sync")
            write(pair.mountpoint / "later", SECRET)
            pair.agent.start()
            pair.wait_in_sync()
            pair.assert_equal()
        assert len(seen) > len(SECRET)
        assert SECRET[:22] not in seen
        # In plain text it can be seen: the test would notice.
        seen.clear()
        with NamedPair([], [], dialled=dialled, start=True) as pair:
            write(pair.mountpoint / "file", SECRET)
        assert SECRET in seen
    finally:
        for proxy in proxies:
            proxy.__exit__()


def assert_nothing_came(pair: Pair) -> None:
    """The primary has tried, more than once, and the secondary has got nothing."""
    write(pair.mountpoint / "file", SECRET)
    attempts = [0]

    def tried() -> bool:
        peer = pair.peer()
        assert peer["state"] not in ("in-sync", "baseline", "incremental"), peer
        attempts[0] += 1
        return attempts[0] > 5

    wait_for(tried, 60, interval_s=0.2)
    assert os.listdir(pair.secondary_store) == [".replfs"]
    assert pair.agent.status()["primary"] is None


def test_a_primary_whose_key_is_not_in_the_list_gets_nothing(keys):
    with NamedPair(
        options(keys, "secondary", keys.allow("secondary", "primary")),
        options(keys, "stranger", keys.allow("stranger", "secondary")),
    ) as pair:
        pair.agent.start()
        pair.mount.start()
        assert_nothing_came(pair)
        # Once a minute, however often it tries.
        assert pair.agent.log_since_start().count(b"is not in the allow-list") == 1
        assert pair.mount.log_since_start().count(b"\n") < 15
        # Once its key is added it may: the list is read again.
        keys.allow("secondary", "primary", "stranger")
        pair.wait_in_sync()
        pair.assert_equal()


def test_a_secondary_with_another_key_than_expected_gets_nothing(keys):
    with NamedPair(
        options(keys, "stranger", keys.allow("stranger", "primary")),
        options(keys, "primary", keys.allow("primary", "secondary")),
    ) as pair:
        pair.agent.start()
        pair.mount.start()
        assert_nothing_came(pair)


def test_new_keys_without_a_pause(keys):
    """First the primary's, then the secondary's; the mount goes on, nothing of it is restarted."""
    with NamedPair(
        options(keys, "secondary", keys.allow("secondary", "primary")),
        options(keys, "primary", keys.allow("primary", "secondary")),
        start=True,
    ) as pair:

        def add_new(owner: str, other: str) -> None:
            """Both keys of *owner* are allowed, and the new one is in its file."""
            old = keys.lines[owner]
            (keys.directory / f"{owner}.key").rename(keys.directory / f"{owner}.old")
            keys.make(f"{owner}.new")
            key = keys.lines[f"{owner}.new"].split()[-1]
            (keys.directory / f"{other}.allowed").write_text(f"{old}\n{owner} = {key}\n")
            (keys.directory / f"{owner}.new.key").rename(keys.directory / f"{owner}.key")
            keys.lines[owner] = f"{owner} = {key}"

        add_new("primary", "secondary")
        pair.mount.replfs("pause", pair.mount.target)
        write(pair.mountpoint / "file", b"1")
        pair.mount.replfs("resume", pair.mount.target)
        pair.wait_in_sync()
        assert b"has another key: it is used from now on" in pair.mount.log_since_start()
        keys.allow("secondary", "primary")  # the new one alone
        add_new("secondary", "primary")
        pair.agent.restart()
        write(pair.mountpoint / "file", b"2")
        pair.wait_in_sync()
        keys.allow("primary", "secondary")
        pair.agent.restart()
        pair.wait_in_sync()
        pair.assert_equal()
        assert read(pair.secondary_store / "file") == b"2"


@pytest.mark.parametrize("plain", ["primary", "secondary"])
def test_plain_text_and_curve_do_not_mix(keys, plain):
    agent_options = options(keys, "secondary", keys.allow("secondary", "primary"))
    mount_options = options(keys, "primary", keys.allow("primary", "secondary"))
    quick: list[str | Path] = ["--peer-timeout", "2s"]
    with NamedPair(
        quick if plain == "secondary" else agent_options,
        quick if plain == "primary" else mount_options,
    ) as pair:
        pair.agent.start()
        pair.mount.start()
        assert_nothing_came(pair)


def test_a_client_with_a_key_of_its_own_gets_no_answer(keys):
    with NamedPair(
        options(keys, "secondary", keys.allow("secondary", "primary")),
        options(keys, "primary", keys.allow("primary", "secondary")),
        start=True,
    ) as pair:
        server = keys.lines["secondary"].split()[-1].encode()
        with zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
            stranger.setsockopt(zmq.LINGER, 0)
            public, secret = zmq.curve_keypair()
            stranger.setsockopt(zmq.CURVE_SERVERKEY, server)
            stranger.setsockopt(zmq.CURVE_PUBLICKEY, public)
            stranger.setsockopt(zmq.CURVE_SECRETKEY, secret)
            monitor = stranger.get_monitor_socket(zmq.EVENT_ALL)
            stranger.connect(pair.endpoint)
            failed = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            failed |= zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
            while True:
                assert monitor.poll(30_000), "it is not turned away"
                event = int.from_bytes(monitor.recv_multipart()[0][:2], "little")
                assert event != zmq.EVENT_HANDSHAKE_SUCCEEDED
                if event & failed:
                    break
            stranger.disable_monitor()
            monitor.close()
        write(pair.mountpoint / "file", b"x")
        assert pair.peer()["state"] == "in-sync"
        pair.assert_equal()


def test_what_is_refused_at_start(keys, tmp_path):
    """Plain text to other machines, and keys that others can read: one sentence, exit code 2."""
    store = tmp_path / "store"
    store.mkdir()
    allowed = keys.allow("secondary", "primary")
    cases: list[tuple[list[str | Path], str]] = [
        (["--listen", "tcp://0.0.0.0:0"], "insecure"),
        (["--listen", "tcp://127.0.0.1:0", "--key-file", tmp_path / "secondary.key"], "peer-keys"),
        (["--listen", "tcp://127.0.0.1:0", "--key-file", tmp_path / "nothing.key",
          "--peer-keys", allowed], "nothing.key"),
    ]  # fmt: skip
    open_key = keys.make("open")
    open_key.chmod(0o644)
    cases.append(
        (["--listen", "tcp://127.0.0.1:0", "--key-file", open_key, "--peer-keys", allowed], "chmod")
    )
    for arguments, word in cases:
        done = subprocess.run(
            [*nodes.REPLFS, "agent", str(store), *map(str, arguments), "-f",
             "--rundir", str(tmp_path / "run")],
            capture_output=True, text=True, check=False, timeout=60, env=nodes.environment(),
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert word in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    done = run_replfs("keygen", open_key, check=False)
    assert done.returncode == 2
    assert "exists already" in done.stderr
