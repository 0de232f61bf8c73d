"""Of a file that is to be compared: which of its regions are known to be changed here.

Kept for an object only while some of its marks may be equal (`COMPARE`) and others are not: after
a loss of power this store's version counts of what was changed, and the peer's of the rest.
"""

from __future__ import annotations

from collections.abc import Iterator

from replfs.core import regions as sets
from replfs.core.marks import CHANGED, COMPARE, ObjectMarks, SaveRegions, WideMarks
from replfs.core.ops import ObjectId


class Changed:
    """The regions of one object that were changed, as they will be once that is saved.

    Nothing counts before that, so what is there is not touched until `apply`.
    """

    def __init__(self, marks: ObjectMarks) -> None:
        self._is_new = not marks.flags & COMPARE
        """So far all that was marked had been changed."""
        self._regions = marks.regions if self._is_new else marks.changed_regions
        self.tail = marks.tail if self._is_new else marks.changed_tail
        self._first = self._last = 0

    def add(self, tail: int, first: int, last: int) -> None:
        """These are changed, too."""
        if tail >= 0 and not 0 <= self.tail <= tail:
            self.tail = tail
        if 0 <= self.tail < last:
            last = self.tail
        if last > first and not sets.contains(self._regions, first, last):
            self._first, self._last = first, last

    def saved(self, object_id: ObjectId) -> Iterator[SaveRegions]:
        """What has to be saved of it."""
        chunks = set(sets.chunks(self._regions)) if self._is_new else set()
        if self._last:
            chunks |= set(sets.chunks_of(self._first, self._last))
        for chunk in sorted(chunks):
            regions = sets.encode_chunk(self._regions, chunk, self._first, self._last)
            yield SaveRegions(object_id, ~chunk, regions)

    def apply(self, marks: ObjectMarks) -> None:
        """It is saved."""
        if isinstance(marks, WideMarks):
            regions = sets.copy(self._regions) if self._is_new else self._regions
            marks.changed_regions = sets.add(regions, self._first, self._last)
            marks.changed_tail = self.tail


def is_changed(marks: ObjectMarks, first: int, last: int) -> bool:
    """Of an object with `COMPARE`: whether all of [first, last) is known to be changed here."""
    if not marks.flags & CHANGED:
        return False
    tail = marks.changed_tail
    return 0 <= tail <= first or sets.contains(marks.changed_regions, first, last)
