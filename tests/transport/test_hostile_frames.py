"""Whatever is sent to a listener, nothing wrong is applied and it goes on serving."""

from __future__ import annotations

import random
import socket
import struct
import time

import pytest
import trio
import zmq
from helpers.linkage import RecordingSink, identity, object_id, port_of, running_pair, until, write
from xxhash import xxh3_64_intdigest

from replfs.core import messages, ops
from replfs.core.messages import Hello, Welcome
from replfs.transport.wire import Wire

MAGIC = 0xF5


@pytest.fixture(params=list(Wire))
def wires(request):
    """Who speaks for the link and for the listener; the strangers speak through libzmq."""
    return request.param, request.param


@pytest.fixture
async def pair(wires):
    async with running_pair(wires=wires) as made:
        yield made


class Stranger:
    """A bare DEALER that sends what it is told."""

    def __init__(self, context, endpoint):
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.setsockopt(zmq.SNDHWM, 0)
        self.socket.connect(endpoint)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_exc):
        self.socket.close(0)

    def send(self, *frames):
        self.socket.send_multipart(frames, zmq.NOBLOCK)

    async def receive(self):
        with trio.fail_after(60):
            while not self.socket.poll(0):
                await trio.sleep(0.005)
        return self.socket.recv_multipart()[0]

    async def greet(self, resume=0, stream=0, answered=0, number=1):
        hello = Hello(
            **identity(name="stranger"),
            version=messages.PROTOCOL_VERSION,
            resume=resume,
            answered=answered,
            stream=stream,
            clock_ns=time.time_ns(),
        )
        self.send(messages.encode_hello(number, hello))
        while True:
            head = await self.receive()
            header = messages.open_head(head, None)
            if header.kind in (messages.WELCOME, messages.REFUSE):
                return header, head


class Impostor:
    """Two strangers that have a session, and so are taken seriously."""

    def __init__(self, context, endpoint):
        self.live = Stranger(context, endpoint)
        self.bulk = Stranger(context, endpoint)
        self.session = 0

    async def __aenter__(self):
        header, head = await self.live.greet()
        assert header.kind == messages.WELCOME
        self.session = messages.decode_welcome(head).session
        header, head = await self.bulk.greet(resume=self.session, stream=1)
        assert header.kind == messages.WELCOME
        assert messages.decode_welcome(head).resumed
        return self

    async def __aexit__(self, *_exc):
        self.live.socket.close(0)
        self.bulk.socket.close(0)

    def op(self, seq, op=None, payload=None, stream=0):
        if op is None:
            op, payload = write(seq)
        return [messages.encode_op(stream, self.session, seq, op, payload)] + (
            [payload] if payload is not None else []
        )


async def bye_to(stranger):
    while True:
        head = await stranger.receive()
        if messages.open_head(head, None).kind == messages.BYE:
            return messages.decode_bye(head)


def junk(rng, genuine):
    """Frames that are random, or genuine and then damaged."""
    choice = rng.randrange(6)
    if choice == 0:
        return [rng.randbytes(rng.randrange(200)) for _ in range(rng.randrange(1, 5))]
    if choice == 1:
        header = struct.pack(
            "<BBBBQQI",
            MAGIC,
            rng.choice([0, 1, 2, 255]),
            rng.randrange(10),
            rng.randrange(3),
            rng.getrandbits(64),
            rng.getrandbits(64),
            rng.choice([0, 1, 2**32 - 1]),
        )
        return [header + rng.randbytes(rng.randrange(100))]
    frames = [bytearray(frame) for frame in rng.choice(genuine)]
    victim = rng.choice(frames)
    if choice == 2 and victim:
        victim[rng.randrange(len(victim))] ^= 1 << rng.randrange(8)
    elif choice == 3:
        del victim[rng.randrange(len(victim)) :]
    elif choice == 4:
        victim += rng.randbytes(rng.randrange(1, 50))
    else:
        frames.append(bytearray(rng.randbytes(20)))
    return [bytes(frame) for frame in frames]


@pytest.mark.parametrize("seed", range(4))
async def test_strangers_do_not_disturb_a_session(pair, seed):
    rng = random.Random(seed)
    link = await pair.up()
    op, payload = write(1)
    genuine = [
        [messages.encode_op(0, link.session, seq, op, payload), payload] for seq in range(1, 5)
    ]
    genuine += [[messages.encode_ping(link.session, 1)], [messages.encode_bye(link.session, "x")]]
    genuine += [[messages.encode_answers(0, link.session, 1, [(1, ops.Done(0))])]]
    async with Stranger(pair.context, pair.listener.endpoint) as stranger:
        sinks = []
        for number in range(1, 400):
            stranger.send(*(junk(rng, genuine) if rng.random() < 0.8 else rng.choice(genuine)))
            sink = RecordingSink()
            sinks.append(sink)
            link.send(*write(number), sink)
            if number % 8 == 0:
                await trio.lowlevel.checkpoint()
            await link.wait_room()
        await until(lambda: link.outstanding == 0, "all is answered")
    assert all(sink.answer for sink in sinks)
    assert pair.applier.applied == [(0, n, *write(n)) for n in range(1, 400)]
    assert pair.owner.events == ["up"]
    assert pair.applier.events == ["opened"]
    await until(lambda: pair.listener.statistics().malformed > 100, "the junk was seen")
    assert pair.listener.statistics().strays > 0


