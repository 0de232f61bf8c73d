"""What the marks of one peer say: questions, and walks over them.

`core.dirty` makes and clears them. Iteration tolerates changes made between two steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from replfs.core import regions as sets
from replfs.core.marks import ALL_NAMES, ATTRS, ObjectMarks
from replfs.core.ops import ObjectId
from replfs.core.regions import REGION_SHIFT, REGION_SIZE, Regions

INFINITE: Final = 1 << 62
"""No file has so many regions."""
NAME_GATHERED: Final = 1
NAME_REMOVAL: Final = 2


class Marked:
    """The marks of one peer, to be read.

    All `first` and `last` are region numbers, half-open; `start` and `stop` are bytes, half-open.
    """

    def __init__(self) -> None:
        self.is_empty = True
        """Current at all times; an attribute because every operation reads it."""
        self.dirty_files = 0
        """Objects with data marks."""
        self.dirty_names = 0
        """Names marked one by one."""
        self._objects: dict[ObjectId, ObjectMarks] = {}
        self._directories: dict[ObjectId, None] = {}
        self._regions = 0
        self._tails = 0

    def __len__(self) -> int:
        return len(self._objects)

    @property
    def dirty_bytes(self) -> int:
        """Bytes that data marks cover, whole regions, by the sizes told with the marks."""
        return (self._regions + self._tails) << REGION_SHIFT

    # Questions ---------------------------------------------------------------------------------

    def object_is_clean(self, object_id: ObjectId) -> bool:
        """There is no mark of any kind on the object."""
        return object_id not in self._objects

    def data_is_clean(self, object_id: ObjectId, start: int, stop: int | None) -> bool:
        """No region that holds any of these bytes is dirty; *stop* None: to the end of the file."""
        marks = self._objects.get(object_id)
        if marks is None or (marks.tail < 0 and not marks.regions):
            return True
        if stop is None:
            last = INFINITE
        elif stop <= start:
            return True
        else:
            last = ((stop - 1) >> REGION_SHIFT) + 1
        if 0 <= marks.tail < last:
            return False
        return not sets.overlaps(marks.regions, start >> REGION_SHIFT, last)

    def attrs_are_clean(self, object_id: ObjectId) -> bool:
        """Attributes, extended attributes and size need not be sent."""
        marks = self._objects.get(object_id)
        return marks is None or not marks.flags & ATTRS

    def name_is_clean(self, directory: ObjectId, name: bytes) -> bool:
        """The peer has at *name* what is here; False also where every name is dirty."""
        marks = self._objects.get(directory)
        if marks is None or marks.names is None:
            return True
        return name not in marks.names and ALL_NAMES not in marks.names

    def split(self, object_id: ObjectId, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """Cut a write of [start, stop) into (start, stop, is clean), each as long as can be."""
        if self.data_is_clean(object_id, start, stop):
            return [(start, stop, True)]
        marks = self._objects[object_id]
        return _cut(start, stop, marks.regions, marks.tail)

    def split_changed(
        self, object_id: ObjectId, start: int, stop: int
    ) -> list[tuple[int, int, bool]]:
        """Cut [start, stop) into (start, stop, is not known to be changed here)."""
        marks = self._objects.get(object_id)
        if marks is None or not marks.compare:
            return self.split(object_id, start, stop)
        return _cut(start, stop, marks.changed_regions, marks.changed_tail)

    def changed_end(self, object_id: ObjectId) -> int | None:
        """Where the last byte of a file that may have been changed here ends, at most.

        None: there is no end, and the size was changed, too.
        """
        marks = self._objects.get(object_id)
        if marks is None:
            return 0
        regions, tail = marks.regions, marks.tail
        if marks.compare:
            regions, tail = marks.changed_regions, marks.changed_tail
        return None if tail >= 0 else sets.end(regions) << REGION_SHIFT

    def marks(self, object_id: ObjectId) -> ObjectMarks | None:
        """The object's marks, to read at once, or None if it is clean."""
        return self._objects.get(object_id)

    def is_gathered(self, directory: ObjectId, name: bytes) -> bool:
        """The name is dirty, and was gathered on the peer after it was last marked."""
        return self._name_value(directory, name) & NAME_GATHERED != 0

    def is_removal(self, directory: ObjectId, name: bytes) -> bool:
        """The name is dirty because it is to be removed from the peer by a change of policy."""
        return self._name_value(directory, name) & NAME_REMOVAL != 0

    def _name_value(self, directory: ObjectId, name: bytes) -> int:
        """The version of a dirty name's last mark, shifted, and its bits; 0 if it is clean."""
        marks = self._objects.get(directory)
        if marks is None or marks.names is None:
            return 0
        return marks.names.get(name, 0)

    # Iteration ---------------------------------------------------------------------------------

    def dirty_regions(
        self, object_id: ObjectId, size: int, *, first: int = 0, limit: int = INFINITE
    ) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of dirty regions below *size* bytes, at most *limit* regions each.

        Each step looks at the marks as they are by then, from the end of the step before.
        """
        end = (size + REGION_SIZE - 1) >> REGION_SHIFT
        while (run := self.next_run(object_id, first, end, limit)) is not None:
            yield run
            first = run[1]

    def next_run(
        self, object_id: ObjectId, first: int, end: int, limit: int = INFINITE
    ) -> tuple[int, int] | None:
        """The first run of dirty regions in [first, end), at most *limit* long, or None."""
        marks = self._objects.get(object_id)
        if marks is None or first >= end:
            return None
        low = sets.first_from(marks.regions, first)
        tail = marks.tail
        if tail >= 0 and (low < 0 or low >= tail):
            low = max(first, tail)
        if low < 0 or low >= end:
            return None
        stop = min(end, low + limit)
        high = stop if 0 <= tail <= low else sets.run_end(marks.regions, low, stop)
        if 0 <= tail <= high:
            high = stop
        return low, high

    def runs(self, object_id: ObjectId) -> Iterator[tuple[int, int]]:
        """Runs [first, last) of regions marked one by one, the tail not among them."""
        marks = self._objects.get(object_id)
        first = 0
        while marks is not None and (first := sets.first_from(marks.regions, first)) >= 0:
            last = sets.run_end(marks.regions, first, INFINITE)
            yield first, last
            first = last

    def objects(self) -> Iterator[ObjectId]:
        """Ids of all objects with marks."""
        for object_id in list(self._objects):
            if object_id in self._objects:
                yield object_id

    def objects_with_data(self) -> Iterator[ObjectId]:
        """Ids of objects with data marks."""
        for object_id in list(self._objects):
            marks = self._objects.get(object_id)
            if marks is not None and marks.data:
                yield object_id

    def objects_with_attrs(self) -> Iterator[ObjectId]:
        """Ids of objects whose attributes are to be sent."""
        for object_id in list(self._objects):
            if not self.attrs_are_clean(object_id):
                yield object_id

    def has_unknown_trees(self) -> bool:
        """Whether there is a directory all below which is dirty without marks of its own."""
        return any(self._objects[one].deep for one in self._directories)

    def directories_unknown(self) -> Iterator[ObjectId]:
        """Ids of directories in which every name is dirty."""
        for directory in list(self._directories):
            if self._name_value(directory, ALL_NAMES):
                yield directory

    def names_pending(self) -> Iterator[tuple[ObjectId, bytes]]:
        """(directory, name) of every dirty name, directory by directory."""
        for directory in list(self._directories):
            marks = self._objects.get(directory)
            if marks is not None and marks.names is not None:
                for name in list(marks.names):
                    if name and self._name_value(directory, name):
                        yield directory, name

    def ungathered(self) -> Iterator[tuple[ObjectId, bytes]]:
        """Those of `names_pending` that are not gathered."""
        for directory, name in self.names_pending():
            if not self.is_gathered(directory, name):
                yield directory, name

    def removals(self) -> Iterator[tuple[ObjectId, bytes]]:
        """Those of `names_pending` that are to be removed by a change of policy."""
        for directory, name in self.names_pending():
            if self.is_removal(directory, name):
                yield directory, name


def weight(marks: ObjectMarks) -> int:
    """Regions that the tail is worth: at least one, for an object whose size was not told."""
    return max(1, marks.extent - marks.tail) if marks.tail >= 0 else 0


def _cut(start: int, stop: int, regions: Regions, tail: int) -> list[tuple[int, int, bool]]:
    """Bytes [start, stop) in (start, stop, is in no region of the set and before the tail)."""
    parts: list[tuple[int, int, bool]] = []
    for region in range(start >> REGION_SHIFT, ((stop - 1) >> REGION_SHIFT) + 1):
        outside = not (0 <= tail <= region or sets.overlaps(regions, region, region + 1))
        end = min(stop, (region + 1) << REGION_SHIFT)
        if parts and parts[-1][2] == outside:
            parts[-1] = (parts[-1][0], end, outside)
        else:
            parts.append((max(start, region << REGION_SHIFT), end, outside))
    return parts
