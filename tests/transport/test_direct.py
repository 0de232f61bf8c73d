"""Raw bytes against a listener and a link that speak ZMTP themselves, and what is theirs alone."""

from __future__ import annotations

import os
import random
import socket
import struct

import pytest
import trio
from helpers.linkage import (
    WIRES,
    RecordingSink,
    object_id,
    port_of,
    running_pair,
    until,
    write,
)
from helpers.tcp_proxy import TcpProxy

from replfs.core import messages, ops
from replfs.errors import UsageError
from replfs.transport import direct, zmtp
from replfs.transport.endpoint import parse
from replfs.transport.listener import Listener
from replfs.transport.socket import NotSent
from replfs.transport.wire import Wire, wire_of_environment

OPENING = zmtp.opening(b"DEALER")
GREETING = OPENING[:64]
HUGE = b"\x02" + struct.pack(">Q", 1 << 40)


@pytest.fixture
async def pair():
    async with running_pair() as made:
        yield made


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(direct, "HANDSHAKE_S", 0.2)


async def dial(pair) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", port_of(pair.listener.endpoint))


async def is_closed(stream: trio.SocketStream) -> bool:
    """Wait until the other side has closed the connection, whatever it says before."""
    with trio.fail_after(60):
        try:
            while await stream.receive_some(65_536):
                pass
        except trio.BrokenResourceError:
            pass
    return True


async def works(pair, number=1) -> bool:
    """The session of the pair's link carries an operation."""
    sink = RecordingSink()
    pair.link.send(*write(number), sink)
    await until(lambda: sink.calls, "it is answered")
    return isinstance(sink.answer, ops.Done) and pair.owner.events == ["up"]


FATAL = {
    "another protocol": b"GET / HTTP/1.0\r\n\r\n",
    "another mechanism": GREETING[:12] + b"PLAIN".ljust(52, b"\0"),
    "no handshake": GREETING + b"\x00\x05hello",
    "a handshake without an end": GREETING + HUGE,
    "a frame of a terabyte": OPENING + HUGE,
    "a frame just too long": OPENING + b"\x02" + struct.pack(">Q", messages.HEAD_MAX + 1),
    "a message without an end": OPENING + b"\x01\x00" * 1000,
    "heartbeats without an end": OPENING + b"\x04\x07\x04PING\x00\x00" * 100_000,
    "an unknown flag": OPENING + b"\x10\x00",
}


@pytest.mark.parametrize("what", FATAL)
async def test_bytes_that_end_the_connection_they_came_over(pair, what):
    await pair.up()
    stranger = await dial(pair)
    async with stranger:
        try:
            await stranger.send_all(FATAL[what])
        except trio.BrokenResourceError:
            pass
        assert await is_closed(stranger)
    assert await works(pair)


async def test_a_stranger_that_speaks_slowly_is_cut_off(pair, impatient):
    await pair.up()
    stranger = await dial(pair)
    async with stranger:
        closed = False

        async def wait_closed():
            nonlocal closed
            closed = await is_closed(stranger)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_closed)
            try:
                for byte in GREETING * 1000:
                    await stranger.send_all(bytes((byte,)))
                    await trio.sleep(0.05)
                    if closed:
                        break
            except trio.BrokenResourceError:
                pass
        assert closed
    assert await works(pair)


async def test_strangers_that_only_connect_leave_room(pair):
    await pair.up()
    strangers = []
    try:
        for _ in range(3 * direct.CONNECTIONS_MAX):
            strangers.append(await dial(pair))
        await until(lambda: len(pair.listener._socket._guests) == direct.CONNECTIONS_MAX, "full")
        assert await is_closed(strangers[0])
        assert await works(pair)
        async with running_pair() as other:
            link = await other.up(pair.listener.endpoint)
            assert link.is_up
    finally:
        for stranger in strangers:
            await trio.aclose_forcefully(stranger)


async def test_a_listener_out_of_descriptors_accepts_again(pair, monkeypatch):
    await pair.up()
    listening = pair.listener._socket

    class Exhausted:
        def __init__(self, real):
            self.real = real
            self.refusals = 0

        def __getattr__(self, name):
            return getattr(self.real, name)

        def accept(self):
            self.refusals += 1
            if self.refusals == 1:
                raise OSError(24, os.strerror(24))
            return self.real.accept()

    listening._socket = exhausted = Exhausted(listening._socket)
    async with running_pair() as other:
        await other.up(pair.listener.endpoint)
    assert exhausted.refusals > 1