async def test_raw_bytes_instead_of_zeromq(pair):
    rng = random.Random(1)
    endpoint = await pair.listen()
    for _ in range(20):
        stream = await trio.open_tcp_stream("127.0.0.1", port_of(endpoint))
        async with stream:
            try:
                await stream.send_all(rng.randbytes(rng.randrange(1, 5000)))
            except trio.BrokenResourceError:
                pass
    link = await pair.up(endpoint)
    assert link.is_up


DAMAGED = {
    "random": lambda i: [b"\xf5" + random.Random(3).randbytes(60)],
    "empty": lambda i: [b""],
    "too long": lambda i: [bytes(messages.HEAD_MAX - 1)],
    "three frames": lambda i: [*i.op(1), b"x"],
    "ten frames": lambda i: [*i.op(1), *[b"x"] * 8],
    "missing payload": lambda i: i.op(1)[:1],
    "empty payload": lambda i: [i.op(1)[0], b""],
    "other payload": lambda i: [i.op(1)[0], b"y" * len(i.op(1)[1])],
    "shorter payload": lambda i: [i.op(1)[0], i.op(1)[1][:-1]],
    "wrong checksum": lambda i: [i.op(1)[0][:-1] + b"\0", i.op(1)[1]],
    "gap": lambda i: i.op(2),
    "zero": lambda i: [messages._seal(messages.OP, 0, i.session, 0, b"", None)],
    "bulk operation on live": lambda i: [
        messages._seal(messages.OP, 0, i.session, 1, messages._encode_body(ops.EmptyLimbo()), None)
    ],
    "a bad name": lambda i: [
        messages._seal(
            messages.OP,
            0,
            i.session,
            1,
            messages._encode_body(ops.Locate(object_id(1), object_id(2), b"../x")),
            None,
        )
    ],
    "a short id": lambda i: [
        messages._seal(
            messages.OP,
            0,
            i.session,
            1,
            messages._encode_body(ops.Truncate(b"id", 1, 1)),
            None,
        )
    ],
    "an answer": lambda i: [messages.encode_answers(0, i.session, 0, [])],
    "a welcome": lambda i: [messages._seal(messages.WELCOME, 0, i.session, 0, b"", None)],
    "other version": lambda i: [
        i.op(1)[0][:1] + b"\x02" + i.op(1)[0][2:],
        i.op(1)[1],
    ],
}


@pytest.mark.parametrize("what", DAMAGED)
async def test_a_peer_that_sends_something_wrong_loses_its_session(pair, what):
    endpoint = await pair.listen()
    async with Impostor(pair.context, endpoint) as impostor:
        impostor.live.send(*DAMAGED[what](impostor))
        impostor.live.send(*impostor.op(1))  # too late
        reason = await bye_to(impostor.live)
        assert reason.startswith("something wrong was received")
        assert pair.applier.events == ["opened", f"closed: {reason}"]
        header, _ = await impostor.bulk.greet(resume=impostor.session, stream=1)
        assert header.kind == messages.REFUSE
    assert pair.applier.applied == []
    link = await pair.up(endpoint)
    sink = RecordingSink()
    link.send(*write(1), sink)
    await until(lambda: sink.answer, "it goes on serving")


async def test_frames_over_the_limit_close_the_connection(pair):
    """They are refused before anything of them is read into memory."""
    endpoint = await pair.listen()
    async with Impostor(pair.context, endpoint) as impostor:
        monitor = impostor.live.socket.get_monitor_socket(zmq.Event.DISCONNECTED)
        impostor.live.send(bytes(messages.HEAD_MAX + 1))
        await until(lambda: monitor.poll(0), "the connection is closed")
        impostor.live.socket.disable_monitor()
        monitor.close(0)
        header, _ = await impostor.live.greet(resume=impostor.session, number=7)
        assert header.seq == 7
    assert pair.applier.applied == []


async def test_a_retry_gets_the_remembered_answer(pair):
    endpoint = await pair.listen()
    async with Impostor(pair.context, endpoint) as impostor:
        for _ in range(3):
            impostor.live.send(*impostor.op(1))
            answers = messages.decode_answers(await impostor.live.receive())
            assert answers == [(1, ops.Done(0, len(impostor.op(1)[1])))]
        assert len(pair.applier.applied) == 1
        assert pair.listener.statistics().session.retries == 2


