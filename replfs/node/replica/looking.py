"""What is asked about a replica, and changes nothing: listings, digests, bytes, attributes."""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import trio

from replfs.core import ops
from replfs.node.asking.attributes import inspect
from replfs.node.pacing.courtesy import Slice
from replfs.node.replica.later import Later, Reply
from replfs.node.replica.objects import Objects
from replfs.store.contents import digest_regions, read_range
from replfs.store.inode import Inode
from replfs.store.reach import RESERVED
from replfs.store.record import INCOMPLETE
from replfs.store.tree import Tree

_LARGE_DIRECTORY: Final = 256 << 10
"""Bytes: a larger one is read and sorted in a thread."""


class Looking:
    """Answers what a primary asks about *tree*."""

    def __init__(self, tree: Tree, objects: Objects, later: Later) -> None:
        self._tree = tree
        self._objects = objects
        self._later = later
        self._listing: tuple[bytes, list[bytes]] = (b"", [])
        """The directory whose pages are asked for one after another, and its names."""
        self.handlers: dict[type, Callable[[Any], ops.AnyAnswer]] = {ops.Inspect: self._inspect}
        """What is answered at once, for each kind; they raise OSError."""
        self.slow: dict[type, Callable[[Any, Reply], ops.AnyAnswer | None]] = {
            ops.List: self._list,
            ops.Digest: self._digest,
            ops.Fetch: self._fetch,
        }
        """What takes long; None: the answer comes later. They raise OSError."""

    def begin_session(self) -> None:
        """Nobody is listing anything yet."""
        self._listing = (b"", [])

    # Names -------------------------------------------------------------------------------------

    def _list(self, op: ops.List, reply: Reply) -> ops.AnyAnswer | None:
        directory = self._objects.known(op.parent)
        if op.after and self._listing[0] == op.parent:
            return self._later.do(partial(self._page, directory, op, self._listing[1]), reply)
        fd = self._tree.directory_fd(directory)
        if os.fstat(fd).st_size > _LARGE_DIRECTORY:
            return self._later.do(partial(self._list_large, directory, op, os.dup(fd)), reply)
        names = sorted(self._tree.names(directory))
        self._listing = (op.parent, names)
        return self._later.do(partial(self._page, directory, op, names), reply)

    async def _list_large(self, directory: Inode, op: ops.List, fd: int) -> ops.AnyAnswer:
        is_wanted = self._later.still()
        self._tree.hold(directory)
        try:
            names = await trio.to_thread.run_sync(_sorted_names, fd, limiter=self._later.reads)
            if not is_wanted():
                return ops.Done(errno.EINTR)
            names = [name for name in names if name != RESERVED]
            self._listing = (op.parent, names)
            return await self._page(directory, op, names)
        finally:
            os.close(fd)
            self._tree.release(directory)

    async def _page(self, directory: Inode, op: ops.List, names: list[bytes]) -> ops.AnyAnswer:
        with self._tree.held(directory):
            return await self._entries(directory, op, names)

    async def _entries(self, directory: Inode, op: ops.List, names: list[bytes]) -> ops.AnyAnswer:
        is_wanted = self._later.still()
        start = _after(names, op.after)
        entries = []
        share = Slice()
        for name in names[start : start + ops.NAMES_PER_MESSAGE]:
            await share.breathe()
            if not is_wanted():
                return ops.Done(errno.EINTR)
            inode = self._objects.at(directory, name)
            if inode is None:
                continue
            entries.append(ops.Entry(name, inode.id, not inode.flags & INCOMPLETE))
            self._tree.drop_unused(inode)
        more = start + ops.NAMES_PER_MESSAGE < len(names)
        if not more:
            self._listing = (b"", [])
        return ops.Listing(entries, more)

    # Contents and attributes -------------------------------------------------------------------

    def _digest(self, op: ops.Digest, reply: Reply) -> ops.AnyAnswer | None:
        inode = self._objects.known(op.object)
        fd = os.dup(self._tree.data_fd(inode))
        return self._later.do(partial(self._digest_in_thread, op, fd), reply)

    async def _digest_in_thread(self, op: ops.Digest, fd: int) -> ops.AnyAnswer:
        try:
            digests = await trio.to_thread.run_sync(
                digest_regions, fd, op.start, op.count, op.size, limiter=self._later.reads
            )
            return ops.Digests(digests, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def _fetch(self, op: ops.Fetch, reply: Reply) -> ops.AnyAnswer | None:
        inode = self._objects.known(op.object)
        if op.xattr:
            value = self._tree.get_xattr(inode, op.xattr)
            return ops.Fetched(value[op.offset : op.offset + op.length], [], len(value))
        fd = os.dup(self._tree.data_fd(inode))
        return self._later.do(partial(self._fetch_in_thread, op, fd), reply)

    async def _fetch_in_thread(self, op: ops.Fetch, fd: int) -> ops.AnyAnswer:
        try:
            return await trio.to_thread.run_sync(
                read_range, fd, op.offset, op.length, limiter=self._later.reads
            )
        finally:
            os.close(fd)

    def _inspect(self, op: ops.Inspect) -> ops.AnyAnswer:
        inode = self._objects.known(op.parent)
        if op.name:
            found = self._objects.at(inode, op.name)
            if found is None:
                return ops.Inspected(ops.NO_OBJECT, complete=False, attributes=None)
            inode = found
            if inode.more:
                self._objects.still_stands(inode)
        answer = ops.Inspected(
            inode.id,
            complete=not inode.flags & INCOMPLETE,
            attributes=inspect(self._tree, inode),
        )
        self._tree.drop_unused(inode)
        return answer


def _sorted_names(fd: int) -> list[bytes]:
    return sorted(os.fsencode(name) for name in os.listdir(fd))


def _after(names: list[bytes], after: bytes) -> int:
    """Index of the first name beyond *after* in a sorted list."""
    return bisect.bisect_right(names, after) if after else 0
