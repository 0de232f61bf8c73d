"""The live stream: what applications do on the primary, done here in the same order, exactly."""

from __future__ import annotations

import errno
import os
import stat as _stat
from collections.abc import Callable
from typing import Any, Final

from replfs.core import ops
from replfs.core.unstable import Unstable
from replfs.node.replica.beside import Beside
from replfs.node.replica.objects import Objects
from replfs.store import syscalls
from replfs.store.contents import put, resize
from replfs.store.inode import Inode, close_quietly
from replfs.store.syscalls import failure
from replfs.store.tree import Tree

_OK: Final = ops.Done(0)
_PATH_FLAGS: Final = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
_STALE: Final = ops.Done(errno.ESTALE)


class Live:
    """Applies the operations of the live stream to *tree*."""

    def __init__(self, tree: Tree, objects: Objects, unstable: Unstable) -> None:
        self.beside: Beside | None = None
        """Where that is kept which this store may have on its own, and loses by an operation."""
        self._closing: list[int] = []
        """Descriptors of what has lost its last name."""
        self._tree = tree
        self._objects = objects
        self._unstable = unstable
        self.handlers: dict[type, Callable[[Any], ops.AnyAnswer]] = {
            ops.Truncate: self._truncate,
            ops.Make: self._make,
            ops.Link: self._link,
            ops.Unlink: self._unlink,
            ops.Rename: self._rename,
            ops.SetAttr: self._set_attr,
            ops.SetXattr: self._set_xattr,
            ops.RemoveXattr: self._remove_xattr,
            ops.SetPolicy: self._set_policy,
        }
        """What is done for each kind but a write; they raise OSError."""

    # Data --------------------------------------------------------------------------------------

    def write(self, op: ops.Write, payload: bytes | memoryview) -> ops.AnyAnswer:
        """Apply a write. Raises OSError."""
        inode = self._tree.table.by_id.get(op.object)
        if inode is None:
            return _STALE
        return put(self._tree.data_fd(inode), payload, op.offset, op.mtime)

    def _truncate(self, op: ops.Truncate) -> ops.AnyAnswer:
        inode = self._objects.known(op.object)
        return resize(self._tree.data_fd(inode), op.size, op.mtime)

    # Metadata ----------------------------------------------------------------------------------

    def _touch(self, directory: Inode, mtime: int) -> None:
        syscalls.utimens(self._tree.directory_fd(directory), None, mtime)

    def _make(self, op: ops.Make) -> ops.AnyAnswer:
        parent = self._objects.directory(op.parent, op.name)
        self._tree.set_umask(0)
        inode, mode, fd = self._tree.make_like(
            parent,
            op.name,
            op.mode,
            rdev=op.rdev,
            target=op.target,
            owner=(op.uid, op.gid),
            object_id=op.object,
        )
        if fd >= 0:
            self._tree.keep_data_fd(inode, fd)  # most new files are written at once
        changed = False
        if op.acl or op.default_acl or self._tree.inherits_acl(parent):
            # The parent's default ACL may not be the primary's yet.
            changed = self._tree.set_acls(inode, op.acl, op.default_acl, fd)
        if inode.type != _stat.S_IFLNK and (changed or mode != op.mode):
            self._tree.set_mode(inode, op.mode)
        if fd >= 0:
            syscalls.utimens(fd, op.mtime, op.mtime)
        else:
            self._tree.set_times(inode, op.mtime, op.mtime)
        self._touch(parent, op.parent_mtime)
        return _OK

    def _link(self, op: ops.Link) -> ops.AnyAnswer:
        inode = self._objects.known(op.object)
        parent = self._objects.directory(op.parent, op.name)
        self._note_moving(inode)
        self._tree.link(inode, parent, op.name)
        for other, name in inode.names():
            self._unstable.note_name(other.id, name, self._objects.locator)
        self._touch(parent, op.parent_mtime)
        return _OK

    def _unlink(self, op: ops.Unlink) -> ops.AnyAnswer:
        parent = self._objects.directory(op.parent, op.name)
        inode, found = self._objects.expect(parent, op.name, op.object)
        links = found.st_nlink
        if op.directory or links <= 1:
            inode.pins = 0
        self._keep_removed(parent, op.name, inode, links)
        self._keep_open(parent, op.name, inode, links)
        self._tree.unlink(parent, op.name, inode, directory=op.directory, links=links)
        if inode.gone:
            self._unstable.forget(op.object)
        self._touch(parent, op.parent_mtime)
        return _OK

    def _rename(self, op: ops.Rename) -> ops.AnyAnswer:
        parent = self._objects.directory(op.parent, op.name)
        new_parent = self._objects.directory(op.new_parent, op.new_name)
        inode, _ = self._objects.expect(parent, op.name, op.object)
        there = self._objects.seen(new_parent, op.new_name)
        replaced, links = (None, 0) if there is None else (there[0], there[1].st_nlink)
        if (replaced.id if replaced is not None else b"") != op.replaced:
            raise failure(errno.ESTALE)
        if replaced is not None and not op.exchange:
            self._keep_removed(new_parent, op.new_name, replaced, links)
            self._keep_open(new_parent, op.new_name, replaced, links)
        self._note_moving(inode, replaced if op.exchange else None)
        self._tree.rename(
            parent,
            op.name,
            new_parent,
            op.new_name,
            syscalls.RENAME_EXCHANGE if op.exchange else 0,
            inode=inode,
            replaced=replaced,
            replaced_links=links,
        )
        if replaced is not None and replaced.gone:
            replaced.pins = 0
            self._unstable.forget(replaced.id)
            self._tree.drop_unused(replaced)
        self._touch(parent, op.parent_mtime)
        if new_parent is not parent:
            self._touch(new_parent, op.new_parent_mtime)
        return _OK

    def _set_attr(self, op: ops.SetAttr) -> ops.AnyAnswer:
        inode = self._objects.known(op.object)
        if op.uid != ops.KEEP or op.gid != ops.KEEP:
            self._tree.set_owner(inode, op.uid, op.gid)
        if op.mode != ops.KEEP and inode.type != _stat.S_IFLNK:
            self._tree.set_mode(inode, op.mode)
        if op.atime is not None or op.mtime is not None:
            self._tree.set_times(inode, op.atime, op.mtime)
        return _OK

    def _set_xattr(self, op: ops.SetXattr) -> ops.AnyAnswer:
        self._tree.set_xattr(self._objects.known(op.object), op.name, op.value)
        return _OK

    def _remove_xattr(self, op: ops.RemoveXattr) -> ops.AnyAnswer:
        try:
            self._tree.remove_xattr(self._objects.known(op.object), op.name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        return _OK

    def _set_policy(self, op: ops.SetPolicy) -> ops.AnyAnswer:
        self._tree.set_policy(self._objects.known(op.object), op.policy, op.ack)
        return _OK

    def _keep_open(self, parent: Inode, name: bytes, inode: Inode, links: int) -> None:
        """A name of an object goes: if it is the last one, its blocks are freed by `catch_up`."""
        if links <= 1 and inode.type == _stat.S_IFREG:
            fd = self._tree.take_data_fd(inode)
            self._closing.append(
                fd
                if fd >= 0
                else os.open(name, _PATH_FLAGS, dir_fd=self._tree.directory_fd(parent))
            )

    def catch_up(self) -> None:
        """What was applied has been answered: do what nobody had to wait for."""
        if self._closing:
            closing, self._closing = self._closing, []
            for fd in closing:
                close_quietly(fd)

    def _note_moving(self, *inodes: Inode | None) -> None:
        """Objects are about to get another name through the live stream."""
        for inode in inodes:
            if self.beside is not None and inode is not None:
                self.beside.moving(inode)

    def _keep_removed(self, parent: Inode, name: bytes, inode: Inode, links: int) -> None:
        """An object is about to lose a name through the live stream."""
        beside = self.beside
        if beside is not None and links <= 1 and beside.holds_contents(inode):
            beside.keep_removed(parent, name, inode, inode.path())