@pytest.mark.parametrize("seed", range(3))
async def test_random_bytes_behind_a_handshake(pair, seed):
    rng = random.Random(seed)
    await pair.up()
    for _ in range(30):
        stranger = await dial(pair)
        async with stranger:
            try:
                await stranger.send_all(OPENING + rng.randbytes(rng.randrange(1, 3000)))
            except trio.BrokenResourceError:
                pass
    assert await works(pair)
    assert len(pair.applier.applied) == 1


async def test_half_a_message_is_none(pair):
    await pair.up()
    op, payload = write(5, 50_000)
    head = messages.encode_op(0, pair.link.session, 1, op, payload)
    first, second = zmtp.encode(head, payload)
    stranger = await dial(pair)
    async with stranger:
        await stranger.send_all(OPENING + (first + (second or b""))[:-1])
    assert await works(pair)
    assert len(pair.applier.applied) == 1


async def test_a_peer_that_never_reads_costs_no_more_than_the_queue(pair, monkeypatch):
    """Its answers are refused at the limit; the connection stays, and nobody else suffers."""
    monkeypatch.setattr(direct, "QUEUE_MAX", 1 << 20)
    await pair.up()
    stranger = await dial(pair)
    async with stranger:
        await stranger.send_all(OPENING)
        await until(lambda: len(pair.listener._socket._guests) == 3, "it is there")
        guest = list(pair.listener._socket._guests.values())[-1]
        await until(lambda: guest.channel.ready, "it may be sent to")
        with pytest.raises(NotSent, match="waiting already"):
            for _ in range(100_000):
                pair.listener._socket.send(bytes(100_000), guest.identity)
        assert guest.channel.queued < (1 << 20) + 200_000
        assert await works(pair)


async def test_what_the_network_does_not_take_waits_and_arrives_in_order(pair):
    with TcpProxy("127.0.0.1", port_of(await pair.listen())) as proxy:
        link = await pair.up(proxy.endpoint)
        proxy.stall()
        expected, sinks = [], []
        for number in range(1, 31):
            payload = random.Random(number).randbytes((1 << 20) - number)
            sinks.append(RecordingSink())
            link.send(ops.Write(object_id(number), 0, 0), payload, sinks[-1])
            expected.append((0, number, ops.Write(object_id(number), 0, 0), payload))
        assert link._flows[0].connection._channel.queued > 1 << 20
        proxy.release()
        await until(lambda: link.outstanding == 0, "all are answered")
        assert pair.applier.applied == expected
        assert link._flows[0].connection._channel.queued == 0


async def test_a_stalled_connection_that_is_closed_sends_nothing_more(pair):
    with TcpProxy("127.0.0.1", port_of(await pair.listen())) as proxy:
        link = await pair.up(proxy.endpoint)
        proxy.stall()
        sinks = [RecordingSink() for _ in range(30)]
        for number, sink in enumerate(sinks, 1):
            link.send(ops.Write(object_id(number), 0, 0), bytes(1 << 20), sink)
        link.fail("enough")
        assert all(sink.was_lost for sink in sinks)
        proxy.release()
        await until(lambda: link.is_up, "a new session is up")
        assert len(pair.applier.applied) < 30


async def test_heartbeats_of_libzmq_are_answered():
    """Else its listener would drop the bulk connection, over which nothing else goes."""
    async with running_pair(0.3, WIRES["direct to libzmq"]) as pair:
        link = await pair.up()
        await until(lambda: link._pings > 20, "several times its timeout has passed")
        assert link.statistics().resumes == 0
        assert pair.owner.events == ["up"]


@pytest.mark.parametrize("said", [b"HTTP/1.0 400 Bad Request\r\n\r\n", b"", OPENING, b"\xff"])
async def test_a_link_that_reached_something_else(pair, said):
    async def serve(stream):
        await stream.send_all(said)
        if said == b"\xff":
            await is_closed(stream)

    pair.timeout_s = 0.5
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    pair.nursery.start_soon(trio.serve_listeners, serve, [listener])
    port = listener.socket.getsockname()[1]
    link = pair.dial(f"tcp://127.0.0.1:{port}")
    await until(lambda: link.statistics().attempts > 1, "it tries again")
    assert not link.is_up
    reason = link.statistics().last_error
    assert reason == {
        b"": "the connection broke",
        b"\xff": "no connection for 0.5 s",
        OPENING: "what answers is no peer: it is not a ROUTER",
    }.get(said, "what answers is no peer: it does not speak ZMTP 3")


