"""What a message may say: a check of every field of every operation and every answer.

Times need none: they are integers, and any integer is a time. Each check raises `ProtocolError`,
and nothing else, whatever the values are; their types are the decoder's to see to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from replfs.core import ops
from replfs.core.marks import NO_TAIL
from replfs.core.regions import REGION_LIMIT
from replfs.errors import ProtocolError

DIGESTS_PER_ANSWER: Final = 16384
XATTRS_MAX: Final = 1024
FORGET_MAX: Final = 65536
HOLES_MAX: Final = ops.PAYLOAD_MAX // 512
"""In one `Fetched`: no file system has smaller blocks."""
HISTORY_MAX: Final = 64
U32_MAX: Final = 2**32 - 1
U64_MAX: Final = 2**64 - 1

_OFFSET_MAX: Final = 2**63 - 1
_ERRNO_MAX: Final = 4095
_MODE_MAX: Final = 0o177777
_TYPE_MASK: Final = 0o170000
_REGULAR: Final = 0o100000
_TYPES: Final = frozenset(
    (0o010000, 0o020000, 0o040000, 0o060000, 0o100000, 0o120000, 0o140000)
)  # FIFO, character device, directory, block device, file, symlink, socket
_DIGEST_SIZE: Final = 16
_SMALL_MAX: Final = 255


# Checks of single fields ------------------------------------------------------------------------


def number(value: int, limit: int, lowest: int = 0) -> None:
    """*lowest* to *limit*. Raises ProtocolError, as all others."""
    if not lowest <= value <= limit:
        raise ProtocolError(f"the number {value} is not between {lowest} and {limit}")


def _extent(offset: int, size: int) -> None:
    if offset < 0 or size < 0 or offset + size > _OFFSET_MAX:
        raise ProtocolError(f"the range {offset}+{size} is outside of any file")


def object_id(value: bytes) -> None:
    """An object's, a node's, a volume's, a generation's."""
    if len(value) != ops.OBJECT_ID_SIZE:
        raise ProtocolError(f"an object id of {len(value)} bytes")


def object_or_none(value: bytes) -> None:
    """As `object_id`, or empty."""
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
    number(value, _MODE_MAX)
    if value & _TYPE_MASK not in _TYPES:
        raise ProtocolError(f"the mode {value:o} has no file type")


def text(value: str, limit: int) -> None:
    """No longer than *limit* characters."""
    if len(value) > limit:
        raise ProtocolError(f"a text of {len(value)} characters")


def generations(values: list[bytes]) -> None:
    """A history, or a part of one."""
    count(values, HISTORY_MAX)
    for value in values:
        object_id(value)


def count(value: list[Any] | dict[Any, Any], limit: int) -> None:
    """No more than *limit* elements."""
    if len(value) > limit:
        raise ProtocolError(f"a list of {len(value)} elements")


def _check_attributes(attributes: ops.Attributes) -> None:
    if (
        attributes.mode & _TYPE_MASK == _REGULAR
        and 0 <= attributes.mode <= _MODE_MAX
        and 0 <= attributes.uid <= U32_MAX
        and 0 <= attributes.gid <= U32_MAX
        and 0 <= attributes.rdev <= U64_MAX
        and 0 <= attributes.size <= _OFFSET_MAX
        and 0 <= attributes.policy <= _SMALL_MAX
        and 0 <= attributes.ack <= _SMALL_MAX
        and not attributes.target
        and not attributes.xattrs
    ):
        return  # which is what most are: there may be hundreds in one message
    _typed_mode(attributes.mode)
    number(attributes.uid, U32_MAX)
    number(attributes.gid, U32_MAX)
    number(attributes.rdev, U64_MAX)
    number(attributes.size, _OFFSET_MAX)
    _target(attributes.target)
    number(attributes.policy, _SMALL_MAX)
    number(attributes.ack, _SMALL_MAX)
    count(attributes.xattrs, XATTRS_MAX)
    for name, value in attributes.xattrs.items():
        _xattr_name(name)
        _xattr_value(value)


# Checks of operations ---------------------------------------------------------------------------
#
# One function per operation.


def _check_place_name(op: ops.Locate | ops.Link | ops.Unlink) -> None:
    object_id(op.object)
    object_id(op.parent)
    _name(op.name)


def _check_forget(op: ops.Forget) -> None:
    count(op.objects, FORGET_MAX)
    for item in op.objects:
        object_id(item)


def _check_truncate(op: ops.Truncate) -> None:
    object_id(op.object)
    number(op.size, _OFFSET_MAX)


def _check_make(op: ops.Make) -> None:
    object_id(op.object)
    object_id(op.parent)
    _name(op.name)
    _typed_mode(op.mode)
    number(op.uid, U32_MAX)
    number(op.gid, U32_MAX)
    number(op.rdev, U64_MAX)
    _target(op.target)
    _xattr_value(op.acl)
    _xattr_value(op.default_acl)


def _check_rename(op: ops.Rename) -> None:
    object_id(op.object)
    object_id(op.parent)
    _name(op.name)
    object_id(op.new_parent)
    _name(op.new_name)
    object_or_none(op.replaced)


def _check_setattr(op: ops.SetAttr) -> None:
    object_id(op.object)
    number(op.mode, _MODE_MAX, ops.KEEP)
    number(op.uid, U32_MAX, ops.KEEP)
    number(op.gid, U32_MAX, ops.KEEP)


def _check_setxattr(op: ops.SetXattr) -> None:
    object_id(op.object)
    _xattr_name(op.name)
    _xattr_value(op.value)


def _check_removexattr(op: ops.RemoveXattr) -> None:
    object_id(op.object)
    _xattr_name(op.name)


def _check_setpolicy(op: ops.SetPolicy) -> None:
    object_id(op.object)
    number(op.policy, _SMALL_MAX)
    number(op.ack, _SMALL_MAX)


def _check_checkpoint(op: ops.Checkpoint) -> None:
    object_or_none(op.generation)


def _check_gather(op: ops.Gather) -> None:
    object_id(op.parent)
    count(op.names, ops.NAMES_PER_MESSAGE)
    if len(op.wanted) != len(op.names):
        raise ProtocolError(f"{len(op.names)} names, {len(op.wanted)} wanted objects")
    for name in op.names:
        _name(name)
    for item in op.wanted:
        object_or_none(item)


def _check_place(op: ops.Place) -> None:
    object_id(op.object)
    object_id(op.parent)
    _name(op.name)
    _check_attributes(op.attributes)
    count(op.hints, ops.NAMES_PER_MESSAGE)
    for directory, name in op.hints:
        object_id(directory)
        _name(name)


def _check_clear(op: ops.Clear) -> None:
    object_id(op.parent)
    _name(op.name)


def _check_digest(op: ops.Digest) -> None:
    object_id(op.object)
    number(op.count, DIGESTS_PER_ANSWER)
    number(op.size, _OFFSET_MAX, 1)
    _extent(op.start, op.count * op.size)


def _check_finish(op: ops.Finish) -> None:
    object_id(op.object)
    _check_attributes(op.attributes)


def _check_list(op: ops.List) -> None:
    object_id(op.parent)
    if op.after:
        _name(op.after)


def _check_phase(op: ops.Phase) -> None:
    object_or_none(op.generation)
    generations(op.history)
    generations(op.discarded)


def _check_generation(op: ops.Generation) -> None:
    object_id(op.generation)
    generations(op.history)
    generations(op.discarded)


def _check_progress(op: ops.Progress) -> None:
    number(op.number, U64_MAX)


def _check_summary(op: ops.Summary) -> None:
    number(op.number, U64_MAX)
    number(op.checksum, U32_MAX)
    object_or_none(op.generation)
    number(op.change, U64_MAX)


def _check_handover(op: ops.Handover) -> None:
    object_id(op.generation)


def _check_sync(op: ops.Sync) -> None:
    object_id(op.object)


def _check_nothing(op: ops.EmptyLimbo | ops.Stable) -> None:
    pass


def _check_inspect(op: ops.Inspect) -> None:
    object_id(op.parent)
    if op.name:
        _name(op.name)


def _check_suspects(op: ops.Suspects) -> None:
    number(op.page, U32_MAX)


def _check_fetch(op: ops.Fetch) -> None:
    object_id(op.object)
    number(op.length, ops.PAYLOAD_MAX)
    _extent(op.offset, op.length)
    if op.xattr:
        _xattr_name(op.xattr)


def _check_place_many(op: ops.PlaceMany) -> None:
    object_id(op.parent)
    count(op.items, ops.ITEMS_PER_MESSAGE)
    for item in op.items:
        object_id(item.object)
        _name(item.name)
        _check_attributes(item.attributes)
        if item.attributes.size and item.attributes.mode & _TYPE_MASK != _REGULAR:
            raise ProtocolError("data of what is no file")


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
    ops.Summary: _check_summary,
    ops.Handover: _check_handover,
    ops.Suspects: _check_suspects,
    ops.Fetch: _check_fetch,
    ops.PlaceMany: _check_place_many,
}


def check_op(op: ops.AnyOp, size: int | None) -> None:
    """An operation with *size* bytes of payload; None: without. Raises ProtocolError."""
    kind = type(op)
    if (
        # First, because nearly all are writes; what is wrong with one is found below.
        type(op) is ops.Write
        and len(op.object) == ops.OBJECT_ID_SIZE
        and size is not None
        and 0 < size <= ops.PAYLOAD_MAX
        and 0 <= op.offset <= _OFFSET_MAX - size
    ):
        return
    if kind is ops.Write or kind is ops.Data:
        _check_data(op, size)  # type: ignore[arg-type]  # narrowed by the line above
        return
    if kind is ops.Place:
        _check_contents(op, size or 0)  # type: ignore[arg-type]  # narrowed by the line above
    elif kind is ops.PlaceMany:
        _check_all_contents(op, size or 0)  # type: ignore[arg-type]  # as above
    elif size is not None:
        raise ProtocolError(f"{kind.__name__} with a payload")
    _CHECKS[kind](op)


def _check_contents(op: ops.Place, size: int) -> None:
    """Of a whole file the payload is all the data; of anything else there is none."""
    if size != (op.attributes.size if op.whole else 0):
        raise ProtocolError(f"Place of {op.attributes.size} bytes with {size} bytes of payload")


def _check_all_contents(op: ops.PlaceMany, size: int) -> None:
    announced = sum(item.attributes.size for item in op.items)
    if size != announced:
        raise ProtocolError(f"PlaceMany of {announced} bytes with {size} bytes of payload")


def _check_data(op: ops.Write | ops.Data, size: int | None) -> None:
    object_id(op.object)
    if size is not None and 0 < size <= ops.PAYLOAD_MAX:
        if type(op) is ops.Data and op.hole:
            raise ProtocolError("a hole with a payload")
        _extent(op.offset, size)
    elif size is None and type(op) is ops.Data and op.hole > 0:
        _extent(op.offset, op.hole)
    else:
        raise ProtocolError(f"{type(op).__name__} with {size or 0} bytes of payload")


def check_answer(answer: ops.AnyAnswer) -> None:
    """An answer. Raises ProtocolError."""
    if type(answer) is ops.Done:
        if 0 <= answer.errno <= _ERRNO_MAX and 0 <= answer.written <= ops.PAYLOAD_MAX:
            return  # nearly always
        number(answer.errno, _ERRNO_MAX)
        number(answer.written, ops.PAYLOAD_MAX)
    elif type(answer) is ops.PlacedMany:
        count(answer.results, ops.ITEMS_PER_MESSAGE)
        for result in answer.results:
            check_answer(result)
    elif type(answer) is ops.Digests:
        if len(answer.digests) % _DIGEST_SIZE:
            raise ProtocolError(f"digests of {len(answer.digests)} bytes")
        number(len(answer.digests), DIGESTS_PER_ANSWER * _DIGEST_SIZE)
        number(answer.size, _OFFSET_MAX)
    elif type(answer) is ops.Listing:
        count(answer.entries, ops.NAMES_PER_MESSAGE)
        _digest_or_none(answer.digest)
        for entry in answer.entries:
            _name(entry.name)
            object_or_none(entry.object)
            _digest_or_none(entry.digest)
    elif type(answer) is ops.Inspected:
        object_or_none(answer.object)
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
    count(answer.places, ops.PLACES_PER_MESSAGE)
    for place in answer.places:
        _check_place_name(place)
    count(answer.suspects, ops.NAMES_PER_MESSAGE)
    runs = names = 0
    for suspect in answer.suspects:
        object_id(suspect.object)
        number(suspect.flags, _SMALL_MAX)
        number(suspect.tail, REGION_LIMIT, NO_TAIL)
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
    number(len(answer.data), ops.PAYLOAD_MAX)
    count(answer.holes, HOLES_MAX)
    at = 0
    for start, stop in answer.holes:
        if not at <= start < stop <= _OFFSET_MAX:
            raise ProtocolError(f"the hole {start} to {stop}")
        at = stop
    number(answer.size, _OFFSET_MAX)
