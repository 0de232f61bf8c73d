"""Wire messages: framing, codec, and the greetings.

A message is one or two ZeroMQ frames. The *head* frame is a fixed header, a msgpack body and a
checksum; the optional *payload* frame holds the bytes of a write or of a transferred region.
This is the only module that knows the layout, and the only user of msgspec's encoders for it.

Everything that arrives is hostile until proven otherwise: lengths are limited before anything is
decoded, the checksum binds header, body, payload and session together, and every field is checked
(`core.checks`). Whatever the bytes are, decoding returns a value that is valid in all its fields or
raises `ProtocolError`, and never anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Final, TypeVar
from zlib import crc32

import msgspec
from xxhash import xxh3_64_intdigest

from replfs.core import checks, ops, summary
from replfs.core.checks import check_answer, check_op
from replfs.errors import ProtocolError

PROTOCOL_VERSION: Final = 1

LIVE: Final = 0
BULK: Final = 1
STREAMS: Final = (LIVE, BULK)

HELLO: Final = 1
WELCOME: Final = 2
REFUSE: Final = 3
OP: Final = 4
ANSWER: Final = 5
PING: Final = 6
PONG: Final = 7
BYE: Final = 8

HEAD_MAX: Final = 2 << 20
"""Bytes in a head frame. A payload frame is limited by `ops.PAYLOAD_MAX`."""
ANSWERS_PER_MESSAGE: Final = 64

_MAGIC: Final = 0xF5
_HEADER: Final = struct.Struct("<BBBBQQI")
_CHECKSUM: Final = struct.Struct("<Q")
_BODY: Final = _HEADER.size
_HEAD_MIN: Final = _HEADER.size + _CHECKSUM.size
_NODE_NAME_MAX: Final = 64
_STORE_MAX: Final = 256
_REASON_MAX: Final = 500
_CODE_MAX: Final = 64
_FEATURES_MAX: Final = 64

Buffer = bytes | bytearray | memoryview


# Bodies of the messages that are not operations or answers --------------------------------------


class Identity(msgspec.Struct, kw_only=True):
    """What both sides say about themselves. `version` and `clock_ns` are the transport's to fill.

    Encoded by field name, so that a later version can add fields that an earlier one ignores.
    """

    version: int = 0
    volume: bytes
    node: bytes
    name: str
    store: bytes
    role: str
    generation: bytes
    history: list[bytes]
    clean: bool
    uninitialized: bool
    memory_lost: bool
    features: list[str]
    clock_ns: int = 0
    release: str = ""
    progress: int = 0
    """The change of its primary up to which a secondary has everything; 0: it is not known."""
    base: bytes = b""
    """The generation whose place the primary's own reign took; empty: it took none."""
    leader: bytes = b""
    """The node of the primary that a secondary let in last; empty: none."""
    led_by: bytes = b""
    """The node of the primary whose resync into a secondary has begun and not ended; empty: none,
    or it is of an earlier release."""
    base_progress: int = 0
    """The change of that generation up to which the primary has everything; 0: not known."""
    discarded: list[bytes] = msgspec.field(default_factory=list)
    """Generations of its history that are another store's, which an operator decided against."""


class Hello(Identity, kw_only=True):
    """The dialling side's first message on each connection.

    `resume` is the session to go on with (0: a new one), `answered` the sequence number up to
    which every operation of `stream` has been answered, `lost` the last session that was lost,
    of which it wants to be told (0: none). The transport fills all four.
    """

    resume: int = 0
    answered: int = 0
    stream: int = 0
    lost: int = 0


class Welcome(Identity, kw_only=True):
    """The listening side's consent.

    `applied` is the last operation applied in order on the stream of the `Hello`. The transport
    fills `session`, `resumed` and `applied`, and in the second reply of a session `had`: what was
    applied of the session that the `Hello` calls lost, by stream; empty if it is not known here.
    """

    session: int = 0
    resumed: bool = False
    applied: int = 0
    had: list[summary.Had] = msgspec.field(default_factory=list)


class Refuse(msgspec.Struct):
    """No: one sentence for people, and a word for programs."""

    reason: str
    code: str


class Bye(msgspec.Struct):
    """This session is over."""

    reason: str


