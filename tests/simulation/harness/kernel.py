"""The kernel above a primary's mount: names it has looked up, locks it holds, references it gives.

It asks the volume what Linux would ask it: one lookup per name, then the cache answers; changes of
a directory under that directory's lock; a reference counted for every entry a reply carries, and
given back, late and in one message, when nobody uses the inode any more. What the kernel would
never do (two changes of one directory at once, a rename of a directory into itself) is not done.

Source: Linux, Documentation/filesystems/directory-locking.rst and fs/fuse/dir.c.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import stat
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import trio
from simulation.harness.ledger import END, InSync, Ledger, Thing

from replfs.errors import ReplfsError
from replfs.front.chores import Chores
from replfs.node.mounted.volume import Volume
from replfs.store import syscalls
from replfs.store.inode import Handle, Inode
from replfs.store.syscalls import failure

ROOT = 1
_EVICT_SHARE = 0.1
_FORGET_SHARE = 0.3
_NOTHING_DONE = frozenset({
    errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EXDEV,
    errno.EINVAL, errno.ENODATA, errno.EPERM, errno.EBUSY,
})  # fmt: skip
"""Errors of calls that change nothing."""


class Node:
    """An inode of the kernel's."""

    _count = itertools.count()

    def __init__(self, nodeid: int, kind: int, thing: Thing) -> None:
        self.thing = thing
        self.number = next(self._count)
        """For an order that does not depend on the file system's numbers."""
        self.nodeid = nodeid
        self.kind = kind
        self.lookups = 0
        self.users = 0
        """System calls and open files that hold it."""
        self.lock = trio.Lock()
        self.children: dict[bytes, Node] = {}
        self.negative: dict[bytes, None] = {}
        self.entries: dict[tuple[Node, bytes], None] = {}
        """Cached names of it."""
        self.is_gone = False
        """No name of it is left."""

    @property
    def is_directory(self) -> bool:
        return self.kind == stat.S_IFDIR


class OpenFile:
    """An open file of a process."""

    def __init__(self, node: Node, handle: Handle, flags: int) -> None:
        self.node = node
        self.readable = flags & os.O_ACCMODE != os.O_WRONLY
        self.number = handle.number
        self.writable = handle.writable
        self.is_closed = False


