"""Wire messages: framing, codec, and every check on what arrives.

A message is one or two ZeroMQ frames. The *head* frame is a fixed header, a msgpack body and a
checksum; the optional *payload* frame holds the bytes of a write or of a transferred region.
This is the only module that knows the layout, and the only user of msgspec's encoders for it.

Everything that arrives is hostile until proven otherwise: lengths are limited before anything is
decoded, the checksum binds header, body, payload and session together, and every field of an
operation or an answer is checked. Whatever the bytes are, decoding returns a value that is valid
in all its fields or raises `ProtocolError`, and never anything else.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
from xxhash import xxh3_64_intdigest

from replfs.core import ops
from replfs.core.marks import NO_TAIL
from replfs.core.regions import REGION_LIMIT
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
DIGESTS_PER_ANSWER: Final = 16384
XATTRS_MAX: Final = 1024
FORGET_MAX: Final = 65536
HISTORY_MAX: Final = 64
HOLES_MAX: Final = ops.PAYLOAD_MAX // 512
"""In one `Fetched`: no file system has smaller blocks."""

_MAGIC: Final = 0xF5
_HEADER: Final = struct.Struct("<BBBBQQI")
_CHECKSUM: Final = struct.Struct("<Q")
_BODY: Final = _HEADER.size
_HEAD_MIN: Final = _HEADER.size + _CHECKSUM.size
_OFFSET_MAX: Final = 2**63 - 1
_U32_MAX: Final = 2**32 - 1
_U64_MAX: Final = 2**64 - 1
_ERRNO_MAX: Final = 4095
_MODE_MAX: Final = 0o177777
_TYPE_MASK: Final = 0o170000
_TYPES: Final = frozenset(
    (0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000)
)  # FIFO, character device, directory, block device, file, symlink, socket
_DIGEST_SIZE: Final = 16
_SMALL_MAX: Final = 255
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
    base_progress: int = 0
    """The change of that generation up to which the primary has everything; 0: not known."""


class Hello(Identity, kw_only=True):
    """The dialling side's first message on each connection.

    `resume` is the session to go on with (0: a new one), `answered` the sequence number up to
    which every operation of `stream` has been answered. The transport fills all three.
    """

    resume: int = 0
    answered: int = 0
    stream: int = 0


class Welcome(Identity, kw_only=True):
    """The listening side's consent.

    `applied` is the last operation applied in order on the stream of the `Hello`. The transport
    fills `session`, `resumed` and `applied`.
    """

    session: int = 0
    resumed: bool = False
    applied: int = 0


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
    _check_op(op, None if payload is None else len(payload))
    try:
        body = _encode_body(op)
    except (OverflowError, TypeError, ValueError, msgspec.MsgspecError) as error:
        raise ProtocolError(f"{type(op).__name__} cannot be sent: {error}") from error
    head = _seal(OP, stream, session, seq, body, payload)
    if len(head) > HEAD_MAX:
        raise ProtocolError(f"{type(op).__name__} of {len(head)} bytes cannot be sent")
    return head


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
    _check_op(op, None if payload is None else len(payload))
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
        if not 0 < seq <= _U64_MAX:
            raise ProtocolError(f"an answer to operation {seq}")
        _check_answer(answer)
    return answers


def decode_hello(head: bytes) -> Hello:
    """The body of a HELLO. Raises `ProtocolError`."""
    hello = _decode(_decode_hello, head)
    _check_identity(hello)
    _number(hello.resume, _U64_MAX)
    _number(hello.answered, _U64_MAX)
    _number(hello.stream, BULK)
    return hello


def decode_welcome(head: bytes) -> Welcome:
    """The body of a WELCOME. Raises `ProtocolError`."""
    welcome = _decode(_decode_welcome, head)
    _check_identity(welcome)
    _number(welcome.session, _U64_MAX)
    _number(welcome.applied, _U64_MAX)
    return welcome


def decode_refuse(head: bytes) -> Refuse:
    """The body of a REFUSE. Raises `ProtocolError`."""
    refuse = _decode(_decode_refuse, head)
    _text(refuse.reason, _REASON_MAX)
    _text(refuse.code, _CODE_MAX)
    return refuse


def decode_pong(head: bytes) -> int:
    """How far the peer has applied the live stream. Raises `ProtocolError`."""
    applied = _decode(_decode_int, head)
    _number(applied, _U64_MAX)
    return applied


def decode_bye(head: bytes) -> str:
    """Why the session is over. Raises `ProtocolError`."""
    bye = _decode(_decode_bye, head)
    _text(bye.reason, _REASON_MAX)
    return bye.reason


# Checks of single fields ------------------------------------------------------------------------


def _number(value: int, limit: int, lowest: int = 0) -> None:
    if not lowest <= value <= limit:
        raise ProtocolError(f"the number {value} is not between {lowest} and {limit}")


def _extent(offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > _OFFSET_MAX:
        raise ProtocolError(f"the range {offset}+{size} is outside of any file")


def _object(value: bytes) -> None:
    if len(value) != ops.OBJECT_ID_SIZE:
        raise ProtocolError(f"an object id of {len(value)} bytes")


def _object_or_none(value: bytes) -> None:
    if value and len(value) != ops.OBJECT_ID_SIZE:
        raise ProtocolError(f"an object id of {len(value)} bytes")


def _digest_or_none(value: bytes) -> None:
    if value and len(value) != _DIGEST_SIZE:
        raise ProtocolError(f"a digest of {len(value)} bytes")


def _name(value: bytes) -> None:
    if not 0 < len(value) <= ops.NAME_MAX:
        raise ProtocolError(f"a name of {len(value)} bytes")
    if b"/" in value or b"\0" in value or value in (b".", b".."):
        raise ProtocolError(f"the name {value!r}")


def _xattr_name(value: bytes) -> None:
    if not 0 < len(value) <= ops.NAME_MAX or b"\0" in value:
        raise ProtocolError(f"an extended attribute's name of {len(value)} bytes")


def _xattr_value(value: bytes) -> None:
    if len(value) > ops.XATTR_VALUE_MAX:
        raise ProtocolError(f"an extended attribute's value of {len(value)} bytes")


def _target(value: bytes) -> None:
    if len(value) > ops.PATH_MAX or b"\0" in value:
        raise ProtocolError(f"a symlink target of {len(value)} bytes")


def _typed_mode(value: int) -> None:
    _number(value, _MODE_MAX)
    if value & _TYPE_MASK not in _TYPES:
        raise ProtocolError(f"the mode {value:o} has no file type")


def _text(value: str, limit: int) -> None:
    if len(value) > limit:
        raise ProtocolError(f"a text of {len(value)} characters")


def _count(value: list[Any] | dict[Any, Any], limit: int) -> None:
    if len(value) > limit:
        raise ProtocolError(f"a list of {len(value)} elements")


def _check_identity(identity: Identity) -> None:
    _number(identity.version, _U32_MAX)
    _object_or_none(identity.volume)
    _object(identity.node)
    _text(identity.release, _CODE_MAX)
    _text(identity.name, _NODE_NAME_MAX)
    if len(identity.store) > _STORE_MAX:
        raise ProtocolError(f"a store identity of {len(identity.store)} bytes")
    _text(identity.role, _CODE_MAX)
    _object_or_none(identity.generation)
    _count(identity.history, HISTORY_MAX)
    for generation in identity.history:
        _object(generation)
    _count(identity.features, _FEATURES_MAX)
    for feature in identity.features:
        _text(feature, _CODE_MAX)
    _number(identity.clock_ns, _U64_MAX)
    _number(identity.progress, _U64_MAX)
    _object_or_none(identity.base)
    _number(identity.base_progress, _U64_MAX)


def _check_attributes(attributes: ops.Attributes) -> None:
    _typed_mode(attributes.mode)
    _number(attributes.uid, _U32_MAX)
    _number(attributes.gid, _U32_MAX)
    _number(attributes.rdev, _U64_MAX)
    _number(attributes.size, _OFFSET_MAX)
    _target(attributes.target)
    _number(attributes.policy, _SMALL_MAX)
    _number(attributes.ack, _SMALL_MAX)
    _count(attributes.xattrs, XATTRS_MAX)
    for name, value in attributes.xattrs.items():
        _xattr_name(name)
        _xattr_value(value)


# Checks of operations ---------------------------------------------------------------------------
#
# One function per operation; `size` is the payload's length, None without a payload. Times need
# no check: they are integers, and any integer is a time.


def _check_place_name(op: ops.Locate | ops.Link | ops.Unlink) -> None:
    _object(op.object)
    _object(op.parent)
    _name(op.name)


def _check_forget(op: ops.Forget) -> None:
    _count(op.objects, FORGET_MAX)
    for item in op.objects:
        _object(item)


def _check_truncate(op: ops.Truncate) -> None:
    _object(op.object)
    _number(op.size, _OFFSET_MAX)


def _check_make(op: ops.Make) -> None:
    _object(op.object)
    _object(op.parent)
    _name(op.name)
    _typed_mode(op.mode)
    _number(op.uid, _U32_MAX)
    _number(op.gid, _U32_MAX)
    _number(op.rdev, _U64_MAX)
    _target(op.target)
    _xattr_value(op.acl)
    _xattr_value(op.default_acl)


def _check_rename(op: ops.Rename) -> None:
    _object(op.object)
    _object(op.parent)
    _name(op.name)
    _object(op.new_parent)
    _name(op.new_name)
    _object_or_none(op.replaced)


def _check_setattr(op: ops.SetAttr) -> None:
    _object(op.object)
    _number(op.mode, _MODE_MAX, ops.KEEP)
    _number(op.uid, _U32_MAX, ops.KEEP)
    _number(op.gid, _U32_MAX, ops.KEEP)


def _check_setxattr(op: ops.SetXattr) -> None:
    _object(op.object)
    _xattr_name(op.name)
    _xattr_value(op.value)


def _check_removexattr(op: ops.RemoveXattr) -> None:
    _object(op.object)
    _xattr_name(op.name)


def _check_setpolicy(op: ops.SetPolicy) -> None:
    _object(op.object)
    _number(op.policy, _SMALL_MAX)
    _number(op.ack, _SMALL_MAX)


def _check_checkpoint(op: ops.Checkpoint) -> None:
    _object_or_none(op.generation)


def _check_gather(op: ops.Gather) -> None:
    _object(op.parent)
    _count(op.names, ops.NAMES_PER_MESSAGE)
    if len(op.wanted) != len(op.names):
        raise ProtocolError(f"{len(op.names)} names, {len(op.wanted)} wanted objects")
    for name in op.names:
        _name(name)
    for item in op.wanted:
        _object_or_none(item)


def _check_place(op: ops.Place) -> None:
    _object(op.object)
    _object(op.parent)
    _name(op.name)
    _check_attributes(op.attributes)
    _count(op.hints, ops.NAMES_PER_MESSAGE)
    for directory, name in op.hints:
        _object(directory)
        _name(name)


def _check_clear(op: ops.Clear) -> None:
    _object(op.parent)
    _name(op.name)


def _check_digest(op: ops.Digest) -> None:
    _object(op.object)
    _number(op.count, DIGESTS_PER_ANSWER)
    _number(op.size, _OFFSET_MAX, 1)
    _extent(op.start, op.count * op.size)


def _check_finish(op: ops.Finish) -> None:
    _object(op.object)
    _check_attributes(op.attributes)


def _check_list(op: ops.List) -> None:
    _object(op.parent)
    if op.after:
        _name(op.after)


def _check_phase(op: ops.Phase) -> None:
    _object_or_none(op.generation)
    _count(op.history, HISTORY_MAX)
    for generation in op.history:
        _object(generation)


def _check_generation(op: ops.Generation) -> None:
    _object(op.generation)
    _count(op.history, HISTORY_MAX)
    for generation in op.history:
        _object(generation)


def _check_progress(op: ops.Progress) -> None:
    _number(op.number, _U64_MAX)


def _check_handover(op: ops.Handover) -> None:
    _object(op.generation)


def _check_sync(op: ops.Sync) -> None:
    _object(op.object)


def _check_nothing(op: ops.EmptyLimbo | ops.Stable) -> None:
    pass


def _check_inspect(op: ops.Inspect) -> None:
    _object(op.parent)
    if op.name:
        _name(op.name)


def _check_suspects(op: ops.Suspects) -> None:
    _number(op.page, _U32_MAX)


def _check_fetch(op: ops.Fetch) -> None:
    _object(op.object)
    _number(op.length, ops.PAYLOAD_MAX)
    _extent(op.offset, op.length)
    if op.xattr:
        _xattr_name(op.xattr)


_CHECKS: Final[dict[type[ops.Op], Callable[[Any], None]]] = {
    ops.Locate: _check_place_name,
    ops.Forget: _check_forget,
    ops.Truncate: _check_truncate,
    ops.Make: _check_make,
    ops.Link: _check_place_name,
    ops.Unlink: _check_place_name,
    ops.Rename: _check_rename,
    ops.SetAttr: _check_setattr,
    ops.SetXattr: _check_setxattr,
    ops.RemoveXattr: _check_removexattr,
    ops.SetPolicy: _check_setpolicy,
    ops.Sync: _check_sync,
    ops.Checkpoint: _check_checkpoint,
    ops.Gather: _check_gather,
    ops.Place: _check_place,
    ops.Clear: _check_clear,
    ops.Digest: _check_digest,
    ops.Finish: _check_finish,
    ops.List: _check_list,
    ops.EmptyLimbo: _check_nothing,
    ops.Phase: _check_phase,
    ops.Inspect: _check_inspect,
    ops.Stable: _check_nothing,
    ops.Generation: _check_generation,
    ops.Progress: _check_progress,
    ops.Handover: _check_handover,
    ops.Suspects: _check_suspects,
    ops.Fetch: _check_fetch,
}


def _check_op(op: ops.AnyOp, size: int | None) -> None:
    kind = type(op)
    if kind is ops.Write or kind is ops.Data:  # first, because nearly all are writes
        _check_data(op, size)  # type: ignore[arg-type]  # narrowed by the line above
        return
    if kind is ops.Place:
        _check_contents(op, size or 0)  # type: ignore[arg-type]  # narrowed by the line above
    elif size is not None:
        raise ProtocolError(f"{kind.__name__} with a payload")
    _CHECKS[kind](op)


def _check_contents(op: ops.Place, size: int) -> None:
    """Of a whole file the payload is all the data; of anything else there is none."""
    if size != (op.attributes.size if op.whole else 0):
        raise ProtocolError(f"Place of {op.attributes.size} bytes with {size} bytes of payload")


def _check_data(op: ops.Write | ops.Data, size: int | None) -> None:
    _object(op.object)
    if size is not None and 0 < size <= ops.PAYLOAD_MAX:
        if type(op) is ops.Data and op.hole:
            raise ProtocolError("a hole with a payload")
        _extent(op.offset, size)
    elif size is None and type(op) is ops.Data and op.hole > 0:
        _extent(op.offset, op.hole)
    else:
        raise ProtocolError(f"{type(op).__name__} with {size or 0} bytes of payload")


def _check_answer(answer: ops.AnyAnswer) -> None:
    if type(answer) is ops.Done:
        _number(answer.errno, _ERRNO_MAX)
        _number(answer.written, ops.PAYLOAD_MAX)
    elif type(answer) is ops.Digests:
        if len(answer.digests) % _DIGEST_SIZE:
            raise ProtocolError(f"digests of {len(answer.digests)} bytes")
        _number(len(answer.digests), DIGESTS_PER_ANSWER * _DIGEST_SIZE)
        _number(answer.size, _OFFSET_MAX)
    elif type(answer) is ops.Listing:
        _count(answer.entries, ops.NAMES_PER_MESSAGE)
        _digest_or_none(answer.digest)
        for entry in answer.entries:
            _name(entry.name)
            _object_or_none(entry.object)
            _digest_or_none(entry.digest)
    elif type(answer) is ops.Inspected:
        _object_or_none(answer.object)
        if answer.attributes is not None:
            _check_attributes(answer.attributes)
            for value in answer.attributes.xattrs.values():
                if len(value) != _DIGEST_SIZE:
                    raise ProtocolError(f"a digest of {len(value)} bytes")
    elif type(answer) is ops.Suspected:
        _check_suspected(answer)
    elif type(answer) is ops.Fetched:
        _check_fetched(answer)


def _check_suspected(answer: ops.Suspected) -> None:
    _count(answer.places, ops.PLACES_PER_MESSAGE)
    for place in answer.places:
        _check_place_name(place)
    _count(answer.suspects, ops.NAMES_PER_MESSAGE)
    runs = names = 0
    for suspect in answer.suspects:
        _object(suspect.object)
        _number(suspect.flags, _SMALL_MAX)
        _number(suspect.tail, REGION_LIMIT, NO_TAIL)
        for first, last in suspect.runs:
            if not 0 <= first < last <= REGION_LIMIT:
                raise ProtocolError(f"the regions {first} to {last}")
        for name in suspect.names:
            if name:
                _name(name)
        runs += len(suspect.runs)
        names += len(suspect.names)
    if runs > ops.RUNS_PER_MESSAGE or names > ops.NAMES_PER_MESSAGE:
        raise ProtocolError(f"{runs} runs of regions and {names} names in one page")


def _check_fetched(answer: ops.Fetched) -> None:
    _number(len(answer.data), ops.PAYLOAD_MAX)
    _count(answer.holes, HOLES_MAX)
    at = 0
    for start, stop in answer.holes:
        if not at <= start < stop <= _OFFSET_MAX:
            raise ProtocolError(f"the hole {start} to {stop}")
        at = stop
    _number(answer.size, _OFFSET_MAX)
