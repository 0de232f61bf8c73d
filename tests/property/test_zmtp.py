"""Whatever a stranger sends, the ZMTP decoder yields messages or ends the connection."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from replfs.errors import ProtocolError
from replfs.transport import zmtp

FRAME_MAX = 150_000

BODIES = st.binary(max_size=300) | st.integers(0, FRAME_MAX).map(bytes)
MESSAGES = st.lists(st.tuples(BODIES, st.none() | BODIES), max_size=6)
CUTS = st.lists(st.integers(1, 70_000), min_size=1, max_size=20)


def hear(decoder: zmtp.Decoder, data: bytes, cuts: list[int]) -> list[tuple[bytes, bytes | None]]:
    heard = []
    rest = memoryview(data)
    turn = 0
    while rest:
        space = decoder.space()
        count = min(len(space), len(rest), cuts[turn % len(cuts)])
        turn += 1
        space[:count] = rest[:count]
        rest = rest[count:]
        decoder.feed(count)
        while (message := decoder.next()) is not None:
            payload = None if message.payload is None else bytes(message.payload)
            heard.append((message.head, payload))
    return heard


def said(messages: list[tuple[bytes, bytes | None]]) -> bytes:
    parts = [zmtp.opening(b"DEALER")]
    for head, payload in messages:
        first, second = zmtp.encode(head, payload)
        parts += [first, second or b""]
    return b"".join(parts)


@given(MESSAGES, CUTS)
def test_messages_survive_any_cutting(messages, cuts):
    assert hear(zmtp.Decoder(b"ROUTER", FRAME_MAX), said(messages), cuts) == messages


@given(MESSAGES, CUTS, st.lists(st.tuples(st.integers(0, 10**6), st.integers(1, 255)), max_size=4))
def test_damage_ends_the_connection_or_gives_other_messages(messages, cuts, flips):
    data = bytearray(said(messages))
    for at, bits in flips:
        data[at % len(data)] ^= bits
    decoder = zmtp.Decoder(b"ROUTER", FRAME_MAX)
    try:
        hear(decoder, bytes(data), cuts)
    except ProtocolError:
        pass
    assert len(decoder._buffer) <= FRAME_MAX + 4 * zmtp.READ_AHEAD


@given(st.binary(max_size=2000), st.booleans(), CUTS)
def test_junk_raises_nothing_else(junk, greeted, cuts):
    data = zmtp.opening(b"DEALER") + junk if greeted else junk
    try:
        hear(zmtp.Decoder(b"ROUTER", FRAME_MAX), data, cuts)
    except ProtocolError:
        pass
