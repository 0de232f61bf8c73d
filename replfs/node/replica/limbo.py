"""Limbo: where a resync keeps what stands in the wrong place until its place is known.

`STORE/.replfs/limbo/` holds objects moved aside, under their id in hex (a counter behind it where
that is taken). Whatever is still there once every name is in place was deleted on the primary, and
goes. What is this node's own (`own`) is never deleted, but kept beside in `STORE/.replfs/kept/`.

Others can look into it as into any directory, by an id that it has everywhere (`LIMBO_ID`): what a
resync had moved aside and not placed yet is the peer's all the same.

What is inside a directory in limbo is found by an index, which is built when it is first needed.
Building it and emptying limbo take as long as there is much in it: both give way to other tasks
all the time, and end early when the session they belong to is over.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from typing import Final

import trio

from replfs.node.replica.beside import Beside
from replfs.node.replica.own import Own, is_own, move
from replfs.store.inode import Inode, close_quietly
from replfs.store.reach import LIMBO
from replfs.store.record import LIMBO_ID
from replfs.store.tree import Tree

_YIELD_EVERY: Final = 50
"""Names looked at, or removed, between two chances for other tasks."""
_LARGE_FILE: Final = 16 << 20
"""Bytes: giving the blocks of a larger file back takes long, and is done in a thread."""


class Limbo:
    """The limbo directory of *tree*."""

    def __init__(self, tree: Tree, own: Own) -> None:
        self._tree = tree
        self._own = own
        self.beside: Beside | None = None
        """What this store had on its own is not removed, but kept."""
        self.spared: frozenset[bytes] = frozenset()
        """Objects that are not removed, but kept, where they would lose their last name."""
        self._directory = tree.reserved_directory(LIMBO)
        tree.table.identify(self._directory, LIMBO_ID)
        self._numbers = itertools.count(1)
        self._deep: dict[bytes, tuple[Inode, bytes]] = {}
        """Where objects in limbo are, by id, as far as it was looked into."""
        self._unindexed: list[Inode] = [self._directory]

    def forget(self) -> None:
        """What is known of limbo's contents may be wrong from here on."""
        self._deep = {}
        self._unindexed = [self._directory]

    def holds(self, inode: Inode) -> bool:
        """Whether the object itself was taken aside, not just a directory that it is in."""
        return inode.parent is self._directory

    def contains(self, inode: Inode) -> bool:
        """Whether the object was taken aside, or a directory that it is in."""
        one: Inode | None = inode
        while one is not None and one is not self._directory:
            one = one.parent
        return one is not None

    def take(self, parent: Inode, name: bytes, inode: Inode) -> None:
        """Move what is *name* in *parent* aside."""
        if self._own.stands_at(inode, name):
            self._own.keep(parent, name, inode)
            return
        if self.beside is not None:
            self.beside.taken(parent, name, inode)
        free = inode.id.hex().encode() or b"nameless"
        free = move(self._tree, parent, name, inode, self._directory, free, self._numbers)
        inode.pins |= 2
        if inode.id:
            self._deep[inode.id] = self._directory, free
        if inode.is_directory:
            self._unindexed.append(inode)

    def find(self, object_id: bytes) -> Inode | None:
        """The object, where it is somewhere in limbo; see `is_indexed`."""
        direct = self._look(self._directory, object_id.hex().encode())
        if direct is not None and direct.id == object_id:
            return direct
        place = self._deep.get(object_id)
        if place is None:
            return None
        inode = self._look(*place)
        return inode if inode is not None and inode.id == object_id else None

    def may_hold(self, object_id: bytes) -> bool:
        """Whether the object is, or may be, somewhere in limbo."""
        return bool(self._unindexed) or object_id in self._deep

    @property
    def is_indexed(self) -> bool:
        """Whether what `find` does not find is not there; if not, `index` sees to it."""
        return not self._unindexed

    def _look(self, parent: Inode, name: bytes) -> Inode | None:
        try:
            inode = self._tree.lookup(parent, name)[0]
            self._tree.read_record(inode)
        except OSError:
            return None
        return inode

    async def index(self, is_wanted: Callable[[], bool]) -> None:
        """Learn what is inside the directories in limbo, while *is_wanted*."""
        count = 0
        while self._unindexed:
            directory = self._unindexed.pop()
            try:
                names = self._tree.names(directory)
            except OSError:
                continue
            for name in names:
                count += 1
                if count % _YIELD_EVERY == 0:
                    await trio.lowlevel.checkpoint()
                    if not is_wanted():
                        return
                self._index_one(directory, name)

    def _index_one(self, directory: Inode, name: bytes) -> None:
        inode = self._look(directory, name)
        if inode is None or is_own(inode):
            return
        if inode.id:
            self._deep.setdefault(inode.id, (directory, name))
            if directory is not self._directory:
                directory.pins |= 2
        if inode.is_directory:
            inode.pins |= 2
            self._unindexed.append(inode)
        else:
            self._tree.drop_unused(inode)

    async def empty(self, is_wanted: Callable[[], bool]) -> bool:
        """Remove all that is left; the node's own is kept. False: stopped before the end.

        Raises:
            OSError: something cannot be removed.
        """
        tree = self._tree
        self.forget()
        count = 0
        stack: list[tuple[Inode, list[bytes]]] = [(self._directory, tree.names(self._directory))]
        tree.hold(self._directory)
        try:
            while stack:
                count += 1
                if count % _YIELD_EVERY == 0:
                    await trio.lowlevel.checkpoint()
                    if not is_wanted():
                        return False
                directory, names = stack[-1]
                if not names:
                    stack.pop()
                    if stack:
                        self._remove_directory(directory)
                    tree.release(directory)
                    continue
                name = names.pop()
                inode = self._look(directory, name)
                if inode is None:
                    continue
                inode.pins &= ~3
                # What was taken as the node's own is not here; inside a directory it may be.
                if self._own.stands_at(inode, name) or self._is_spared(inode):
                    self._own.keep(directory, name, inode)
                elif inode.is_directory:
                    stack.append((inode, tree.names(inode)))
                    tree.hold(inode)
                else:
                    await self._remove_file(directory, name, inode)
        finally:
            for directory, _ in stack:
                tree.release(directory)
        return True

    def _is_spared(self, inode: Inode) -> bool:
        if inode.id not in self.spared:
            return False
        return inode.is_directory or self._tree.stat(inode).st_nlink == 1

    def _remove_directory(self, inode: Inode) -> None:
        above = inode.parent
        if above is not None:
            self._tree.unlink(above, inode.name, inode, directory=True, links=2)

    async def _remove_file(self, directory: Inode, name: bytes, inode: Inode) -> None:
        tree = self._tree
        found = tree.stat(inode)
        beside = self.beside
        # Of a file with another name nothing goes; a name among what is kept would change with it.
        if found.st_nlink == 1 and beside is not None and beside.wants(directory, name, inode):
            beside.keep_removed(directory, name, inode, beside.path_of(inode))
        fd = -1
        if found.st_size > _LARGE_FILE and found.st_nlink == 1:
            fd = tree.open(inode, os.O_RDONLY)
        try:
            tree.unlink(directory, name, inode, directory=False, links=found.st_nlink)
        finally:
            if fd >= 0:
                # The blocks go with the last descriptor.
                await trio.to_thread.run_sync(close_quietly, fd)
