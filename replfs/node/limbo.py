"""Limbo: where a resync keeps what stands in the wrong place until its place is known.

`STORE/.replfs/limbo/` holds objects moved aside, under their id in hex (a counter behind it where
that is taken). Whatever is still there once every name is in place was deleted on the primary, and
goes. Objects of policy `none` belong to this node: they are never deleted, but kept beside in
`STORE/.replfs/kept/`.
"""

from __future__ import annotations

import itertools
import os

from replfs.core.policy import Policy
from replfs.store.inode import Inode
from replfs.store.tree import KEPT, LIMBO, Tree


class Limbo:
    """The limbo and kept directories of *tree*."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self._directory = tree.reserved_directory(LIMBO)
        self._kept = tree.reserved_directory(KEPT)
        self._count = itertools.count(1)
        self._deep: dict[bytes, tuple[Inode, bytes]] | None = None
        """Where objects inside directories in limbo are, by id; None: to be looked up anew."""

    def holds(self, inode: Inode) -> bool:
        """Whether the object's name is inside limbo, at any depth."""
        above = inode.parent
        while above is not None:
            if above is self._directory:
                return True
            above = above.parent
        return False

    def take(self, parent: Inode, name: bytes, inode: Inode) -> None:
        """Move what is *name* in *parent* aside."""
        into = self._kept if inode.policy == Policy.NONE else self._directory
        free = inode.id.hex().encode() or b"nameless"
        if into is self._kept:
            free = name
        self._move(parent, name, inode, into, free)
        if into is self._directory:
            inode.pins |= 2
        self._deep = None

    def _move(self, parent: Inode, name: bytes, inode: Inode, into: Inode, free: bytes) -> None:
        tree = self._tree
        while _exists(tree, into, free):
            free = b"%s.%d" % (free[:200].split(b".~", 1)[0] + b".~", next(self._count))
        tree.rename(parent, name, into, free, 0, inode=inode, replaced=None, replaced_links=0)

    def find(self, object_id: bytes) -> Inode | None:
        """The object, where it is somewhere in limbo."""
        tree = self._tree
        direct = self._look(self._directory, object_id.hex().encode())
        if direct is not None and direct.id == object_id:
            return direct
        if self._deep is None:
            self._deep = {}
            for name in tree.names(self._directory):
                inode = self._look(self._directory, name)
                if inode is not None and inode.is_directory:
                    self._index(inode)
        place = self._deep.get(object_id)
        if place is None:
            return None
        inode = self._look(*place)
        return inode if inode is not None and inode.id == object_id else None

    def _look(self, parent: Inode, name: bytes) -> Inode | None:
        try:
            inode = self._tree.lookup(parent, name)[0]
        except OSError:
            return None
        self._tree.read_record(inode)
        return inode

    def _index(self, top: Inode) -> None:
        deep = self._deep
        if deep is None:
            return
        waiting = [top]
        while waiting:
            directory = waiting.pop()
            for name in self._tree.names(directory):
                inode = self._look(directory, name)
                if inode is None:
                    continue
                if inode.id:
                    deep.setdefault(inode.id, (directory, name))
                    directory.pins |= 2
                if inode.is_directory:
                    waiting.append(inode)
                else:
                    self._tree.drop_unused(inode)

    def empty(self) -> None:
        """Remove all that is left; what has policy `none` is kept."""
        self._deep = None
        self._remove_below(self._directory)

    def _remove_below(self, directory: Inode) -> None:
        tree = self._tree
        for name in tree.names(directory):
            inode = self._look(directory, name)
            if inode is None:
                continue
            inode.pins &= ~3
            if inode.policy == Policy.NONE:
                self._move(directory, name, inode, self._kept, name)
                continue
            if inode.is_directory:
                self._remove_below(inode)
            tree.unlink(
                directory,
                name,
                inode,
                directory=inode.is_directory,
                links=tree.stat(inode).st_nlink,
            )


def _exists(tree: Tree, directory: Inode, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=tree.directory_fd(directory), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
