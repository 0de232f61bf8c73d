"""Step 1 of a resync: a directory of which nothing is known is looked at on both sides.

What the peer has comes in a listing; what is here is looked at in a thread. Where everything below
a directory is unknown, small objects are compared by digests of all there is to them, and only what
is not certainly equal is marked: an unchanged directory costs one question.

Nothing is claimed for that. While a directory's names are all dirty, each change of a name in it
is marked. A change of an object goes to both sides, or is marked, or, if one of them fails, is
marked then: so whatever is changed while the two sides are looked at ends equal or marked, byte by
byte and attribute by attribute, and all the rest was still while it was looked at. Equal digests
never clear a mark of the object's own.
"""

from __future__ import annotations

import bisect
import errno
import os
import stat as _stat
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

import trio

from replfs.core import ops
from replfs.node.asking.question import Question, begin
from replfs.node.pacing.courtesy import Slice
from replfs.node.replication.places import BULK
from replfs.node.resync.work import Work
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.look import SMALL_DIRECTORY, Seen, directory_digest, look, sorted_names
from replfs.store.reach import RESERVED
from replfs.store.record import INCOMPLETE, Record

_NAMES_AHEAD: Final = 10000
"""Unknown directories are expanded only while fewer dirty names than this are waiting."""
_FEW_NAMES: Final = 64
"""Looked at in one go while applications are at work."""
_MARKS_TOGETHER: Final = 64
"""Saved with one transaction: some 0.5 ms in which nothing else runs."""

_HELD_MAX: Final = 1024
"""Directories that are kept in memory from when they are made there until they are filled."""

_ASKED: Final = 0
"""No session's number: whether a directory is empty is being asked."""

Mark = Callable[[], None]