class Kernel:
    """One mount."""

    def __init__(
        self,
        volume: Volume,
        rng: random.Random,
        trouble: Callable[[str], None],
        ledger: Ledger,
        stores_in_sync: Callable[[], set[InSync]],
        may_fail: Callable[[], bool],
    ) -> None:
        """*stores_in_sync*: those that take part in an fsync that begins and ends now.

        *may_fail*: disks have failed, so that what failed may have been done in part.
        """
        self.volume = volume
        self.rng = rng
        self._trouble = trouble
        self.inside = 0
        """System calls of applications that have not returned."""
        self._ledger = ledger
        self._stores_in_sync = stores_in_sync
        self._may_fail = may_fail
        self.root = Node(ROOT, stat.S_IFDIR, ledger.root)
        self.root.users = 1
        self.nodes: dict[int, Node] = {ROOT: self.root}
        self._forgets: list[tuple[int, int]] = []
        self.chores = Chores()
        self.chores.begin()
        self._renaming = trio.Lock()
        self.files: list[OpenFile] = []

    # References ------------------------------------------------------------------------------

    def _entry(self, directory: Node, name: bytes, inode: Inode) -> Node:
        """A reply carried an entry."""
        node = self.nodes.get(inode.nodeid)
        thing = self._ledger.looked_up(directory.thing, name, inode.type, inode.id)
        if thing is None:
            self._trouble(f"{name!r} in inode {directory.nodeid} is there, and nobody made it")
            thing = self._ledger.made(inode.type, inode.id)
        if node is None:
            node = self.nodes[inode.nodeid] = Node(inode.nodeid, inode.type, thing)
        else:
            met = self._ledger.met_again(node.thing, thing)
            if met is None:
                self._trouble(f"{name!r} in inode {directory.nodeid} is another object")
            node.thing = met or thing
        if node.is_gone or node.kind != inode.type:
            self._trouble(f"inode {inode.nodeid} ({name!r}) was given to another object")
        node.lookups += 1
        if node.is_directory and any(entry != (directory, name) for entry in node.entries):
            self._trouble(f"directory {inode.nodeid} has two names")
        directory.children[name] = node
        directory.negative.pop(name, None)
        node.entries[directory, name] = None
        return node

    @staticmethod
    def _drop_entry(directory: Node, name: bytes) -> Node | None:
        node = directory.children.pop(name, None)
        if node is not None:
            del node.entries[directory, name]
        return node

    def release(self, node: Node) -> None:
        """One user less."""
        node.users -= 1
        if not node.users and not node.entries and not node.children:
            self._evict(node)

    def _evict(self, node: Node) -> None:
        for directory, name in list(node.entries):
            self._drop_entry(directory, name)
        del self.nodes[node.nodeid]
        if node.lookups:
            self._forgets.append((node.nodeid, node.lookups))

    def reclaim(self, share: float = _EVICT_SHARE) -> None:
        """Memory is short: some of what nobody uses goes."""
        for node in list(self.nodes.values()):
            if node.users or node.children or self.rng.random() >= share:
                continue
            if self.nodes.get(node.nodeid) is node:
                self._evict(node)
        if self.rng.random() < _FORGET_SHARE or share == 1.0:
            self.send_forgets()

    def send_forgets(self) -> None:
        """Give back what is due, all at once."""
        forgets, self._forgets = self._forgets, []
        if forgets:
            self.volume.forget(forgets)
        self.chores.finish()

    async def close_files(self) -> None:
        """Applications close all that they have open."""
        while self.files:
            await self.close(self.files.pop())

    def look_again(self, parent: int, name: bytes) -> None:
        """The kernel is told that a name may be another than it believes."""
        directory = self.nodes.get(parent)
        if directory is not None:
            directory.negative.pop(name, None)
            self._drop_entry(directory, name)

    async def drop_everything(self) -> None:
        """As umount does: close all files, give all references back."""
        await self.close_files()
        before = -1
        while len(self.nodes) != before:
            before = len(self.nodes)
            self.reclaim(1.0)

    def held(self) -> list[str]:
        """What is still in use after `drop_everything`; for messages."""
        return [
            f"{node.nodeid} users {node.users} children {list(node.children)} "
            f"names {[name for _, name in node.entries]} gone {node.is_gone}"
            for node in self.nodes.values()
            if node is not self.root
        ]

    # Looking ---------------------------------------------------------------------------------

    def _look(self, directory: Node, name: bytes) -> Node | None:
        """The directory is locked by the caller."""
        node = directory.children.get(name)
        if node is not None:
            return node
        if directory.is_gone or name in directory.negative:
            return None
        try:
            inode, _ = self.volume.lookup(directory.nodeid, name)
        except FileNotFoundError:
            directory.negative[name] = None
            thing = directory.thing
            if name in thing.names and name not in thing.unsure_names:
                self._trouble(f"{name!r} in inode {directory.nodeid} is not there any more")
            return None
        return self._entry(directory, name, inode)

    @asynccontextmanager
    async def at(self, path: tuple[bytes, ...]) -> AsyncIterator[Node]:
        """What is at *path*, held."""
        node = self.root
        node.users += 1
        try:
            for name in path:
                if not node.is_directory:
                    raise failure(errno.ENOTDIR)
                async with node.lock:
                    below = self._look(node, name)
                    if below is None:
                        raise failure(errno.ENOENT)
                    below.users += 1
                node, above = below, node
                self.release(above)
            yield node
        finally:
            self.release(node)

    async def readdir(self, path: tuple[bytes, ...]) -> list[bytes]:
        """All names, with attributes (READDIRPLUS)."""
        async with self.at(path) as node:
            if not node.is_directory:
                raise failure(errno.ENOTDIR)
            async with node.lock:
                if node.is_gone:
                    return []
                handle = self.volume.opendir(node.nodeid)
                names = self.volume.entries(handle.number, 0)
                for name in names:
                    found = self.volume.entry(handle.number, name)
                    if found is None:
                        self._trouble(f"{name!r} was listed, but is not there")
                    elif name not in {b".", b".."}:
                        self.volume.referenced(found[0])
                        self._entry(node, name, found[0])
                self.volume.releasedir(handle.number)
                return names

    async def stat(self, path: tuple[bytes, ...]) -> os.stat_result:
        async with self.at(path) as node:
            return self.volume.getattr(node.nodeid)[1]

    # Names -----------------------------------------------------------------------------------

    @asynccontextmanager
    async def _in(self, path: tuple[bytes, ...]) -> AsyncIterator[tuple[Node, bytes]]:
        """The directory of *path*, locked, and the last name."""
        async with self.at(path[:-1]) as directory:
            if not directory.is_directory:
                raise failure(errno.ENOTDIR)
            async with directory.lock:
                if directory.is_gone:
                    raise failure(errno.ENOENT)
                yield directory, path[-1]

    @contextmanager
    def _naming(self, *entries: tuple[Node, bytes]) -> Iterator[None]:
        """Names are about to be changed: the ledger is told, and told if they were not."""
        known = [
            (directory.thing, name, name in directory.thing.unsure_names)
            for directory, name in entries
        ]
        for thing, name, _ in known:
            self._ledger.name_changes(thing, name)
        try:
            yield
        except OSError as error:
            if error.errno in _NOTHING_DONE and not self._may_fail():
                for thing, name, was_unsure in known:
                    if not was_unsure:
                        thing.unsure_names.discard(name)
            raise
        except ReplfsError:
            # As the front end has the kernel do: it may be done.
            for directory, name in entries:
                directory.negative.pop(name, None)
                self._drop_entry(directory, name)
            raise

    async def make(self, path: tuple[bytes, ...], mode: int, **more: Any) -> None:
        """mkdir, mknod, symlink."""
        async with self._in(path) as (directory, name):
            if self._look(directory, name) is not None:
                raise failure(errno.EEXIST)
            kind = {stat.S_IFDIR: "mkdir", stat.S_IFLNK: "symlink"}.get(stat.S_IFMT(mode), "mknod")
            with self._naming((directory, name)):
                inode, _ = await self.volume.make(
                    directory.nodeid, name, mode, owner=self._owner(), kind=kind, **more
                )
            thing = self._ledger.made(inode.type, inode.id)
            self._ledger.named(directory.thing, name, thing)
            self._entry(directory, name, inode)

    async def create(self, path: tuple[bytes, ...], mode: int, flags: int) -> OpenFile:
        """open(O_CREAT)."""
        async with self._in(path) as (directory, name):
            node = self._look(directory, name)
            if node is None:
                try:
                    with self._naming((directory, name)):
                        handle, inode, _ = await self.volume.create(
                            directory.nodeid, name, mode, flags, owner=self._owner(), umask=0o022
                        )
                except OSError as error:
                    if error.errno != errno.ESTALE:
                        raise
                    directory.negative.pop(name, None)  # as fs/namei.c does: look again
                else:
                    thing = self._ledger.made(inode.type, inode.id)
                    self._ledger.named(directory.thing, name, thing)
                    return self._opened(self._entry(directory, name, inode), handle, flags)
            if flags & os.O_EXCL:
                raise failure(errno.EEXIST)
        return await self.open(path, flags)

    def _owner(self) -> tuple[int, int]:
        return self.rng.choice((0, 0, 1000)), self.rng.choice((0, 0, 1000))

    async def unlink(self, path: tuple[bytes, ...], *, directory: bool = False) -> None:
        """unlink, rmdir."""
        async with self._in(path) as (above, name):
            node = self._look(above, name)
            if node is None:
                raise failure(errno.ENOENT)
            if node.is_directory != directory:
                raise failure(errno.ENOTDIR if directory else errno.EISDIR)
            node.users += 1
            try:
                async with node.lock:
                    call = self.volume.rmdir if directory else self.volume.unlink
                    with self._naming((above, name)):
                        await call(above.nodeid, name)
                    self._ledger.named(above.thing, name, None)
                    self._removed(above, name, node)
            finally:
                self.release(node)

    def _removed(self, above: Node, name: bytes, node: Node) -> None:
        self._drop_entry(above, name)
        above.negative[name] = None
        known = self.volume.table.by_nodeid.get(node.nodeid)
        if known is None:
            self._trouble(f"inode {node.nodeid} is forgotten while it is in use")
        elif known.gone:
            node.is_gone = True

    async def link(self, path: tuple[bytes, ...], new: tuple[bytes, ...]) -> None:
        async with self.at(path) as node, self._in(new) as (directory, name):
            if node.is_directory:
                raise failure(errno.EPERM)
            if self._look(directory, name) is not None:
                raise failure(errno.EEXIST)
            async with node.lock:
                if node.is_gone:
                    raise failure(errno.ENOENT)
                with self._naming((directory, name)):
                    inode, _ = await self.volume.link(node.nodeid, directory.nodeid, name)
                self._ledger.named(directory.thing, name, node.thing)
                self._entry(directory, name, inode)

    def _is_below(self, node: Node, above: Node) -> bool:
        while node is not above:
            if not node.entries:
                return False
            node = next(iter(node.entries))[0]
        return True

    async def rename(self, old: tuple[bytes, ...], new: tuple[bytes, ...], flags: int) -> None:
        async with AsyncExitStack() as held:
            source = await held.enter_async_context(self.at(old[:-1]))
            target = await held.enter_async_context(self.at(new[:-1]))
            if not (source.is_directory and target.is_directory):
                raise failure(errno.ENOTDIR)
            if source is not target:
                await held.enter_async_context(self._renaming)
                first, second = source, target
                if self._is_below(source, target) or (
                    not self._is_below(target, source) and source.number > target.number
                ):
                    first, second = target, source
                await held.enter_async_context(first.lock)
                await held.enter_async_context(second.lock)
            else:
                await held.enter_async_context(source.lock)
            if source.is_gone or target.is_gone:
                raise failure(errno.ENOENT)
            node, there = self._look(source, old[-1]), self._look(target, new[-1])
            if node is None or (flags & syscalls.RENAME_EXCHANGE and there is None):
                raise failure(errno.ENOENT)
            if flags & syscalls.RENAME_NOREPLACE and there is not None:
                raise failure(errno.EEXIST)
            if self._is_below(target, node):
                raise failure(errno.EINVAL)
            if there is not None and self._is_below(source, there):
                exchange = flags & syscalls.RENAME_EXCHANGE
                raise failure(errno.EINVAL if exchange else errno.ENOTEMPTY)
            if node is there:
                return
            if there is not None and not flags and node.is_directory != there.is_directory:
                raise failure(errno.ENOTDIR if node.is_directory else errno.EISDIR)
            moved = [node] if there is None else [node, there]
            for one in moved:
                one.users += 1
                held.callback(self.release, one)
            for one in sorted(moved, key=lambda one: (not one.is_directory, one.number)):
                await held.enter_async_context(one.lock)
            with self._naming((source, old[-1]), (target, new[-1])):
                await self.volume.rename(source.nodeid, old[-1], target.nodeid, new[-1], flags)
            swapped = there.thing if there is not None and flags else None
            self._ledger.named(source.thing, old[-1], swapped)
            self._ledger.named(target.thing, new[-1], node.thing)
            self._moved(source, old[-1], target, new[-1], node, there, flags)

    def _moved(
        self,
        source: Node,
        name: bytes,
        target: Node,
        new_name: bytes,
        node: Node,
        there: Node | None,
        flags: int,
    ) -> None:
        if there is not None and flags & syscalls.RENAME_EXCHANGE:
            self._drop_entry(source, name)
            self._drop_entry(target, new_name)
            source.children[name] = there
            there.entries[source, name] = None
        else:
            if there is not None:
                self._removed(target, new_name, there)
            self._drop_entry(source, name)
            source.negative[name] = None
        target.negative.pop(new_name, None)
        target.children[new_name] = node
        node.entries[target, new_name] = None

    # Attributes ------------------------------------------------------------------------------

    async def setattr(self, path: tuple[bytes, ...], **changes: int) -> None:
        """chmod, chown, utimensat, truncate by path."""
        async with self.at(path) as node, node.lock:
            if "size" in changes and node.is_directory:
                raise failure(errno.EISDIR)
            if "size" in changes and node.kind != stat.S_IFREG:
                raise failure(errno.EINVAL)
            if "mode" in changes and node.kind == stat.S_IFLNK:
                raise failure(errno.EOPNOTSUPP)
            asked = dict.fromkeys(("size", "mode", "uid", "gid", "atime", "mtime"))
            with self._resizing(node, changes.get("size")):
                await self.volume.setattr(node.nodeid, None, **(asked | changes))

    async def setxattr(self, path: tuple[bytes, ...], name: bytes, value: bytes) -> None:
        async with self.at(path) as node, node.lock:
            self._check_xattr(node, name)
            await self.volume.setxattr(node.nodeid, name, value, uid=0, groups=set)

    async def removexattr(self, path: tuple[bytes, ...], name: bytes) -> None:
        async with self.at(path) as node, node.lock:
            self._check_xattr(node, name)
            await self.volume.removexattr(node.nodeid, name, uid=0)

    @staticmethod
    def _check_xattr(node: Node, name: bytes) -> None:
        if name.startswith(b"user.") and node.kind not in {stat.S_IFREG, stat.S_IFDIR}:
            raise failure(errno.EPERM)
        if name.startswith(b"system.posix_acl_default") and not node.is_directory:
            raise failure(errno.EPERM)

    # Files -----------------------------------------------------------------------------------

    def _opened(self, node: Node, handle: Handle, flags: int) -> OpenFile:
        node.users += 1
        opened = OpenFile(node, handle, flags)
        self.files.append(opened)
        return opened

    @contextmanager
    def _resizing(self, node: Node, size: int | None) -> Iterator[None]:
        thing, ledger = node.thing, self._ledger
        if size is None:
            yield
            return
        change = ledger.data_changes(thing, min(size, len(thing.data)), END)
        try:
            yield
        except OSError:
            ledger.failed(thing, change)
            raise
        ledger.truncated(thing, change, size)

    async def open(self, path: tuple[bytes, ...], flags: int) -> OpenFile:
        async with self.at(path) as node:
            if node.kind != stat.S_IFREG:
                raise failure(errno.EISDIR if node.is_directory else errno.ENXIO)
            if flags & os.O_TRUNC:
                async with node.lock:
                    with self._resizing(node, 0):
                        handle = await self.volume.open(node.nodeid, flags)
                    return self._opened(node, handle, flags)
            return self._opened(node, await self.volume.open(node.nodeid, flags), flags)

    async def close(self, opened: OpenFile) -> None:
        """close, after the caller took it out of `files`."""
        opened.is_closed = True
        await self.volume.flush(opened.number)
        if self.volume.closes_at_once:
            self.chores.put(lambda: self.volume.close(opened.number))
        else:
            await self.volume.release(opened.number)
        self.release(opened.node)

    async def write(self, opened: OpenFile, offset: int, data: bytes, *, mapped: bool) -> int:
        """*mapped*: as write-back of a mapping does, without the inode's lock."""
        if mapped:
            return await self._write(opened, offset, data)
        async with opened.node.lock:
            return await self._write(opened, offset, data)

    async def _write(self, opened: OpenFile, offset: int, data: bytes) -> int:
        thing, ledger = opened.node.thing, self._ledger
        stop = offset + len(data)
        change = ledger.data_changes(thing, min(offset, len(thing.data)), stop)
        try:
            written = await self.volume.write(opened.number, offset, data)
        except OSError:
            ledger.failed(thing, change)
            raise
        if written == len(data):
            ledger.written(thing, change, offset, data)
        else:
            ledger.failed(thing, change)
        return written

    async def truncate(self, opened: OpenFile, size: int) -> None:
        """ftruncate."""
        async with opened.node.lock:
            with self._resizing(opened.node, size):
                await self.volume.setattr(
                    opened.node.nodeid,
                    opened.number,
                    size=size,
                    mode=None,
                    uid=None,
                    gid=None,
                    atime=None,
                    mtime=None,
                )

    async def read(self, opened: OpenFile, offset: int, size: int) -> bytes:
        return bytes(await self.volume.read(opened.number, offset, size))

    async def fsync(self, opened: OpenFile, *, data_only: bool) -> None:
        async with opened.node.lock:
            with self._flushing([opened.node.thing]):
                await self.volume.fsync(opened.number, data_only=data_only)

    @contextmanager
    def _flushing(self, things: Iterable[Thing]) -> Iterator[None]:
        before = self._stores_in_sync()
        ended = self._ledger.flush_begins(things)
        try:
            yield
        except OSError:
            ended(())
            raise
        ended(before & self._stores_in_sync())

    async def fsyncdir(self, path: tuple[bytes, ...]) -> None:
        async with self.at(path) as node:
            if not node.is_directory or node.is_gone:
                return
            async with node.lock:
                handle = self.volume.opendir(node.nodeid)
                things = self._ledger.things() if node is self.root else [node.thing]
                try:
                    with self._flushing(things):
                        await self.volume.fsyncdir(handle.number, data_only=False)
                except OSError:
                    # A flush of everything that has failed once fails for good.
                    if node is not self.root or not self._may_fail():
                        raise
                finally:
                    self.volume.releasedir(handle.number)