async def test_answers_are_given_again_after_resuming(pair):
    endpoint = await pair.listen()
    pair.applier.defer = lambda op: isinstance(op, ops.Sync)
    async with Impostor(pair.context, endpoint) as impostor:
        for seq in range(1, 6):
            impostor.live.send(*impostor.op(seq))
        impostor.live.send(*impostor.op(6, ops.Sync(object_id(1), data_only=True)))
        await until(lambda: len(pair.applier.applied) == 6, "all are applied")
        async with Stranger(pair.context, endpoint) as again:
            header, head = await again.greet(resume=impostor.session, answered=2)
            assert messages.decode_welcome(head).applied == 6
            answers = messages.decode_answers(await again.receive())
            assert [seq for seq, _ in answers] == [3, 4, 5]
            impostor.live.send(*impostor.op(7))  # no longer the session's connection
            pair.applier.sessions[0].answer(0, 6, ops.Done(0))
            assert messages.decode_answers(await again.receive()) == [(6, ops.Done(0))]
            again.send(*impostor.op(7))
            await until(lambda: len(pair.applier.applied) == 7, "it goes on")


async def test_resuming_what_is_not_there(pair):
    endpoint = await pair.listen()
    async with (
        Impostor(pair.context, endpoint) as impostor,
        Stranger(pair.context, endpoint) as stranger,
    ):
        for resume, stream, answered in (
            (12345, 0, 0),
            (12345, 1, 0),
            (impostor.session, 0, 99),
        ):
            header, head = await stranger.greet(resume, stream, answered)
            assert header.kind == messages.REFUSE
            assert messages.decode_refuse(head).code == "unknown-session"
        impostor.live.send(*impostor.op(1))
        await until(lambda: pair.applier.applied, "the session is untouched")


async def test_an_offer_replaces_nothing_until_it_is_taken(pair):
    link = await pair.up()
    async with Stranger(pair.context, pair.listener.endpoint) as stranger:
        for number in range(1, 30):
            header, _ = await stranger.greet(number=number)
            assert header.kind == messages.WELCOME
    assert pair.applier.events == ["opened"]
    sink = RecordingSink()
    link.send(*write(1), sink)
    await until(lambda: sink.answer, "the session goes on")


async def test_another_protocol_version_is_told(pair):
    endpoint = await pair.listen()
    async with Stranger(pair.context, endpoint) as stranger:
        hello = Hello(**identity(), version=2)
        body = messages._encode_body(hello)
        front = struct.pack("<BBBBQQI", MAGIC, 2, messages.HELLO, 0, 0, 5, 0) + body
        stranger.send(front + struct.pack("<Q", xxh3_64_intdigest(front, 0)))
        head = await stranger.receive()
        assert messages.open_head(head, None).seq == 5
        refuse = messages.decode_refuse(head)
        assert refuse.code == "version"
        assert "version 2 is not supported" in refuse.reason


async def test_a_peer_that_does_not_read_its_answers(pair):
    """It may lose its answers, but costs bounded memory and harms nobody."""
    endpoint = await pair.listen()
    async with Impostor(pair.context, endpoint) as impostor:
        impostor.bulk.socket.setsockopt(zmq.RCVHWM, 1)
        for seq in range(1, 800):
            while True:
                try:
                    frames = impostor.op(seq, ops.List(object_id(1), b""), stream=1)
                    impostor.bulk.send(*frames)
                except zmq.Again:
                    await trio.sleep(0.005)
                else:
                    break
        await until(lambda: len(pair.applier.applied) == 799, "all are applied")
        lane = pair.applier.sessions[0].lanes[1]
        assert lane.answers_bytes <= 64 << 20
    link = await pair.up(endpoint)
    assert link.is_up


async def test_a_peer_that_asks_for_too_much_at_once(pair):
    endpoint = await pair.listen()
    pair.applier.defer = lambda _op: True
    async with Impostor(pair.context, endpoint) as impostor:
        for seq in range(1, 2060):
            impostor.live.send(*impostor.op(seq))
            if seq % 50 == 0:
                await trio.sleep(0)
        assert "operations without an answer" in await bye_to(impostor.live)


async def test_silence_ends_a_session(wires):
    async with running_pair(0.2, wires) as pair:
        endpoint = await pair.listen()
        async with Impostor(pair.context, endpoint):
            await until(lambda: len(pair.applier.events) == 2, "it is closed")
            assert pair.applier.events[1] == "closed: silent for 0.6 s"


