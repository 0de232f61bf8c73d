"""What one store may have and another lack: asked for in pages, answered from a set of marks.

The answering side has marks of objects it may have changed on its own, or that the asking side may
have lost. It tells them with the place of each object, parents first, so that the asking side can
find what it knows under the same id.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.marks import CHANGED, NO_TAIL, SaveName, SaveObject
from replfs.core.regions import REGION_SHIFT
from replfs.errors import PeerLost, ProtocolError
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

Ask = Callable[[ops.AnyOp], Awaitable[ops.AnyAnswer]]

_UNKNOWN = ops.Suspected(known=False, places=[], suspects=[], more=False)


class Pages:
    """Answers `Suspects`, one page after another."""

    def __init__(self, tree: Tree, source: Callable[[bool], DirtyLog | None]) -> None:
        """*source*: the marks, since all stores were stable together or not; None: unknown."""
        self.source = source
        self._tree = tree
        self._next = 0
        self._left: Iterator[tuple[Inode, ops.Suspect]] = iter(())
        self._kept: tuple[Inode, ops.Suspect] | None = None
        self._told: set[bytes] = set()

    def answer(self, op: ops.Suspects) -> ops.AnyAnswer:
        """The page that is asked for; EINVAL where it is not the next one."""
        if op.page == 0:
            marks = self.source(op.everywhere)
            if marks is None:
                return _UNKNOWN
            self._left = self._each(marks)
            self._kept = None
            self._told = {ROOT_ID}
        elif op.page != self._next:
            return ops.Done(errno.EINVAL)
        self._next = op.page + 1
        return self._page()

    def _page(self) -> ops.AnyAnswer:
        places: list[ops.Locate] = []
        found: list[ops.Suspect] = []
        names = runs = 0
        while True:
            item = self._kept or next(self._left, None)
            self._kept = None
            if item is None:
                return ops.Suspected(known=True, places=places, suspects=found, more=False)
            inode, suspect = item
            if not suspect.object:
                self._next = -1
                return _UNKNOWN
            names += len(suspect.names)
            runs += len(suspect.runs)
            if (
                len(found) == ops.NAMES_PER_MESSAGE
                or len(places) >= ops.NAMES_PER_MESSAGE
                or names > ops.NAMES_PER_MESSAGE
                or runs > ops.RUNS_PER_MESSAGE
            ):
                self._kept = item
                return ops.Suspected(known=True, places=places, suspects=found, more=True)
            places += self._places(inode)
            found.append(suspect)

    def _places(self, inode: Inode) -> list[ops.Locate]:
        """Where the object and those above it are, as far as that was not told."""
        chain = []
        while inode.parent is not None and inode.id not in self._told:
            self._told.add(inode.id)
            chain.append(ops.Locate(inode.id, self._tree.ensure_id(inode.parent), inode.name))
            inode = inode.parent
        return chain[::-1]

    def _each(self, marks: DirtyLog) -> Iterator[tuple[Inode, ops.Suspect]]:
        """All marks in pieces; one without an object, where an object cannot be found."""
        for object_id in marks.objects():
            own = marks.marks(object_id)
            if own is None:
                continue
            inode = locators.find(self._tree, own.handle, object_id)
            if inode is None:
                if not locators.is_gone(self._tree, own.handle):
                    yield self._tree.root, ops.Suspect(b"", 0, NO_TAIL, [], [])
                    return
                continue
            names = list(own.names or ())
            runs = list(marks.runs(object_id))
            # What only this side's log of a peer needs, and earlier releases do not know.
            flags = own.flags & ~CHANGED
            # In pieces, each of which says all there is to say but for runs and names.
            yield inode, ops.Suspect(object_id, flags, own.tail, [], [])
            for at in range(0, len(runs), ops.RUNS_PER_MESSAGE):
                part = runs[at : at + ops.RUNS_PER_MESSAGE]
                yield inode, ops.Suspect(object_id, flags, own.tail, part, [])
            for at in range(0, len(names), ops.NAMES_PER_MESSAGE):
                part_names = names[at : at + ops.NAMES_PER_MESSAGE]
                yield inode, ops.Suspect(object_id, flags, own.tail, [], part_names)


class Suspicion:
    """What another store said of itself: marks, and where the objects are there."""

    def __init__(self) -> None:
        self.marks = DirtyLog()
        self.places: dict[bytes, tuple[bytes, bytes]] = {}
        """Of each object and everything above it: its directory and its name there."""

    def add(self, page: ops.Suspected) -> None:
        """Take in one page. Raises ProtocolError."""
        for place in page.places:
            self.places[place.object] = place.parent, place.name
        for suspect in page.suspects:
            saved = SaveObject(suspect.object, suspect.flags, suspect.tail, 0, b"")
            try:
                self.marks.restore(saved)
            except ValueError as error:
                raise ProtocolError(f"suspects that cannot be: {error}") from None
            for first, last in suspect.runs:
                self.marks.mark_data(suspect.object, first << REGION_SHIFT, last << REGION_SHIFT)
            for name in suspect.names:
                self.marks.restore(SaveName(suspect.object, name, removal=False))


async def ask(question: Ask, *, everywhere: bool) -> Suspicion | None:
    """All that the other side may have on its own; None: anything.

    Raises:
        PeerLost: the session ended, or the other side could not answer.
    """
    found = Suspicion()
    page = 0
    while True:
        answer = await question(ops.Suspects(page, everywhere))
        if not isinstance(answer, ops.Suspected):
            raise PeerLost("the peer could not say what it has")
        if not answer.known:
            return None
        found.add(answer)
        if not answer.more:
            return found
        page += 1


def find(tree: Tree, places: dict[bytes, tuple[bytes, bytes]], object_id: bytes) -> Inode | None:
    """The object here: under its place there, or wherever it is known to be.

    Raises:
        ProtocolError: the places lead in a circle.
    """
    held = tree.table.by_id.get(object_id)
    if held is not None and held.named:
        return held
    chain: list[tuple[bytes, bytes]] = []
    at = object_id
    while at != ROOT_ID and at in places:
        above, name = places[at]
        chain.append((at, name))
        if len(chain) > ops.PATH_MAX:
            raise ProtocolError("suspects in a circle of directories")
        at = above
        known = tree.table.by_id.get(at)
        if known is not None and known.named:
            break
    inode = tree.table.by_id.get(at)
    for one, name in reversed(chain):
        if inode is None or not inode.is_directory:
            return None
        inode = tree.lookup_or_none(inode, name)
        if inode is None:
            return None
        tree.read_record(inode)
        if inode.id != one:
            tree.drop_unused(inode)
            return None
    return inode if inode is not None and inode.id == object_id else None


def mark(tree: Tree, log: DirtyLog, suspicion: Suspicion | None) -> bool:
    """Mark in *log*, a peer's, what that peer may have on its own; False: everything was marked.

    An object that cannot be found here was made there, or renamed out of a directory that is not
    there any more; then its name is suspect too, and what stands at it will be removed, or placed
    where it belongs, and the peer says then that it is not whole. Or it was removed here: that
    needs a look at everything.

    Raises:
        OSError: as `DirtyLog.mark_data`.
    """
    if suspicion is None:
        log.mark_unknown(ROOT_ID, directory=True, deep=True)
        return False
    found = DirtyLog()
    missing = _absorb(tree, suspicion, suspicion.marks.objects(), found)
    if missing:
        with _renamed(tree, log, suspicion):
            missing = _absorb(tree, suspicion, missing, found)
    for object_id in missing:
        above, name = suspicion.places.get(object_id, (ROOT_ID, b""))
        if suspicion.marks.name_is_clean(above, name):
            log.mark_unknown(ROOT_ID, directory=True, deep=True)
            return False
    log.absorb(found, compare=True)
    return True


def _absorb(
    tree: Tree, suspicion: Suspicion, objects: Iterable[bytes], found: DirtyLog
) -> list[bytes]:
    """Take the marks of objects that are here into *found*; those that cannot be found."""
    missing = []
    for object_id in objects:
        inode = find(tree, suspicion.places, object_id)
        if inode is None:
            missing.append(object_id)
            continue
        found.absorb_object(suspicion.marks, object_id, handle=locators.of(tree, inode))
        tree.drop_unused(inode)
    return missing


@contextmanager
def _renamed(tree: Tree, log: DirtyLog, suspicion: Suspicion) -> Iterator[None]:
    """What was renamed, here or there, is known inside, and can be found.

    Since the stores were equal, either an object keeps its name here, and then that is one which
    was taken from it there; or it was renamed here, and then its name is one that *log* has.
    """
    wanted = [*_names(suspicion.marks), *_names(log)]
    held: list[Inode] = []
    try:
        while wanted:
            later = []
            for directory_id, name in wanted:
                directory = _directory(tree, log, suspicion, directory_id)
                if directory is None:
                    later.append((directory_id, name))
                    continue
                for one in [name] if name else tree.names(directory):
                    inode = tree.lookup_or_none(directory, one)
                    if inode is not None:
                        tree.read_record(inode)
                        tree.hold(inode)
                        held.append(inode)
            if len(later) == len(wanted):
                break  # those directories are not here
            wanted = later
        yield
    finally:
        for inode in held:
            tree.release(inode)


def _names(marks: DirtyLog) -> Iterator[tuple[bytes, bytes]]:
    """(directory, name) of what is marked; an empty name stands for all."""
    yield from marks.names_pending()
    for directory in marks.directories_unknown():
        yield directory, b""


def _directory(
    tree: Tree, log: DirtyLog, suspicion: Suspicion, directory_id: bytes
) -> Inode | None:
    inode = find(tree, suspicion.places, directory_id)
    own = log.marks(directory_id)
    if inode is None and own is not None:
        inode = locators.find(tree, own.handle, directory_id)
    return inode if inode is not None and inode.is_directory else None
