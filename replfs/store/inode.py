"""The objects of the store that are known now: where they are, and who still needs them.

An inode is known while the kernel counts a lookup of it, a handle is open on it, or a peer's
primary has located it (`pins`). It is found by inode number, or by object id. It knows one name
for certain as long as the object has a name this process has seen; a directory always does.

Relies on: exclusive ownership of the store. Every change of a name goes through this process, so
the names held here are right.
"""

from __future__ import annotations

import os
import secrets
import stat as _stat
from operator import attrgetter
from typing import Any, Final, Protocol, TypeVar

from replfs.store.record import ROOT_ID

T = TypeVar("T")

ROOT_NODEID: Final = 1
_RENUMBERED: Final = 1 << 62
_TYPES: Final = {
    one: one
    for one in (
        _stat.S_IFREG, _stat.S_IFDIR, _stat.S_IFLNK, _stat.S_IFIFO, _stat.S_IFSOCK, _stat.S_IFCHR,
        _stat.S_IFBLK,
    )
}  # fmt: skip
"""One integer for each, instead of one for each inode."""


class _Rare:
    """What few objects have: an inode has one of its own only once one of these is set."""

    __slots__ = (
        "ack", "bequeaths", "children", "flags", "foreign", "gone", "more", "policy",
        "unconfirmed",
    )  # fmt: skip

    def __init__(self) -> None:
        self.flags = self.policy = self.ack = self.children = self.unconfirmed = 0
        self.foreign = self.gone = False
        self.bequeaths: bool | None = None
        self.more: dict[tuple[Inode, bytes], None] | None = None


_NOTHING: Final = _Rare()
"""Of all inodes that have none of their own; never changed."""


class _Field(Protocol[T]):
    """An attribute of every inode."""

    def __get__(self, inode: Inode, owner: type[Inode]) -> T: ...
    def __set__(self, inode: Inode, value: T) -> None: ...


def _rare(name: str) -> Any:
    """A property of an `Inode` that stands in its `_Rare`."""

    def put(inode: Inode, value: object) -> None:
        if inode.rare is _NOTHING:
            if getattr(_NOTHING, name) == value:
                return
            inode.rare = _Rare()
        setattr(inode.rare, name, value)

    return property(attrgetter(f"rare.{name}"), put)


class Inode:
    """One known object. A million of them are not unusual, so each byte counts."""

    __slots__ = (
        "fd",
        "handle",
        "id",
        "lookups",
        "name",
        "nodeid",
        "opens",
        "parent",
        "pins",
        "privileges",
        "rare",
        "recorded",
        "resolved",
        "size",
        "type",
    )

    flags: _Field[int] = _rare("flags")
    """Of its record."""
    policy: _Field[int] = _rare("policy")
    """Its own, of its record; 0: none."""
    ack: _Field[int] = _rare("ack")
    """Its own acknowledgement level, of its record; 0: none."""
    unconfirmed: _Field[int] = _rare("unconfirmed")
    """Number of the last of its changes that is awaited together with others; kept by the
    volume."""
    more: _Field[dict[tuple[Inode, bytes], None] | None] = _rare("more")
    """Further names that have been seen, of an object with several links, oldest first."""
    children: _Field[int] = _rare("children")
    """Names below this directory that known inodes hold: it stays known as long as they do."""
    gone: _Field[bool] = _rare("gone")
    """Its last name was removed."""
    foreign: _Field[bool] = _rare("foreign")
    """On another file system mounted inside the store: shown, never entered."""
    bequeaths: _Field[bool | None] = _rare("bequeaths")
    """Whether this directory has a default ACL, for what is made in it; None: not looked yet."""

    def __init__(self, ino: int, file_type: int) -> None:
        self.nodeid = ino if ino != ROOT_NODEID else _RENUMBERED
        """The number the kernel knows it by."""
        self.type = _TYPES.get(file_type, file_type)
        self.handle = b""
        """The file system's handle of it, whatever its name; empty while nobody has asked."""
        self.id = b""
        """Object id, or empty while the record has not been read."""
        self.recorded = False
        self.rare = _NOTHING
        self.resolved: tuple[int, int, int] | None = None
        """Cached (policy epoch, effective policy, acknowledgement level); kept by the volume."""
        self.parent: Inode | None = None
        self.name = b""
        self.lookups = 0
        self.pins = 0
        """Bits: which other users, besides kernel and handles, need it known."""
        self.opens = 0
        """Twice the number of handles on it, and 1 once there was one: no byte for that alone."""
        self.fd = -1
        """A directory's cached descriptor; or what keeps an object reachable without a name."""
        self.size = 0
        """Bytes; current for regular files that are open."""
        self.privileges: bool | None = None
        """Whether a write must clear set-id bits or capabilities; None: not looked yet."""

    @property
    def ino(self) -> int:
        """Its inode number in the store."""
        return self.nodeid if self.nodeid != _RENUMBERED else ROOT_NODEID

    @property
    def is_open(self) -> bool:
        """Whether there is a handle on it."""
        return self.opens > 1

    @property
    def was_opened(self) -> bool:
        """Whether there is, or was since it is known."""
        return self.opens > 0

    @property
    def is_directory(self) -> bool:
        """Whether it is a directory."""
        return self.type == _stat.S_IFDIR

    @property
    def named(self) -> bool:
        """Whether a name of it is known."""
        return self.parent is not None or self.id == ROOT_ID

    def has_name(self, parent: Inode, name: bytes) -> bool:
        """Whether it has been seen under this name."""
        if self.parent is parent and self.name == name:
            return True
        return bool(self.more) and (parent, name) in (self.more or {})

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


