"""Which object a primary means: by its id, where it was located in this session or placed by it."""

from __future__ import annotations

import errno
import os

from replfs.core import ops
from replfs.node.replica.beside import Beside
from replfs.node.replica.own import Own
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.record import INCOMPLETE
from replfs.store.syscalls import failure
from replfs.store.tree import Tree


class Objects:
    """The objects of one replica, as its primary names them."""

    def __init__(self, tree: Tree, own: Own) -> None:
        self.tree = tree
        self.beside: Beside | None = None
        """What this store may have on its own, and its primary not."""
        self._own = own

    def is_whole(self, inode: Inode) -> bool:
        """Whether its primary has to compare nothing of an object that it finds here."""
        if inode.flags & INCOMPLETE:
            return False
        return self.beside is None or not self.beside.is_suspect(inode)

    def directory(self, object_id: bytes, name: bytes) -> Inode:
        """A directory in which *name* may be changed. Raises OSError."""
        inode = self.known(object_id)
        if not inode.is_directory:
            raise failure(errno.ENOTDIR)
        self.tree.check_name(inode, name)
        return inode

    def known(self, object_id: bytes) -> Inode:
        """An object that has a name; OSError (ESTALE) where it was not located, or is gone."""
        inode = self.tree.table.by_id.get(object_id)
        if inode is None or not inode.named:
            raise failure(errno.ESTALE)
        return inode

    def seen(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result] | None:
        """What stands at a name, with its record read; None where nothing does."""
        try:
            inode, found = self.tree.lookup(parent, name)
        except FileNotFoundError:
            return None
        self.tree.read_record(inode)
        return inode, found

    def at(self, parent: Inode, name: bytes) -> Inode | None:
        """As `seen`, without its attributes."""
        seen = self.seen(parent, name)
        return None if seen is None else seen[0]

    def expect(self, parent: Inode, name: bytes, object_id: bytes) -> tuple[Inode, os.stat_result]:
        """The object at a name, which must be *object_id*: nothing else may be touched."""
        seen = self.seen(parent, name)
        if seen is None or not self.tree.is_object(seen[0], object_id):
            if seen is not None:
                self.tree.drop_unused(seen[0])
            raise failure(errno.ESTALE)
        return seen

    def locate(self, op: ops.Locate, pin: int) -> None:
        """Learn where an object is, if it is there; *pin* keeps it known.

        What stands where the primary has it is looked at though another one was taken for it: one
        that was moved aside, say, after it had been made anew there. One that is this node's own is
        no longer the object. Raises OSError.
        """
        inode = self.tree.table.by_id.get(op.object)
        parent = self.tree.table.by_id.get(op.parent)
        if inode is None or parent is None or not inode.has_name(parent, op.name):
            inode = self._stands_at(parent, op) or inode
        if inode is None or not inode.named:
            return
        if self._own.holds(inode, by_policy=True):
            self._own.part(inode)
        else:
            inode.pins |= pin

    def _stands_at(self, parent: Inode | None, op: ops.Locate) -> Inode | None:
        if parent is None or not parent.is_directory:
            return None
        try:
            return self.expect(parent, op.name, op.object)[0]
        except OSError:
            return None

    def forget(self, op: ops.Forget, pin: int) -> None:
        """The session needs objects no longer."""
        for object_id in op.objects:
            inode = self.tree.table.by_id.get(object_id)
            if inode is not None and inode.pins & pin:
                inode.pins &= ~pin
                self.tree.drop_unused(inode)

    def forget_all(self) -> None:
        """A new session: nothing is located yet."""
        for inode in list(self.tree.table.by_nodeid.values()):
            if inode.pins & 3:
                inode.pins &= ~3
                self.tree.drop_unused(inode)

    def pin(self, object_id: bytes, pin: int) -> None:
        """Keep an object known that the session has just placed."""
        made = self.tree.table.by_id.get(object_id)
        if made is not None:
            made.pins |= pin

    def still_stands(self, inode: Inode) -> bool:
        """Whether an object is where it is known to be: behind the node's back it may have gone."""
        for parent, name in inode.names():
            try:
                directory = self.tree.directory_fd(parent)
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                stands = found.st_ino == inode.ino
            except OSError:
                stands = False
            if not stands:
                inode.drop_name(parent, name)
        if not inode.named:
            inode.pins &= ~3
            inode.gone = True
            self.tree.drop_unused(inode)
        return inode.named

    def locator(self, object_id: bytes) -> bytes:
        """How an object is found again after a restart; empty where it is not known."""
        inode = self.tree.table.by_id.get(object_id)
        return b"" if inode is None else locators.of(self.tree, inode)
