"""Steps 4 and 5 of a resync: what is in an object, its data and then its attributes."""

from __future__ import annotations

import errno
import os
import stat as _stat
from collections.abc import Iterator
from functools import partial
from typing import Final

import trio
import xxhash

from replfs.core import footprint, ops
from replfs.core.marked import INFINITE
from replfs.core.regions import REGION_SHIFT, REGION_SIZE
from replfs.node.asking.attributes import read as read_attributes
from replfs.node.pacing.ahead import ahead
from replfs.node.pacing.rate import Allowance, Rate
from replfs.node.replication.flight import describe
from replfs.node.replication.places import BULK
from replfs.node.resync.inorder import InOrder
from replfs.node.resync.names import Names
from replfs.node.resync.work import UNREPRESENTABLE, Work
from replfs.store.holes import segments
from replfs.store.inode import Inode

_REGIONS_AT_ONCE: Final = ops.PAYLOAD_MAX // REGION_SIZE
_RUNS_ON_THEIR_WAY: Final = 3
"""Of one file."""
_FEW_REGIONS: Final = 2
"""Sent with one message while applications are at work."""
DISK_FAILED: Final = (
    "it differs, and this node's disk has failed to write: the peer may be right. Start this node "
    "again, or promote a peer"
)

Run = tuple[int, int]
"""Regions of a file, half-open."""