class Root(Inode):
    """The root of the store: the kernel has one number for it, the store another."""

    __slots__ = ("_ino",)

    def __init__(self, ino: int) -> None:
        super().__init__(ino, _stat.S_IFDIR)
        self.nodeid = ROOT_NODEID
        self.id = ROOT_ID
        self._ino = ino

    @property
    def ino(self) -> int:
        """Its inode number in the store."""
        return self._ino


class Handle:
    """An open file or directory."""

    __slots__ = ("entries", "fd", "inode", "number", "silent", "synchronous", "writable")

    def __init__(self, number: int, inode: Inode, fd: int) -> None:
        self.number = number
        self.inode = inode
        self.fd = fd
        self.writable = False
        self.synchronous = 0
        """0, os.O_DSYNC or os.O_SYNC: what a write through it must reach before it returns."""
        self.silent = False
        """The kernel does not tell when one of its descriptors is closed, only when all are."""
        self.entries: list[bytes] = []
        """A directory's names, as they were when reading it began."""


class Table:
    """All known inodes and open handles.

    Invariant: an inode that the kernel or a peer knows keeps its inode number from being given
    to another object: it has a name, or a descriptor.
    """

    def __init__(self, root: Root) -> None:
        self.root = root
        self.by_nodeid: dict[int, Inode] = {ROOT_NODEID: root}
        self.by_id: dict[bytes, Inode] = {root.id: root}
        self.handles: dict[int, Handle] = {}
        self._next_handle = 1
        self.keeps = False
        """What has a name stays known, though nobody needs it now: an NFS client may."""
        self._generation = 1 + secrets.randbelow(1 << 30)
        self._removed: dict[int, int] = {}
        """While it `keeps`: how many objects with this number are no more."""

    def find(self, ino: int) -> Inode | None:
        """The known one with this inode number in the store."""
        if ino == self.root.ino:
            return self.root
        return self.by_nodeid.get(ino if ino != ROOT_NODEID else _RENUMBERED)

    def generation(self, nodeid: int) -> int:
        """Tells an object from others that have had its number, and from those of other processes.

        1 to 2 ** 31 - 1, the same as long as the object is known; 0 of the root, as FUSE has it.
        """
        if nodeid == ROOT_NODEID:
            return 0
        return (self._generation + self._removed.get(nodeid, 0)) & 0x7FFFFFFF or 1

    def add(self, inode: Inode) -> None:
        """A new one is known."""
        self.by_nodeid[inode.nodeid] = inode
        if inode.id:
            self.by_id[inode.id] = inode

    def identify(self, inode: Inode, object_id: bytes) -> None:
        """Its object id is known now, or has changed."""
        if inode.id and self.by_id.get(inode.id) is inode:
            del self.by_id[inode.id]
        inode.id = object_id
        if self.by_nodeid.get(inode.nodeid) is inode:
            self.by_id[object_id] = inode

    def disown(self, inode: Inode) -> None:
        """It is as one without an id: another one turned out to be the object."""
        del self.by_id[inode.id]
        inode.id = b""

    def drop_unused(self, inode: Inode) -> list[Inode]:
        """Forget it, and the parents only it needed, where nobody needs them any more.

        Returns what is no longer known: the caller closes the descriptors.
        """
        dropped: list[Inode] = []
        waiting = [inode]
        while waiting:
            one = waiting.pop()
            if one.lookups > 0 or one.is_open or one.pins or one.children or one is self.root:
                continue
            if self.keeps and one.named:
                continue
            if self.by_nodeid.get(one.nodeid) is not one:
                continue
            del self.by_nodeid[one.nodeid]
            if self.keeps:
                self._removed[one.nodeid] = self._removed.get(one.nodeid, 0) + 1
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
        inode.opens = (inode.opens | 1) + 2
        return handle

    def close(self, number: int) -> Handle:
        """The handle is gone; the caller closes its descriptor."""
        handle = self.handles.pop(number)
        handle.inode.opens -= 2
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
