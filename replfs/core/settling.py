"""What was cleared from a peer's log, and is still marked on the disk.

A clear is saved lazily. Until it is safe from a loss of power, the disk says that the peer lacks
something that it has. Were a change acknowledged meanwhile because both sides have it, and power
lost, the next start could not tell whose version is the later one: that of the peer, or one that
was marked again after it. So nothing is sent to a peer on top of a clear that is not on the disk
yet; it is recorded, as if the clear had not been. Then a mark that is found after a loss of power
says for certain that nothing was acknowledged on top of it: this store's version counts there.

What is refused for that reason is remembered: the resync carries it once more, and waits for the
disk before it lets applications go on, so that it converges.

Pure. One caller at a time; what is safe is told by `begin` and `settle`.
"""

from __future__ import annotations

from typing import Final

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.marks import ALL_NAMES

_WAITED_MAX: Final = 1024
"""Things remembered as waited for; of more, the next time the disk is written to serves them."""
_RANGES_MAX: Final = 64
"""Ranges of one object told apart; of more, all between them counts, too."""
_END: Final = 1 << 63

Key = tuple[ops.ObjectId, bytes]
"""An object, or a name in it."""


class _Cleared:
    """What was cleared in some time: sets and short lists, for every file that is carried pays."""

    __slots__ = ("attrs", "data", "directories", "names")

    def __init__(self) -> None:
        self.names: set[Key] = set()
        self.directories: set[ops.ObjectId] = set()
        """Those of the names."""
        self.attrs: set[ops.ObjectId] = set()
        self.data: dict[ops.ObjectId, list[tuple[int, int]]] = {}

    @property
    def is_empty(self) -> bool:
        return not (self.names or self.attrs or self.data)

    def add_data(self, object_id: ops.ObjectId, start: int, stop: int) -> None:
        ranges = self.data.get(object_id)
        if ranges is None:
            self.data[object_id] = [(start, stop)]
            return
        low, high = ranges[-1]
        if low <= start <= high:
            ranges[-1] = low, max(high, stop)
        elif len(ranges) < _RANGES_MAX:
            ranges.append((start, stop))
        else:
            first = min(start, *(low for low, _ in ranges))
            ranges[:] = [(first, max(stop, *(high for _, high in ranges)))]

    def add(self, other: _Cleared) -> None:
        self.names |= other.names
        self.directories |= other.directories
        self.attrs |= other.attrs
        for object_id, ranges in other.data.items():
            for start, stop in ranges:
                self.add_data(object_id, start, stop)

    def has_data(self, object_id: ops.ObjectId, start: int, stop: int) -> bool:
        ranges = self.data.get(object_id)
        return ranges is not None and any(low < stop and start < high for low, high in ranges)

    def has_name(self, directory: ops.ObjectId, name: bytes) -> bool:
        return (directory, name) in self.names or (directory, ALL_NAMES) in self.names

    def has_object(self, object_id: ops.ObjectId) -> bool:
        return object_id in self.attrs or object_id in self.data or object_id in self.directories

    def has_what(self, op: ops.AnyOp) -> bool:
        """Whether *op*, which changes no data, is on top of something in it."""
        match op:
            case ops.Make() | ops.Link() | ops.Unlink():
                return self.has_name(op.parent, op.name)
            case ops.Rename():
                return self.has_name(op.parent, op.name) or self.has_name(
                    op.new_parent, op.new_name
                )
            case ops.SetAttr() | ops.SetXattr() | ops.RemoveXattr() | ops.SetPolicy():
                return op.object in self.attrs
            case _:
                return False


class Settling:
    """The clears of one log."""

    def __init__(self) -> None:
        self.is_empty = True
        """Current at all times; an attribute because every operation reads it."""
        self._noted = _Cleared()
        self._saving: _Cleared | None = None
        self._waited: set[Key] = set()

    # The log's -----------------------------------------------------------------------------------

    def data(self, object_id: ops.ObjectId, start: int, stop: int | None) -> None:
        """Bytes [start, stop) of an object were cleared; *stop* None: to the end."""
        self._noted.add_data(object_id, start, _END if stop is None else stop)
        self.is_empty = False

    def attrs(self, object_id: ops.ObjectId) -> None:
        """The attributes of an object were cleared."""
        self._noted.attrs.add(object_id)
        self.is_empty = False

    def name(self, directory: ops.ObjectId, name: bytes) -> None:
        """A name was cleared; an empty one: all that were not marked one by one."""
        self._noted.names.add((directory, name))
        self._noted.directories.add(directory)
        self.is_empty = False

    # Questions -----------------------------------------------------------------------------------

    def _periods(self) -> tuple[_Cleared, ...]:
        return (self._noted,) if self._saving is None else (self._noted, self._saving)

    def allows(self, op: ops.AnyOp, start: int, stop: int | None) -> bool:
        """Whether *op*, of bytes [start, stop) where it is one of data, may be sent.

        If not, it is waited for from here on.
        """
        if type(op) is ops.Write or type(op) is ops.Truncate:
            end = _END if stop is None else stop
            refused = any(one.has_data(op.object, start, end) for one in self._periods())
        else:
            refused = any(one.has_what(op) for one in self._periods())
        if refused and len(self._waited) < _WAITED_MAX:
            self._waited.update(_keys(op))
        return not refused

    def name_is_settled(self, directory: ops.ObjectId, name: bytes) -> bool:
        """Whether what stands at a name is safely known to be on the peer."""
        return not any(one.has_name(directory, name) for one in self._periods())

    def object_is_settled(self, object_id: ops.ObjectId) -> bool:
        """Whether nothing of the object was cleared just now."""
        return not any(one.has_object(object_id) for one in self._periods())

    def is_waited_for(self, dirty: DirtyLog) -> bool:
        """Whether something that was refused was cleared again, and only the disk is missing."""
        return any(_is_clean(dirty, key) and not self._has_settled(key) for key in self._waited)

    def _has_settled(self, key: Key) -> bool:
        one, name = key
        return self.name_is_settled(one, name) if name else self.object_is_settled(one)

    # The disk ------------------------------------------------------------------------------------

    def begin(self) -> None:
        """What was cleared so far is being made safe."""
        if self._saving is None:
            self._saving = self._noted
        else:
            self._saving.add(self._noted)
        self._noted = _Cleared()

    def settle(self, dirty: DirtyLog) -> None:
        """What was cleared before the last `begin` is safe; *dirty* is the log."""
        self._saving = None
        self.is_empty = self._noted.is_empty
        if self._waited:
            self._waited = {
                key
                for key in self._waited
                if not (_is_clean(dirty, key) and self._has_settled(key))
            }


def _is_clean(dirty: DirtyLog, key: Key) -> bool:
    one, name = key
    return dirty.name_is_clean(one, name) if name else dirty.object_is_clean(one)


def _keys(op: ops.AnyOp) -> tuple[Key, ...]:
    match op:
        case ops.Make() | ops.Link() | ops.Unlink():
            return ((op.parent, op.name),)
        case ops.Rename():
            return (op.parent, op.name), (op.new_parent, op.new_name)
        case _:
            return ((getattr(op, "object", b""), b""),)