async def test_a_claimed_identity_takes_nothing_over(pair):
    """A connection that claims the identity of a session's connection is turned away."""
    link = await pair.up()
    lane = pair.applier.sessions[0].lanes[0]
    with socket.create_connection(("127.0.0.1", port_of(pair.listener.endpoint))) as raw:
        raw.setblocking(False)
        properties = b""
        for name, value in ((b"Socket-Type", b"DEALER"), (b"Identity", lane.identity)):
            properties += bytes([len(name)]) + name + struct.pack(">I", len(value)) + value
        ready = b"\x05READY" + properties
        greeting = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
        op, payload = write(1)
        head = messages.encode_op(0, link.session, 1, op, payload)
        raw.send(greeting)
        raw.send(b"\x04" + bytes([len(ready)]) + ready)
        raw.send(b"\x01" + bytes([len(head)]) + head + b"\x00" + bytes([len(payload)]) + payload)
        sink = RecordingSink()
        for number in range(50, 60):
            sink = RecordingSink()
            link.send(*write(number), sink)
            await until(lambda: sink.answer, "the session goes on")  # noqa: B023
        assert pair.owner.events == ["up"]
        assert [op.offset for _, _, op, _ in pair.applier.applied] == list(range(50, 60))


class FakeListener:
    """A ROUTER that grants sessions and then sends what it is told."""

    def __init__(self, context):
        self.socket = context.socket(zmq.ROUTER)
        self.socket.setsockopt(zmq.LINGER, 0)
        port = self.socket.bind_to_random_port("tcp://127.0.0.1")
        self.endpoint = f"tcp://127.0.0.1:{port}"
        self.identities = {}
        self.session = 0
        self.ops = []

    async def run(self):
        while True:
            while self.socket.poll(0):
                identity, head, *rest = self.socket.recv_multipart()
                header = messages.open_head(head, rest[0] if rest else None)
                if header.kind == messages.HELLO:
                    self.welcome(identity, header, messages.decode_hello(head))
                elif header.kind == messages.OP:
                    self.ops.append(header.seq)
            await trio.sleep(0.002)

    def welcome(self, identity, header, hello):
        if not hello.resume:
            self.session += 1
        self.identities[header.stream] = identity
        welcome = Welcome(
            **SIDE, version=1, session=self.session, resumed=bool(hello.resume), applied=0
        )
        head = messages.encode_welcome(header.stream, header.seq, welcome)
        self.socket.send_multipart([identity, head])

    def send(self, *frames, stream=0):
        self.socket.send_multipart([self.identities[stream], *frames])


SIDE = identity(name="fake")
WRONG = {
    "random": lambda f: [random.Random(4).randbytes(50)],
    "empty": lambda f: [b""],
    "two frames": lambda f: [messages.encode_answers(0, f.session, 0, []), b"x"],
    "three frames": lambda f: [messages.encode_answers(0, f.session, 0, []), b"x", b"y"],
    "an operation": lambda f: [
        messages.encode_op(0, f.session, 1, ops.Sync(b"i" * 16, True), None)
    ],
    "other stream": lambda f: [messages.encode_answers(1, f.session, 0, [])],
    "never sent": lambda f: [messages.encode_answers(0, f.session, 1, [(2, ops.Done(0))])],
    "never applied": lambda f: [messages.encode_answers(0, f.session, 2, [])],
    "not applied yet": lambda f: [messages.encode_answers(0, f.session, 0, [(1, ops.Done(0))])],
    "wrong kind": lambda f: [
        messages.encode_answers(0, f.session, 1, [(1, ops.Placed(True, True))])
    ],
    "too much written": lambda f: [
        messages.encode_answers(0, f.session, 1, [(1, ops.Done(0, 10**6))])
    ],
    "bad pong": lambda f: [messages.encode_pong(f.session, 1, 99)],
    "bad body": lambda f: [messages._seal(messages.ANSWER, 0, f.session, 0, b"junk", None)],
}


@pytest.mark.parametrize("what", WRONG)
async def test_a_listener_that_sends_something_wrong_loses_the_link(wires, what):
    async with running_pair(wires=wires) as pair:
        fake = FakeListener(pair.context)
        try:
            pair.nursery.start_soon(fake.run)
            link = await pair.up(fake.endpoint)
            sink = RecordingSink()
            link.send(*write(1), sink)
            await until(lambda: fake.ops, "it has arrived")
            # Of another session, so without effect.
            fake.send(messages.encode_answers(0, fake.session + 7, 1, [(1, ops.Done(0))]))
            fake.send(messages.encode_bye(fake.session + 7, "not me"))
            fake.send(*WRONG[what](fake))
            await until(lambda: sink.calls, "it is settled")
            assert sink.was_lost
            assert sink.calls == 1
            assert pair.owner.events[1].startswith("down: the peer sent something wrong")
            await until(lambda: link.is_up, "it tries again")
        finally:
            pair.nursery.cancel_scope.cancel()
            fake.socket.close(0)
