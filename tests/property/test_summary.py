"""Running checksums: equal for equal streams, another for anything dropped, doubled or moved."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replfs.core import messages, ops, summary
from replfs.core.messages import LIVE

SESSION = 0x1122334455667788
ID = b"i" * 16
G, H = b"g" * 16, b"h" * 16


def heads(payloads):
    """The messages of one stream that writes these."""
    return [
        messages.encode_op(LIVE, SESSION, seq, ops.Write(ID, 0, 0), payload)
        for seq, payload in enumerate(payloads, 1)
    ]


def checksum(stream):
    found = summary.NOTHING
    for head in stream:
        found = messages.chained(found, head)
    return found


streams = st.lists(st.binary(min_size=1, max_size=20), min_size=2, max_size=30).map(heads)


@given(streams, st.data())
def test_what_is_not_the_same_stream_has_another_checksum(stream, data):
    """But for one in 2^32, which is not met here."""
    sent = checksum(stream)
    assert sent == checksum(list(stream))
    one = data.draw(st.integers(0, len(stream) - 2))
    dropped = stream[:one] + stream[one + 1 :]
    doubled = [*stream[: one + 1], *stream[one:]]
    moved = [*stream[:one], stream[one + 1], stream[one], *stream[one + 2 :]]
    assert sent not in map(checksum, (dropped, doubled, moved))


@given(streams, st.binary(min_size=1, max_size=20))
def test_another_payload_has_another_checksum(stream, payload):
    """The payload is in a frame of its own, and its message's checksum covers it."""
    last = heads([payload] * len(stream))[-1]
    assert (checksum([*stream[:-1], last]) == checksum(stream)) == (last == stream[-1])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"number": 6}, "7 operations were sent, 6 were applied"),
        ({"checksum": 2}, "others were applied"),
        ({"generation": H}, "the generation is"),
        ({"generation": b""}, ""),
        ({"change": 8}, "up to change 8, and should be up to 9"),
        ({"change": 0}, ""),
    ],
)
def test_what_differs_is_said_in_words(changes, words):
    mine = {"number": 7, "checksum": 1, "generation": G, "change": 9} | changes
    found = summary.difference(ops.Summary(7, 1, G, 9), **mine)
    assert words in found if words else not found


@given(streams, st.data())
def test_of_a_lost_session_all_is_compared_that_the_peer_had(stream, data):
    """However much of what was not answered it has applied; and what it lacks of the rest, too."""
    known = data.draw(st.integers(0, len(stream) - 1))
    had = data.draw(st.integers(known, len(stream)))
    sums = {number: checksum(stream[:number]) for number in range(known, len(stream) + 1)}
    lost = summary.Lost(1, [sums, {0: 0}])
    applied = checksum(stream[:had])
    assert not lost.differences([(had, applied), (0, 0)])
    assert not lost.differences([])
    assert not summary.Lost().differences([(had, applied), (0, 0)])
    (found,) = lost.differences([(had, applied ^ 1), (0, 0)])
    assert found[0] == 0
    assert "others were applied" in found[1]
    (found,) = lost.differences([(had, applied), (1, 0)])
    assert found == (1, "0 to 0 operations may have been applied, and 1 were")
    if known:
        assert lost.differences([(known - 1, checksum(stream[: known - 1])), (0, 0)])


def test_what_the_primary_cannot_say_is_not_compared():
    said = ops.Summary(7, 1, b"", 0)
    assert not summary.difference(said, number=7, checksum=1, generation=G, change=9)
