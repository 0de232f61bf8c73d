"""Many small new objects of one directory with one message and one answer.

What is placed so is claimed so: all names of a batch and their objects at once, for as long as the
batch is on its way, which is no longer than a region's transfer. What cannot go with others, or was
not taken by the peer as a whole, is left for the steps that carry objects one by one.
"""

from __future__ import annotations

import os
import stat as _stat
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import trio

from replfs.core import footprint, ops
from replfs.errors import ProtocolError
from replfs.node.pacing.rate import Rate
from replfs.node.replication.places import BULK
from replfs.node.resync.names import Names
from replfs.node.resync.whole import WHOLE_MAX
from replfs.node.resync.work import Work
from replfs.store.inode import Inode
from replfs.store.look import Whole, read_whole
from replfs.store.record import PRIVILEGED, ROOT_ID

_MANY: Final = 64
_FEW: Final = 8
"""Placed with one message while applications are at work."""

Batch = tuple[bytes, tuple[bytes, ...]]
"""A directory's id, and names in it."""


class Batches:
    """Step 3 of a resync, for what is small and new."""

    def __init__(self, work: Work, names: Names, rate: Rate) -> None:
        self._work = work
        self._names = names
        self._rate = rate
        self._tree = work.tree
        self._peer = work.peer
        self._log = work.log

    def pending(self) -> Iterator[Batch]:
        """What may be placed together, of all dirty names."""
        if not (PRIVILEGED and self._peer.understands(ops.PlaceMany)):
            return
        current = b""
        names: list[bytes] = []
        for directory, name in self._log.names_pending():
            if names and (directory != current or len(names) >= self._count()):
                yield current, tuple(names)
                names = []
            current = directory
            if self._names.may_go_whole(directory, name):
                names.append(name)
        if names:
            yield current, tuple(names)

    def _count(self) -> int:
        return _FEW if self._work.pipeline.applications.are_busy else _MANY

    async def place(self, batch: Batch) -> None:
        """Place of *batch* what goes whole."""
        directory_id, names = batch
        directory = self._work.find(directory_id)
        if directory is None:
            return
        try:
            with self._tree.held(directory):
                if await self._names.is_placed(directory):
                    await self._place_all(directory, deque(names))
        except (OSError, ProtocolError):
            return  # what it is about is found out where objects are carried one by one

    async def _place_all(self, directory: Inode, names: deque[bytes]) -> None:
        while names:
            with ExitStack() as holds:
                children = self._next(directory, names, holds)
                if children:
                    files = (one for one in children.values() if one.type == _stat.S_IFREG)
                    await self._rate.spend(sum(one.size for one in files))
                    claims = footprint.together(
                        claim
                        for name, child in children.items()
                        for claim in footprint.entry_of(directory, name, child)
                    )
                    async with self._work.claim(claims):
                        await self._place_claimed(directory, children)

    def _next(self, directory: Inode, names: deque[bytes], holds: ExitStack) -> dict[bytes, Inode]:
        """Take as many as one message holds off *names*: those of them that go whole."""
        children: dict[bytes, Inode] = {}
        left = ops.PAYLOAD_MAX
        while names:
            try:
                child = self._work.child(directory, names[0])
            except OSError:
                child = None
            if child is not None:
                if not self._goes_whole(child):
                    self._tree.drop_unused(child)
                elif child.type == _stat.S_IFREG and child.size > left:
                    self._tree.drop_unused(child)
                    break
                else:
                    left -= child.size if child.type == _stat.S_IFREG else 0
                    holds.enter_context(self._tree.held(child))
                    children[names[0]] = child
            names.popleft()
        return children

    def _goes_whole(self, child: Inode) -> bool:
        if child.type in {_stat.S_IFLNK, _stat.S_IFDIR}:
            return not child.foreign
        return (
            child.type == _stat.S_IFREG
            and child.size <= WHOLE_MAX
            and self._names.is_all_new(child)
        )

    async def _place_claimed(self, directory: Inode, children: dict[bytes, Inode]) -> None:
        # Whatever is marked from here on counts as marked since.
        version = self._log.mark_version(directory.id)
        wanted = [
            (name, child.ino)
            for name, child in children.items()
            if self._log.is_gathered(directory.id, name)
            and self._work.policies.is_replicated_name(directory, name, child)
        ]
        fd = os.dup(self._tree.directory_fd(directory))
        try:
            read = await trio.to_thread.run_sync(read_whole, fd, wanted, ops.PAYLOAD_MAX)
        finally:
            os.close(fd)
        if not read:
            return
        items = [
            ops.Item(children[name].id, name, _attributes(children[name], one))
            for name, one in read.items()
        ]
        payload = b"".join(
            one.contents for one in read.values() if _stat.S_ISREG(one.found.st_mode)
        )
        self._peer.locate(directory.id, BULK)
        self._names.expansion.is_placed_in(directory.id)
        answer = await self._peer.ask(ops.PlaceMany(directory.id, items), payload or None)
        if not isinstance(answer, ops.PlacedMany) or len(answer.results) != len(items):
            # Most likely the directory is not where it was: it is looked for from the top.
            self._peer.located[BULK].intersection_update({ROOT_ID})
            return
        # What is marked of each stands for its name, and is saved with the clearing of that.
        with self._log.together():
            for item, result in zip(items, answer.results, strict=True):
                if isinstance(result, ops.Placed):
                    self._placed(directory, children[item.name], item, result, version)

    def _placed(
        self, directory: Inode, child: Inode, item: ops.Item, result: ops.Placed, version: int
    ) -> None:
        if result.created and result.complete:
            self._log.clear_tail(child.id, None, version=version)
            self._log.clear_regions(child.id, 0, None, version=version)
            self._log.clear_attrs(child.id, version=version)
            self._work.progress.files += 1
            self._work.progress.bytes += item.attributes.size
        else:
            self._peer.located[BULK].add(child.id)
            if not result.complete:
                self._names.mark_contents(child, created=result.created)
        self._names.was_placed(directory, item.name, version)


def _attributes(child: Inode, one: Whole) -> ops.Attributes:
    found = one.found
    is_link = child.type == _stat.S_IFLNK
    return ops.Attributes(
        mode=found.st_mode,
        uid=found.st_uid,
        gid=found.st_gid,
        rdev=0,
        size=len(one.contents) if child.type == _stat.S_IFREG else 0,
        mtime=found.st_mtime_ns,
        target=one.contents if is_link else b"",
        policy=child.policy,
        ack=child.ack,
        xattrs=one.xattrs,
    )
