"""What is in a directory, told to another node a page at a time.

Looking at what has to be read, and at many names, is done in a thread.
"""

from __future__ import annotations

import bisect
import errno
import os
from collections.abc import Callable
from typing import Final

import trio

from replfs.core import ops
from replfs.core.policy import Policy
from replfs.node.pacing.courtesy import Slice
from replfs.node.replica.objects import Objects
from replfs.node.replica.own import is_own
from replfs.store.inode import Inode
from replfs.store.look import SMALL_DIRECTORY, Seen, directory_digest, look, sorted_names
from replfs.store.reach import RESERVED
from replfs.store.record import INCOMPLETE, Record

_KEPT: Final = 16
"""Directories of which the names are kept from one page to the next."""


class Listings:
    """The directories of a replica, as they are asked for."""

    def __init__(self, objects: Objects, limit: trio.CapacityLimiter) -> None:
        """*limit*: how many threads there may be."""
        self._objects = objects
        self._tree = objects.tree
        self._limit = limit
        self._names: dict[bytes, list[bytes]] = {}
        """Of directories of which there is more to tell, by id; the one asked for last at the end.
        """

    def forget(self) -> None:
        """Whoever asked is gone."""
        self._names.clear()

    async def page(
        self, directory: Inode, op: ops.List, is_wanted: Callable[[], bool]
    ) -> ops.AnyAnswer:
        """One page. Raises OSError."""
        with self._tree.held(directory):
            fd = os.dup(self._tree.directory_fd(directory))
            try:
                return await self._page(directory, op, fd, is_wanted)
            finally:
                os.close(fd)

    async def _page(
        self, directory: Inode, op: ops.List, fd: int, is_wanted: Callable[[], bool]
    ) -> ops.AnyAnswer:
        kept = self._names.pop(op.parent, None) if op.after else None
        seen: dict[bytes, Seen] = {}
        stop, digest = 0, b""
        hidden = RESERVED if directory is self._tree.root else b""
        if op.digests:
            own = Record(directory.id, directory.flags, directory.policy, directory.ack)
            names, stop, seen, digest = await trio.to_thread.run_sync(
                _look, fd, hidden, kept, op.after, own, limiter=self._limit
            )
        elif kept is not None:
            names = kept
        elif os.fstat(fd).st_size > SMALL_DIRECTORY:
            names = await trio.to_thread.run_sync(sorted_names, fd, hidden, limiter=self._limit)
        else:
            names = sorted_names(fd, hidden)
        if not is_wanted():
            return ops.Done(errno.EINTR)
        start = _after(names, op.after)
        if not op.digests:
            stop = start + ops.NAMES_PER_MESSAGE
        entries = await self._entries(
            directory, names[start:stop], seen, is_wanted, digests=op.digests
        )
        if entries is None:
            return ops.Done(errno.EINTR)
        more = stop < len(names)
        if more:
            self._names[op.parent] = names
            if len(self._names) > _KEPT:
                del self._names[next(iter(self._names))]
        return ops.Listing(entries, more, b"" if more else digest)

    async def _entries(
        self,
        directory: Inode,
        names: list[bytes],
        seen: dict[bytes, Seen],
        is_wanted: Callable[[], bool],
        *,
        digests: bool,
    ) -> list[ops.Entry] | None:
        tree = self._tree
        entries = []
        share = Slice()
        for name in names:
            await share.breathe()
            if not is_wanted():
                return None
            one = seen.get(name)
            if one is not None and one.record.object and self._is_unknown(one):
                # Nobody has it in hand: it is what was seen.
                complete = not one.record.flags & INCOMPLETE
                entry = ops.Entry(name, one.record.object, complete, one.digest)
                entries.append(_own(name) if one.record.policy == Policy.NONE else entry)
                continue
            try:
                inode = tree.lookup(directory, name)[0]
            except FileNotFoundError:
                continue
            tree.read_record(inode)
            is_same = one is not None and one.found.st_ino == inode.ino
            digest = one.digest if one is not None and is_same else b""
            # Who asks for digests compares what is below, suspect or not.
            is_whole = not inode.flags & INCOMPLETE if digests else self._objects.is_whole(inode)
            entry = ops.Entry(name, inode.id, is_whole, digest)
            entries.append(_own(name) if is_own(inode) else entry)
            tree.drop_unused(inode)
        return entries

    def _is_unknown(self, one: Seen) -> bool:
        table = self._tree.table
        return table.find(one.found.st_ino) is None and one.record.object not in table.by_id


def _own(name: bytes) -> ops.Entry:
    """What is this node's own stands there, and is no object of the other side's."""
    return ops.Entry(name, ops.NO_OBJECT, complete=False)


def _look(
    fd: int, hidden: bytes, names: list[bytes] | None, after: bytes, own: Record
) -> tuple[list[bytes], int, dict[bytes, Seen], bytes]:
    """All names, where the page ends among them, what is there, the directory's own digest."""
    if names is None:
        names = sorted_names(fd, hidden)
    start = _after(names, after)
    seen, count = look(fd, names[start : start + ops.NAMES_PER_MESSAGE], digests=True)
    digest = b"" if own.flags & INCOMPLETE else directory_digest(fd, own)
    return names, start + count, seen, digest


def _after(names: list[bytes], after: bytes) -> int:
    """Index of the first name beyond *after* in a sorted list."""
    return bisect.bisect_right(names, after) if after else 0
