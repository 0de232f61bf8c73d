"""What differs between this store and another one that was changed apart from it, path by path.

Both know what they changed since they were last equal: it is in the log that each kept for the
other. Only that is looked at, and what is below a directory that is another one there, or is there
alone: its contents came with it, and are in no log.
"""

from __future__ import annotations

import enum
import heapq
import os
import stat as _stat
from collections.abc import Iterator
from typing import Final

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


class Comparison:
    """Compares, asking the other side by *inspector*."""

    def __init__(self, tree: Tree, inspector: Inspector, name: str) -> None:
        self._tree = tree
        self._inspector = inspector
        self._name = name

    async def differences(self, mine: DirtyLog) -> dict[bytes, str]:
        """By path, parents first, in words; *mine*: what this store changed.

        Everything is compared where either side does not know any more what it changed.

        Raises:
            PeerLost: the other was lost.
            OSError: something cannot be read, here or there.
        """
        reaches: dict[bytes, Reach] = {}
        theirs = await suspects.ask(self._inspector.ask, everywhere=False)
        for path, reach in self._suspect(mine, theirs):
            reaches[path] = max(reach, reaches.get(path, Reach.ITSELF))
        found = {}
        pending = list(reaches)
        heapq.heapify(pending)
        while pending:
            path = heapq.heappop(pending)
            there = await self._inspector.at(path)
            # Only now: applications go on, and it may go while the other side is asked.
            inode = self._tree.at(path)
            if inode is not None:
                self._tree.read_record(inode)
            if _is_private(inode, there):
                continue
            what = await self._compare(inode, there)
            if what and path:
                found[path] = what
            reach = reaches[path]
            is_other = inode is None or there is None or inode.id != there.object
            for name in await self._names(inode, there, Reach.EVERYTHING if is_other else reach):
                below = path + b"/" + name if path else name
                if below not in reaches:
                    heapq.heappush(pending, below)
                inherited = reach if reach is Reach.EVERYTHING else Reach.ITSELF
                reaches[below] = max(inherited, reaches.get(below, Reach.ITSELF))
        return found

    def _suspect(
        self, mine: DirtyLog, theirs: suspects.Suspicion | None
    ) -> Iterator[tuple[bytes, Reach]]:
        if theirs is None:
            yield b"", Reach.EVERYTHING
            return
        for object_id in mine.objects():
            marks = mine.marks(object_id)
            if marks is not None:
                inode = locators.find(self._tree, marks.handle, object_id)
                if inode is not None:
                    yield from _marked(inode.path(), marks)
        for object_id in theirs.marks.objects():
            marks = theirs.marks.marks(object_id)
            path = _path_there(theirs, object_id)
            if path is not None and marks is not None:
                yield from _marked(path, marks)

    async def _names(
        self, inode: Inode | None, there: ops.Inspected | None, reach: Reach
    ) -> set[bytes]:
        """What is in a directory on either side, if it may differ.

        Of a directory that is here alone nothing more is to be told.
        """
        if reach is Reach.ITSELF or not _is_directory(there) or there is None or not there.object:
            return set()
        listed = await list_all(self._inspector.ask, there.object)
        if not isinstance(listed, dict):
            raise PeerLost(f"a directory on {self._name} could not be listed")
        names = set(listed)
        if inode is not None and inode.is_directory and not inode.gone:
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


def _is_private(inode: Inode | None, there: ops.Inspected | None) -> bool:
    """Whether it is one node's own affair: what has policy `none` is nobody else's."""
    theirs = there.attributes if there is not None else None
    return (inode is not None and inode.policy == Policy.NONE) or (
        theirs is not None and theirs.policy == Policy.NONE
    )


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
