"""Keys, allow-lists, who needs them, and CURVE between real sockets."""

from __future__ import annotations

import os
import stat
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import zmq
from helpers.linkage import RecordingSink, running_pair, until, write

from replfs.errors import UsageError
from replfs.transport.security import (
    AllowList,
    Curve,
    KeyPair,
    Zap,
    generate_keypair,
    is_local,
    load_keypair,
    require_curve,
    save_keypair,
)


def allow(path, **keys: str) -> AllowList:
    path.write_text("# nodes\n\n" + "".join(f"{name} = {key}\n" for name, key in keys.items()))
    path.chmod(0o644)
    return AllowList(str(path))


def test_keys_are_saved_readable_only_by_their_owner(tmp_path):
    path = str(tmp_path / "key")
    keys = generate_keypair()
    previous = os.umask(0)
    try:
        save_keypair(path, keys)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600
    assert load_keypair(path) == keys
    with pytest.raises(UsageError, match="exists already"):
        save_keypair(path, generate_keypair())
    assert load_keypair(path) == keys


def test_the_secret_does_not_show():
    keys = generate_keypair()
    assert keys.secret not in repr(keys)
    assert keys.secret not in f"{keys}"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_key_that_others_can_read_is_refused(tmp_path, mode):
    path = tmp_path / "key"
    save_keypair(str(path), generate_keypair())
    path.chmod(mode)
    with pytest.raises(UsageError, match="chmod 600"):
        load_keypair(str(path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
def test_a_key_of_another_user_is_refused(tmp_path):
    path = tmp_path / "key"
    save_keypair(str(path), generate_keypair())
    os.chown(path, 12345, -1)
    with pytest.raises(UsageError, match="belongs to another user"):
        load_keypair(str(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "public = short\n",
        "public\n",
        "public = " + "a" * 40 + "\n",
        "x" * 2_000_000,
        "public = {public}\nsecret = {other}\n",
        "public = {public}\npublic = {public}\nsecret = {secret}\n",
    ],
)
def test_damaged_key_files_are_refused(tmp_path, text):
    keys, other = generate_keypair(), generate_keypair()
    path = tmp_path / "key"
    path.write_text(
        text.replace("{public}", keys.public)
        .replace("{secret}", keys.secret)
        .replace("{other}", other.secret)
    )
    path.chmod(0o600)
    with pytest.raises(UsageError):
        load_keypair(str(path))


def test_missing_and_strange_files_are_refused(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        load_keypair(str(tmp_path / "missing"))
    with pytest.raises(UsageError):
        load_keypair(str(tmp_path))
    os.mkfifo(tmp_path / "fifo", 0o600)
    with pytest.raises(UsageError, match="not a file"):
        load_keypair(str(tmp_path / "fifo"))
    with pytest.raises(UsageError, match="cannot write"):
        save_keypair(str(tmp_path / "missing" / "key"), generate_keypair())


def test_the_allow_list_is_read_again_when_it_changes(tmp_path):
    a, b = generate_keypair(), generate_keypair()
    path = tmp_path / "peers"
    allowed = allow(path, alpha=a.public)
    assert allowed.keys_of("alpha") == [a.public]
    assert allowed.name_of(a.public) == "alpha"
    assert allowed.name_of(b.public) is None
    with pytest.raises(UsageError, match="no key for beta"):
        allowed.keys_of("beta")
    allow(path, alpha=a.public, beta=b.public)
    assert allowed.keys_of("beta") == [b.public]
    assert allowed.name_of(b.public) == "beta"
    path.write_text("nonsense\n")
    assert allowed.name_of(a.public) is None  # refuses, rather than going on with an old list
    with pytest.raises(UsageError, match="line 1"):
        allowed.keys_of("alpha")
    path.unlink()
    assert allowed.name_of(a.public) is None


def test_a_node_that_gets_a_new_key_has_two(tmp_path):
    old, new = generate_keypair(), generate_keypair()
    path = tmp_path / "peers"
    path.write_text(f"alpha = {old.public}\nalpha = {new.public}\n")
    allowed = AllowList(str(path))
    assert allowed.keys_of("alpha") == [old.public, new.public]
    assert allowed.name_of(old.public) == allowed.name_of(new.public) == "alpha"


def test_another_key_in_the_file_is_used_from_then_on(tmp_path, caplog):
    old, new = generate_keypair(), generate_keypair()
    key_file = tmp_path / "key"
    save_keypair(str(key_file), old)
    peers = tmp_path / "peers"
    allow(peers, beta=old.public)
    peers.write_text(f"{peers.read_text()}beta = {new.public}\n")
    curve = Curve(load_keypair(str(key_file)), AllowList(str(peers)), str(key_file))

    def dial(*, after_failure: bool = False) -> tuple[str, str]:
        """Our key and the peer's that a new connection uses."""
        options: dict[int, bytes] = {}
        socket: Any = SimpleNamespace(setsockopt=options.__setitem__)
        if after_failure:
            curve.failed("beta")
        curve.prepare_dialling(socket, "beta")
        return options[zmq.CURVE_PUBLICKEY].decode(), options[zmq.CURVE_SERVERKEY].decode()

    assert dial() == dial() == (old.public, old.public)
    assert dial(after_failure=True) == dial() == (old.public, new.public)
    assert dial(after_failure=True) == (old.public, old.public)
    key_file.write_text("damaged")
    assert dial()[0] == old.public
    assert "going on with the key of before" in caplog.text
    key_file.unlink()
    save_keypair(str(key_file), new)
    assert dial()[0] == new.public


def test_an_allow_list_that_others_can_write_is_refused(tmp_path):
    path = tmp_path / "peers"
    path.write_text("")
    path.chmod(0o666)
    with pytest.raises(UsageError, match="chmod 644"):
        AllowList(str(path))


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://127.0.0.1:7800",
        "tcp://127.8.8.8:7800",
        "tcp://[::1]:7800",
        "tcp://localhost:7800",
        "ipc:///run/x",
        "inproc://x",
    ],
)
def test_local_endpoints_need_no_keys(endpoint):
    assert is_local(endpoint)
    require_curve(endpoint, False)


@pytest.mark.parametrize(
    "endpoint",
    [
        "tcp://*:7800",
        "tcp://0.0.0.0:7800",
        "tcp://[::]:7800",
        "tcp://192.168.1.2:7800",
        "tcp://localhost.example.com:7800",
        "tcp://127.0.0.1.example.com:7800",
        "tcp://example.com:7800",
        "tcp://[bad:7800",
        "",
    ],
)
def test_other_endpoints_need_keys(endpoint, tmp_path):
    assert not is_local(endpoint)
    with pytest.raises(UsageError, match="--insecure"):
        require_curve(endpoint, False)
    require_curve(endpoint, True)
    require_curve(endpoint, False, Curve(generate_keypair(), allow(tmp_path / "peers")))


@pytest.fixture
def curves(tmp_path) -> dict[str, tuple[KeyPair, Curve]]:
    """Keys of both sides; each knows the other."""
    near, far = generate_keypair(), generate_keypair()
    return {
        "near": (near, Curve(near, allow(tmp_path / "near", secondary=far.public))),
        "far": (far, Curve(far, allow(tmp_path / "far", primary=near.public))),
    }


async def test_known_keys_connect(curves):
    async with running_pair(security=curves["far"][1]) as pair:
        link = await pair.up(security=curves["near"][1])
        sink = RecordingSink()
        link.send(*write(1), sink)
        await until(lambda: sink.answer, "it is answered")


async def test_an_unknown_key_is_denied(curves, tmp_path):
    stranger = Curve(
        generate_keypair(), allow(tmp_path / "stranger", secondary=curves["far"][0].public)
    )
    async with running_pair(security=curves["far"][1]) as pair:
        link = pair.dial(await pair.listen(), security=stranger)
        await until(lambda: pair.listener.statistics().denied_keys, "it is denied")
        await until(lambda: link.statistics().last_error, "the link is told")
        assert not link.is_up
        assert pair.applier.hellos == []
        assert "does not accept this node's key" in link.statistics().last_error
        # Once the key is added, the next attempt succeeds, without a restart.
        (tmp_path / "far").write_text(f"new = {stranger.keys.public}\n")
        await until(lambda: link.is_up, "it is accepted")


async def test_the_wrong_server_is_noticed(curves, tmp_path):
    """The dialling side proves whom it reached: here another key answers than it expects."""
    near, _ = curves["near"]
    misled = Curve(near, allow(tmp_path / "misled", secondary=generate_keypair().public))
    async with running_pair(1.0, security=curves["far"][1]) as pair:
        link = pair.dial(await pair.listen(), security=misled)
        await until(lambda: link.statistics().last_error, "an attempt has failed")
        assert not link.is_up
        assert pair.applier.hellos == []


async def test_without_the_peers_key_nothing_is_tried(curves, tmp_path):
    near, _ = curves["near"]
    lonely = Curve(near, allow(tmp_path / "lonely"))
    async with running_pair(security=curves["far"][1]) as pair:
        link = pair.dial(await pair.listen(), security=lonely)
        await until(lambda: link.statistics().last_error, "an attempt has failed")
        assert "no key for secondary" in link.statistics().last_error


@pytest.mark.parametrize("secure", ["near", "far"])
async def test_plain_text_and_curve_do_not_mix(curves, secure):
    listening = {"security": curves["far"][1]} if secure == "far" else {}
    async with running_pair(1.0, **listening) as pair:
        dialling = {"security": curves["near"][1]} if secure == "near" else {}
        link = pair.dial(await pair.listen(), **dialling)
        await until(lambda: link.statistics().last_error, "an attempt has failed")
        assert not link.is_up
        assert pair.applier.hellos == []


async def test_nobody_connects_without_a_handler(curves):
    """Were the handler missing, keys alone would not do."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with context.socket(zmq.ROUTER) as server, context.socket(zmq.DEALER) as client:
        for one in (server, client):
            one.setsockopt(zmq.LINGER, 0)
        curves["far"][1].prepare_listening(server)
        port = server.bind_to_random_port("tcp://127.0.0.1")
        curves["near"][1].prepare_dialling(client, "secondary")
        client.connect(f"tcp://127.0.0.1:{port}")
        client.send(b"hello")
        assert not await trio.to_thread.run_sync(server.poll, 300)
    context.term()


async def test_nonsense_to_the_handler_is_denied(curves):
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    zap = Zap(context, curves["far"][1].allowed)
    with pytest.raises(zmq.ZMQError):
        Zap(context, curves["far"][1].allowed)
    key = bytes(32)
    good = [b"1.0", b"7", b"replfs", b"127.0.0.1", b"", b"CURVE", key]
    requests = [
        [b"1.0"],
        [b"", b"7"],
        [b"2.0", *good[1:]],
        [*good[:2], b"other", *good[3:]],
        [*good[:5], b"PLAIN", b"user", b"password"],
        [*good[:6], b"short"],
        [*good, b"x", b"y", b"z"],
        good,
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(zap.run)
        with context.socket(zmq.REQ) as client:
            client.setsockopt(zmq.LINGER, 0)
            client.connect("inproc://zeromq.zap.01")
            for request in requests:
                client.send_multipart(request)
                await until(lambda: client.poll(0), "it answers")
                assert client.recv_multipart()[2] == b"400"
        nursery.cancel_scope.cancel()
    assert zap.denied == 1
    context.term()