class Contents:
    """What is in the objects that are placed."""

    def __init__(self, work: Work, names: Names, rate: Rate) -> None:
        self._work = work
        self._names = names
        self._rate = rate
        self._source = work.source
        self._unclaimed: set[bytes] = set()
        """Objects of which regions are on their way without a claim."""
        self._tree = work.tree
        self._peer = work.peer
        self._log = work.log
        self.hurried: set[Inode] = set()
        """Objects that a strict change waits for: *rate* does not hold them back."""

    # 4. Data -----------------------------------------------------------------------------------

    async def data(self, object_id: bytes) -> None:
        """Send the dirty regions of a file; of a small one its attributes too."""
        key = ("data", object_id)
        marks = self._log.marks(object_id)
        if marks is None or not marks.data or self._work.is_waiting(key):
            return
        if object_id in self._unclaimed:
            return
        inode = self._work.find(object_id)
        if inode is None:
            return
        with self._tree.held(inode):
            if await self._names.is_placed(inode):
                await self._send_data(key, inode)

    async def _send_data(self, key: object, inode: Inode) -> None:
        if inode.type != _stat.S_IFREG:
            self._log.clear_tail(inode.id, None)
            self._log.clear_regions(inode.id, 0, None)
            return
        try:
            fd = self._tree.open(inode, os.O_RDONLY)
        except OSError as error:
            self._work.failed(key, inode, error.strerror or "cannot be read")
            return
        try:
            if not await self._send_small(key, inode, fd):
                await self._send_from_snapshot(key, inode)
                await self._send_regions(key, inode, fd)
        except OSError as error:
            self._work.failed(key, inode, error.strerror or "cannot be read")
        finally:
            os.close(fd)

    async def _send_small(self, key: object, inode: Inode, fd: int) -> bool:
        """A small file in one claim: its dirty regions, then all its attributes. False: too large.

        Whether it was carried, or failed, is noted by *key*.
        """
        size = os.fstat(fd).st_size
        if size > ops.PAYLOAD_MAX:
            return False
        dirty = self._log.dirty_regions(inode.id, size)
        count = min(size, sum(last - first for first, last in dirty) << REGION_SHIFT)
        async with (
            self._rate.allowance(count, at_once=inode in self.hurried) as allowance,
            self._work.claim(footprint.whole(inode)),
        ):
            if os.fstat(fd).st_size > ops.PAYLOAD_MAX:
                return False  # it has grown while its turn was awaited
            if not self._work.is_on_peers(inode):
                return True
            version = self._log.mark_version(inode.id)
            first = 0
            while (run := self._next_run(inode, fd, first)) is not None:
                if not await self._send_run(key, inode, fd, run, allowance):
                    return True
                self._log.clear_regions(inode.id, *run, version=version)
                first = run[1]
            await self._finish_claimed(("attrs", inode.id), inode, version)
            self._work.succeeded(key)
            return True

    async def _send_from_snapshot(self, key: object, inode: Inode) -> None:
        """What can be read from the baseline's snapshot: without holding up writes."""
        fd = self._source.open(inode)
        if fd < 0:
            return
        self._unclaimed.add(inode.id)
        try:
            first = 0
            while (run := self._next_run(inode, fd, first)) is not None:
                count = (run[1] - run[0]) << REGION_SHIFT
                async with self._rate.allowance(count) as allowance:
                    sent = await self._send_run(key, inode, fd, run, allowance)
                if not sent or not await self._is_kept(inode, fd, run):
                    return
                first = run[1]
                self._peer.progressed()
                await self._work.pipeline.applications.give_way()
        finally:
            self._unclaimed.discard(inode.id)
            os.close(fd)

    async def _is_kept(self, inode: Inode, fd: int, run: Run) -> bool:
        """Whether what was sent from the snapshot still is what is here; else it is dirty."""
        start, stop = run[0] << REGION_SHIFT, run[1] << REGION_SHIFT
        async with self._work.claim(footprint.data(inode, start, stop)):
            if not self._source.is_same(inode, fd):
                self._log.mark_data(inode.id, start, stop)
                return False
            self._clear_run(inode, run, None)
        return True

    def _clear_run(self, inode: Inode, run: Run, version: int | None) -> None:
        self._log.clear_regions(inode.id, *run, version=version)
        marks = self._log.marks(inode.id)
        # A tail that begins before the run came while its turn was awaited.
        if marks is not None and run[0] <= marks.tail < run[1]:
            self._log.clear_tail(inode.id, run[1], version=version)

    async def _send_regions(self, key: object, inode: Inode, fd: int) -> None:
        """All that is dirty, some runs at a time: one is read while another is written there."""
        order = InOrder[Run](partial(self._clear_run, inode))

        def runs() -> Iterator[Run]:
            first = 0
            while (run := self._next_run(inode, fd, first)) is not None:
                first = run[1]
                order.begin(run)
                yield run

        send = partial(self._send_in_turn, key, inode, fd, order)
        applications = self._work.pipeline.applications
        if await ahead(runs(), send, applications, tasks=_RUNS_ON_THEIR_WAY):
            self._work.succeeded(key)
            await self.finish(inode.id)

    async def _send_in_turn(
        self, key: object, inode: Inode, fd: int, order: InOrder[Run], run: Run
    ) -> bool:
        count = (run[1] - run[0]) << REGION_SHIFT
        async with self._rate.allowance(count, at_once=inode in self.hurried) as allowance:
            # While leave was awaited the file may have been cut off, or sent by another task.
            left = self._next_run(inode, fd, *run)
            if left is None:
                order.drop(run)
                return True
            claims = footprint.data(inode, left[0] << REGION_SHIFT, left[1] << REGION_SHIFT)
            async with self._work.claim(claims):
                if not self._work.is_on_peers(inode):
                    return False
                version = self._log.mark_version(inode.id)
                if not await self._send_run(key, inode, fd, left, allowance):
                    return False
                order.end(run, left, version)
        self._peer.progressed()
        return True

    def _next_run(self, inode: Inode, fd: int, first: int, last: int = INFINITE) -> Run | None:
        end = (os.fstat(fd).st_size + REGION_SIZE - 1) >> REGION_SHIFT
        busy = self._work.pipeline.applications.are_busy
        limit = _FEW_REGIONS if busy else _REGIONS_AT_ONCE
        return self._log.next_run(inode.id, first, min(end, last), limit)

    async def _send_run(
        self, key: object, inode: Inode, fd: int, run: Run, allowance: Allowance
    ) -> bool:
        """Send a run of regions, or those of them that differ; the claim is the caller's."""
        start = run[0] << REGION_SHIFT
        count = run[1] - run[0]
        data = await trio.to_thread.run_sync(os.pread, fd, count << REGION_SHIFT, start)
        parts = [(0, len(data))]
        marks = self._log.marks(inode.id)
        self._peer.locate(inode.id, BULK)
        if marks is not None and marks.compare:
            answer = await self._peer.ask(ops.Digest(inode.id, start, count, REGION_SIZE))
            if not isinstance(answer, ops.Digests):
                self._work.refused(key, inode, answer)
                return False
            parts = _differing(data, answer.digests)
            if self._work.pipeline.unwritten.number and self._may_be_older(inode, start, parts):
                self._work.failed(key, inode, DISK_FAILED)
                return False
        for left, right, is_hole in _pieces(segments(fd, start, start + len(data)), parts, start):
            length = right - left
            if is_hole:
                op, payload = ops.Data(inode.id, left, length), None
            else:
                op = ops.Data(inode.id, left)
                payload = data[left - start : right - start]
                allowance.left -= length
            answer = await self._peer.ask(op, payload)
            written = 0 if is_hole else length
            if not isinstance(answer, ops.Done) or answer.errno or answer.written != written:
                number = self._work.refused(key, inode, answer)
                self._peer.note_error(op, describe(number or errno.ENOSPC))
                return False
            self._work.progress.bytes += written
        return True

    def _may_be_older(self, inode: Inode, start: int, parts: list[tuple[int, int]]) -> bool:
        """Whether any of *parts*, relative to *start*, is not known to have been changed here.

        What the kernel had to drop of it is what the disk has, and the peer's is the newer one.
        """
        return any(
            is_unknown
            for low, high in parts
            for *_, is_unknown in self._log.split_changed(inode.id, start + low, start + high)
        )

    # 5. Finish ---------------------------------------------------------------------------------

    async def finish(self, object_id: bytes) -> None:
        """Make an object's attributes, extended attributes and size exactly what they are here."""
        key = ("attrs", object_id)
        if not self._may_finish(object_id) or self._work.is_waiting(key):
            return
        inode = self._work.find(object_id)
        if inode is None:
            return
        with self._tree.held(inode):
            await self.finish_held(inode)

    async def finish_held(self, inode: Inode) -> None:
        """The same, of an object that the caller holds."""
        key = ("attrs", inode.id)
        if not self._may_finish(inode.id) or self._work.is_waiting(key):
            return
        if not await self._names.is_placed(inode):
            return
        async with self._work.claim(footprint.whole(inode)):
            if not self._may_finish(inode.id) or not self._work.is_on_peers(inode):
                return
            try:
                await self._finish_claimed(key, inode, self._log.mark_version(inode.id))
            except OSError as error:
                self._work.failed(key, inode, error.strerror or "cannot be read")

    def _may_finish(self, object_id: bytes) -> bool:
        """Attributes come last: after the data, and after the names in a directory."""
        marks = self._log.marks(object_id)
        if marks is None or not marks.attrs or marks.names is not None:
            return False
        if not marks.data:
            return True
        inode = self._tree.table.by_id.get(object_id)
        if inode is None:
            return False
        try:
            # Not what is known of it: after a truncation that failed here it may be larger.
            size = self._tree.stat(inode).st_size
        except OSError:
            return False  # why is found out, and told, where its data is read
        end = (size + REGION_SIZE - 1) >> REGION_SHIFT
        return self._log.next_run(object_id, 0, end) is None

    async def _finish_claimed(self, key: object, inode: Inode, version: int) -> None:
        attributes = read_attributes(self._tree, inode)
        self._peer.locate(inode.id, BULK)
        answer = await self._peer.ask(ops.Finish(inode.id, attributes))
        if not isinstance(answer, ops.Done) or answer.errno:
            number = self._work.refused(key, inode, answer)
            if number in UNREPRESENTABLE:
                self._work.unrepresentable(inode, number)
            return
        self._log.clear_tail(inode.id, None, version=version)
        self._log.clear_regions(
            inode.id, (attributes.size + REGION_SIZE - 1) >> REGION_SHIFT, None, version=version
        )
        self._log.clear_attrs(inode.id, version=version)
        self._peer.unrepresentable.discard(inode.id)
        self._work.progress.files += 1
        self._work.succeeded(key)
        if not inode.is_directory:
            self._peer.forget([inode.id], BULK)
        self._peer.progressed()


def _differing(data: bytes, digests: bytes) -> list[tuple[int, int]]:
    """(low, high) of the parts of *data* whose digests differ from the peer's, joined."""
    parts: list[tuple[int, int]] = []
    for index in range(0, len(data), REGION_SIZE):
        piece = data[index : index + REGION_SIZE]
        place = index // REGION_SIZE * 16
        if xxhash.xxh3_128_digest(piece) == digests[place : place + 16]:
            continue
        if parts and parts[-1][1] == index:
            parts[-1] = (parts[-1][0], index + len(piece))
        else:
            parts.append((index, index + len(piece)))
    return parts


def _pieces(
    pieces: list[tuple[int, int, bool]], parts: list[tuple[int, int]], start: int
) -> Iterator[tuple[int, int, bool]]:
    """What to send of *pieces*: of data what lies in *parts* (relative to *start*).

    Holes all the same: the peer may have zeros there, which have the same digest.
    """
    for left, right, is_hole in pieces:
        if is_hole:
            yield left, right, True
            continue
        for low, high in parts:
            first, last = max(left, start + low), min(right, start + high)
            if first < last:
                yield first, last, False
