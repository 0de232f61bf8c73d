"""Which data was marked lately, so that a clear of other regions of the same object may go on."""

from __future__ import annotations

from typing import Final

from replfs.core.ops import ObjectId

_OBJECTS_MAX: Final = 64
_MARKS_MAX: Final = 1024


class _OfObject:
    """Data marks of one object since the first of its version tokens that may still be used."""

    __slots__ = ("floor", "marks")

    def __init__(self, floor: int) -> None:
        self.floor = floor
        """Of tokens up to this one, nothing is known."""
        self.marks: list[tuple[int, int, int]] = []
        """(version, first region, last region + 1), in order of version."""


class Recent(dict[ObjectId, _OfObject]):
    """The latest marks of the few objects of which somebody may ask; empty: nobody does."""

    def begin(self, object_id: ObjectId, version: int) -> None:
        """A token was given for the object: its marks are remembered from here on."""
        recent = self.pop(object_id, None)
        if recent is None:
            recent = _OfObject(version - 1)
            if len(self) >= _OBJECTS_MAX:
                del self[next(iter(self))]
        self[object_id] = recent

    def note(self, object_id: ObjectId, version: int, first: int, last: int) -> None:
        """Remember a mark of regions [first, last), where somebody may ask."""
        recent = self.get(object_id)
        if recent is None or first >= last:
            return
        mark = (version, first, last)
        if recent.marks and recent.marks[-1] == mark:
            return
        recent.marks.append(mark)
        if len(recent.marks) > _MARKS_MAX:
            recent.floor = recent.marks[_MARKS_MAX // 2][0]
            del recent.marks[: _MARKS_MAX // 2 + 1]

    def may_hold(self, object_id: ObjectId, version: int, first: int, last: int | None) -> bool:
        """Whether regions [first, last) were, or may have been, marked since token *version*.

        *last* None: to the end.
        """
        recent = self.get(object_id)
        if recent is None or recent.floor >= version:
            return True
        for at, low, high in reversed(recent.marks):
            if at < version:
                break
            if (last is None or low < last) and first < high:
                return True
        return False
