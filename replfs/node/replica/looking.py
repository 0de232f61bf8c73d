"""What is asked about a replica, and changes nothing: listings, digests, bytes, attributes.

Of what is this node's own no more is told than that its name is taken.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from replfs.core import ops
from replfs.node.asking.attributes import inspect
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.replica.later import Later, Reply
from replfs.node.replica.listings import Listings
from replfs.node.replica.objects import Objects
from replfs.node.replica.own import is_own
from replfs.store import cached
from replfs.store.contents import digest_regions, read_range
from replfs.store.record import INCOMPLETE
from replfs.store.tree import Tree


class Looking:
    """Answers what a primary asks about *tree*."""

    def __init__(self, tree: Tree, objects: Objects, later: Later, unwritten: Unwritten) -> None:
        self._unwritten = unwritten
        self._tree = tree
        self._objects = objects
        self._later = later
        self._listings = Listings(objects, later.reads)
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
        self._listings.forget()

    def _list(self, op: ops.List, reply: Reply) -> ops.AnyAnswer | None:
        directory = self._objects.known(op.parent)
        if self._unwritten.number:
            op = ops.List(op.parent, op.after)  # they would be of what is in memory
        page = partial(self._listings.page, directory, op, self._later.still())
        return self._later.do(page, reply)

    # Contents and attributes -------------------------------------------------------------------

    def _digest(self, op: ops.Digest, reply: Reply) -> ops.AnyAnswer | None:
        inode = self._objects.known(op.object)
        fd = os.dup(self._tree.data_fd(inode))
        if self._unwritten.number:
            cached.forget(fd)
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
            if found is None or is_own(found):
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
