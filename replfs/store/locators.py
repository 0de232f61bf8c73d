"""Locators: what finds an object again in another process, under whatever name it has then.

A locator is the file system's own handle of the object and, of what is not a directory, that of
the directory it was in, a byte of length before each. The kernel opens a handle without a name. The
name is then what /proc/self/fd says of the descriptor, or, of a file, what its directory has for
the inode number. The id is compared at the end: a handle may have come to another object since.

Without root no handle can be opened. A locator is then a zero byte and the path: it finds nothing
after a directory above was renamed.

Relies on: a directory opened by its handle has its whole path, a file need not have one (Linux,
Documentation/filesystems/nfs/exporting.rst, "disconnected" dentries).
"""

from __future__ import annotations

import errno
import os
import stat as _stat

from replfs.store import syscalls
from replfs.store.inode import Inode, proc_path
from replfs.store.reach import is_aside
from replfs.store.record import PRIVILEGED, ROOT_ID
from replfs.store.tree import Tree


def of(tree: Tree, inode: Inode) -> bytes:
    """What finds the object after a restart.

    Empty where the file system has no handles, and of an object without a name.
    """
    try:
        if inode.parent is None:
            return b""
        if not PRIVILEGED:
            return b"\0" + inode.path()
        own = _handle(tree, inode)
        parent = b"" if inode.is_directory else _handle(tree, inode.parent)
    except OSError:
        return b""
    return bytes([len(own)]) + own + bytes([len(parent)]) + parent


def of_file(tree: Tree, parent: Inode, fd: int) -> bytes:
    """As `of`, of a file in *parent* that is open. Needs root."""
    try:
        own, above = syscalls.name_to_handle(fd), _handle(tree, parent)
    except OSError:
        return b""
    return bytes([len(own)]) + own + bytes([len(above)]) + above


def _handle(tree: Tree, inode: Inode) -> bytes:
    """The file system's own handle of an object with a name, or of the root; asked for once."""
    if not inode.handle:
        if inode.parent is None:
            inode.handle = syscalls.name_to_handle(tree.directory_fd(inode))
        else:
            above = tree.directory_fd(inode.parent)
            inode.handle = syscalls.name_to_handle(above, inode.name)
    return inode.handle


def find(tree: Tree, locator: bytes, object_id: bytes) -> Inode | None:
    """The object a locator stands for, under a name; None where it is not there any more.

    Nor is what stands in the reserved directory: a resync has moved it aside, and a store that was
    promoted before that one's end knows it there.
    """
    if object_id == ROOT_ID:
        return tree.root
    held = tree.table.by_id.get(object_id)
    if held is not None and held.named and not is_aside(held):
        return held
    if not locator:
        return None
    if not locator[0]:
        inode = tree.at(locator[1:])
        if inode is None:
            return None
        tree.read_record(inode)
        return inode if tree.is_object(inode, object_id) else None
    own = locator[1 : 1 + locator[0]]
    parent = locator[2 + locator[0] :]
    try:
        fd = syscalls.open_by_handle(tree.root_fd, own, os.O_PATH)
    except OSError:
        return None
    try:
        found = os.fstat(fd)
        if _stat.S_ISDIR(found.st_mode):
            inode = _find_directory(tree, fd)
        else:
            inode = _find_file(tree, fd, found.st_ino, parent)
    finally:
        os.close(fd)
    if inode is None:
        return None
    tree.read_record(inode)
    return inode if inode.id == object_id else None


def is_gone(tree: Tree, locator: bytes) -> bool:
    """Whether what a locator stood for certainly has no name any more."""
    if not locator or not locator[0]:
        return False
    try:
        fd = syscalls.open_by_handle(tree.root_fd, locator[1 : 1 + locator[0]], os.O_PATH)
    except OSError as error:
        return error.errno == errno.ESTALE
    try:
        return os.fstat(fd).st_nlink == 0
    finally:
        os.close(fd)


def inode_number(tree: Tree, locator: bytes) -> int:
    """Of what a locator stands for, wherever it is; 0 where it cannot be told."""
    if not locator:
        return 0
    try:
        fd = syscalls.open_by_handle(tree.root_fd, locator[1 : 1 + locator[0]], os.O_PATH)
    except OSError:
        return 0
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


def _find_directory(tree: Tree, fd: int) -> Inode | None:
    return _walk(tree, os.readlink(proc_path(fd)))


def _find_file(tree: Tree, fd: int, ino: int, parent: bytes) -> Inode | None:
    inode = _walk(tree, os.readlink(proc_path(fd)))
    if inode is not None and inode.ino == ino:
        return inode
    if not parent:
        return None
    try:
        above_fd = syscalls.open_by_handle(tree.root_fd, parent, os.O_PATH)
    except OSError:
        return None
    try:
        above = _find_directory(tree, above_fd)
    finally:
        os.close(above_fd)
    if above is None:
        return None
    with os.scandir(tree.directory_fd(above)) as entries:
        for entry in entries:
            if entry.inode() == ino:
                return tree.lookup_or_none(above, os.fsencode(entry.name))
    return None


def _walk(tree: Tree, path: bytes) -> Inode | None:
    """The inode at an absolute path beneath STORE as the kernel spells it."""
    top = os.readlink(proc_path(tree.root_fd))
    if path == top:
        return tree.root
    if top != b"/":
        top += b"/"
    if not path.startswith(top):
        return None
    return tree.at(path[len(top) :])
