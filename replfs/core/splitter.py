"""Where an operation goes: to the peer now, or into its dirty region log.

What an operation touches on a peer is clean or dirty there. Clean: it is sent, and the object
stays in sync. Dirty: it is applied locally only and recorded, since the peer does not have what it
would change; the resync carries it. What the resync is transferring this moment is claimed by it
(`core.scheduler`), so an operation on it has waited before it comes here. A write over clean and
dirty regions is recorded whole: the log may say more than differs, never less.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from replfs.core import ops
from replfs.core.dirty import DirtyLog

_TYPE_MASK: Final = 0o170000
_REGULAR: Final = 0o100000

Locator = Callable[[ops.ObjectId], bytes]
"""What finds an object again after a restart; empty where the caller does not know."""


def is_clean(log: DirtyLog, op: ops.AnyOp) -> bool:
    """Whether everything *op* needs is on the peer, so that it may be sent."""
    match op:
        case ops.Write():
            return log.data_is_clean(op.object, op.offset, op.offset + 1)
        case ops.Truncate():
            return log.data_is_clean(op.object, op.size, None)
        case ops.Make() | ops.Link() | ops.Unlink():
            return log.name_is_clean(op.parent, op.name)
        case ops.Rename():
            return log.name_is_clean(op.parent, op.name) and log.name_is_clean(
                op.new_parent, op.new_name
            )
        case ops.SetAttr() | ops.SetXattr() | ops.RemoveXattr() | ops.SetPolicy():
            return log.attrs_are_clean(op.object)
        case _:
            return True


def mark(
    log: DirtyLog, op: ops.AnyOp, locate: Locator, *, length: int = 0, start: int | None = None
) -> None:
    """Record that the peer lacks what *op* did.

    *length* is a write's payload in bytes; *start* the first byte it changes, where that lies
    before its offset because the file was shorter.
    """
    match op:
        case ops.Write():
            first = op.offset if start is None else min(start, op.offset)
            log.mark_data(op.object, first, op.offset + length, handle=locate(op.object))
            log.mark_attrs(op.object)
        case ops.Truncate():
            first = op.size if start is None else min(start, op.size)
            log.mark_tail(op.object, first, handle=locate(op.object))
            log.mark_attrs(op.object)
        case ops.Make():
            mark_name(log, op.parent, op.name, locate)
            if op.mode & _TYPE_MASK == _REGULAR:
                log.mark_tail(op.object, 0, handle=locate(op.object))
            else:
                log.mark_attrs(op.object, handle=locate(op.object))
        case ops.Link():
            mark_name(log, op.parent, op.name, locate)
        case ops.Unlink():
            mark_name(log, op.parent, op.name, locate)
        case ops.Rename():
            mark_name(log, op.parent, op.name, locate)
            mark_name(log, op.new_parent, op.new_name, locate)
        case ops.SetAttr() | ops.SetXattr() | ops.RemoveXattr() | ops.SetPolicy():
            log.mark_attrs(op.object, handle=locate(op.object))
        case _:
            pass


def mark_name(
    log: DirtyLog, directory: ops.ObjectId, name: bytes, locate: Locator, *, removal: bool = False
) -> None:
    """Record that the peer may have something else under a name."""
    log.mark_name(directory, name, removal=removal, handle=locate(directory))