class Header(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What stands before the body.

    `seq` is an operation's number in its stream, the number applied so far in an ANSWER, and in
    all other kinds a number that the reply repeats.
    """

    kind: int
    stream: int
    session: int
    seq: int


# Encoding ---------------------------------------------------------------------------------------

_encode_body = msgspec.msgpack.Encoder().encode


def _seal(
    kind: int, stream: int, session: int, seq: int, body: bytes, payload: Buffer | None
) -> bytes:
    if payload is None:
        front = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind, stream, session, seq, 0) + body
        checksum = xxh3_64_intdigest(front, session)
    else:
        size = len(payload)
        front = _HEADER.pack(_MAGIC, PROTOCOL_VERSION, kind, stream, session, seq, size) + body
        checksum = xxh3_64_intdigest(payload, xxh3_64_intdigest(front, session))
    return front + _CHECKSUM.pack(checksum)


def encode_op(stream: int, session: int, seq: int, op: ops.AnyOp, payload: Buffer | None) -> bytes:
    """The head frame of an operation.

    Raises:
        ProtocolError: the peer would refuse this operation; nothing may be sent.
    """
    check_op(op, None if payload is None else len(payload))
    try:
        body = _encode_body(op)
    except (OverflowError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ProtocolError(f"{type(op).__name__} cannot be sent: {error}") from error
    head = _seal(OP, stream, session, seq, body, payload)
    if len(head) > HEAD_MAX:
        raise ProtocolError(f"{type(op).__name__} of {len(head)} bytes cannot be sent")
    return head


def chained(checksum: int, head: bytes) -> int:
    """The running checksum after the operation in *head*, *checksum* before it; 0 to 2^32 - 1.

    It covers what that message's own checksum does, in order: header, body and payload.
    """
    return crc32(head[-8:], checksum)


def encode_answers(
    stream: int, session: int, applied: int, answers: list[tuple[int, ops.AnyAnswer]]
) -> bytes:
    """The head frame of an ANSWER; *applied* is the last operation applied in order."""
    return _seal(ANSWER, stream, session, applied, _encode_body(answers), None)


def encode_hello(number: int, hello: Hello) -> bytes:
    """The head frame of a HELLO; the reply repeats *number*."""
    return _seal(HELLO, hello.stream, 0, number, _encode_body(hello), None)


def encode_welcome(stream: int, number: int, welcome: Welcome) -> bytes:
    """The head frame of the reply to the HELLO with this *number*."""
    return _seal(WELCOME, stream, welcome.session, number, _encode_body(welcome), None)


def encode_refuse(stream: int, number: int, reason: str, code: str) -> bytes:
    """The head frame of the reply to the HELLO with this *number*."""
    body = _encode_body(Refuse(reason[:_REASON_MAX], code[:_CODE_MAX]))
    return _seal(REFUSE, stream, 0, number, body, None)


def encode_ping(session: int, number: int) -> bytes:
    """The head frame of a heartbeat on the live stream."""
    return _seal(PING, LIVE, session, number, b"", None)


def encode_pong(session: int, number: int, applied: int) -> bytes:
    """The head frame of the reply to a heartbeat; *applied* as in an ANSWER."""
    return _seal(PONG, LIVE, session, number, _encode_body(applied), None)


def encode_bye(session: int, reason: str) -> bytes:
    """The head frame of a farewell on the live stream."""
    return _seal(BYE, LIVE, session, 0, _encode_body(Bye(reason[:_REASON_MAX])), None)


# Decoding ---------------------------------------------------------------------------------------

_T = TypeVar("_T")


def open_head(head: bytes, payload: Buffer | None) -> Header:
    """Check lengths, header and checksum.

    Raises:
        ProtocolError: too long, too short, of another protocol version, or damaged.
    """
    length = len(head)
    if not _HEAD_MIN <= length <= HEAD_MAX:
        raise ProtocolError(f"a head frame of {length} bytes")
    size = 0 if payload is None else len(payload)
    if size > ops.PAYLOAD_MAX:
        raise ProtocolError(f"a payload frame of {size} bytes")
    magic, version, kind, stream, session, seq, expected = _HEADER.unpack_from(head)
    if magic != _MAGIC:
        raise ProtocolError("not a message of this protocol")
    if version != PROTOCOL_VERSION and kind not in (HELLO, REFUSE):
        # HELLO and REFUSE keep their layout for ever, so that versions can tell each other.
        raise ProtocolError(f"protocol version {version}, not {PROTOCOL_VERSION}")
    if not HELLO <= kind <= BYE:
        raise ProtocolError(f"message kind {kind}")
    if stream > BULK:
        raise ProtocolError(f"stream {stream}")
    if size != expected or (payload is not None and size == 0):
        raise ProtocolError(f"{expected} payload bytes announced, {size} received")
    if payload is not None and kind != OP:
        raise ProtocolError(f"message kind {kind} with a payload")
    checksum = xxh3_64_intdigest(head[:-8], session)
    if payload is not None:
        checksum = xxh3_64_intdigest(payload, checksum)
    if checksum != _CHECKSUM.unpack_from(head, length - 8)[0]:
        raise ProtocolError("the checksum is wrong")
    return Header(kind, stream, session, seq)


def _decode(decode: Callable[[bytes], _T], head: bytes) -> _T:
    try:
        return decode(head[_BODY:-8])
    except (ValueError, TypeError, ArithmeticError, RecursionError, MemoryError) as error:
        # msgspec's own errors are ValueErrors; the others are its reactions to absurd nesting
        # and absurd numbers.
        raise ProtocolError(f"a body that cannot be decoded: {error}") from error


_decode_live: Final = msgspec.msgpack.Decoder(ops.LiveOp).decode
_decode_bulk: Final = msgspec.msgpack.Decoder(ops.BulkOp).decode
_decode_answers: Final = msgspec.msgpack.Decoder(list[tuple[int, ops.AnyAnswer]]).decode
_decode_hello: Final = msgspec.msgpack.Decoder(Hello).decode
_decode_welcome: Final = msgspec.msgpack.Decoder(Welcome).decode
_decode_refuse: Final = msgspec.msgpack.Decoder(Refuse).decode
_decode_bye: Final = msgspec.msgpack.Decoder(Bye).decode
_decode_int: Final = msgspec.msgpack.Decoder(int).decode


def decode_op(stream: int, head: bytes, payload: Buffer | None) -> ops.AnyOp:
    """The operation in a head frame that `open_head` has accepted.

    Raises:
        ProtocolError: it does not belong on *stream*, or a field is invalid.
    """
    op: ops.AnyOp = _decode(_decode_live if stream == LIVE else _decode_bulk, head)
    check_op(op, None if payload is None else len(payload))
    return op


def decode_answers(head: bytes) -> list[tuple[int, ops.AnyAnswer]]:
    """The answers in a head frame that `open_head` has accepted.

    Raises:
        ProtocolError: a field is invalid.
    """
    answers = _decode(_decode_answers, head)
    if len(answers) > ANSWERS_PER_MESSAGE:
        raise ProtocolError(f"{len(answers)} answers in one message")
    for seq, answer in answers:
        if not 0 < seq <= checks.U64_MAX:
            raise ProtocolError(f"an answer to operation {seq}")
        check_answer(answer)
    return answers


def decode_hello(head: bytes) -> Hello:
    """The body of a HELLO. Raises `ProtocolError`."""
    hello = _decode(_decode_hello, head)
    _check_identity(hello)
    checks.number(hello.resume, checks.U64_MAX)
    checks.number(hello.answered, checks.U64_MAX)
    checks.number(hello.stream, BULK)
    checks.number(hello.lost, checks.U64_MAX)
    return hello


def decode_welcome(head: bytes) -> Welcome:
    """The body of a WELCOME. Raises `ProtocolError`."""
    welcome = _decode(_decode_welcome, head)
    _check_identity(welcome)
    checks.number(welcome.session, checks.U64_MAX)
    checks.number(welcome.applied, checks.U64_MAX)
    checks.count(welcome.had, len(STREAMS))
    for number, checksum in welcome.had:
        checks.number(number, checks.U64_MAX)
        checks.number(checksum, checks.U32_MAX)
    return welcome


def decode_refuse(head: bytes) -> Refuse:
    """The body of a REFUSE. Raises `ProtocolError`."""
    refuse = _decode(_decode_refuse, head)
    checks.text(refuse.reason, _REASON_MAX)
    checks.text(refuse.code, _CODE_MAX)
    return refuse


def decode_pong(head: bytes) -> int:
    """How far the peer has applied the live stream. Raises `ProtocolError`."""
    applied = _decode(_decode_int, head)
    checks.number(applied, checks.U64_MAX)
    return applied


def decode_bye(head: bytes) -> str:
    """Why the session is over. Raises `ProtocolError`."""
    bye = _decode(_decode_bye, head)
    checks.text(bye.reason, _REASON_MAX)
    return bye.reason


def _check_identity(identity: Identity) -> None:
    checks.number(identity.version, checks.U32_MAX)
    checks.object_or_none(identity.volume)
    checks.object_id(identity.node)
    checks.text(identity.release, _CODE_MAX)
    checks.text(identity.name, _NODE_NAME_MAX)
    if len(identity.store) > _STORE_MAX:
        raise ProtocolError(f"a store identity of {len(identity.store)} bytes")
    checks.text(identity.role, _CODE_MAX)
    checks.object_or_none(identity.generation)
    checks.generations(identity.history)
    checks.count(identity.features, _FEATURES_MAX)
    for feature in identity.features:
        checks.text(feature, _CODE_MAX)
    checks.number(identity.clock_ns, checks.U64_MAX)
    checks.number(identity.progress, checks.U64_MAX)
    checks.object_or_none(identity.base)
    checks.number(identity.base_progress, checks.U64_MAX)
    checks.object_or_none(identity.leader)
    checks.generations(identity.discarded)
