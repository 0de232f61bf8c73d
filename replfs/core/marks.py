"""The marks of one object in a dirty region log, and the changes by which they are kept on disk.

A change is absolute, not relative: it says all there is to know about its key. So a later one for
the same key makes an earlier one unnecessary, and repeating one changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Final, Protocol

import msgspec

from replfs.core.ops import ObjectId
from replfs.core.regions import Regions

NO_TAIL: Final = -1
ALL_NAMES: Final = b""
"""In `ObjectMarks.names`: every name. No entry has an empty name."""

ATTRS: Final = 1
"""Attributes, extended attributes and the size are to be sent."""
COMPARE: Final = 2
"""What the data marks cover may be equal: compare digests before sending."""
DEEP: Final = 4
"""With all names: everything below them is unknown too."""
CHANGED_SOMEWHERE: Final = 8
"""With `COMPARE`, as earlier releases saved it: changed here, too, it is not known where."""
CHANGED: Final = 16
"""With `COMPARE`: the object was also changed here, without the peer, since it was marked."""
CHANGED_TAIL_SHIFT: Final = 8
"""Above its flags an object is saved with its `changed_tail`, plus one."""


class ObjectMarks(msgspec.Struct, gc=False):
    """The marks of one object. To be read by others, changed only by its log."""

    flags: int = 0
    regions: Regions = 0
    """Region numbers: bits of an int if all are in the first chunk, else a bitmap, never empty."""
    handle: bytes = b""
    """Where the store finds the object; means nothing here."""
    version: int = 0

    @property
    def tail(self) -> int:
        """Everything from this region to the end of the file is dirty, the size included."""
        return NO_TAIL

    @property
    def extent(self) -> int:
        """Regions the object had when last told: a hint, for `dirty_bytes`."""
        return 0

    @property
    def changed_regions(self) -> Regions:
        """With `compare` and `changed`: the regions that were changed here, of all that are dirty.

        Without `compare` that is all of them.
        """
        return 0

    @property
    def changed_tail(self) -> int:
        """As `changed_regions`: from this region on everything was, the size included."""
        return NO_TAIL

    @property
    def names(self) -> dict[bytes, int] | None:
        """Per dirty name a number for the log; see `DirtyLog.is_gathered` and `.is_removal`."""
        return None

    @property
    def attrs(self) -> bool:
        """Attributes are to be sent."""
        return self.flags & ATTRS != 0

    @property
    def compare(self) -> bool:
        """Data marks are to be compared before anything is sent."""
        return self.flags & COMPARE != 0

    @property
    def changed(self) -> bool:
        """Something marked was changed here, which is not just unknown."""
        return not self.flags & COMPARE or self.flags & CHANGED != 0

    @property
    def deep(self) -> bool:
        """What is below this directory is unknown too."""
        return self.flags & DEEP != 0

    @property
    def data(self) -> bool:
        """There are data marks."""
        return self.tail >= 0 or bool(self.regions)

    @property
    def names_all(self) -> bool:
        """Every name in this directory is dirty."""
        return self.names is not None and ALL_NAMES in self.names


class WideMarks(ObjectMarks, gc=False):
    """The marks of an object that has, or once had, a tail, dirty names, or both kinds of regions.

    Apart because a million files of which single regions are dirty have none of it.
    """

    tail: int = NO_TAIL
    extent: int = 0
    names: dict[bytes, int] | None = None
    changed_regions: Regions = 0
    changed_tail: int = NO_TAIL


# Journal ---------------------------------------------------------------------------------------


class SaveObject(msgspec.Struct, frozen=True, gc=False):
    """The object's own marks are exactly these. `tail` is `NO_TAIL` or a region.

    In `flags` is what `CHANGED_TAIL_SHIFT` says, too.
    """

    object: ObjectId
    flags: int
    tail: int
    extent: int
    handle: bytes


class SaveRegions(msgspec.Struct, frozen=True, gc=False):
    """Chunk *chunk* of the object's regions is exactly this (see `regions.encode_chunk`).

    Below zero it is chunk `~chunk` of those that were changed here.
    """

    object: ObjectId
    chunk: int
    regions: bytes


class SaveName(msgspec.Struct, frozen=True, gc=False):
    """*name* in *directory* is dirty; `ALL_NAMES`: every name in it."""

    directory: ObjectId
    name: bytes
    removal: bool


class DropName(msgspec.Struct, frozen=True, gc=False):
    """*name* in *directory* is clean."""

    directory: ObjectId
    name: bytes


class DropObject(msgspec.Struct, frozen=True, gc=False):
    """The object has no marks at all any more: its own, its regions', its names'."""

    object: ObjectId


class DropAll(msgspec.Struct, frozen=True, gc=False):
    """The log is empty."""


Change = SaveObject | SaveRegions | SaveName | DropName | DropObject | DropAll


class Journal(Protocol):
    """Where changes are kept."""

    behind: bool
    """Marks that count in memory are not saved yet; the next call must save them or fail."""

    def __call__(self, changes: Sequence[Change], *, lazily: bool = False) -> None:
        """Keep *changes*, all or none of them.

        With *lazily* they may be kept later or lost, and the call raises nothing. Otherwise they
        survive the death of this process from the moment the call returns.

        Raises:
            OSError: they cannot be kept (ENOSPC); nothing has been.
        """

    def together(self) -> AbstractContextManager[None]:
        """Changes made in the block are kept at its end; for no longer than until an await.

        Raises:
            OSError: they cannot be kept; see `behind`.
        """


class NotKept:
    """A journal that keeps nothing, for a log that lives in memory only."""

    behind = False

    def __call__(self, changes: Sequence[Change], *, lazily: bool = False) -> None:
        """Keep nothing."""

    def together(self) -> AbstractContextManager[None]:
        """Nothing is kept at the end of the block either."""
        return nullcontext()


class Clears(Protocol):
    """Told of what is cleared, which the journal keeps lazily."""

    def data(self, object_id: ObjectId, start: int, stop: int | None) -> None:
        """Bytes [start, stop) of an object; *stop* None: to the end."""

    def attrs(self, object_id: ObjectId) -> None:
        """The attributes of an object."""

    def name(self, directory: ObjectId, name: bytes) -> None:
        """A name in a directory, or `ALL_NAMES`."""
