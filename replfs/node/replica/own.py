"""What on a replica is its node's own: of policy `none`, itself or by a directory above it.

It was made, or made `none`, while this node was the primary, and is no primary's to change: not
even where its object is one that the present primary has, as after a split brain. Then there are
two objects from here on, and this one gets another id.
"""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Callable, Iterator

from replfs.core.policy import NO_PATTERNS, NamePatterns, Policy
from replfs.store import syscalls
from replfs.store.inode import Inode
from replfs.store.reach import KEPT
from replfs.store.record import Record, can_carry
from replfs.store.tree import Tree

log = logging.getLogger(__name__)


def is_own(inode: Inode) -> bool:
    """Whether an object has the policy itself; its record was read.

    Not the root, which is one object on all stores; see `Own.claim_root`.
    """
    return inode.policy == Policy.NONE and inode.parent is not None


class Own:
    """What is the node's own in one store."""

    def __init__(
        self,
        tree: Tree,
        names: NamePatterns = NO_PATTERNS,
        told: Callable[[str], None] = lambda _: None,
    ) -> None:
        """*names*: what has policy `none` by its name, where it has none of its own.

        *told* hears the path, below STORE, of each that had to give up its place.
        """
        self._tree = tree
        self._names = names
        self._told = told
        self.kept = tree.reserved_directory(KEPT)
        """Where what has to give up its place goes."""
        self._numbers = itertools.count(1)

    def stands_at(self, inode: Inode, name: bytes) -> bool:
        """Whether an object under a name is the node's own, wherever that name is."""
        if inode.policy:
            return inode.policy == Policy.NONE
        return bool(self._names.match(name, directory=inode.is_directory))

    def holds(self, inode: Inode, *, by_policy: bool = False) -> bool:
        """Whether an object is the node's own, itself or by something above it.

        *by_policy*: not by names. What they are is configured, and may be otherwise on the primary.
        Raises OSError.
        """
        one = inode
        while one.parent is not None:
            if one is self.kept:
                return True
            self._tree.read_record(one)
            if is_own(one) or (not by_policy and self.stands_at(one, one.name)):
                return True
            one = one.parent
        return False

    def part(self, inode: Inode) -> None:
        """It is not what a primary means by its id: it gets another one. Raises OSError."""
        new = Record(self._tree.new_id(), inode.flags, inode.policy, inode.ack)
        self._tree.set_record(inode, new)

    def keep(self, parent: Inode, name: bytes, inode: Inode) -> None:
        """Move what is *name* in *parent* to the kept directory. Raises OSError."""
        if inode.id:
            self.part(inode)
        free = move(self._tree, parent, name, inode, self.kept, name, self._numbers)
        shown = free.decode(errors="backslashreplace")
        log.warning("kept beside, since the primary has its place: %s", shown)
        self._told(f".replfs/kept/{shown}")

    def claim_root(self) -> None:
        """Where the root has policy `none`: what is in it is the node's own for good.

        The root's policy will be as the primary says. What cannot carry one is kept beside.
        To be called before a primary is followed. Raises OSError.
        """
        tree = self._tree
        root = tree.root
        if root.policy != Policy.NONE:
            return
        for name in tree.names(root):
            inode = tree.lookup_or_none(root, name)
            if inode is None:
                continue
            tree.read_record(inode)
            if inode.foreign or inode.policy == Policy.NONE:
                pass
            elif can_carry(inode.type):
                tree.set_policy(inode, Policy.NONE, inode.ack)
            else:
                self.keep(root, name, inode)
            tree.drop_unused(inode)
        syscalls.syncfs(tree.root_fd)


def move(
    tree: Tree,
    parent: Inode,
    name: bytes,
    inode: Inode,
    into: Inode,
    free: bytes,
    numbers: Iterator[int],
) -> bytes:
    """Move what is *name* in *parent* to *free*, or, if that is taken, to the next of *numbers*.

    The name that it has then. Raises OSError.
    """
    wanted = free[:200]
    while _exists(tree, into, free):
        free = b"%s.~%d" % (wanted, next(numbers))
    tree.rename(parent, name, into, free, 0, inode=inode, replaced=None, replaced_links=0)
    return free


def _exists(tree: Tree, directory: Inode, name: bytes) -> bool:
    try:
        os.stat(name, dir_fd=tree.directory_fd(directory), follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True