async def test_a_link_to_a_listener_that_wants_curve_says_so(pair):
    async def serve(stream):
        await stream.send_all(GREETING[:12] + b"CURVE".ljust(20, b"\0") + b"\1" + bytes(31))
        await is_closed(stream)

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    pair.nursery.start_soon(trio.serve_listeners, serve, [listener])
    link = pair.dial(f"tcp://127.0.0.1:{listener.socket.getsockname()[1]}")
    await until(lambda: link.statistics().last_error, "it failed")
    assert "security mechanism 'CURVE'" in link.statistics().last_error


async def test_a_name_is_looked_up(pair):
    endpoint = await pair.listen()
    link = await pair.up(f"tcp://localhost:{port_of(endpoint)}")
    assert link._flows[0].connection.is_edge_triggered is False


async def test_over_ipv6(pair):
    endpoint = await pair.listen("tcp://[::1]:0")
    assert endpoint.startswith("tcp://[::1]:")
    await pair.up(endpoint)
    assert await works(pair)


async def test_a_socket_left_behind_is_replaced_and_a_file_is_not(pair, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    await pair.up(await pair.listen(f"ipc://{path}"))
    assert await works(pair)
    file = tmp_path / "file"
    file.write_text("precious")
    listener = Listener(pair.context, f"ipc://{file}", pair.applier, peer_timeout_s=1)
    with pytest.raises(UsageError, match=r"cannot listen on ipc://.*/file"):
        await listener.run()
    assert file.read_text() == "precious"


async def test_a_port_in_use_is_one_clear_sentence(pair):
    endpoint = await pair.listen()
    listener = Listener(pair.context, endpoint, pair.applier, peer_timeout_s=1)
    with pytest.raises(UsageError, match=f"cannot listen on {endpoint}: Address already in use"):
        await listener.run()


@pytest.mark.parametrize(
    ("endpoint", "listening", "target"),
    [
        ("tcp://127.0.0.1:80", False, ("127.0.0.1", 80)),
        ("tcp://*:80", True, ("0.0.0.0", 80)),
        ("tcp://*:*", True, ("0.0.0.0", 0)),
        ("tcp://[::1]:80", True, ("::1", 80)),
        ("tcp://example.org:80", False, ("example.org", 80)),
        ("ipc:///run/x", True, "/run/x"),
        # What only libzmq knows, or nobody.
        ("tcp://example.org:80", True, None),
        ("tcp://eth0:80", True, None),
        ("tcp://*:80", False, None),
        ("tcp://127.0.0.1:70000", False, None),
        ("tcp://127.0.0.1", False, None),
        ("tcp://1.2.3.4:5;6.7.8.9:10", False, None),
        ("ipc://@abstract", True, None),
        ("ipc://*", True, None),
        ("tcp://:::nonsense", False, None),
        ("", False, None),
    ],
)
def test_endpoints(endpoint, listening, target):
    address = parse(endpoint, listening=listening)
    assert (address and address.target) == target


def test_the_environment_chooses(monkeypatch):
    monkeypatch.delenv("REPLFS_WIRE", raising=False)
    assert wire_of_environment() is Wire.AUTO
    monkeypatch.setenv("REPLFS_WIRE", "libzmq")
    assert wire_of_environment() is Wire.LIBZMQ
    monkeypatch.setenv("REPLFS_WIRE", "pigeons")
    with pytest.raises(UsageError, match="REPLFS_WIRE must be auto or libzmq"):
        wire_of_environment()


async def test_a_connection_that_breaks_as_it_begins(monkeypatch):
    """The other process may be killed between accepting and reading."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.close()

    async def connected_to(*_: object) -> socket.socket:
        return ours

    monkeypatch.setattr(direct, "connected_to", connected_to)
    address = parse("tcp://127.0.0.1:1", listening=False)
    assert address is not None
    connection = direct.DirectConnection(
        address, lambda *_: None, lambda *_: None, frame_max=1 << 20
    )
    connection.send(b"sent before it was connected")
    with trio.fail_after(60):
        await connection.watch()
        await connection.wait()
    assert connection.gone
    with pytest.raises(NotSent):
        connection.send(b"and after")
    connection.close()
