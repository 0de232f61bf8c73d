"""The codec: round trips, limits, and that nothing but `ProtocolError` comes out of junk."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from replfs.core import messages, ops
from replfs.core.messages import Bye, Hello, Identity, Refuse, Welcome
from replfs.errors import ProtocolError

# A loaded machine is no failure.
settings.register_profile("loaded", deadline=None, suppress_health_check=[HealthCheck.too_slow])
patient = settings(settings.get_profile("loaded"))

U64 = 2**64 - 1
OFFSET = 2**63 - 1

ids = st.binary(min_size=16, max_size=16)
ids_or_none = st.one_of(st.just(b""), ids)
names = st.binary(min_size=1, max_size=255).filter(
    lambda name: b"/" not in name and b"\0" not in name and name not in (b".", b"..")
)
xattr_names = st.binary(min_size=1, max_size=255).filter(lambda name: b"\0" not in name)
times = st.integers(-(2**63), U64)
owners = st.integers(0, 2**32 - 1)
kept = st.integers(-1, 2**32 - 1)
sizes = st.integers(0, OFFSET)
targets = st.binary(max_size=4096).filter(lambda target: b"\0" not in target)
kinds = st.sampled_from([0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000])
modes = st.builds(lambda kind, bits: kind | bits, kinds, st.integers(0, 0o7777))
small = st.integers(0, 255)
attributes = st.builds(
    ops.Attributes,
    mode=modes,
    uid=owners,
    gid=owners,
    rdev=st.integers(0, U64),
    size=sizes,
    mtime=times,
    target=targets,
    policy=small,
    ack=small,
    xattrs=st.dictionaries(xattr_names, st.binary(max_size=300), max_size=5),
)
inspected_attributes = st.builds(
    msgspec.structs.replace,
    attributes,
    xattrs=st.dictionaries(xattr_names, st.binary(min_size=16, max_size=16), max_size=5),
)
histories = st.lists(ids, max_size=64)

LIVE_OPS = [
    st.builds(ops.Locate, ids, ids, names),
    st.builds(ops.Forget, st.lists(ids, max_size=20)),
    st.builds(ops.Truncate, ids, sizes, times),
    st.builds(
        ops.Make, ids, ids, names, modes, owners, owners, st.integers(0, U64), targets, times, times
    ),
    st.builds(ops.Link, ids, ids, names, times),
    st.builds(ops.Unlink, ids, ids, names, st.booleans(), times),
    st.builds(ops.Rename, ids, ids, names, ids, names, ids_or_none, st.booleans(), times, times),
    st.builds(
        ops.SetAttr,
        ids,
        st.integers(-1, 0o177777),
        kept,
        kept,
        st.none() | times,
        st.none() | times,
    ),
    st.builds(ops.SetXattr, ids, xattr_names, st.binary(max_size=500)),
    st.builds(ops.RemoveXattr, ids, xattr_names),
    st.builds(ops.SetPolicy, ids, small, small),
    st.builds(ops.Sync, ids, st.booleans()),
    st.builds(ops.Generation, ids, histories, histories),
    st.builds(ops.Progress, st.integers(0, U64)),
    st.builds(
        ops.Summary,
        st.integers(0, U64),
        st.integers(0, 2**32 - 1),
        ids_or_none,
        st.integers(0, U64),
    ),
    st.builds(ops.Checkpoint, ids_or_none),
    st.builds(ops.Stable, st.booleans()),
]
BULK_OPS = [
    LIVE_OPS[0],
    LIVE_OPS[1],
    st.lists(st.tuples(names, ids_or_none), max_size=10).flatmap(
        lambda pairs: st.builds(
            ops.Gather, ids, st.just([a for a, _ in pairs]), st.just([b for _, b in pairs])
        )
    ),
    st.builds(ops.Place, ids, ids, names, attributes, st.lists(st.tuples(ids, names), max_size=5)),
    st.builds(ops.Clear, ids, names),
    st.builds(ops.Digest, ids, st.integers(0, 2**40), st.integers(0, 16384), st.integers(1, 2**30)),
    st.builds(ops.Data, ids, st.integers(0, 2**61), st.integers(1, 2**61)),
    st.builds(ops.Finish, ids, attributes),
    st.builds(ops.List, ids, st.just(b"") | names, st.booleans()),
    st.builds(ops.EmptyLimbo),
    st.builds(ops.Phase, st.booleans(), ids_or_none, histories, histories),
    st.builds(ops.Inspect, ids, st.just(b"") | names),
    st.builds(ops.Handover, ids, st.booleans()),
    st.builds(ops.Suspects, st.integers(0, 2**32 - 1), st.booleans()),
    st.builds(
        ops.Fetch, ids, st.integers(0, 2**62), st.integers(0, 1 << 20), st.just(b"") | xattr_names
    ),
    st.builds(
        ops.PlaceMany,
        ids,
        st.lists(
            st.builds(
                ops.Item,
                ids,
                names,
                attributes.map(lambda found: msgspec.structs.replace(found, size=0)),
            ),
            max_size=5,
        ),
    ),
]
WITH_PAYLOAD = [
    st.builds(ops.Write, ids, st.integers(0, 2**62), times),
    st.builds(ops.Data, ids, st.integers(0, 2**62)),
]
ANSWERS = st.one_of(
    st.builds(ops.Done, st.integers(0, 4095), st.integers(0, 1 << 20)),
    st.builds(ops.Placed, st.booleans(), st.booleans()),
    st.builds(
        ops.PlacedMany,
        st.lists(
            st.builds(ops.Placed, st.booleans(), st.booleans())
            | st.builds(ops.Done, st.integers(0, 4095)),
            max_size=10,
        ),
    ),
    st.builds(ops.Digests, st.integers(0, 20).map(lambda n: b"d" * 16 * n), sizes),
    st.builds(
        ops.Listing,
        st.lists(st.builds(ops.Entry, names, ids_or_none, st.booleans(), ids_or_none), max_size=10),
        st.booleans(),
        ids_or_none,
    ),
    st.builds(ops.Inspected, ids_or_none, st.booleans(), st.none() | inspected_attributes),
    st.builds(
        ops.Suspected,
        st.booleans(),
        st.lists(LIVE_OPS[0], max_size=5),
        st.lists(
            st.builds(
                ops.Suspect,
                ids,
                st.integers(0, 255),
                st.integers(-1, 2**32),
                st.lists(st.integers(0, 2**31).map(lambda n: (n, n + 1)), max_size=5),
                st.lists(st.just(b"") | names, max_size=5),
            ),
            max_size=5,
        ),
        st.booleans(),
    ),
    st.builds(
        ops.Fetched,
        st.binary(max_size=500),
        st.lists(st.integers(0, 2**40), max_size=5, unique=True).map(
            lambda starts: [(start, start + 1) for start in sorted(starts)]
        ),
        sizes,
    ),
)
seqs = st.integers(1, U64)
sessions = st.integers(0, U64)
identities: dict[str, Any] = {
    "version": st.integers(0, 2**32 - 1),
    "volume": ids_or_none,
    "node": ids,
    "name": st.text(max_size=64),
    "store": st.binary(max_size=256),
    "role": st.text(max_size=64),
    "generation": ids_or_none,
    "history": histories,
    "discarded": histories,
    "clean": st.booleans(),
    "uninitialized": st.booleans(),
    "memory_lost": st.booleans(),
    "features": st.lists(st.text(max_size=64), max_size=64),
    "clock_ns": st.integers(0, U64),
}
hellos = st.builds(
    Hello, **identities, resume=sessions, answered=sessions, stream=st.integers(0, 1), lost=sessions
)
welcomes = st.builds(
    Welcome,
    **identities,
    session=sessions,
    resumed=st.booleans(),
    applied=sessions,
    had=st.lists(st.tuples(sessions, st.integers(0, 2**32 - 1)), max_size=2),
)


def seal(body: object, kind: int = messages.OP, stream: int = 0) -> bytes:
    """A head frame with a right checksum around any body."""
    raw = body if isinstance(body, bytes) else msgspec.msgpack.encode(body)
    return messages._seal(kind, stream, 9, 1, raw, None)


# Round trips ------------------------------------------------------------------------------------


@patient
@given(
    st.one_of(
        *[st.tuples(st.just(0), op) for op in LIVE_OPS],
        *[st.tuples(st.just(1), op) for op in BULK_OPS],
    ),
    sessions,
    seqs,
)
def test_operations_survive_the_wire(where, session, seq):
    stream, op = where
    head = messages.encode_op(stream, session, seq, op, None)
    header = messages.open_head(head, None)
    assert (header.kind, header.stream, header.session, header.seq) == (
        messages.OP,
        stream,
        session,
        seq,
    )
    assert messages.decode_op(stream, head, None) == op


@patient
@given(
    st.sampled_from([0, 1]).flatmap(lambda n: st.tuples(st.just(n), WITH_PAYLOAD[n])),
    st.binary(min_size=1, max_size=5000),
)
def test_payloads_are_covered(where, payload):
    stream, op = where
    head = messages.encode_op(stream, 5, 6, op, payload)
    assert messages.open_head(head, payload).seq == 6
    assert messages.decode_op(stream, head, memoryview(payload)) == op
    damaged = bytearray(payload)
    damaged[len(damaged) // 2] ^= 1
    for wrong in (bytes(damaged), payload + b"x", payload[1:] or None, None):
        with pytest.raises(ProtocolError):
            messages.open_head(head, wrong)


def test_the_payload_of_a_whole_file_is_all_its_data():
    whole = ops.Place(I, I, b"n", with_(size=5), [], whole=True)
    head = messages.encode_op(1, 5, 6, whole, b"12345")
    assert messages.decode_op(1, head, b"12345") == whole
    empty = ops.Place(I, I, b"n", with_(size=0), [], whole=True)
    assert messages.decode_op(1, messages.encode_op(1, 5, 6, empty, None), None) == empty
    for op, payload in (
        (whole, b"1234"),
        (empty, b"1"),
        (ops.Place(I, I, b"n", with_(size=5), []), b"12345"),
    ):
        with pytest.raises(ProtocolError):
            messages.encode_op(1, 5, 6, op, payload)


def item(size: int, mode: int = 0o100644) -> ops.Item:
    return ops.Item(I, b"n", with_(size=size, mode=mode))


def test_the_payload_of_many_files_is_all_their_data():
    many = ops.PlaceMany(I, [item(5), item(0), item(2), item(0, 0o120777)])
    head = messages.encode_op(1, 5, 6, many, b"1234567")
    assert messages.decode_op(1, head, b"1234567") == many
    for op, payload in (
        (many, b"123456"),
        (many, b"12345678"),
        (many, None),
        (ops.PlaceMany(I, [item(0)]), b"1"),
        (ops.PlaceMany(I, [item(1, 0o120777)]), b"1"),
        (ops.PlaceMany(I, [item(-1), item(2)]), b"1"),
    ):
        with pytest.raises(ProtocolError):
            messages.encode_op(1, 5, 6, op, payload)
        with pytest.raises(ProtocolError):
            messages.decode_op(1, seal(op), payload)


@patient
@given(st.lists(st.tuples(seqs, ANSWERS), max_size=16), sessions, st.integers(0, 1))
def test_answers_survive_the_wire(answers, session, stream):
    head = messages.encode_answers(stream, session, 77, answers)
    header = messages.open_head(head, None)
    assert (header.kind, header.stream, header.session, header.seq) == (
        messages.ANSWER,
        stream,
        session,
        77,
    )
    assert messages.decode_answers(head) == answers


@patient
@given(hellos)
def test_hellos_survive_the_wire(hello):
    head = messages.encode_hello(3, hello)
    header = messages.open_head(head, None)
    assert (header.kind, header.session, header.seq) == (messages.HELLO, 0, 3)
    assert messages.decode_hello(head) == hello


@patient
@given(welcomes)
def test_welcomes_survive_the_wire(welcome):
    head = messages.encode_welcome(1, 3, welcome)
    header = messages.open_head(head, None)
    assert (header.kind, header.session, header.seq) == (messages.WELCOME, welcome.session, 3)
    assert messages.decode_welcome(head) == welcome


def test_small_messages_survive_the_wire():
    head = messages.encode_refuse(1, 4, "r" * 1000, "c" * 1000)
    assert messages.open_head(head, None) == messages.Header(messages.REFUSE, 1, 0, 4)
    assert messages.decode_refuse(head) == Refuse("r" * 500, "c" * 64)
    head = messages.encode_bye(8, "r" * 1000)
    assert messages.open_head(head, None).kind == messages.BYE
    assert messages.decode_bye(head) == "r" * 500
    head = messages.encode_ping(8, 5)
    assert messages.open_head(head, None) == messages.Header(messages.PING, 0, 8, 5)
    head = messages.encode_pong(8, 5, 99)
    assert messages.open_head(head, None) == messages.Header(messages.PONG, 0, 8, 5)
    assert messages.decode_pong(head) == 99


def test_a_later_version_may_add_fields():
    body = msgspec.to_builtins(Refuse("no", "other"), builtin_types=(bytes,)) | {
        "hint": "from the future"
    }
    assert messages.decode_refuse(seal(body, messages.REFUSE)) == Refuse("no", "other")


def test_layout_is_what_the_documentation_says():
    op = ops.Truncate(b"i" * 16, 5, -1)
    head = messages.encode_op(0, 0x1122334455667788, 9, op, None)
    checksum = struct.pack("<Q", xxh3_64_intdigest(head[:-8], 0x1122334455667788))
    parts = [
        "f5 01 04 00",  # magic, version, kind, stream
        "88 77 66 55 44 33 22 11",  # session
        "09 00 00 00 00 00 00 00",  # sequence number
        "00 00 00 00",  # payload length
        "94 0b c4 10" + " 69" * 16 + " 05 ff",  # [11, object, 5, -1]
        checksum.hex(),
    ]
    assert head == bytes.fromhex(" ".join(parts))


# Damage -----------------------------------------------------------------------------------------


DECODERS: list[Callable[[bytes], object]] = [
    lambda head: messages.decode_op(0, head, None),
    lambda head: messages.decode_op(0, head, b"x"),
    lambda head: messages.decode_op(1, head, None),
    lambda head: messages.decode_op(1, head, b"x"),
    messages.decode_answers,
    messages.decode_hello,
    messages.decode_welcome,
    messages.decode_refuse,
    messages.decode_bye,
    messages.decode_pong,
]


@patient
@given(st.binary(max_size=200), st.none() | st.binary(max_size=20))
def test_random_frames_are_refused(head, payload):
    with pytest.raises(ProtocolError):
        messages.open_head(head, payload)


@patient
@given(
    st.one_of(*LIVE_OPS, *BULK_OPS),
    st.integers(0, 10**6),
    st.integers(0, 7),
)
def test_every_flipped_bit_is_noticed(op, position, bit):
    stream = 0 if isinstance(op, ops.LiveOp) else 1
    head = bytearray(messages.encode_op(stream, 5, 6, op, None))
    head[position % len(head)] ^= 1 << bit
    with pytest.raises(ProtocolError):
        messages.open_head(bytes(head), None)


json_like = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), U64)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.sampled_from([b"i" * 16, b".", b"..", b"a/b", b"\0"]),
    lambda inner: (
        st.lists(inner, max_size=12) | st.dictionaries(st.text(max_size=9), inner, max_size=6)
    ),
    max_leaves=30,
)
tagged = st.builds(
    lambda tag, rest: [tag, *rest], st.integers(0, 50), st.lists(json_like, max_size=11)
)


@patient
@given(st.one_of(st.binary(max_size=300), json_like, tagged))
def test_any_body_decodes_or_is_refused(body):
    head = seal(body)
    for decode in DECODERS:
        try:
            decode(head)
        except ProtocolError:
            pass


@patient
@given(st.one_of(*LIVE_OPS, *BULK_OPS, ANSWERS, hellos), st.randoms(use_true_random=False))
def test_damaged_bodies_decode_or_are_refused(thing, rng):
    body = bytearray(
        msgspec.msgpack.encode([[1, thing]] if isinstance(thing, ops.Answer) else thing)
    )
    for _ in range(rng.randrange(1, 4)):
        where = rng.randrange(len(body))
        choice = rng.randrange(3)
        if choice == 0:
            body[where] = rng.randrange(256)
        elif choice == 1:
            del body[where]
            body = body or bytearray(1)
        else:
            body.insert(where, rng.randrange(256))
    head = seal(bytes(body))
    for decode in DECODERS:
        try:
            decode(head)
        except ProtocolError:
            pass


@pytest.mark.parametrize(
    "body",
    [
        b"\xdd\xff\xff\xff\xff",  # an array of four billion
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xc6\x00\x1f\x00\x00",
        b"\x91" * 100000,  # nested a hundred thousand deep
        b"\x9a\x0a" + b"\x91" * 100000,
        b"\xcf" + b"\xff" * 8,
        b"",
    ],
)
def test_absurd_bodies_are_refused_at_once(body):
    head = seal(body)
    for decode in DECODERS[:-1]:
        with pytest.raises(ProtocolError):
            decode(head)


def test_lengths_are_limited():
    with pytest.raises(ProtocolError):
        messages.open_head(b"", None)
    with pytest.raises(ProtocolError):
        messages.open_head(bytes(messages.HEAD_MAX + 1), None)
    op = ops.Write(b"i" * 16, 0, 0)
    limit = b"x" * ops.PAYLOAD_MAX
    head = messages.encode_op(0, 1, 1, op, limit)
    messages.open_head(head, limit)
    with pytest.raises(ProtocolError):
        messages.open_head(head, limit + b"x")
    with pytest.raises(ProtocolError):
        messages.encode_op(0, 1, 1, op, limit + b"x")
    xattrs = {b"user.%d" % n: bytes(60000) for n in range(40)}
    big = ops.Attributes(0o100644, 0, 0, 0, 0, 0, b"", 0, 0, xattrs)
    with pytest.raises(ProtocolError):
        messages.encode_op(1, 1, 1, ops.Finish(b"i" * 16, big), None)
    with pytest.raises(ProtocolError):
        messages.decode_answers(seal([(1, ops.Done(0))] * 65, messages.ANSWER))


# Single fields ----------------------------------------------------------------------------------

I = b"i" * 16  # noqa: E741
GOOD = ops.Attributes(0o100644, 0, 0, 0, 0, 0, b"", 0, 0, {})


def with_(**changes: Any) -> ops.Attributes:
    return msgspec.structs.replace(GOOD, **changes)


BAD_LIVE: list[ops.AnyOp] = [
    ops.Locate(b"", I, b"n"),
    ops.Locate(I, b"", b"n"),
    ops.Locate(I, I[:15], b"n"),
    ops.Locate(I, I + b"x", b"n"),
    *[ops.Locate(I, I, name) for name in (b"", b".", b"..", b"a/b", b"/", b"a\0", b"n" * 256)],
    ops.Forget([I, b""]),
    ops.Forget([I] * 65537),
    ops.Truncate(b"", 0, 0),
    ops.Truncate(I, -1, 0),
    ops.Truncate(I, 2**63, 0),
    ops.Make(b"", I, b"n", 0o100644, 0, 0, 0, b"", 0, 0),
    ops.Make(I, b"", b"n", 0o100644, 0, 0, 0, b"", 0, 0),
    ops.Make(I, I, b"..", 0o100644, 0, 0, 0, b"", 0, 0),
    ops.Make(I, I, b"n", 0o644, 0, 0, 0, b"", 0, 0),
    ops.Make(I, I, b"n", 0o1100644, 0, 0, 0, b"", 0, 0),
    ops.Make(I, I, b"n", -1, 0, 0, 0, b"", 0, 0),
    ops.Make(I, I, b"n", 0o100644, -1, 0, 0, b"", 0, 0),
    ops.Make(I, I, b"n", 0o100644, 0, 2**32, 0, b"", 0, 0),
    ops.Make(I, I, b"n", 0o100644, 0, 0, -1, b"", 0, 0),
    ops.Make(I, I, b"n", 0o120777, 0, 0, 0, b"t" * 4097, 0, 0),
    ops.Make(I, I, b"n", 0o120777, 0, 0, 0, b"a\0b", 0, 0),
    ops.Link(I, I, b"", 0),
    ops.Unlink(I, I, b"a/b", False, 0),
    ops.Rename(I, I, b"", I, b"n", b"", False, 0, 0),
    ops.Rename(I, I, b"n", I, b".", b"", False, 0, 0),
    ops.Rename(I, I, b"n", b"", b"n", b"", False, 0, 0),
    ops.Rename(I, I, b"n", I, b"n", b"x", False, 0, 0),
    ops.SetAttr(b""),
    ops.SetAttr(I, mode=-2),
    ops.SetAttr(I, mode=2**17),
    ops.SetAttr(I, uid=-2),
    ops.SetAttr(I, gid=2**32),
    ops.SetXattr(I, b"", b""),
    ops.SetXattr(I, b"n" * 256, b""),
    ops.SetXattr(I, b"a\0b", b""),
    ops.SetXattr(I, b"user.a", bytes(65537)),
    ops.RemoveXattr(I, b""),
    ops.SetPolicy(I, -1, 0),
    ops.SetPolicy(I, 0, 256),
    ops.Sync(b"", True),
    ops.Checkpoint(b"short"),
    ops.Generation(b"", []),
    ops.Generation(I, [b""]),
    ops.Generation(I, [I] * 65),
    ops.Generation(I, [], [b""]),
    ops.Progress(-1),
    ops.Summary(-1, 0, b"", 0),
    ops.Summary(0, 2**32, b"", 0),
    ops.Summary(0, 0, b"short", 0),
    ops.Summary(0, 0, b"", -1),
    ops.Write(I, 0, 0),
]
BAD_BULK: list[ops.AnyOp] = [
    ops.Gather(b"", [], []),
    ops.Gather(I, [b"n"], []),
    ops.Gather(I, [b".."], [I]),
    ops.Gather(I, [b"n"], [b"x"]),
    ops.Gather(I, [b"n"] * 1001, [I] * 1001),
    ops.Place(I, I, b"n", with_(mode=0o644), []),
    ops.Place(I, I, b"n", with_(uid=-1), []),
    ops.Place(I, I, b"n", with_(size=-1), []),
    ops.Place(I, I, b"n", with_(target=bytes(5000)), []),
    ops.Place(I, I, b"n", with_(policy=-1), []),
    ops.Place(I, I, b"n", with_(xattrs={b"": b""}), []),
    ops.Place(I, I, b"n", with_(xattrs={b"a": bytes(65537)}), []),
    ops.Place(I, I, b"n", with_(xattrs={b"%d" % n: b"" for n in range(1025)}), []),
    ops.Place(I, I, b"n", GOOD, [(b"", b"n")]),
    ops.Place(I, I, b"n", GOOD, [(I, b"../n")]),
    ops.Place(I, I, b"n", with_(size=5), [], whole=True),
    ops.Clear(I, b""),
    ops.Digest(I, -1, 1, 1),
    ops.Digest(I, 0, 1, 0),
    ops.Digest(I, 0, 16385, 1),
    ops.Digest(I, 2**62, 2, 2**62),
    ops.Data(I, -1, 1),
    ops.Data(I, 0, -1),
    ops.Data(I, 0, 0),
    ops.Data(I, 2**62, 2**62),
    ops.Finish(b"", GOOD),
    ops.Finish(I, with_(rdev=-1)),
    ops.List(b"", b""),
    ops.List(I, b"a/b"),
    ops.Phase(True, b"x", []),
    ops.Phase(True, I, [b"x"]),
    ops.Phase(True, I, [I] * 65),
    ops.Phase(True, I, [], [I] * 65),
    ops.Inspect(b"", b"a"),
    ops.Handover(b"", True),
    ops.Inspect(I, b"."),
    ops.Inspect(I, b"a/b"),
    ops.Suspects(-1, True),
    ops.Suspects(2**32, True),
    ops.Fetch(b"", 0, 1, b""),
    ops.Fetch(I, -1, 1, b""),
    ops.Fetch(I, 0, (1 << 20) + 1, b""),
    ops.Fetch(I, 2**63 - 1, 1, b""),
    ops.Fetch(I, 0, 1, b"a" * 256),
    ops.PlaceMany(b"", [ops.Item(I, b"n", GOOD)]),
    ops.PlaceMany(I, [ops.Item(b"", b"n", GOOD)]),
    ops.PlaceMany(I, [ops.Item(I, b"..", GOOD)]),
    ops.PlaceMany(I, [ops.Item(I, b"n", with_(mode=0o644))]),
    ops.PlaceMany(I, [ops.Item(I, b"n", GOOD)] * 257),
]


@pytest.mark.parametrize(
    ("stream", "op"),
    [(0, op) for op in BAD_LIVE] + [(1, op) for op in BAD_BULK],
    ids=lambda value: type(value).__name__,
)
def test_invalid_fields_are_refused_on_both_sides(stream, op):
    with pytest.raises(ProtocolError):
        messages.decode_op(stream, seal(op), None)
    with pytest.raises(ProtocolError):
        messages.encode_op(stream, 1, 1, op, None)


@pytest.mark.parametrize(
    ("op", "payload"),
    [
        (ops.Write(b"", 0, 0), b"x"),
        (ops.Write(I, -1, 0), b"x"),
        (ops.Write(I, OFFSET, 0), b"x"),
        (ops.Write(I, 0, 0), b""),
        (ops.Data(I, 0, 1), b"x"),
        (ops.Data(I, OFFSET, 0), b"x"),
        (ops.Truncate(I, 0, 0), b"x"),
        (ops.Clear(I, b"n"), b"x"),
    ],
)
def test_invalid_payloads_are_refused_on_both_sides(op, payload):
    stream = 0 if isinstance(op, ops.LiveOp) else 1
    with pytest.raises(ProtocolError):
        messages.decode_op(stream, seal(op), payload)
    with pytest.raises(ProtocolError):
        messages.encode_op(stream, 1, 1, op, payload)


def test_operations_belong_to_a_stream():
    with pytest.raises(ProtocolError):
        messages.decode_op(0, seal(ops.EmptyLimbo()), None)
    with pytest.raises(ProtocolError):
        messages.decode_op(1, seal(ops.Truncate(I, 0, 0)), None)
    with pytest.raises(ProtocolError):
        messages.decode_op(1, seal(ops.Write(I, 0, 0)), b"x")


def test_what_msgpack_cannot_hold_cannot_be_sent():
    for time in (2**64, -(2**63) - 1):
        with pytest.raises(ProtocolError):
            messages.encode_op(0, 1, 1, ops.Truncate(I, 0, time), None)


@pytest.mark.parametrize(
    "answer",
    [
        ops.Done(-1),
        ops.Done(4096),
        ops.Done(0, -1),
        ops.Done(0, (1 << 20) + 1),
        ops.Digests(b"x", 0),
        ops.Digests(bytes(16 * 16385), 0),
        ops.Digests(b"", -1),
        ops.Listing([ops.Entry(b"a/b", I, True)], False),
        ops.Listing([ops.Entry(b"a", b"x", True)], False),
        ops.Listing([ops.Entry(b"a", I, True)] * 1001, False),
        ops.Listing([ops.Entry(b"a", I, True, b"short")], False),
        ops.Listing([], False, b"short"),
        ops.PlacedMany([ops.Done(-1)]),
        ops.PlacedMany([ops.Placed(True, True)] * 257),
        ops.Suspected(True, [ops.Locate(I, I, b"..")], [], False),
        ops.Suspected(True, [ops.Locate(I, I, b"a")] * 3049, [], False),
        ops.Suspected(True, [], [ops.Suspect(b"x", 0, -1, [], [])], False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -2, [], [])], False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -1, [(1, 1)], [])], False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -1, [(0, 2**33)], [])], False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -1, [(0, 1)] * 4097, [])], False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -1, [], [b"a/b"])], False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -1, [], [b"a"] * 501)] * 2, False),
        ops.Suspected(True, [], [ops.Suspect(I, 0, -1, [], [])] * 1001, False),
        ops.Fetched(bytes((1 << 20) + 1), [], 0),
        ops.Fetched(b"", [(5, 5)], 0),
        ops.Fetched(b"", [(5, 7), (6, 9)], 0),
        ops.Fetched(b"", [(-1, 2)], 0),
        ops.Fetched(b"", [], -1),
        ops.Inspected(b"x", True, None),
        ops.Inspected(I, True, ops.Attributes(0, 0, 0, 0, 0, 0, b"", 0, 0, {})),
        ops.Inspected(I, True, ops.Attributes(0o100644, 0, 0, 0, 0, 0, b"", 0, 0, {b"n": b"x"})),
    ],
)
def test_invalid_answers_are_refused(answer):
    with pytest.raises(ProtocolError):
        messages.decode_answers(seal([(1, answer)], messages.ANSWER))


def test_answers_to_impossible_numbers_are_refused():
    for seq in (0, -1):
        with pytest.raises(ProtocolError):
            messages.decode_answers(seal([(seq, ops.Done(0))], messages.ANSWER))


def example_hello(**changes: Any) -> Hello:
    fields: dict[str, Any] = {
        "volume": b"",
        "node": I,
        "name": "n",
        "store": b"s",
        "role": "primary",
        "generation": b"",
        "history": [],
        "clean": True,
        "uninitialized": False,
        "memory_lost": False,
        "features": [],
    }
    return Hello(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": -1},
        {"volume": b"x"},
        {"node": b""},
        {"name": "n" * 65},
        {"store": bytes(257)},
        {"role": "r" * 65},
        {"generation": b"x"},
        {"history": [b""]},
        {"history": [I] * 65},
        {"discarded": [b""]},
        {"discarded": [I] * 65},
        {"features": ["f"] * 65},
        {"features": ["f" * 65]},
        {"clock_ns": -1},
        {"resume": -1},
        {"answered": -1},
        {"stream": 2},
        {"lost": -1},
    ],
)
def test_invalid_greetings_are_refused(changes):
    good = example_hello()
    assert messages.decode_hello(seal(good, messages.HELLO)) == good
    with pytest.raises(ProtocolError):
        messages.decode_hello(seal(example_hello(**changes), messages.HELLO))


@pytest.mark.parametrize("had", [[(0, 0)] * 3, [(-1, 0)], [(0, 2**32)], [(0, -1)]])
def test_invalid_accounts_of_a_lost_session_are_refused(had):
    identity = {name: getattr(example_hello(), name) for name in Identity.__struct_fields__}
    good = Welcome(**identity, had=[(0, 0), (2**64 - 1, 2**32 - 1)])
    assert messages.decode_welcome(seal(good, messages.WELCOME)) == good
    with pytest.raises(ProtocolError):
        messages.decode_welcome(seal(Welcome(**identity, had=had), messages.WELCOME))


def test_other_invalid_messages_are_refused():
    with pytest.raises(ProtocolError):
        messages.decode_refuse(seal(Refuse("r" * 501, ""), messages.REFUSE))
    with pytest.raises(ProtocolError):
        messages.decode_refuse(seal(Refuse("", "c" * 65), messages.REFUSE))
    with pytest.raises(ProtocolError):
        messages.decode_bye(seal(Bye("r" * 501), messages.BYE))
    with pytest.raises(ProtocolError):
        messages.decode_pong(seal(-1, messages.PONG))
    for kind in (0, 9, 255):
        with pytest.raises(ProtocolError):
            messages.open_head(seal(b"", kind), None)
    with pytest.raises(ProtocolError):
        messages.open_head(seal(b"", messages.PING, stream=2), None)
    with pytest.raises(ProtocolError):
        messages.open_head(messages._seal(messages.PING, 0, 1, 1, b"", b"payload"), b"payload")


def test_only_greetings_may_be_of_another_version():
    for kind in range(1, 9):
        front = struct.pack("<BBBBQQI", 0xF5, 9, kind, 0, 0, 1, 0)
        head = front + struct.pack("<Q", xxh3_64_intdigest(front, 0))
        if kind in (messages.HELLO, messages.REFUSE):
            assert messages.open_head(head, None).kind == kind
        else:
            with pytest.raises(ProtocolError, match="protocol version 9"):
                messages.open_head(head, None)


def test_a_message_belongs_to_its_session():
    """The same bytes under another session's number do not pass."""
    head = bytearray(messages.encode_op(0, 5, 6, ops.Truncate(I, 0, 0), None))
    head[4:12] = struct.pack("<Q", 7)
    with pytest.raises(ProtocolError):
        messages.open_head(bytes(head), None)


def test_random_mutations_of_everything_with_a_seed():
    rng = random.Random(20)
    heads = [
        messages.encode_op(0, 5, 6, ops.Truncate(I, 0, 0), None),
        messages.encode_answers(0, 5, 6, [(1, ops.Done(0)), (2, ops.Placed(True, False))]),
        messages.encode_hello(1, example_hello()),
        messages.encode_pong(5, 6, 7),
    ]
    for _ in range(3000):
        head = bytearray(rng.choice(heads))
        for _ in range(rng.randrange(1, 5)):
            head[rng.randrange(len(head))] = rng.randrange(256)
        if bytes(head) in heads:
            continue
        with pytest.raises(ProtocolError):
            messages.open_head(bytes(head), None)
