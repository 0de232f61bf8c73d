"""Names that nobody has looked up in this run, found by walking the store.

The store knows no way from an object to its names, and none is needed but in a resync: the peer may
have an object under a name that is not known here, and must not get it twice; and a changed object
may have lost the name that it was known by. A walk reads directories only (names, types and inode
numbers are in them), and does so twice, so that what it remembers is bounded by the objects that
have several names or are sought.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Final

import trio
from pyroaring import BitMap64

from replfs.store.inode import Inode
from replfs.store.reach import RESERVED
from replfs.store.tree import Tree

_YIELD_EVERY: Final = 256
_REST: Final = 10
"""After a walk there is none for so many times as long as it took."""


class Links:
    """What the last walk found."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._paths: dict[int, list[tuple[bytes, bytes]]] = {}
        """By inode number: (path of a directory, name in it)."""
        self._walked_for: set[int] = set()
        self._sought: set[int] = set()
        self._missing: set[int] = set()
        self.may_walk_at = 0.0
        """Monotonic seconds; infinite during a walk."""

    async def learn_names(self, inode: Inode) -> bool:
        """Look up every name of *inode*, which the caller holds. False: later, ask again.

        True also where a walk has not found them all: they are not where users can see them.
        """
        if self.are_known(inode) or self._look_up(inode) or inode.ino in self._walked_for:
            return True
        if time.monotonic() < self.may_walk_at:
            return False
        await self._walk_twice()
        self._walked_for.add(inode.ino)
        self._look_up(inode)
        return True

    def find(self, number: int) -> Inode | None:
        """What has this inode number and is no directory, where the last walk saw it."""
        for path, name in self._paths.get(number, ()):
            above = self._tree.at(path)
            if above is None:
                continue
            inode = self._tree.lookup_or_none(above, name)
            if inode is not None and inode.ino == number:
                return inode
            self._tree.drop_unused(inode or above)
        return None

    def seek(self, number: int) -> bool:
        """Have the next walk look for an inode number. False: one has, and has not seen it."""
        if number in self._missing:
            return False
        self._sought.add(number)
        return True

    async def walk_for_sought(self) -> None:
        """Walk, if something is sought and the last walk was long enough ago."""
        if self._sought and time.monotonic() >= self.may_walk_at:
            sought = set(self._sought)
            await self._walk_twice()
            self._missing |= sought - self._paths.keys()
            self._sought -= sought

    def forget(self) -> None:
        """What was found is not needed any more."""
        self._paths = {}
        self._walked_for = set()
        self._sought = set()
        self._missing = set()

    def are_known(self, inode: Inode) -> bool:
        """Whether every name of *inode* has been looked up."""
        return inode.is_directory or len(inode.names()) >= self._tree.stat(inode).st_nlink

    def _look_up(self, inode: Inode) -> bool:
        """Look where the last walk saw it; whether all its names are known now."""
        tree = self._tree
        for path, name in self._paths.get(inode.ino, ()):
            above = tree.at(path)
            if above is None:
                continue
            tree.drop_unused(tree.lookup_or_none(above, name) or above)
        return self.are_known(inode)

    async def _walk_twice(self) -> None:
        began = time.monotonic()
        # No other walk meanwhile.
        self.may_walk_at = float("inf")
        try:
            self._paths = await self._paths_of_many()
        finally:
            now = time.monotonic()
            self.may_walk_at = now + _REST * (now - began)

    async def _paths_of_many(self) -> dict[int, list[tuple[bytes, bytes]]]:
        seen, again = BitMap64(), BitMap64(self._sought)
        paths: dict[int, list[tuple[bytes, bytes]]] = {}

        def count(_path: bytes, _name: bytes, ino: int) -> None:
            (again if ino in seen else seen).add(ino)

        def remember(path: bytes, name: bytes, ino: int) -> None:
            if ino in again:
                paths.setdefault(ino, []).append((path, name))

        await self._walk(count)
        await self._walk(remember)
        return paths

    async def _walk(self, visit: Callable[[bytes, bytes, int], None]) -> None:
        """*visit* (path of its directory, name, inode number) of all that is not a directory."""
        tree = self._tree
        count = 0
        paths = [b""]
        while paths:
            path = paths.pop()
            directory = tree.at(path)
            if directory is None:
                continue
            try:
                entries = list(os.scandir(tree.directory_fd(directory)))
            except OSError:
                continue  # not a directory any more, or on another file system
            finally:
                tree.drop_unused(directory)
            for entry in entries:
                name = os.fsencode(entry.name)
                if not entry.is_dir(follow_symlinks=False):
                    visit(path, name, entry.inode())
                elif path or name != RESERVED:
                    paths.append(path + b"/" + name if path else name)
                count += 1
                if count % _YIELD_EVERY == 0:
                    await trio.lowlevel.checkpoint()
