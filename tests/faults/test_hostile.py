"""Strangers at a real agent: whatever they send, it goes on serving and changes nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from helpers.cases import read, write
from helpers.nodes import Pair

from replfs.core import messages, ops
from replfs.core.messages import Hello
from replfs.store import record

pytestmark = pytest.mark.mounted

FRAMES = 2000
KIB = 1 << 10


def snapshot(store: Path) -> dict[bytes, tuple[object, ...]]:
    """All about every object of a store: a ctime that stays says that nothing was touched."""
    found: dict[bytes, tuple[object, ...]] = {}
    waiting = [os.fsencode(store)]
    while waiting:
        path = waiting.pop()
        status = os.lstat(path)
        content: object = None
        if stat.S_ISDIR(status.st_mode):
            content = sorted(os.listdir(path))
            waiting += [path + b"/" + name for name in os.listdir(path) if name != b".replfs"]
        elif stat.S_ISREG(status.st_mode):
            content = read(path)
        found[path] = (status.st_ino, status.st_mode, status.st_mtime_ns, status.st_ctime_ns,
                       status.st_nlink, status.st_size, content)  # fmt: skip
    for name in ("limbo", "kept"):
        assert os.listdir(store / ".replfs" / name) == []
    return found


def fill(top: Path) -> None:
    (top / "dir" / "deep").mkdir(parents=True)
    for number in range(10):
        write(top / "dir" / f"{number}", b"%d" % number * 10_000)
    os.symlink("dir", top / "link")


def identity_of(path: Path) -> bytes:
    """The object id that a replica keeps with an object."""
    value = os.getxattr(path, record.XATTR, follow_symlinks=False)
    found = record.unpack(value, os.lstat(path).st_ino)
    assert found is not None
    return found.object


class Stranger:
    """A bare DEALER that sends what it is told."""

    def __init__(self, context: zmq.Context[Any], endpoint: str) -> None:
        self.socket = context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 2000)
        self.socket.connect(endpoint)

    def send(self, frames: list[bytes]) -> None:
        """Send one message; waits while there are too many on the way."""
        assert self.socket.poll(30_000, zmq.POLLOUT), "the agent takes nothing"
        self.socket.send_multipart(frames, zmq.NOBLOCK)

    def answer(self, *kinds: int) -> bytes | None:
        """The next message of one of these kinds; None if there is none for long."""
        while self.socket.poll(20_000):
            head = bytes(self.socket.recv_multipart()[0])
            if messages.open_head(head, None).kind in kinds:
                return head
        return None

    def close(self) -> None:
        self.socket.close()


@contextlib.contextmanager
def strangers(endpoint: str, count: int) -> Iterator[list[Stranger]]:
    with zmq.Context() as context:
        made = [Stranger(context, endpoint) for _ in range(count)]
        try:
            yield made
        finally:
            for stranger in made:
                stranger.close()


class Harm:
    """Operations that would do harm if they were taken for genuine."""

    def __init__(self, store: Path) -> None:
        self.file = identity_of(store / "dir" / "3")
        self.directory = identity_of(store / "dir")
        self.new = b"\x07" * 16

    def live(self) -> list[tuple[ops.AnyOp, bytes | None]]:
        return [
            (ops.Write(self.file, 0, 1), b"overwritten"),
            (ops.Truncate(self.file, 0, 1), None),
            (ops.Unlink(self.file, self.directory, b"3", False, 1), None),
            (ops.Rename(self.file, self.directory, b"3", record.ROOT_ID, b"moved", b"", False,
                        1, 1), None),
            (ops.Make(self.new, record.ROOT_ID, b"new", 0o100644, 0, 0, 0, b"", 1, 1), None),
            (ops.SetAttr(self.file, 0o777, 1, 1, 1, 1), None),
            (ops.SetXattr(self.file, b"user.x", b"y"), None),
            (ops.SetPolicy(self.directory, 4, 1), None),
            (ops.Checkpoint(b"g" * 16), None),
        ]  # fmt: skip

    def bulk(self) -> list[tuple[ops.AnyOp, bytes | None]]:
        return [
            (ops.Clear(self.directory, b"3"), None),
            (ops.Data(self.file, 0), b"overwritten"),
            (ops.Data(self.file, 0, 4096), None),
            (ops.Phase(inconsistent=True, generation=b"g" * 16, history=[]), None),
            (ops.EmptyLimbo(), None),
        ]


def mutate(rng: random.Random, frames: list[bytes]) -> list[bytes]:
    """Frames that differ from genuine ones in some way."""
    changed = [bytearray(frame) for frame in frames]
    victim = rng.choice(changed)
    match rng.randrange(6):
        case 0:
            for _ in range(rng.randrange(1, 4)):
                victim[rng.randrange(len(victim))] ^= 1 << rng.randrange(8)
            if [bytes(frame) for frame in changed] == frames:  # flipped back
                victim[0] ^= 1
        case 1:
            del victim[rng.randrange(len(victim)) :]
        case 2:
            victim += rng.randbytes(rng.randrange(1, 50))
        case 3:
            changed.append(bytearray(rng.randbytes(rng.randrange(1, 50))))
        case 4:
            changed.insert(0, bytearray())
        case _:
            at = rng.randrange(len(victim))
            victim[at : at + 8] = rng.randbytes(9)
    return [bytes(frame) for frame in changed]


def junk(rng: random.Random) -> list[bytes]:
    """Frames that are nothing at all, or begin like something."""
    frames = [rng.randbytes(rng.choice((0, 1, 7, 40, 3000))) for _ in range(rng.randrange(1, 6))]
    if rng.random() < 0.5:
        frames[0] = bytes([0xF5, 1, rng.randrange(10), rng.randrange(3)]) + frames[0]
    return frames


def hello(status: dict[str, Any], **changes: Any) -> Hello:
    """A greeting as the primary with this status would send it."""
    fields: dict[str, Any] = {
        "version": messages.PROTOCOL_VERSION,
        "volume": bytes.fromhex(status["volume"]),
        "node": b"n" * 16,
        "name": "impostor",
        "store": b"elsewhere",
        "role": "primary",
        "generation": bytes.fromhex(status["generation"]),
        "history": [],
        "clean": True,
        "uninitialized": False,
        "memory_lost": False,
        "features": [],
    }
    return Hello(**(fields | changes))


def greet(status: dict[str, Any], live: Stranger, bulk: Stranger) -> int:
    """Be taken for the primary with this status; the session."""
    live.send([messages.encode_hello(1, hello(status))])
    head = live.answer(messages.WELCOME, messages.REFUSE)
    assert head is not None, "the agent does not answer any more"
    assert messages.open_head(head, None).kind == messages.WELCOME
    session = messages.decode_welcome(head).session
    bulk.send([messages.encode_hello(1, hello(status, resume=session, stream=1))])
    head = bulk.answer(messages.WELCOME, messages.REFUSE)
    assert head is not None
    assert messages.open_head(head, None).kind == messages.WELCOME
    return session


def test_strangers_beside_a_session():
    """Nobody who does not know the session is taken seriously, and it is not disturbed."""
    rng = random.Random(1)
    with Pair() as pair:
        fill(pair.mountpoint)
        pair.assert_equal()
        before = snapshot(pair.secondary_store)
        status = pair.mount.status()
        harm = Harm(pair.secondary_store)
        genuine: list[list[bytes]] = [
            [messages.encode_hello(1, hello(status))],
            [messages.encode_ping(1, 1)],
            [messages.encode_bye(1, "over")],
            [messages.encode_answers(0, 1, 1, [(1, ops.Done(0))])],
        ]
        for stream, operations in ((0, harm.live()), (1, harm.bulk())):
            for op, payload in operations:
                head = messages.encode_op(stream, rng.getrandbits(64), 1, op, payload)
                genuine.append([head] if payload is None else [head, payload])
        with strangers(pair.endpoint, 8) as crowd:
            for number in range(FRAMES):
                if number % 4 == 0:
                    frames = junk(rng)
                else:
                    frames = mutate(rng, rng.choice(genuine))
                crowd[number % 8].send(frames)
                if number % 100 == 0:
                    write(pair.mountpoint / "own", b"%d" % number)
                    assert read(pair.secondary_store / "own") == b"%d" % number
            for op, payload in [*harm.live(), *harm.bulk()]:
                # Whole and right, but of no session.
                stream = 0 if (op, payload) in harm.live() else 1
                head = messages.encode_op(stream, 12345, 1, op, payload)
                crowd[0].send([head] if payload is None else [head, payload])
        assert pair.peer()["state"] == "in-sync"
        os.unlink(pair.mountpoint / "own")
        after = snapshot(pair.secondary_store)
        del before[os.fsencode(pair.secondary_store)], after[os.fsencode(pair.secondary_store)]
        assert after == before
        assert b"is over" not in pair.mount.log_since_start()
        pair.assert_equal()
        pair.check_alive()


def test_an_impostor_with_a_session_sends_damaged_frames():
    """Even from whom it takes for its primary the agent applies only what is whole."""
    rng = random.Random(2)
    with Pair() as pair:
        fill(pair.mountpoint)
        pair.assert_equal()
        status = pair.mount.status()
        assert pair.mount.stop() == 0
        before = snapshot(pair.secondary_store)
        harm = Harm(pair.secondary_store)
        greetings = 0
        for _ in range(FRAMES // 10):
            with strangers(pair.endpoint, 2) as (live, bulk):
                session = greet(status, live, bulk)
                greetings += 1
                for _ in range(9):
                    stream = rng.randrange(2)
                    op, payload = rng.choice(harm.bulk() if stream else harm.live())
                    head = messages.encode_op(stream, session, 1, op, payload)
                    frames = mutate(rng, [head] if payload is None else [head, payload])
                    (bulk if stream else live).send(frames)
        assert greetings == FRAMES // 10
        assert snapshot(pair.secondary_store) == before
        assert b"something wrong was received" in pair.agent.log_since_start()
        assert b"Traceback" not in pair.agent.log_since_start()
        # And it serves its primary as before.
        pair.agent.check()
        pair.mount.start()
        pair.wait_in_sync()
        write(pair.mountpoint / "dir" / "new", b"x")
        pair.assert_equal()


def test_whole_operations_with_wrong_contents():
    """Sealed correctly, but with names and places that no primary may use."""
    with Pair() as pair:
        fill(pair.mountpoint)
        pair.assert_equal()
        status = pair.mount.status()
        assert pair.mount.stop() == 0
        harm = Harm(pair.secondary_store)
        os.mkdir(pair.base / "outside")
        before = snapshot(pair.secondary_store), sorted(os.listdir(pair.base))
        reserved: list[ops.AnyOp] = [
            ops.Rename(harm.directory, record.ROOT_ID, b"dir", record.ROOT_ID, b".replfs",
                       b"", True, 1, 1),
            ops.Rename(harm.directory, record.ROOT_ID, b"dir", record.ROOT_ID, b".replfs",
                       b"", False, 1, 1),
            ops.Rename(harm.file, record.ROOT_ID, b".replfs", record.ROOT_ID, b"mine",
                       b"", False, 1, 1),
            ops.Make(harm.new, record.ROOT_ID, b".replfs", 0o40755, 0, 0, 0, b"", 1, 1),
            ops.Unlink(harm.file, record.ROOT_ID, b".replfs", True, 1),
            ops.SetXattr(harm.file, b"trusted.replfs", b"x"),
            ops.RemoveXattr(harm.file, b"trusted.replfs"),
        ]  # fmt: skip
        malformed: list[ops.AnyOp] = [
            ops.Make(harm.new, record.ROOT_ID, name, 0o100644, 0, 0, 0, b"", 1, 1)
            for name in (b"../outside/x", b"..", b".", b"", b"a/b", b"a\0b", b"x" * 256)
        ]
        malformed += [
            ops.Truncate(harm.file, -1, 1),
            ops.Truncate(harm.file[:8], 1, 1),
            ops.Make(harm.new, record.ROOT_ID, b"x", 0o777, 0, 0, 0, b"", 1, 1),
            ops.Unlink(harm.file, harm.directory, b"../dir/3", False, 1),
        ]
        for op in [*reserved, *malformed]:
            with strangers(pair.endpoint, 2) as (live, bulk):
                session = greet(status, live, bulk)
                locate = ops.Locate(harm.directory, record.ROOT_ID, b"dir")
                live.send([messages.encode_op(0, session, 1, locate, None)])
                locate = ops.Locate(harm.file, harm.directory, b"3")
                live.send([messages.encode_op(0, session, 2, locate, None)])
                body = messages._encode_body(op)
                live.send([messages._seal(messages.OP, 0, session, 3, body, None)])
                head = live.answer(messages.ANSWER, messages.BYE)
                assert head is not None, op
                kind = messages.open_head(head, None).kind
                if op in malformed:
                    assert kind == messages.BYE, op
                elif kind == messages.ANSWER:
                    [(_, answer)] = messages.decode_answers(head)
                    assert isinstance(answer, ops.Done)
                    assert answer.errno or isinstance(op, ops.RemoveXattr), op
        assert (snapshot(pair.secondary_store), sorted(os.listdir(pair.base))) == before
        assert b"Traceback" not in pair.agent.log_since_start()
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()


def test_bytes_that_are_not_even_zeromq():
    rng = random.Random(3)
    with Pair() as pair:
        write(pair.mountpoint / "file", b"x")
        host, _, port = pair.endpoint.removeprefix("tcp://").rpartition(":")
        for _ in range(40):
            with socket.create_connection((host, int(port)), 30) as connection:
                with contextlib.suppress(ConnectionError, BrokenPipeError):
                    connection.sendall(rng.randbytes(rng.randrange(1, 100 * KIB)))
        with socket.create_connection((host, int(port)), 30) as slow:
            slow.sendall(b"\xff")  # and then nothing more
            write(pair.mountpoint / "file", b"y")
        assert read(pair.secondary_store / "file") == b"y"
        assert pair.peer()["state"] == "in-sync"
        pair.assert_equal()
        pair.check_alive()
