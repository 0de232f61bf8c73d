"""What one side has applied since it, and who it applies it with, were last stable together.

An operation that was acknowledged is in two page caches, and maybe on no disk yet. When one side
loses power, the other knows from this set what the first may lack: it is that, and no more, that
has to be compared. A *common checkpoint* empties it: it begins in the order of the live stream
(`begin`), both sides flush, and when both have, what was noted before it began is dropped
(`settle`). A primary has one set per peer, of what it sent; a secondary has one, of what it
applied.

Where a volume has several peers, a secondary goes on remembering what is stable on the primary and
not on all the others (`settle` with *everywhere* false): should it be promoted, that is what they
may lack.

Pure: no clock, no I/O. The set is bounded; beyond `LIMIT` marks, or `FILES_MAX` files of a resync,
as before the first checkpoint, it is not known what is unstable, and everything has to be compared.
"""

from __future__ import annotations

from typing import Final

from replfs.core import ops, splitter
from replfs.core.dirty import DirtyLog

LIMIT: Final = 200_000
"""Objects and names: some 50 MB of memory."""
FILES_MAX: Final = 5_000
"""Files that a resync made in one go (`note_file`): to tell where one is found costs nearly as much
as to make it, and a first copy makes thousands a second."""

_BULK: Final = frozenset({
    ops.Place, ops.PlaceMany, ops.Clear, ops.Gather, ops.Data, ops.Finish,
})  # fmt: skip
"""What the resync does; all else is marked as the splitter would."""


class _Period:
    """What was noted between two points in the stream; `is_complete`: nothing is missing."""

    __slots__ = ("files", "is_complete", "log")

    def __init__(self, *, is_complete: bool) -> None:
        self.log = DirtyLog()
        self.is_complete = is_complete
        self.files = 0
        """How many were made in one go."""

    def overflow(self) -> None:
        self.log = DirtyLog()
        self.is_complete = False

    def add(self, other: _Period, limit: int) -> None:
        """Everything of *other*, too."""
        self.is_complete = self.is_complete and other.is_complete
        if not self.is_complete or _size(self.log) + _size(other.log) > limit:
            self.overflow()
        else:
            self.log.absorb(other.log)


