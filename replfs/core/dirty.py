"""The dirty region log of one peer: what that peer is known to be missing, or may be missing.

Keyed by object id, so that a rename moves no marks. An object's marks are its attributes, regions
of its data (`REGION_SIZE` bytes each), and, of a directory, names in it. Held in memory, and kept
on disk through a journal: a mark is handed to the journal *before* it counts in memory, so a mark
that could not be saved never hides a later one; a clear is handed over afterwards and may be lost,
which only costs a transfer.

Pure: no clock, no I/O. One caller at a time; iteration tolerates changes made between two steps.

Memory, measured: 0.6 bytes per sparse region of one large file; 255 bytes per dirty file of which
single regions are dirty, with its id and a locator of 26 bytes (a million such files with 100 GiB
of dirty regions: 243 MiB); 32 more with a tail; 90 to 150 per dirty name. Time: a mark that is
there already 0.4 us, a question 0.06 us for a clean object and 0.3 us for a region of a dirty one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Final

from replfs.core import regions as sets
from replfs.core.changed import Changed, is_changed
from replfs.core.marked import INFINITE, NAME_GATHERED, NAME_REMOVAL, Marked, weight
from replfs.core.marks import (
    ALL_NAMES,
    ATTRS,
    CHANGED,
    CHANGED_SOMEWHERE,
    CHANGED_TAIL_SHIFT,
    COMPARE,
    DEEP,
    NO_TAIL,
    Change,
    Clears,
    DropAll,
    DropName,
    DropObject,
    Journal,
    NotKept,
    ObjectMarks,
    SaveName,
    SaveObject,
    SaveRegions,
    WideMarks,
)
from replfs.core.ops import ObjectId
from replfs.core.recent import Recent
from replfs.core.regions import CHUNK_SHIFT, REGION_LIMIT, REGION_SHIFT, REGION_SIZE

_NAME_SHIFT: Final = 2


class DirtyLog(Marked):
    """What one peer is missing.

    All `first` and `last` are region numbers, half-open; `start` and `stop` are bytes, half-open.

    Versions: `mark_version` gives a token; a clear that is given this token refuses, returning
    False, if what it would clear was marked again since the token was taken. A transfer takes its
    token before it reads.
    """

    def __init__(self, journal: Journal | None = None) -> None:
        super().__init__()
        self._journal: Journal = journal if journal is not None else NotKept()
        self._recent = Recent()
        self._clears: Clears | None = None
        self._gathered_from = self._gathered_to = 0
        self._version = 0
        self._next_version()

    # Versions ----------------------------------------------------------------------------------

    def mark_version(self, object_id: ObjectId) -> int:
        """A token: whatever is marked on the object from here on counts as marked since.

        Two tokens are never equal; compare with `marked_since`, not with each other.
        """
        self._next_version()
        self._recent.begin(object_id, self._version)
        return self._version

    def marked_since(
        self, object_id: ObjectId, version: int, first: int = 0, last: int | None = None
    ) -> bool:
        """Whether data in the regions was, or may have been, marked since the token was taken."""
        marks = self._objects.get(object_id)
        if marks is None or marks.version < version:
            return False
        return self._recent.may_hold(object_id, version, first, last)

    def _next_version(self) -> None:
        self._version += 1
        # Made here once, so that a million names marked at one version share one int.
        plain = self._version << _NAME_SHIFT
        self._name_values = {0: plain, NAME_REMOVAL: plain | NAME_REMOVAL}

    # Marks -------------------------------------------------------------------------------------

    def mark_data(
        self,
        object_id: ObjectId,
        start: int,
        stop: int | None,
        *,
        handle: bytes = b"",
        compare: bool = False,
    ) -> None:
        """The bytes, and with them the attributes (a write changes mtime and maybe the size).

        *compare* adds that they may be equal all the same. *stop* None is `mark_tail`.

        Raises:
            OSError: the mark cannot be saved (ENOSPC); nothing is marked.
        """
        if stop is None:
            self.mark_tail(object_id, start, handle=handle, compare=compare)
            return
        flags = ATTRS | COMPARE if compare else ATTRS
        first = start >> REGION_SHIFT
        last = ((stop - 1) >> REGION_SHIFT) + 1 if stop > start else first
        if last > REGION_LIMIT:
            self.mark_tail(object_id, start, handle=handle, compare=compare)
            return
        marks = self._objects.get(object_id)
        if (
            marks is not None
            and marks.flags & flags == flags
            and (compare or not marks.flags & COMPARE or is_changed(marks, first, last))
            and (not handle or handle == marks.handle)
            and (0 <= marks.tail <= first or sets.contains(marks.regions, first, last))
            and not self._journal.behind
        ):
            # Marked already, which is what most writes to a file out of sync find.
            marks.version = self._version
            if self._recent:
                self._recent.note(object_id, self._version, first, last)
            return
        self._mark(object_id, flags, NO_TAIL, 0, handle, first, last)

    def mark_tail(
        self,
        object_id: ObjectId,
        start: int,
        *,
        size: int | None = None,
        handle: bytes = b"",
        compare: bool = False,
    ) -> None:
        """Everything from byte *start* to the end of the file, the size included.

        *size* in bytes is a hint for `dirty_bytes`.

        Raises:
            OSError: as `mark_data`.
        """
        flags = ATTRS | COMPARE if compare else ATTRS
        extent = 0 if size is None else (size + REGION_SIZE - 1) >> REGION_SHIFT
        self._mark(object_id, flags, min(start >> REGION_SHIFT, REGION_LIMIT), extent, handle, 0, 0)

    def mark_attrs(self, object_id: ObjectId, *, handle: bytes = b"") -> None:
        """Attributes and extended attributes; raises as `mark_data`."""
        marks = self._objects.get(object_id)
        if (
            marks is not None
            and marks.flags & ATTRS
            and marks.changed
            and (not handle or handle == marks.handle)
            and not self._journal.behind
        ):
            marks.version = self._version  # marked already, as after the first of several changes
            return
        self._mark(object_id, ATTRS, NO_TAIL, 0, handle, 0, 0)

    def mark_name(
        self, directory: ObjectId, name: bytes, *, removal: bool = False, handle: bytes = b""
    ) -> None:
        """What stands at *name*, and the directory's attributes. It counts as not gathered.

        *handle* is the directory's. Raises as `mark_data`.
        """
        self._mark_name(directory, name, ATTRS, NAME_REMOVAL if removal else 0, handle)

    def mark_names_all(
        self, directory: ObjectId, *, deep: bool = False, handle: bytes = b""
    ) -> None:
        """Every name in the directory, and its attributes; *deep*: and all that is below.

        Names are still to be marked one by one as they change: only then does the clearing of
        this mark leave them. Raises as `mark_data`.
        """
        self._mark_name(directory, ALL_NAMES, ATTRS | DEEP if deep else ATTRS, 0, handle)

    def mark_unknown(
        self,
        object_id: ObjectId,
        *,
        directory: bool,
        deep: bool = False,
        size: int | None = None,
        handle: bytes = b"",
    ) -> None:
        """Everything about the object may differ, and may be equal; raises as `mark_data`."""
        if directory:
            self.mark_names_all(object_id, deep=deep, handle=handle)
        else:
            self.mark_tail(object_id, 0, size=size, handle=handle, compare=True)

    def absorb(self, other: DirtyLog, *, compare: bool = False) -> None:
        """Mark all that is marked in *other*; with *compare*, as what may be equal all the same.

        Raises:
            OSError: as `mark_data`; part of *other* is marked then.
        """
        for object_id in other.objects():
            self.absorb_object(other, object_id, compare=compare)

    def absorb_object(
        self, other: DirtyLog, object_id: ObjectId, *, handle: bytes = b"", compare: bool = False
    ) -> None:
        """As `absorb`, one object's marks; *handle* is what finds it here, if not as there."""
        marks = other.marks(object_id)
        if marks is None:
            return
        handle = handle or marks.handle
        # Whoever marked it in *other* says, with *compare*, nothing of what was changed here.
        flags = marks.flags & ~CHANGED
        if compare:
            found = self._objects.get(object_id)
            if marks.data or (found is not None and found.compare):
                flags |= COMPARE
        for first, last in other.runs(object_id):
            self._mark(object_id, flags, NO_TAIL, 0, handle, first, last)
        self._mark(object_id, flags, marks.tail, marks.extent, handle, 0, 0)
        if marks.flags & CHANGED and not compare:
            flags = marks.flags & ATTRS
            for first, last in sets.runs(marks.changed_regions):
                self._mark(object_id, flags, NO_TAIL, 0, handle, first, last)
            self._mark(object_id, flags, marks.changed_tail, 0, handle, 0, 0)
        for name, value in list((marks.names or {}).items()):
            self._mark_name(object_id, name, 0, value & NAME_REMOVAL, b"")

    # Clears ------------------------------------------------------------------------------------

    def clear_regions(
        self, object_id: ObjectId, first: int, last: int | None, *, version: int | None = None
    ) -> bool:
        """The peer has these regions; *last* None: to the end, the tail mark excepted."""
        marks = self._objects.get(object_id)
        if marks is None:
            return True
        if version is not None and self.marked_since(object_id, version, first, last):
            return False
        stop = INFINITE if last is None else last
        if self._clears is not None and sets.overlaps(marks.regions, first, stop):
            end = None if last is None else last << REGION_SHIFT
            self._clears.data(object_id, first << REGION_SHIFT, end)
        self._drop_regions(object_id, marks, first, stop)
        # Regions that only the tail has stay.
        self._drop_changed(object_id, marks, first, stop if marks.tail < 0 else marks.tail)
        self._settle(object_id, marks, save=False)
        return True

    def clear_tail(
        self, object_id: ObjectId, up_to: int | None, *, version: int | None = None
    ) -> bool:
        """The peer has everything up to region *up_to*, from where the tail now begins.

        None: it has everything, and the size is right.
        """
        marks = self._objects.get(object_id)
        if not isinstance(marks, WideMarks) or marks.tail < 0:
            return True
        if up_to is not None and up_to <= marks.tail:
            return True
        if version is not None and self.marked_since(object_id, version, marks.tail, up_to):
            return False
        if self._clears is not None:
            end = None if up_to is None else up_to << REGION_SHIFT
            self._clears.data(object_id, marks.tail << REGION_SHIFT, end)
        self._tails -= weight(marks)
        had_data = marks.data
        self._drop_changed(object_id, marks, marks.tail, INFINITE if up_to is None else up_to)
        marks.tail = NO_TAIL if up_to is None else min(up_to, REGION_LIMIT)
        if marks.changed_tail >= 0:
            marks.changed_tail = max(marks.changed_tail, marks.tail) if marks.tail >= 0 else NO_TAIL
        self._tails += weight(marks)
        self.dirty_files += marks.data - had_data
        self._settle(object_id, marks, save=True)
        return True

    def clear_attrs(self, object_id: ObjectId, *, version: int | None = None) -> bool:
        """The peer has the attributes, the extended attributes and the size."""
        marks = self._objects.get(object_id)
        if marks is None or not marks.flags & ATTRS:
            return True
        if version is not None and marks.version >= version:
            return False
        if self._clears is not None:
            self._clears.attrs(object_id)
        marks.flags &= ~ATTRS
        self._settle(object_id, marks, save=True)
        return True

    def set_gathered(self, directory: ObjectId, name: bytes, *, version: int | None = None) -> bool:
        """What stood wrongly at *name* on the peer is out of the way. Lost with the process.

        False if the name is not dirty, or was marked again since the token was taken.
        """
        value = self._name_value(directory, name)
        if not value or (version is not None and value >> _NAME_SHIFT >= version):
            return False
        names = self._objects[directory].names
        if names is not None:
            # One int for all names marked at the same version, not one each.
            if self._gathered_from != value:
                self._gathered_from, self._gathered_to = value, value | NAME_GATHERED
            names[name] = self._gathered_to
        return True

    def clear_name(self, directory: ObjectId, name: bytes, *, version: int | None = None) -> bool:
        """The peer has at *name* what is here."""
        value = self._name_value(directory, name)
        if not value:
            return True
        if version is not None and value >> _NAME_SHIFT >= version:
            return False
        if self._clears is not None:
            self._clears.name(directory, name)
        marks = self._objects[directory]
        if isinstance(marks, WideMarks) and marks.names is not None:
            del marks.names[name]
            if not marks.names:
                marks.names = None
                del self._directories[directory]
        if name != ALL_NAMES:
            self.dirty_names -= 1
        self._journal((DropName(directory, name),), lazily=True)
        self._settle(directory, marks, save=False)
        return True

    def clear_names_all(self, directory: ObjectId, *, version: int | None = None) -> bool:
        """Every name was looked at; those found different are marked one by one by now."""
        return self.clear_name(directory, ALL_NAMES, version=version)

    def forget(self, object_id: ObjectId) -> None:
        """The object is gone: so are its marks."""
        marks = self._objects.pop(object_id, None)
        if marks is None:
            return
        self.is_empty = not self._objects
        self._regions -= sets.count(marks.regions, 0, REGION_LIMIT)
        self._tails -= weight(marks)
        self.dirty_files -= marks.data
        if marks.names is not None:
            self.dirty_names -= len(marks.names) - marks.names_all
            del self._directories[object_id]
        self._journal((DropObject(object_id),), lazily=True)

    def discard(self) -> None:
        """Drop every mark: an operator decided that the peer is right as it is."""
        self._objects.clear()
        self._directories.clear()
        self.is_empty = True
        self.dirty_files = self.dirty_names = self._regions = self._tails = 0
        self._journal((DropAll(),), lazily=True)

    # Saving and loading ------------------------------------------------------------------------

    def restore(self, change: SaveObject | SaveRegions | SaveName) -> None:
        """Take in a change saved by an earlier run; only before `attach`.

        Raises:
            ValueError: no log can have saved this.
        """
        if isinstance(change, SaveName):
            bits = NAME_REMOVAL if change.removal else 0
            self._mark_name(change.directory, change.name, 0, bits, b"")
            return
        marks = self._objects.get(change.object)
        if marks is None:
            marks = self._objects[change.object] = ObjectMarks()
            self.is_empty = False
        if isinstance(change, SaveObject):
            flags, tail = change.flags & ((1 << CHANGED_TAIL_SHIFT) - 1), change.tail
            changed_tail = (change.flags >> CHANGED_TAIL_SHIFT) - 1
            known = ATTRS | COMPARE | DEEP | CHANGED | CHANGED_SOMEWHERE
            if flags & ~known or not (
                NO_TAIL <= tail <= REGION_LIMIT and NO_TAIL <= changed_tail <= REGION_LIMIT
            ):
                raise ValueError("impossible marks of an object")
            if flags & CHANGED_SOMEWHERE:
                flags &= ~(CHANGED_SOMEWHERE | COMPARE)
            if tail >= 0 or flags & CHANGED:
                marks = self._objects[change.object] = wide = _wide(marks)
                wide.changed_tail = changed_tail
            self._apply(marks, flags, tail, change.extent, change.handle, 0, 0)
            return
        if change.chunk < 0:
            if isinstance(marks, WideMarks) and marks.flags & CHANGED:
                for first, last in sets.decode_chunk(change.regions, ~change.chunk):
                    marks.changed_regions = sets.add(marks.changed_regions, first, last)
            return
        for first, last in sets.decode_chunk(change.regions, change.chunk):
            # What a tail covers is not kept twice.
            end = min(last, marks.tail) if marks.tail >= 0 else last
            self._apply(marks, marks.flags, marks.tail, 0, marks.handle, first, end)

    def together(self) -> AbstractContextManager[None]:
        """Marks made in the block are saved at its end, which costs less; never over an await.

        Only for marks that say in detail what one that is saved, and stays meanwhile, says already.

        Raises:
            OSError: they cannot be saved, but count; all later marks fail until they are.
        """
        return self._journal.together()

    def saved(self) -> Iterator[SaveObject | SaveRegions | SaveName]:
        """All marks, as they would be saved anew. Nothing may be marked or cleared meanwhile."""
        for object_id, marks in self._objects.items():
            yield _saved(object_id, marks)
            for chunk in sets.chunks(marks.regions):
                yield SaveRegions(object_id, chunk, sets.encode_chunk(marks.regions, chunk, 0, 0))
            for chunk in sets.chunks(marks.changed_regions):
                regions = sets.encode_chunk(marks.changed_regions, chunk, 0, 0)
                yield SaveRegions(object_id, ~chunk, regions)
            for name, value in (marks.names or {}).items():
                yield SaveName(object_id, name, value & NAME_REMOVAL != 0)

    def watch(self, clears: Clears) -> None:
        """From here on *clears* is told of what is cleared."""
        self._clears = clears

    def attach(self, journal: Journal) -> None:
        """From here on every change goes to *journal*."""
        self._journal = journal

    # Inside ------------------------------------------------------------------------------------

    def _mark(
        self,
        object_id: ObjectId,
        flags: int,
        tail: int,
        extent: int,
        handle: bytes,
        first: int,
        last: int,
    ) -> None:
        """Add to the object's own marks: *tail*, or regions [first, last), or neither."""
        if self._recent:
            low, high = (first, last) if tail < 0 else (tail, INFINITE)
            self._recent.note(object_id, self._version, low, high)
        found = self._objects.get(object_id)
        old_flags = 0 if found is None else found.flags
        new_flags = old_flags | flags
        was_changed = found is not None and not found.compare and (found.attrs or found.data)
        if new_flags & COMPARE and (not flags & COMPARE or was_changed):
            # What is known to be changed here stays known among what may be equal.
            new_flags |= CHANGED
        if tail >= 0 or new_flags & CHANGED:
            marks: ObjectMarks = _wide(found)
        else:
            marks = ObjectMarks() if found is None else found
        changed: Changed | None = None
        if new_flags & CHANGED:
            changed = Changed(marks)
            if not flags & COMPARE:
                changed.add(tail, first, last)
        new_tail = tail if marks.tail < 0 or 0 <= tail < marks.tail else marks.tail
        new_handle = handle or marks.handle
        if 0 <= new_tail < last:
            last = new_tail
        adds = last > first and not sets.contains(marks.regions, first, last)
        changes: list[Change] = []
        if (
            found is None
            or new_flags != marks.flags
            or new_tail != marks.tail
            or new_handle != marks.handle
            or (changed is not None and changed.tail != marks.changed_tail)
        ):
            changed_tail = marks.changed_tail if changed is None else changed.tail
            saved = new_flags | (changed_tail + 1) << CHANGED_TAIL_SHIFT
            changes.append(
                SaveObject(object_id, saved, new_tail, extent or marks.extent, new_handle)
            )
        if adds:
            for chunk in sets.chunks_of(first, last):
                regions = sets.encode_chunk(marks.regions, chunk, first, last)
                changes.append(SaveRegions(object_id, chunk, regions))
        if changed is not None:
            changes += changed.saved(object_id)
        if changes or self._journal.behind:
            self._journal(changes)
        # Saved: from here on nothing fails.
        if found is not marks:
            self._objects[object_id] = marks
            self.is_empty = False
        if changed is not None:
            changed.apply(marks)
        self._apply(marks, new_flags, new_tail, extent, new_handle, first, last if adds else first)
        if tail >= 0:
            self._drop_regions(object_id, marks, new_tail, INFINITE)

    def _apply(
        self,
        marks: ObjectMarks,
        flags: int,
        tail: int,
        extent: int,
        handle: bytes,
        first: int,
        last: int,
    ) -> None:
        had_data = marks.data
        self._tails -= weight(marks)
        marks.flags = flags
        if isinstance(marks, WideMarks):
            marks.tail = tail
            marks.extent = extent or marks.extent
        marks.handle = handle
        marks.version = self._version
        self._tails += weight(marks)
        if last > first:
            self._regions += (last - first) - sets.count(marks.regions, first, last)
            marks.regions = sets.add(marks.regions, first, last)
        self.dirty_files += marks.data - had_data

    def _mark_name(
        self, directory: ObjectId, name: bytes, flags: int, bits: int, handle: bytes
    ) -> None:
        found = self._objects.get(directory)
        marks = _wide(found)
        new_flags = marks.flags | flags
        new_handle = handle or marks.handle
        old = marks.names.get(name, 0) if marks.names is not None else 0
        changes: list[Change] = []
        if found is None or new_flags != marks.flags or new_handle != marks.handle:
            changes.append(_saved(directory, marks, new_flags, new_handle))
        if not old or (old ^ bits) & NAME_REMOVAL:
            changes.append(SaveName(directory, name, bits != 0))
        if changes or self._journal.behind:
            self._journal(changes)
        if found is not marks:
            self._objects[directory] = marks
            self.is_empty = False
        marks.flags = new_flags
        marks.handle = new_handle
        marks.version = self._version
        if marks.names is None:
            marks.names = {}
            self._directories[directory] = None
        if not old and name:
            self.dirty_names += 1
        marks.names[name] = self._name_values[bits]

    def _drop_regions(self, object_id: ObjectId, marks: ObjectMarks, first: int, last: int) -> None:
        """Take regions [first, last) out and save that."""
        had_data = marks.data
        low = sets.first_from(marks.regions, first)
        while 0 <= low < last:
            chunk = low >> CHUNK_SHIFT
            high = min(last, (chunk + 1) << CHUNK_SHIFT)
            self._regions -= sets.count(marks.regions, low, high)
            marks.regions = sets.remove(marks.regions, low, high)
            regions = sets.encode_chunk(marks.regions, chunk, 0, 0)
            self._journal((SaveRegions(object_id, chunk, regions),), lazily=True)
            low = sets.first_from(marks.regions, high)
        self.dirty_files += marks.data - had_data

    def _drop_changed(self, object_id: ObjectId, marks: ObjectMarks, first: int, last: int) -> None:
        """Take regions [first, last) out of those that were changed here, and save that."""
        if not isinstance(marks, WideMarks):
            return
        low = sets.first_from(marks.changed_regions, first)
        while 0 <= low < last:
            chunk = low >> CHUNK_SHIFT
            high = min(last, (chunk + 1) << CHUNK_SHIFT)
            marks.changed_regions = sets.remove(marks.changed_regions, low, high)
            regions = sets.encode_chunk(marks.changed_regions, chunk, 0, 0)
            self._journal((SaveRegions(object_id, ~chunk, regions),), lazily=True)
            low = sets.first_from(marks.changed_regions, high)

    def _settle(self, object_id: ObjectId, marks: ObjectMarks, *, save: bool) -> None:
        """After a clear: drop what has no meaning any more, and the object with the last of it."""
        flags = marks.flags
        if not marks.data:
            flags &= ~(COMPARE | CHANGED)
        if not marks.names_all:
            flags &= ~DEEP
        if not flags and not marks.data and marks.names is None:
            del self._objects[object_id]
            self.is_empty = not self._objects
            self._journal((DropObject(object_id),), lazily=True)
        elif save or flags != marks.flags:
            marks.flags = flags
            self._journal((_saved(object_id, marks),), lazily=True)


def _saved(
    object_id: ObjectId, marks: ObjectMarks, flags: int | None = None, handle: bytes | None = None
) -> SaveObject:
    """The object's own marks, or with other *flags* and *handle*."""
    saved = marks.flags if flags is None else flags
    saved |= (marks.changed_tail + 1) << CHANGED_TAIL_SHIFT
    known = marks.handle if handle is None else handle
    return SaveObject(object_id, saved, marks.tail, marks.extent, known)


def _wide(found: ObjectMarks | None) -> WideMarks:
    """*found* if it can have a tail and names, else marks that say the same and can."""
    if isinstance(found, WideMarks):
        return found
    if found is None:
        return WideMarks()
    return WideMarks(found.flags, found.regions, found.handle, found.version)