class Expansion:
    """Marks each name, and each object, that may differ in directories that are unknown."""

    def __init__(
        self,
        work: Work,
        is_placed: Callable[[Inode], Awaitable[bool]],
        absent: set[tuple[bytes, bytes]],
        can_fill: Callable[[], bool],
    ) -> None:
        """*absent* learns the dirty names, (id of the directory, name), that the peer has not.

        *can_fill*: whether what is empty there can be filled without being looked at here.
        """
        self._work = work
        self._is_placed = is_placed
        self._absent = absent
        self._can_fill = can_fill
        self._tree = work.tree
        self._policies = work.policies
        self._peer = work.peer
        self._log = work.log
        self._applications = work.pipeline.applications
        self._under_way: set[bytes] = set()
        self._empty: dict[bytes, int] = {}
        """Directories in which the peer has nothing at all yet, each with the session of which
        that is known. What is placed in one of them ends that: once there is something, only the
        peer can tell whether it is still wanted.
        """
        self._held: dict[bytes, Inode] = {}
        """Of those the ones that are held in the tree."""

    def was_made(self, directory: Inode) -> None:
        """The peer has just made a directory: there is nothing in it."""
        self._empty[directory.id] = self._peer.link.session
        # It is about to be filled: to find it again would cost more than that of a small one.
        if directory.id not in self._held and len(self._held) < _HELD_MAX:
            self._held[directory.id] = directory
            self._tree.hold(directory)

    def is_placed_in(self, directory_id: bytes) -> None:
        """Something is about to be placed in a directory: what is in it is not known any more."""
        self._is_not_empty(directory_id)

    def _is_not_empty(self, directory_id: bytes) -> int | None:
        """Or that is not known any more; the session of which it was, None: of none."""
        held = self._held.pop(directory_id, None)
        if held is not None:
            self._tree.release(held)
        return self._empty.pop(directory_id, None)

    def forget(self) -> None:
        """The resync is over."""
        self._empty.clear()
        while self._held:
            self._tree.release(self._held.popitem()[1])

    def pending(self) -> Iterator[tuple[str, bytes]]:
        """What `expand` is to do, while few dirty names are waiting."""
        for directory in self._log.directories_unknown():
            if self._log.dirty_names - len(self._work.stuck) >= _NAMES_AHEAD:
                return
            if not self._is_to_fill(directory):
                yield "list", directory

    # Directories that are empty there ----------------------------------------------------------

    def empty(self) -> Iterator[bytes]:
        """Ids of unknown directories that can be filled."""
        for directory in self._log.directories_unknown():
            if self._is_to_fill(directory) and directory not in self._under_way:
                yield directory

    def _is_to_fill(self, directory_id: bytes) -> bool:
        if self._empty.get(directory_id, 0) != self._peer.link.session or not self._can_fill():
            return False
        marks = self._log.marks(directory_id)
        # Where what is below is unknown, too, the peer may have it at another place.
        return marks is not None and not marks.deep

    @contextmanager
    def attended(self, directory_id: bytes) -> Iterator[bool]:
        """While the block lasts nobody else looks at a directory; False: somebody does already."""
        if directory_id in self._under_way:
            yield False
            return
        self._under_way.add(directory_id)
        try:
            yield True
        finally:
            self._under_way.discard(directory_id)

    async def mark_absent(self, directory: Inode, names: list[bytes]) -> None:
        """The peer has nothing at *names*. Raises OSError."""
        await self._mark([partial(self._mark_absent, directory.id, name) for name in names])

    # Directories that are looked at ------------------------------------------------------------

    async def expand(self, item: tuple[str, bytes]) -> None:
        """Look at one directory, unless that is being done."""
        directory_id = item[1]
        marks = self._log.marks(directory_id)
        if marks is None or not marks.names_all or self._work.is_waiting(item):
            return
        inode = self._work.find(directory_id)
        if inode is None:
            return
        with self.attended(directory_id) as is_free, self._tree.held(inode):
            if is_free and await self._is_placed(inode):
                await self._expand(item, inode, deep=marks.deep)

    async def _expand(self, key: object, directory: Inode, *, deep: bool) -> None:
        version = self._log.mark_version(directory.id)
        marks = self._log.marks(directory.id)
        # What is done about a name changes the directory's attributes on the peer.
        is_alone = marks is not None and marks.names is not None and len(marks.names) == 1
        await self._peer.fence()
        fd = os.dup(self._tree.directory_fd(directory))
        try:
            their_digest = await self._compare_pages(key, directory, fd, deep=deep)
            is_same = deep and is_alone and their_digest == _own_digest(fd, directory)
        except OSError as error:
            self._work.failed(key, directory, error.strerror or "error")
            return
        finally:
            os.close(fd)
        if their_digest is None:
            return
        self._log.clear_names_all(directory.id, version=version)
        if is_same:
            # Not if a name was marked above, or a change has marked anything.
            self._log.clear_attrs(directory.id, version=version)
        self._work.progress.compared += 1
        self._work.succeeded(key)

    async def _compare_pages(
        self, key: object, directory: Inode, fd: int, *, deep: bool
    ) -> bytes | None:
        """Compare all names with what the peer has, as it tells of it; its digest of the directory.

        None: it cannot say. A page at a time, since a directory may have millions of names; the
        peer looks for the next one meanwhile. *fd*: the directory. Raises OSError.
        """
        is_empty = self._is_not_empty(directory.id) == self._peer.link.session
        page: ops.AnyAnswer = ops.Listing([], more=False)
        if not is_empty:
            self._empty[directory.id] = _ASKED
            page = await (await self._ask(directory, b"", digests=deep)).answer()
            was_untouched = self._empty.pop(directory.id, None) is not None
            if isinstance(page, ops.Listing) and not page.entries and not page.more:
                if was_untouched and not deep and self._can_fill():
                    self._empty[directory.id] = self._peer.link.session
                    return None
        hidden = RESERVED if directory is self._tree.root else b""
        if os.fstat(fd).st_size <= SMALL_DIRECTORY:
            names = sorted_names(fd, hidden)
        else:
            names = await trio.to_thread.run_sync(sorted_names, fd, hidden)
        start = 0
        while isinstance(page, ops.Listing):
            stop, next_page = len(names), None
            if page.more:
                if not page.entries:
                    # What follows it is not known, and to ask again would never end.
                    page = ops.Done(errno.EPROTO)
                    break
                last = page.entries[-1].name
                next_page = await self._ask(directory, last, digests=deep)
                stop = bisect.bisect_right(names, last)
            theirs = {entry.name: entry for entry in page.entries}
            await self._compare_all(directory, fd, names[start:stop], theirs, deep=deep)
            if next_page is None:
                return page.digest
            start = stop
            await self._applications.give_way()
            page = await next_page.answer()
        self._work.refused(key, directory, page)
        return None

    async def _ask(self, directory: Inode, after: bytes, *, digests: bool) -> Question:
        if not self._peer.link.has_room(BULK):
            await self._peer.link.wait_room(BULK)
        self._peer.locate(directory.id, BULK)
        return begin(self._peer.link, ops.List(directory.id, after, digests))

    async def _compare_all(
        self,
        directory: Inode,
        fd: int,
        names: list[bytes],
        theirs: dict[bytes, ops.Entry],
        *,
        deep: bool,
    ) -> None:
        """Mark what differs between *names* here and *theirs*. Raises OSError."""
        start = 0
        while start < len(names):
            count = _FEW_NAMES if self._applications.are_busy else ops.NAMES_PER_MESSAGE
            page = names[start : start + count]
            common = [name for name in page if name in theirs]
            seen: dict[bytes, Seen] = {}
            if common:
                seen, looked = await trio.to_thread.run_sync(
                    partial(look, fd, common, digests=deep)
                )
                if looked < len(common):
                    page = page[: bisect.bisect_right(page, common[looked - 1])]
            await self._compare(directory, page, seen, theirs, deep=deep)
            start += len(page)
            if start < len(names):
                await self._applications.give_way()
        await self._mark([partial(self._log.mark_name, directory.id, name) for name in theirs])

    async def _compare(
        self,
        directory: Inode,
        names: list[bytes],
        seen: dict[bytes, Seen],
        theirs: dict[bytes, ops.Entry],
        *,
        deep: bool,
    ) -> None:
        """Mark what may differ under *names*, which leave *theirs*."""
        share = Slice()
        marks: list[Mark] = []
        for name in names:
            await share.breathe()
            entry = theirs.pop(name, None)
            if entry is None and not deep and self._policies.replicates_all:
                # Whatever it is here, it is to be placed.
                marks.append(partial(self._mark_absent, directory.id, name))
                continue
            one = seen.get(name)
            if one is not None and entry is not None:
                if self._is_equal(directory, one, entry, deep=deep):
                    continue
            child = self._work.child(directory, name)
            if child is None:
                if entry is not None:
                    marks.append(partial(self._log.mark_name, directory.id, name))
                continue
            if entry is None:
                marks.append(partial(self._mark_absent, directory.id, name))
            elif entry.object != child.id or not entry.complete or child.more:
                marks.append(partial(self._log.mark_name, directory.id, name))
            if deep:
                marks.append(self._unknown(child))
            self._tree.drop_unused(child)
            if len(marks) >= _MARKS_TOGETHER:
                await self._mark(marks)
                marks.clear()
        await self._mark(marks)

    def _is_equal(self, directory: Inode, one: Seen, entry: ops.Entry, *, deep: bool) -> bool:
        """Whether the peer certainly has what is here, the name included."""
        record, found = one.record, one.found
        if not record.object or record.object != entry.object or not entry.complete:
            return False
        if record.flags & INCOMPLETE:
            return False  # it is to be known as whole here
        if deep and not (one.digest and one.digest == entry.digest):
            return False
        if found.st_nlink != 1:
            return False
        table = self._tree.table
        known = table.find(found.st_ino)
        if known is None:
            if record.object in table.by_id:
                return False  # another one has this id
        elif known.id != record.object or known.gone:
            return False
        return self._policies.is_replicated_entry(
            directory, one.name, record.policy, directory=False
        )

    def _mark_absent(self, directory_id: bytes, name: bytes) -> None:
        """The peer has nothing at a name, so there is nothing to be moved aside."""
        self._log.mark_name(directory_id, name)
        self._log.set_gathered(directory_id, name)
        self._absent.add((directory_id, name))

    def _unknown(self, child: Inode) -> Mark:
        handle = locators.of(self._tree, child)
        if child.is_directory or child.type == _stat.S_IFREG:
            return partial(
                self._log.mark_unknown,
                child.id,
                directory=child.is_directory,
                deep=True,
                handle=handle,
            )
        return partial(self._log.mark_attrs, child.id, handle=handle)

    async def _mark(self, marks: list[Mark]) -> None:
        """Make all *marks*, a few at a time with one transaction."""
        for start in range(0, len(marks), _MARKS_TOGETHER):
            if start:
                await trio.lowlevel.checkpoint()
            with self._log.together():
                for mark in marks[start : start + _MARKS_TOGETHER]:
                    mark()


def _own_digest(fd: int, directory: Inode) -> bytes:
    """As the peer makes it of its own."""
    return directory_digest(fd, Record(directory.id, 0, directory.policy, directory.ack))
