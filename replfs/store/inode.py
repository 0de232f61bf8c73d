"""The objects of the store that are known now: where they are, and who still needs them.

An inode is known while the kernel counts a lookup of it, a handle is open on it, or a peer's
primary has located it (`pins`). It is found by inode number, or by object id. It knows one name
for certain as long as the object has a name this process has seen; a directory always does.

Relies on: exclusive ownership of the store. Every change of a name goes through this process, so
the names held here are right.
"""

from __future__ import annotations

import os
import stat as _stat
from typing import Final

from replfs.store.record import ROOT_ID

ROOT_NODEID: Final = 1
_RENUMBERED: Final = 1 << 62


class Inode:
    """One known object."""

    __slots__ = (
        "ack",
        "children",
        "fd",
        "flags",
        "foreign",
        "gone",
        "handle",
        "id",
        "ino",
        "lookups",
        "more",
        "name",
        "nodeid",
        "opens",
        "parent",
        "pins",
        "policy",
        "privileges",
        "recorded",
        "resolved",
        "size",
        "type",
        "unconfirmed",
    )

    def __init__(self, ino: int, file_type: int) -> None:
        self.ino = ino
        self.nodeid = ino if ino != ROOT_NODEID else _RENUMBERED
        """The number the kernel knows it by."""
        self.type = file_type
        self.handle = b""
        """The file system's handle of it, whatever its name; empty while nobody has asked."""
        self.id = b""
        """Object id, or empty while the record has not been read."""
        self.recorded = False
        self.flags = 0
        self.policy = 0
        self.ack = 0
        self.resolved: tuple[int, int, int] | None = None
        """Cached (policy epoch, effective policy, acknowledgement level); kept by the volume."""
        self.unconfirmed = 0
        """Number of the last of its changes that is awaited together with others; kept by the
        volume."""
        self.parent: Inode | None = None
        self.name = b""
        self.more: dict[tuple[Inode, bytes], None] | None = None
        """Further names that have been seen, of an object with several links, oldest first."""
        self.lookups = 0
        self.pins = 0
        """Bits: which other users, besides kernel and handles, need it known."""
        self.opens = 0
        self.children = 0
        """Names below this directory that known inodes hold: it stays known as long as they do."""
        self.fd = -1
        """A directory's cached descriptor; or what keeps an object reachable without a name."""
        self.size = 0
        """Bytes; current for regular files that are open."""
        self.privileges: bool | None = None
        """Whether a write must clear set-id bits or capabilities; None: not looked yet."""
        self.gone = False
        """Its last name was removed."""
        self.foreign = False
        """On another file system mounted inside the store: shown, never entered."""

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.type == _stat.S_IFDIR

    @property
    def named(self) -> bool:
        """Whether a name of it is known."""
        return self.parent is not None or self.id == ROOT_ID

    def add_name(self, parent: Inode, name: bytes) -> None:
        """It has been seen under this name."""
        if self.parent is parent and self.name == name:
            return
        if self.parent is None:
            self.parent = parent
            self.name = name
        elif self.is_directory:
            self.parent.children -= 1
            self.parent = parent
            self.name = name
        else:
            if self.more is None:
                self.more = {}
            elif (parent, name) in self.more:
                return
            self.more[parent, name] = None
        parent.children += 1

    def drop_name(self, parent: Inode, name: bytes) -> None:
        """It no longer has this name."""
        if self.parent is parent and self.name == name:
            if self.more:
                self.parent, self.name = self.more.popitem()[0]
            else:
                self.parent = None
                self.name = b""
        elif self.more and (parent, name) in self.more:
            del self.more[parent, name]
        else:
            return
        parent.children -= 1
        if not self.more:
            self.more = None

    def prefer(self, parent: Inode, name: bytes) -> None:
        """Of the names that have been seen, this one comes first from here on."""
        if self.parent is not None and self.more and (parent, name) in self.more:
            del self.more[parent, name]
            self.more[self.parent, self.name] = None
            self.parent, self.name = parent, name

    def names(self) -> list[tuple[Inode, bytes]]:
        """Every name that has been seen."""
        if self.parent is None:
            return []
        return [(self.parent, self.name), *(self.more or ())]

    def path(self) -> bytes:
        """One path from the root of the store, for people; empty for the root itself."""
        parts: list[bytes] = []
        inode: Inode | None = self
        while inode is not None and inode.id != ROOT_ID:
            if inode.parent is None:
                return b"(removed)/" + b"/".join(reversed(parts)) if parts else b"(removed)"
            parts.append(inode.name)
            inode = inode.parent
        return b"/".join(reversed(parts))