class Unstable:
    """The set of one side, or of one pair of sides."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        # Nobody knows what an earlier process had applied.
        self._noted = _Period(is_complete=False)
        self._flushing: _Period | None = None
        self._apart = _Period(is_complete=False)
        self._owed: tuple[ops.AnyOp, splitter.Locator, int] | None = None
        """An operation that was applied and is not noted yet."""

    @property
    def is_empty(self) -> bool:
        """Everything is known to be stable: a checkpoint would bring nothing."""
        self.catch_up()
        if self._flushing is not None or not self._noted.is_complete:
            return False
        return self._noted.log.is_empty

    def lose_track(self) -> None:
        """It is not known what is unstable, until the next checkpoint begins."""
        self.catch_up()
        self._noted.overflow()

    @property
    def is_known(self) -> bool:
        """Whether it is known what is unstable; until the next checkpoint begins nothing counts."""
        return self._noted.is_complete

    def is_noted(self, object_id: ops.ObjectId) -> bool:
        """Whether what finds an object again is known since the last checkpoint began."""
        return self._noted.log.marks(object_id) is not None

    def note_file(
        self,
        directory: ops.ObjectId,
        above: bytes,
        name: bytes,
        object_id: ops.ObjectId,
        handle: bytes,
    ) -> None:
        """A file was made, with all there is to it; *handle* finds it again.

        *above* is the directory's, empty where that `is_noted`.
        """
        if not self._noted.is_complete:
            return
        noted = self._noted
        noted.files += 1
        noted.log.mark_name(directory, name, handle=above)
        noted.log.mark_tail(object_id, 0, handle=handle)
        if noted.files > FILES_MAX or _size(noted.log) > self._limit:
            noted.overflow()

    @property
    def objects(self) -> int | None:
        """How many objects are unstable, at most; None where it is not known. For any thread."""
        noted, flushing = self._noted, self._flushing
        if not noted.is_complete or (flushing is not None and not flushing.is_complete):
            return None
        return len(noted.log) + (len(flushing.log) if flushing is not None else 0)

    def note(
        self,
        op: ops.AnyOp,
        locate: splitter.Locator,
        *,
        length: int = 0,
        start: int | None = None,
    ) -> None:
        """*op* has been, or is about to be, applied; arguments as for `splitter.mark`.

        *locate* is asked the first time an object is noted after a checkpoint, and after a rename.
        """
        self.catch_up()
        if not self._noted.is_complete:
            return
        log = self._noted.log
        if type(op) is ops.Write:
            # Nearly all are writes, and most of them to what is noted already.
            first = op.offset if start is None or start > op.offset else start
            if log.marks(op.object) is not None:
                log.mark_data(op.object, first, op.offset + length)
                return
            log.mark_data(op.object, first, op.offset + length, handle=locate(op.object))
        else:
            self._note(log, op, locate, length, start)
        if _size(log) > self._limit:
            self._noted.overflow()

    def moved(self, object_id: ops.ObjectId, locate: splitter.Locator) -> None:
        """What is not a directory has another name, in another directory maybe.

        For who notes a rename before it is done.
        """
        self.catch_up()
        if self._noted.is_complete and self._noted.log.marks(object_id) is not None:
            self._noted.log.mark_attrs(object_id, handle=locate(object_id))

    def note_soon(self, op: ops.AnyOp, locate: splitter.Locator, *, length: int = 0) -> None:
        """As `note`, in the next `catch_up`: somebody is waiting for the answer to *op* now."""
        self.catch_up()
        if self._noted.is_complete:
            self._owed = op, locate, length

    def catch_up(self) -> None:
        """Note what `note_soon` was told: due before another operation is applied.

        What depends on it does so by itself.
        """
        owed = self._owed
        if owed is not None:
            op, locate, length = owed
            self._owed = None
            try:
                self.note(op, locate, length=length)
            except BaseException:
                self._owed = owed
                raise

    @staticmethod
    def _note(
        log: DirtyLog, op: ops.AnyOp, locate: splitter.Locator, length: int, start: int | None
    ) -> None:
        def find(object_id: ops.ObjectId) -> bytes:
            return b"" if log.marks(object_id) is not None else locate(object_id)

        if type(op) not in _BULK:
            splitter.mark(log, op, find, length=length, start=start)
            if isinstance(op, ops.Rename) and log.marks(op.object) is not None:
                log.mark_attrs(op.object, handle=locate(op.object))
            return
        match op:
            case ops.Place() | ops.Clear():
                splitter.mark_name(log, op.parent, op.name, find)
                if isinstance(op, ops.Place) and op.whole:
                    log.mark_tail(op.object, 0, handle=find(op.object))
            case ops.PlaceMany():
                for item in op.items:
                    splitter.mark_name(log, op.parent, item.name, find)
                    log.mark_tail(item.object, 0, handle=find(item.object))
            case ops.Gather():
                for name in op.names:
                    splitter.mark_name(log, op.parent, name, find)
            case ops.Data():
                stop = op.offset + (op.hole or length)
                log.mark_data(op.object, op.offset, stop, handle=find(op.object))
            case ops.Finish():
                log.mark_attrs(op.object, handle=find(op.object))
            case _:
                pass

    def note_name(self, directory: ops.ObjectId, name: bytes, locate: splitter.Locator) -> None:
        """What stands at a name may be new, as of an object that got one more."""
        self.catch_up()
        log = self._noted.log
        handle = b"" if log.marks(directory) is not None else locate(directory)
        log.mark_name(directory, name, handle=handle)

    def forget(self, object_id: ops.ObjectId) -> None:
        """The object's last name is gone, so nothing of it is wanted any more."""
        self.catch_up()
        self._noted.log.forget(object_id)
        self._apart.log.forget(object_id)
        if self._flushing is not None:
            self._flushing.log.forget(object_id)

    # Checkpoints -------------------------------------------------------------------------------

    def begin(self) -> None:
        """A checkpoint begins: what was noted so far is being flushed, what follows is not."""
        self.catch_up()
        if self._flushing is None:
            self._flushing = self._noted
        else:
            self._flushing.add(self._noted, self._limit)
        self._noted = _Period(is_complete=True)

    def settle(self, *, everywhere: bool) -> None:
        """What was noted before the last `begin` is stable on both sides of the checkpoint.

        *everywhere*: and on all other sides of the volume.
        """
        flushed, self._flushing = self._flushing, None
        if flushed is None:
            return  # it was settled before
        if everywhere:
            self._apart = _Period(is_complete=True)
        else:
            self._apart.add(flushed, self._limit)

    def restore(self, log: DirtyLog) -> None:
        """An earlier process had this set when it was stopped; nothing has been noted yet."""
        self._noted = _Period(is_complete=True)
        self._noted.log.absorb(log)
        self._apart = _Period(is_complete=True)

    def snapshot(self, *, everywhere: bool) -> DirtyLog | None:
        """All that is unstable, as marks of a log of its own; None: it is not known.

        *everywhere*: since all sides of the volume were stable together, not just the two of the
        last checkpoint.
        """
        self.catch_up()
        periods = [self._noted]
        if self._flushing is not None:
            periods.append(self._flushing)
        if everywhere:
            periods.append(self._apart)
        if not all(period.is_complete for period in periods):
            return None
        found = DirtyLog()
        for period in reversed(periods):  # the latest handle of an object counts
            found.absorb(period.log)
        return found


def _size(log: DirtyLog) -> int:
    return len(log) + log.dirty_names
