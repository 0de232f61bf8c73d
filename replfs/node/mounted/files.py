"""Contents of files through a primary's mount: open, write, truncate, fsync.

Data operations go to both sides at once; barriers drain the object, then flush both sides at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat as _stat
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

from replfs.core import footprint, ops
from replfs.core.policy import Policy
from replfs.core.scheduler import END
from replfs.errors import HalfDone
from replfs.node.mounted.late_times import LateTimes
from replfs.node.mounted.view import View
from replfs.node.pacing import flush
from replfs.node.replication.flight import Flight
from replfs.node.replication.pipeline import Pipeline, Steps
from replfs.store.activity import KIND_ATTRS, KIND_DATA, KIND_FILE, Slot
from replfs.store.contents import put, resize, write_all
from replfs.store.describe import PERMISSIONS, SET_ID
from replfs.store.inode import Handle, Inode
from replfs.store.syscalls import failure

_REGION_SHIFT: Final = 20
"""The activity log's regions: 1 MiB."""
_REGIONS_MAX: Final = 8
"""A write over more regions than this is noted as the whole file."""


class Files(View):
    """The looks, and what changes contents."""

    def __init__(
        self,
        pipeline: Pipeline,
        status: Callable[[], dict[str, Any]],
        checkpoint: Callable[[], Awaitable[None]],
    ) -> None:
        """*checkpoint*: everything acknowledged so far is stable on both sides when it returns."""
        super().__init__(pipeline.tree, status)
        self.pipeline = pipeline
        self.checkpoint = checkpoint
        self.policies = pipeline.policies
        self._late_times = LateTimes()
        for handle in self.table.handles.values():
            if handle.silent:  # from when this node was a primary before
                self._count_silent(handle, 1)

    # Data --------------------------------------------------------------------------------------

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Both sides get the same bytes at the same time."""
        began = time.monotonic_ns()
        handle = self.table.handles[number]
        inode = handle.inode
        if inode.gone:
            return write_all(handle.fd, data, offset)
        if self.policies.writeback:
            self._late_times.came(inode, handle.fd)
        if inode.privileges is not False and self.tree.must_clear_privileges(inode):
            await self._clear_privileges(inode)
        size = len(data)
        start = min(offset, inode.size)
        ticket, policy = await self.pipeline.turn(
            footprint.data(inode, start, offset + size), "write", inode
        )
        slots: list[Slot] = []
        let_go = False
        flight = Flight(self.pipeline, "write", size)
        try:
            replicated = policy != Policy.NONE and bool(self.pipeline.peers)
            if replicated:
                if not inode.id:
                    self.tree.ensure_id(inode)
                slots = self._note_range(inode, start, offset + size)
            stamp = self.tree.now()
            if replicated and not inode.gone:
                self.pipeline.send(ops.Write(inode.id, offset, stamp), data, flight, start, policy)
            done = flight.here = put(handle.fd, data, offset, stamp)
            if offset + done.written > inode.size:
                inode.size = offset + done.written
            if flight.waiting:
                let_go = self.pipeline.let_go(flight, slots, inode, policy)
            if let_go:
                slots = []
            else:
                await self.pipeline.settled(flight, policy)
        finally:
            for slot in slots:
                self.pipeline.activity.end(slot)
            self.pipeline.release_claim(ticket)
            self.pipeline.measure("write", began)
        if done.errno:
            raise failure(done.errno)
        if let_go:
            await self.pipeline.catch_up()
        if handle.synchronous:
            await self._flush(inode, data_only=handle.synchronous != os.O_SYNC)
        return done.written

    def _note_range(self, inode: Inode, start: int, stop: int) -> list[Slot]:
        first = start >> _REGION_SHIFT
        last = (stop - 1) >> _REGION_SHIFT if stop > start else first
        if first == last:
            return self.pipeline.note(((inode, KIND_DATA, first),))
        if last - first > _REGIONS_MAX:
            return self.pipeline.note(((inode, KIND_FILE, 0),))
        return self.pipeline.note(
            tuple((inode, KIND_DATA, region) for region in range(first, last + 1))
        )

    async def _clear_privileges(self, inode: Inode) -> None:
        """A write takes set-id bits and capabilities away (write(2), chmod(2))."""
        mode = self.tree.stat(inode).st_mode & 0o7777
        cleared = mode & ~_stat.S_ISUID
        if mode & _stat.S_IXGRP:
            cleared &= ~_stat.S_ISGID
        if cleared != mode:
            await self.set_attributes(inode, mode=cleared)
        if b"security.capability" in self.tree.list_xattrs(inode):
            await self._remove_capability(inode)
        inode.privileges = False

    async def truncate(self, inode: Inode, size: int, mtime: int | None, fd: int) -> None:
        """Set the size: a data operation on everything from the smaller size to the end."""
        began = time.monotonic_ns()
        if inode.gone:
            os.ftruncate(fd if fd >= 0 else self.tree.data_fd(inode), size)
            inode.size = size
            return
        if self.tree.must_clear_privileges(inode):
            await self._clear_privileges(inode)
        low = min(size, self.tree.stat(inode).st_size)
        ticket, policy = await self.pipeline.turn(
            footprint.data(inode, low, END), "truncate", inode
        )
        slots: list[Slot] = []
        let_go = False
        flight = Flight(self.pipeline, "truncate")
        try:
            replicated = policy != Policy.NONE and bool(self.pipeline.peers)
            if replicated:
                self.tree.ensure_id(inode)
                slots = self.pipeline.note(((inode, KIND_FILE, 0),))
            stamp = self.tree.now() if mtime is None else mtime
            own = fd if fd >= 0 else self.tree.data_fd(inode)
            if replicated:
                self.pipeline.send(ops.Truncate(inode.id, size, stamp), None, flight, low, policy)
            done = flight.here = resize(own, size, stamp)
            # After an error rather too small: a write beyond the end counts from there.
            inode.size = min(inode.size, size) if done.errno else size
            if flight.waiting:
                let_go = self.pipeline.let_go(flight, slots, inode, policy)
            if let_go:
                slots = []
            else:
                await self.pipeline.settled(flight, policy)
        finally:
            for slot in slots:
                self.pipeline.activity.end(slot)
            self.pipeline.release_claim(ticket)
            self.pipeline.measure("truncate", began)
        if done.errno:
            raise failure(done.errno)
        if let_go:
            await self.pipeline.catch_up()

    # Files -------------------------------------------------------------------------------------

    async def open(self, nodeid: int, flags: int) -> Handle:
        """A handle; O_TRUNC arrives here and is a truncation like any other."""
        inode = self.inode(nodeid)
        if flags & os.O_ACCMODE != os.O_RDONLY:
            self.check_confirmable(inode)
        if self.policies.writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            # The kernel reads the rest of a page that is written in part.
            flags = flags & ~os.O_ACCMODE | os.O_RDWR
        is_first = not inode.was_opened
        handle = self.open_handle(inode, flags)
        if is_first:  # the kernel keeps contents from one open to the next
            self.begin_to_read(handle)
        if flags & os.O_TRUNC:
            try:
                await self.truncate(inode, 0, None, handle.fd if handle.writable else -1)
            except BaseException:
                self._close(handle.number)
                raise
        self.decide_silence(handle)
        return handle

    def decide_silence(self, handle: Handle) -> None:
        """Whether the kernel has to tell of each close of *handle*: where one awaits something."""
        inode = handle.inode
        policy = self.policies.effective(inode)
        if not (self.policies.writeback or self.policies.is_deferred(inode, policy)):
            handle.silent = True
            self._count_silent(handle, 1)

    def _count_silent(self, handle: Handle, change: int) -> None:
        silent = self.pipeline.silent
        count = silent.get(handle.inode, 0) + change
        if count:
            silent[handle.inode] = count
        else:
            del silent[handle.inode]

    def check_confirmable(self, inode: Inode) -> None:
        """EOPNOTSUPP where a write would return before it could be `strict`."""
        if self.policies.writeback and self.policies.effective(inode) == Policy.STRICT:
            raise failure(errno.EOPNOTSUPP)

    async def flush(self, number: int) -> None:
        """At close: what was not awaited by itself is."""
        inode = self.handle(number).inode
        await self._settle_times(inode)
        if inode.unconfirmed:
            await self.pipeline.together(inode.unconfirmed)

    async def _settle_times(self, inode: Inode) -> None:
        mtime = self._late_times.due(inode)
        if mtime is not None and not inode.gone:
            await self.set_attributes(inode, mtime=mtime)

    async def release(self, number: int) -> None:
        """A file's handle is closed."""
        await self._settle_times(self.handle(number).inode)
        self.close(number)

    @property
    def closes_at_once(self) -> bool:
        """Not where the kernel owns the times, of which one may have to be set again."""
        return not self.policies.writeback

    def close(self, number: int) -> None:
        """A file's handle is closed, and nothing is owed."""
        handle = self.handle(number)
        if handle.silent:
            self._count_silent(handle, -1)
        self._close(number)
        self._late_times.forget(handle.inode)

    async def fsync(self, number: int, *, data_only: bool) -> None:
        """Stable on both sides: what was in flight first, then both disks at once."""
        handle = self.handle(number)
        if handle.inode.gone:
            await flush.begin(handle.fd, data_only=data_only).wait()
            return
        await self._settle_times(handle.inode)
        await self._flush(handle.inode, data_only=data_only)

    async def fsyncdir(self, number: int, *, data_only: bool) -> None:
        """As `fsync`, for a directory; for the root, everything."""
        inode = self.handle(number).inode
        if inode is self.tree.root:
            self.pipeline.part_from_lacking()
            await self.checkpoint()
        elif not inode.gone:
            await self._flush(inode, data_only=data_only)

    async def _flush(self, inode: Inode, *, data_only: bool) -> None:
        """Drain the object, then flush it here and on the peers in parallel.

        The claim is given back as soon as both flushes are under way: later operations on the
        object do not wait for the disks.
        """
        began = time.monotonic_ns()
        if self.pipeline.unwritten.number:
            self.pipeline.unwritten.check(inode.id)
        ticket, policy = await self.pipeline.turn(footprint.whole(inode), "fsync", inode)
        flight = Flight(self.pipeline, "fsync")
        try:
            fd = self.tree.directory_fd(inode) if inode.is_directory else self.tree.data_fd(inode)
            own = flush.begin(fd, data_only=data_only)
            try:
                if policy != Policy.NONE and self.pipeline.peers:
                    self.tree.ensure_id(inode)
                    self.pipeline.send(ops.Sync(inode.id, data_only), None, flight, 0, policy)
            except BaseException:
                await own.wait()
                raise
        finally:
            self.pipeline.release_claim(ticket)
        try:
            await own.wait()
        except OSError as error:
            self._note_unwritten(inode, error)
            # A peer that could not flush says so once: it is recorded whatever came of it here.
            if flight.waiting:
                await self.pipeline.confirmed(flight)
            flight.settle(strict=False)
            raise
        if flight.waiting:
            await self.pipeline.confirmed(flight)
        await self.pipeline.together(inode.unconfirmed)
        try:
            flight.settle(strict=policy == Policy.STRICT)
        finally:
            for peer in self.pipeline.peers:
                await peer.marks_durable()
        self.pipeline.measure("fsync", began)

    def _note_unwritten(self, inode: Inode, error: OSError) -> None:
        """What was written to the object may never be on the disk here, whatever comes later."""
        object_id = b""
        with contextlib.suppress(OSError):  # it is the same disk
            object_id = self.tree.ensure_id(inode)
        self.pipeline.unwritten.failed_for(object_id, error)

    # What contents take with them ---------------------------------------------------------------

    async def set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
    ) -> os.stat_result | None:
        """Mode, owner, times; None leaves one as it is.

        Returns the attributes, unless others may have changed them since.
        """
        tree = self.tree
        owner = uid is not None or gid is not None
        timed = atime is not None or mtime is not None
        found: os.stat_result | None = None

        def told(mode_is: int, atime_is: int | None, mtime_is: int | None) -> ops.AnyOp:
            changes_mode = (owner or mode is not None) and inode.type != _stat.S_IFLNK
            return ops.SetAttr(
                inode.id,
                mode_is & PERMISSIONS if changes_mode else ops.KEEP,
                ops.KEEP if uid is None else uid,
                ops.KEEP if gid is None else gid,
                atime_is,
                mtime_is,
            )

        def apply() -> Steps:
            nonlocal found
            is_sent = self.is_sent(inode)
            before = None if timed or inode.gone else self._described(inode, owner=owner)
            privileges = inode.privileges
            foretold = _foretold(before, inode, mode, uid, gid) if is_sent else None
            if foretold is not None:
                yield told(foretold[0], None, None)
            if owner:
                tree.set_owner(
                    inode, ops.KEEP if uid is None else uid, ops.KEEP if gid is None else gid
                )
            try:
                if mode is not None:
                    tree.set_mode(inode, mode)
                if timed:
                    tree.set_times(inode, atime, mtime)
            except OSError as error:
                if owner or (mode is not None and timed):
                    raise HalfDone(error.errno, error.strerror) from error
                raise
            # What resulted travels: the store clamps times that it cannot hold, chown(2) may clear
            # set-id bits, chmod(2) the set-group-ID one.
            after = found = tree.stat(inode)
            resulted = (after.st_mode, after.st_uid, after.st_gid)
            if foretold is not None:
                if resulted != foretold:
                    self.pipeline.record(lambda peer: peer.mark(ops.SetAttr(inode.id)))
            elif is_sent and resulted != before:
                yield told(
                    after.st_mode,
                    None if atime is None else after.st_atime_ns,
                    None if mtime is None else after.st_mtime_ns,
                )
            elif is_sent:
                inode.privileges = privileges  # tar(1) and rsync(1) say what is so already

        touched = () if inode.gone else ((inode, KIND_ATTRS, 0),)
        held = await self.pipeline.change(
            "setattr",
            footprint.whole(inode),
            inode,
            touched,
            apply,
            policy=Policy.NONE if inode.gone else None,
        )
        return found if held else None

    def _described(self, inode: Inode, *, owner: bool) -> tuple[int, int, int] | None:
        """Mode and owner; None where what follows changes more than these.

        *owner*: it is a chown(2), which takes a capability away even where the owner stays.
        """
        if owner and self.tree.must_clear_privileges(inode):
            return None
        found = self.tree.stat(inode)
        return found.st_mode, found.st_uid, found.st_gid

    async def change_xattr(self, kind: str, inode: Inode, apply: Callable[[], Steps]) -> None:
        """One extended attribute, by *apply*."""
        if inode.foreign:
            raise failure(errno.EXDEV)
        await self.pipeline.change(
            kind,
            footprint.whole(inode),
            inode,
            () if inode.gone else ((inode, KIND_ATTRS, 0),),
            apply,
            policy=Policy.NONE if inode.gone else None,
        )

    def is_sent(self, inode: Inode) -> bool:
        """Whether what changes on the object is the peers' business."""
        return not inode.gone and self.policies.effective(inode) != Policy.NONE

    async def _remove_capability(self, inode: Inode) -> None:
        def apply() -> Steps:
            self.tree.remove_xattr(inode, b"security.capability")
            if self.is_sent(inode):
                yield ops.RemoveXattr(inode.id, b"security.capability")

        await self.change_xattr("removexattr", inode, apply)


def _foretold(
    before: tuple[int, int, int] | None,
    inode: Inode,
    mode: int | None,
    uid: int | None,
    gid: int | None,
) -> tuple[int, int, int] | None:
    """Mode and owner as a change of these will have made them; *before*: as they are now.

    None where that is not certain, since chown(2) may clear set-id bits, or nothing changes.
    """
    if before is None or (mode is not None and inode.type == _stat.S_IFLNK):
        return None
    old_mode, old_uid, old_gid = before
    if mode is None and old_mode & SET_ID:
        return None
    after = (
        old_mode if mode is None else _stat.S_IFMT(old_mode) | (mode & PERMISSIONS),
        old_uid if uid is None or uid == ops.KEEP else uid,
        old_gid if gid is None or gid == ops.KEEP else gid,
    )
    return None if after == before else after
