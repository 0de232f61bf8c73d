"""ZMTP without sockets: what one side says is what the other hears, and nothing else passes."""

from __future__ import annotations

import struct

import pytest

from replfs.errors import ProtocolError
from replfs.transport import zmtp

FRAME_MAX = 100_000


def pieces(data: bytes, size: int) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def hear(
    decoder: zmtp.Decoder, data: bytes, size: int = 1 << 20
) -> list[tuple[bytes, bytes | None, str]]:
    """Feed *data* in pieces of at most *size* bytes; the messages, with payloads copied."""
    heard = []
    rest = memoryview(data)
    while rest:
        space = decoder.space()
        count = min(len(space), len(rest), size)
        assert count > 0
        space[:count] = rest[:count]
        rest = rest[count:]
        decoder.feed(count)
        while (message := decoder.next()) is not None:
            payload = None if message.payload is None else bytes(message.payload)
            heard.append((message.head, payload, message.wrong))
    return heard


def greeted(socket_type: bytes = b"ROUTER", frame_max: int = FRAME_MAX) -> zmtp.Decoder:
    decoder = zmtp.Decoder(socket_type, frame_max)
    assert hear(decoder, zmtp.opening(zmtp._PARTNERS[socket_type])) == []
    assert decoder.ready
    return decoder


def said(head: bytes, payload: bytes | None = None) -> bytes:
    first, second = zmtp.encode(head, payload)
    return first + (second or b"")


def frame(flags: int, body: bytes) -> bytes:
    return bytes((flags, len(body))) + body


MESSAGES = [
    (b"", None, ""),
    (b"h", b"", ""),
    (b"head", b"payload", ""),
    (b"h" * 255, b"p" * 255, ""),
    (b"h" * 256, b"p" * 256, ""),
    (b"h" * 70_000, None, ""),
    (b"h", b"p" * 99_999, ""),
    (b"h" * 300, b"p" * (32 << 10), ""),
    (b"h" * 300, b"p" * ((32 << 10) + 1), ""),
    (b"last", None, ""),
]


@pytest.mark.parametrize("size", [1, 2, 7, 63, 64, 65, 1000, 65_536, 1 << 20])
def test_messages_arrive_as_they_were_sent_however_they_are_cut(size):
    decoder = zmtp.Decoder(b"ROUTER", FRAME_MAX)
    data = zmtp.opening(b"DEALER") + b"".join(said(head, payload) for head, payload, _ in MESSAGES)
    assert hear(decoder, data, size) == MESSAGES


def test_a_large_frame_is_received_up_to_its_end_and_not_beyond():
    decoder = greeted(frame_max=1 << 20)
    head, payload = b"head", bytes(1 << 20)
    data = said(head, payload)
    assert hear(decoder, data[:100]) == []
    assert len(decoder.space()) == len(data) - 100
    assert hear(decoder, data[100:]) == [(head, payload, "")]
    assert len(decoder.space()) == zmtp.READ_AHEAD


def test_heartbeats_are_answered_even_amid_a_message():
    decoder = greeted()
    ping = frame(4, b"\x04PING\x00\x10context")
    assert hear(decoder, frame(1, b"head") + ping + frame(0, b"payload")) == [
        (b"head", b"payload", "")
    ]
    assert decoder.replies == frame(4, b"\x04PONGcontext")
    decoder.replies = b""
    assert (
        hear(decoder, frame(4, b"\x04PONGcontext") + frame(4, b"\x05OTHER") + frame(4, b"")) == []
    )
    assert decoder.replies == b""


def test_a_flood_of_heartbeats_ends_the_connection():
    decoder = greeted()
    with pytest.raises(ProtocolError, match="heartbeats"):
        hear(decoder, frame(4, b"\x04PING\x00\x00") * 2000)


def test_longer_messages_are_skipped_and_reported():
    decoder = greeted()
    data = frame(1, b"a") * 9 + frame(0, b"b") + said(b"next")
    assert hear(decoder, data) == [(b"", None, "a message of 10 frames"), (b"next", None, "")]


def test_a_message_without_an_end_ends_the_connection():
    decoder = greeted()
    with pytest.raises(ProtocolError, match="more than 64 frames"):
        hear(decoder, frame(1, b"") * 100)


@pytest.mark.parametrize("small", [True, False])
def test_a_frame_over_the_limit_is_refused_by_its_header(small):
    decoder = greeted(frame_max=100 if small else FRAME_MAX)
    size = 101 if small else FRAME_MAX + 1
    with pytest.raises(ProtocolError, match=f"a frame of {size} bytes"):
        hear(decoder, b"\x02" + struct.pack(">Q", size))
    decoder = greeted(frame_max=100)
    with pytest.raises(ProtocolError, match="a frame of 101 bytes"):
        hear(decoder, frame(0, bytes(101)))
    assert hear(greeted(frame_max=100), frame(0, bytes(100))) == [(bytes(100), None, "")]


READY = zmtp.opening(b"DEALER")[64:]
GREETING = zmtp.opening(b"DEALER")[:64]
WRONG = {
    "not ZeroMQ": (b"GET / HTTP/1.1\r\n", "does not speak ZMTP 3"),
    "ZMTP 1": (b"\x01\x00" + bytes(70), "does not speak ZMTP 3"),
    "ZMTP 2": (GREETING[:10] + b"\x01", "speaks ZMTP 1"),
    "half a signature": (b"\xff" + bytes(8) + b"\x00", "does not speak ZMTP 3"),
    "CURVE": (GREETING[:12] + b"CURVE".ljust(52, b"\0"), "'CURVE', not NULL"),
    "a message first": (GREETING + frame(0, b"hello"), "before the handshake"),
    "half a message first": (GREETING + b"\x00\x7f", "before the handshake"),
    "an unknown flag": (GREETING + READY + frame(8, b"x"), "flags 0x08"),
    "half with an unknown flag": (GREETING + READY + b"\x80\x7f", "flags 0x80"),
    "a command in parts": (GREETING + READY + frame(5, b"x"), "flags 0x05"),
    "a long command": (GREETING + b"\x06" + struct.pack(">Q", 8193), "a frame of 8193 bytes"),
    "a frame of 2^64-1": (GREETING + READY + b"\x02" + b"\xff" * 8, "a frame of 18446744073709"),
    "an error": (GREETING + frame(4, b"\x05ERROR\x07go away"), "go away"),
    "another command": (GREETING + frame(4, b"\x05HELLO"), "not one of the mechanism NULL"),
    "an empty command": (GREETING + frame(4, b""), "not one of the mechanism NULL"),
    "no socket type": (GREETING + frame(4, b"\x05READY"), "not a DEALER"),
    "another socket": (zmtp.opening(b"ROUTER"), "not a DEALER"),
    "half a property": (GREETING + frame(4, b"\x05READY\x0bSocket"), "amid a property"),
    "a property too long": (
        GREETING + frame(4, b"\x05READY\x01x" + struct.pack(">I", 2**32 - 1)),
        "amid a property",
    ),
}  # fmt: skip


@pytest.mark.parametrize("size", [1, 1 << 20])
@pytest.mark.parametrize("what", WRONG)
def test_whatever_else_is_said_ends_the_connection(what, size):
    data, reason = WRONG[what]
    with pytest.raises(ProtocolError, match=reason):
        hear(zmtp.Decoder(b"ROUTER", FRAME_MAX), data, size)
