"""What differs between this store and another one that was changed apart from it, path by path.

Both know what they changed since they were last equal: it is in the log that each kept for the
other. Only that is looked at, and what is below a directory that is another one there, or is there
alone: its contents came with it, and are in no log.

What has policy `none` on one side is not in the volume there.
"""

from __future__ import annotations

import enum
import heapq
import os
import stat as _stat
from collections.abc import Iterator
from typing import Final, NamedTuple

import trio

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.marks import ObjectMarks
from replfs.core.policy import Policy
from replfs.core.regions import REGION_SIZE
from replfs.errors import PeerLost
from replfs.node.asking import attributes, suspects
from replfs.node.asking.inspector import Inspector
from replfs.node.asking.question import list_all
from replfs.node.replication.policies import Policies
from replfs.store import locators
from replfs.store.contents import digest_regions
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

_REGIONS_AT_ONCE: Final = 256


class Reach(enum.IntEnum):
    """How much of what is at a path may differ."""

    ITSELF = 0
    NAMES = 1
    """And what has a name in it."""
    EVERYTHING = 2
    """And all that is below."""


class Difference(NamedTuple):
    """What differs at a path."""

    what: str
    """In words."""
    is_version: bool
    """The other side has a version of its own there, which this store has not."""


class Comparison:
    """Compares, asking the other side by *inspector*."""

    def __init__(self, tree: Tree, policies: Policies, inspector: Inspector, name: str) -> None:
        self._tree = tree
        self._policies = policies
        self._inspector = inspector
        self._name = name

    async def differences(self, mine: DirtyLog) -> dict[bytes, Difference]:
        """By path, parents first; *mine*: what this store changed.

        Everything is compared where either side does not know any more what it changed.

        Raises:
            PeerLost: the other was lost.
            OSError: something cannot be read, here or there.
        """
        reaches: dict[bytes, Reach] = {}
        """Of what either side may have changed."""
        changed: dict[bytes, Reach] = {}
        """Of what the other one may have."""
        theirs = await suspects.ask(self._inspector.ask, everywhere=False)
        for path, reach in self._suspect_there(theirs):
            _extend(reaches, path, reach)
            _extend(changed, path, reach)
        if theirs is not None:
            for path, reach in self._suspect_here(mine):
                _extend(reaches, path, reach)
        found = {}
        pending = list(reaches)
        heapq.heapify(pending)
        while pending:
            path = heapq.heappop(pending)
            there = await self._there(path)
            # Only now: applications go on, and it may go while the other side is asked.
            hidden = self._at(path)
            inode = hidden if hidden is not None and self._is_in_volume(path, hidden) else None
            what = await self._compare(inode, there)
            if what and path:
                is_version = inode is not None or hidden is None
                if not is_version and there is not None:
                    # Only here it is not in the volume: it has changed there, and is not equal.
                    is_version = path in changed and not await self._is_same_file(hidden, there)
                found[path] = Difference(what, is_version)
            is_other = inode is None or there is None or inode.id != there.object
            reach, theirs_too = reaches[path], changed.get(path)
            for name in await self._names(path, there, Reach.EVERYTHING if is_other else reach):
                below = path + b"/" + name if path else name
                if below not in reaches:
                    heapq.heappush(pending, below)
                _extend(reaches, below, _inherited(reach))
                if theirs_too is not None and theirs_too is not Reach.ITSELF:
                    _extend(changed, below, _inherited(theirs_too))
        return found

    def _at(self, path: bytes) -> Inode | None:
        inode = self._tree.at(path)
        if inode is not None:
            self._tree.read_record(inode)
        return inode

    def _is_in_volume(self, path: bytes, inode: Inode) -> bool:
        """Whether what is here at a path is replicated."""
        if not path:
            return self._policies.effective(inode) != Policy.NONE
        above, _, name = path.rpartition(b"/")
        parent = self._tree.at(above)
        return parent is not None and self._policies.is_replicated_name(parent, name, inode)

    async def _there(self, path: bytes) -> ops.Inspected | None:
        """What is there at a path, if it is in the volume."""
        there = await self._inspector.at(path)
        if there is None or there.attributes is None or not path:
            return there
        *above, name = path.split(b"/")
        is_directory = _stat.S_ISDIR(there.attributes.mode)
        if self._is_none(name, there.attributes.policy, directory=is_directory):
            return None
        if any(self._is_none(one, Policy.INHERIT, directory=True) for one in above):
            return None
        return there

    def _is_none(self, name: bytes, policy: int, *, directory: bool) -> bool:
        return self._policies.is_none_by_itself(name, policy, directory=directory)

    def _suspect_there(self, theirs: suspects.Suspicion | None) -> Iterator[tuple[bytes, Reach]]:
        if theirs is None:
            yield b"", Reach.EVERYTHING
            return
        for object_id in theirs.marks.objects():
            marks = theirs.marks.marks(object_id)
            path = _path_there(theirs, object_id)
            if path is not None and marks is not None:
                yield from _marked(path, marks)

    def _suspect_here(self, mine: DirtyLog) -> Iterator[tuple[bytes, Reach]]:
        for object_id in mine.objects():
            marks = mine.marks(object_id)
            if marks is not None:
                inode = locators.find(self._tree, marks.handle, object_id)
                if inode is not None:
                    yield from _marked(inode.path(), marks)

    async def _names(self, path: bytes, there: ops.Inspected | None, reach: Reach) -> set[bytes]:
        """What is in a directory on either side, if it may differ.

        Of a directory that is here alone nothing more is to be told, but of the root, which is not
        told itself: it is here alone where all of that store is its own.
        """
        known_there = there.object if there is not None and _is_directory(there) else b""
        if reach is Reach.ITSELF or (path and not known_there):
            return set()
        names: set[bytes] = set()
        if known_there:
            listed = await list_all(self._inspector.ask, known_there)
            if not isinstance(listed, dict):
                raise PeerLost(f"a directory on {self._name} could not be listed")
            names.update(listed)
        inode = self._tree.at(path)  # only now, as above
        if inode is not None and inode.is_directory:
            names.update(self._tree.names(inode))
        return names

    async def _compare(self, inode: Inode | None, there: ops.Inspected | None) -> str:
        theirs = there.attributes if there is not None else None
        if inode is None or there is None or theirs is None:
            if inode is not None:
                return "only here"
            return f"only on {self._name}" if theirs is not None else ""
        mine = attributes.inspect(self._tree, inode)
        words = [
            text for text in attributes.differences(mine, theirs) if not text.startswith("mtime:")
        ]
        is_file = _stat.S_ISREG(mine.mode) and _stat.S_ISREG(theirs.mode)
        if is_file and (mine.size != theirs.size or not await self._is_equal(inode, there.object)):
            words.insert(0, "contents differ")
        return ", ".join(words)

    async def _is_same_file(self, inode: Inode | None, there: ops.Inspected) -> bool:
        """Whether two files have the same contents."""
        theirs = there.attributes
        if inode is None or theirs is None or inode.type != _stat.S_IFREG:
            return False
        if not _stat.S_ISREG(theirs.mode) or self._tree.stat(inode).st_size != theirs.size:
            return False
        return await self._is_equal(inode, there.object)

    async def _is_equal(self, inode: Inode, object_id: bytes) -> bool:
        fd = self._tree.open(inode, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            step = _REGIONS_AT_ONCE * REGION_SIZE
            for start in range(0, size, step):
                count = min(_REGIONS_AT_ONCE, -(-(size - start) // REGION_SIZE))
                theirs = await self._inspector.digests(object_id, start, count, REGION_SIZE)
                mine = await trio.to_thread.run_sync(digest_regions, fd, start, count, REGION_SIZE)
                if mine != theirs:
                    return False
            return True
        finally:
            os.close(fd)


def _is_directory(there: ops.Inspected | None) -> bool:
    return (
        there is not None and there.attributes is not None and _stat.S_ISDIR(there.attributes.mode)
    )


def _extend(reaches: dict[bytes, Reach], path: bytes, reach: Reach) -> None:
    reaches[path] = max(reach, reaches.get(path, Reach.ITSELF))


def _inherited(reach: Reach) -> Reach:
    """By what has a name in a directory of that reach."""
    return reach if reach is Reach.EVERYTHING else Reach.ITSELF


def _marked(path: bytes, marks: ObjectMarks) -> Iterator[tuple[bytes, Reach]]:
    """What the marks of an object at a path say may differ."""
    if marks.deep:
        yield path, Reach.EVERYTHING
        return
    yield path, Reach.NAMES if marks.names_all else Reach.ITSELF
    for name in marks.names or ():
        if name:
            yield path + b"/" + name if path else name, Reach.ITSELF


def _path_there(suspicion: suspects.Suspicion, object_id: bytes) -> bytes | None:
    parts: list[bytes] = []
    at = object_id
    while at != ROOT_ID:
        place = suspicion.places.get(at)
        if place is None or len(parts) > ops.PATH_MAX:
            return None
        at, name = place
        parts.append(name)
    return b"/".join(reversed(parts))