class Handle:
    """An open file or directory."""

    __slots__ = ("entries", "fd", "inode", "number", "synchronous", "writable")

    def __init__(self, number: int, inode: Inode, fd: int) -> None:
        self.number = number
        self.inode = inode
        self.fd = fd
        self.writable = False
        self.synchronous = 0
        """0, os.O_DSYNC or os.O_SYNC: what a write through it must reach before it returns."""
        self.entries: list[bytes] = []
        """A directory's names, as they were when reading it began."""


class Table:
    """All known inodes and open handles.

    Invariant: an inode that the kernel or a peer knows keeps its inode number from being given
    to another object: it has a name, or a descriptor.
    """

    def __init__(self, root: Inode) -> None:
        self.root = root
        self.by_ino: dict[int, Inode] = {root.ino: root}
        self.by_nodeid: dict[int, Inode] = {ROOT_NODEID: root}
        self.by_id: dict[bytes, Inode] = {root.id: root}
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1

    def add(self, inode: Inode) -> None:
        """A new one is known."""
        self.by_ino[inode.ino] = inode
        self.by_nodeid[inode.nodeid] = inode
        if inode.id:
            self.by_id[inode.id] = inode

    def identify(self, inode: Inode, object_id: bytes) -> None:
        """Its object id is known now, or has changed."""
        if inode.id and self.by_id.get(inode.id) is inode:
            del self.by_id[inode.id]
        inode.id = object_id
        if self.by_ino.get(inode.ino) is inode:
            self.by_id[object_id] = inode

    def drop_unused(self, inode: Inode) -> list[Inode]:
        """Forget it, and the parents only it needed, where nobody needs them any more.

        Returns what is no longer known: the caller closes the descriptors.
        """
        dropped: list[Inode] = []
        waiting = [inode]
        while waiting:
            one = waiting.pop()
            if one.lookups > 0 or one.opens or one.pins or one.children or one is self.root:
                continue
            if self.by_ino.get(one.ino) is not one:
                continue
            del self.by_ino[one.ino]
            del self.by_nodeid[one.nodeid]
            if one.id and self.by_id.get(one.id) is one:
                del self.by_id[one.id]
            for parent, name in one.names():
                one.drop_name(parent, name)
                waiting.append(parent)
            dropped.append(one)
        return dropped

    def open(self, inode: Inode, fd: int) -> Handle:
        """A new handle on *inode*, owning *fd*."""
        handle = Handle(self._next_handle, inode, fd)
        self._next_handle += 1
        self.handles[handle.number] = handle
        inode.opens += 1
        return handle

    def close(self, number: int) -> Handle:
        """The handle is gone; the caller closes its descriptor."""
        handle = self.handles.pop(number)
        handle.inode.opens -= 1
        return handle


def proc_path(fd: int, name: bytes = b"") -> bytes:
    """A path to what *fd* is, or to *name* in it, for calls without an `at` form.

    Relies on: /proc/self/fd/N jumps to the open object itself, whatever is mounted over its path
    (proc(5)).
    """
    if name:
        return b"/proc/self/fd/%d/%s" % (fd, name)
    return b"/proc/self/fd/%d" % fd


def close_quietly(fd: int) -> None:
    """Close; a descriptor's late error belongs to nobody here, its data was synced or not."""
    try:
        os.close(fd)
    except OSError:
        return
