"""The primary's mount: every change, applied locally and on the peers before it returns.

The life of an operation: it claims what it touches and waits for its turn (`core.scheduler`); it is
noted in the activity log; it is applied locally and sent to every peer on which it is clean,
recorded dirty for the others (`core.splitter`); data is sent before the local write, so that both
sides work at the same time, metadata after it; the acknowledgements are awaited; the claims are
given back. Between local success and sending there is no await: the order on the wire is the local
order.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio

from replfs.core import footprint, ops
from replfs.core.policy import Ack, Policy
from replfs.core.scheduler import END, Claim, Scheduler, Ticket
from replfs.errors import NotInSync
from replfs.node.flight import Flight, Latencies
from replfs.node.peer import Peer
from replfs.node.policies import Policies
from replfs.node.view import Found, View, failure
from replfs.store import syscalls
from replfs.store.activity import KIND_DATA, KIND_NAMES, KIND_OBJECT, ActivityLog, Slot
from replfs.store.inode import Handle, Inode
from replfs.store.tree import Tree

_REGION_SHIFT: Final = 20
"""The activity log's regions: 1 MiB."""
_SPIN_NS: Final = 300_000
"""How long a lone operation watches for its acknowledgement before it sleeps.

Waking an idle core costs tens of microseconds, more than half of a round trip on loopback.
"""

Touched = tuple[Inode, int, int]
"""(inode, kind, region) for the activity log."""


class Volume(View):
    """The changes of a mount, on top of the looks."""

    def __init__(
        self,
        tree: Tree,
        activity: ActivityLog,
        policies: Policies,
        *,
        status: Callable[[], dict[str, Any]],
        async_bytes_max: int = 32 << 20,
    ) -> None:
        super().__init__(tree, status)
        self.activity = activity
        self.policies = policies
        self.scheduler = Scheduler()
        self.peers: list[Peer] = []
        self.strict_peers = 0
        """How many peers a strict change needs; 0: all of them."""
        self.flights = 0
        self.latencies: dict[str, Latencies] = {}
        self.fuse_ready: Callable[[], bool] = lambda: False
        self._async_bytes_max = async_bytes_max
        self._changed = trio.Event()
        self.draining = False

    # Claims ------------------------------------------------------------------------------------

    async def claim(self, claims: tuple[Claim, ...], kind: str) -> Ticket:
        """Wait for a turn: nothing that conflicts is in flight when this returns."""
        ticket = self.scheduler.admit(claims, kind)
        if ticket.waits:
            ticket.owner = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_not_cancelled)
        return ticket

    def release_claim(self, ticket: Ticket) -> None:
        """Give the turn to those that wait for it."""
        for later in self.scheduler.complete(ticket):
            if isinstance(later.owner, trio.lowlevel.Task):
                trio.lowlevel.reschedule(later.owner)

    # The way of every change ---------------------------------------------------------------------

    def _note(self, touched: tuple[Touched, ...]) -> list[Slot]:
        """Record what is about to diverge, before it can."""
        slots = []
        for inode, kind, region in touched:
            slot = self.activity.begin(inode.id, kind, region, partial(self.tree.locator, inode))
            if slot is not None:
                slots.append(slot)
        return slots

    async def _prepare(self, inode: Inode, policy: int) -> None:
        """What must be true before anything is applied: strict peers, and room to send."""
        for peer in self.peers:
            if peer.live and not peer.link.has_room():
                if policy == Policy.ASYNC:
                    continue
                await peer.wait_room()
        if policy == Policy.STRICT:
            await self._require_strict(inode)

    async def _require_strict(self, *inodes: Inode) -> None:
        """EIO before anything is applied, where the peers a strict change needs are lost."""
        needed = self.strict_peers or len(self.peers)
        ready = 0
        for peer in self.peers:
            if peer.live and await peer.bring_in_sync(inodes):
                ready += 1
        if ready < needed:
            raise NotInSync(f"{ready} of {needed} peers confirm strict changes")

    def _send(self, op: ops.AnyOp, payload: bytes | None, flight: Flight, start: int) -> None:
        """To every peer on which *op* is clean; into the log of the others."""
        length = len(payload) if payload is not None else 0
        for peer in self.peers:
            if not peer.send(op, payload, flight, start):
                peer.mark(op, length=length, start=start)

    async def _confirmed(self, flight: Flight) -> None:
        """Wait until every peer the operation went to has answered or is lost."""
        if self.flights == 1 and flight.waiting:
            self._spin(flight)
        if flight.waiting:
            flight.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_not_cancelled)

    def _spin(self, flight: Flight) -> None:
        until = time.monotonic_ns() + _SPIN_NS
        ready = self.fuse_ready
        while True:
            for peer in self.peers:
                if peer.live:
                    peer.link.pump()
            if not flight.waiting or ready() or time.monotonic_ns() > until:
                return

    async def _change(
        self,
        kind: str,
        claims: tuple[Claim, ...],
        subject: Inode,
        touched: tuple[Touched, ...],
        apply: Callable[[], ops.AnyOp | None],
        *,
        policy: int | None = None,
    ) -> None:
        """One metadata operation: turn, local, peers, acknowledgement.

        *subject* decides the policy. *apply* does the local part and returns what is sent, or
        None where nothing is.
        """
        began = time.monotonic_ns()
        ticket = await self.claim(claims, kind)
        slots: list[Slot] = []
        flight = Flight(self, kind)
        try:
            if policy is None:
                policy = self.policies.effective(subject)
            if policy != Policy.NONE and self.peers:
                await self._prepare(subject, policy)
                for inode, _, _ in touched:
                    self.tree.ensure_id(inode)
                slots = self._note(touched)
            op = apply()
            if op is not None and policy != Policy.NONE:
                self._send(op, None, flight, 0)
                if flight.waiting:
                    if policy == Policy.ASYNC:
                        flight.detach(slots)
                        slots = []
                        return
                    await self._confirmed(flight)
                flight.settle(strict=policy == Policy.STRICT)
        finally:
            for slot in slots:
                self.activity.end(slot)
            self.release_claim(ticket)
            self._measure(kind, began)

    def _measure(self, kind: str, began: int) -> None:
        found = self.latencies.get(kind)
        if found is None:
            found = self.latencies[kind] = Latencies()
        found.add(time.monotonic_ns() - began)

    # Data --------------------------------------------------------------------------------------

    async def write(self, number: int, offset: int, data: bytes) -> int:
        """Both sides get the same bytes at the same time."""
        began = time.monotonic_ns()
        handle = self.table.handles[number]
        inode = handle.inode
        if inode.gone:
            return os.pwrite(handle.fd, data, offset)
        if inode.privileges is not False and self.tree.must_clear_privileges(inode):
            await self._clear_privileges(inode)
        size = len(data)
        start = min(offset, inode.size)
        ticket = await self.claim(footprint.data(inode, start, offset + size), "write")
        slots: list[Slot] = []
        flight = Flight(self, "write", size)
        try:
            policy = self.policies.effective(inode)
            replicated = policy != Policy.NONE and bool(self.peers)
            if replicated:
                if not inode.id:
                    self.tree.ensure_id(inode)
                if policy == Policy.STRICT or not self._all_have_room():
                    await self._prepare(inode, policy)
                slots = self._note_range(inode, start, offset + size)
            stamp = time.time_ns()
            if replicated and not inode.gone:
                self._send(ops.Write(inode.id, offset, stamp), data, flight, start)
            failed = 0
            written = 0
            try:
                written = os.pwrite(handle.fd, data, offset)
                syscalls.utimens(handle.fd, None, stamp)
            except OSError as error:
                failed = error.errno or errno.EIO
            if offset + written > inode.size:
                inode.size = offset + written
            if flight.waiting:
                if policy == Policy.ASYNC and not failed:
                    flight.detach(slots)
                    slots = []
                    return written
                await self._confirmed(flight)
            flight.settle(strict=policy == Policy.STRICT, failed=failed, written=written)
        finally:
            for slot in slots:
                self.activity.end(slot)
            self.release_claim(ticket)
            self._measure("write", began)
        if failed:
            raise failure(failed)
        if handle.synchronous:
            await self._flush(inode, data_only=handle.synchronous != os.O_SYNC)
        return written

    def _all_have_room(self) -> bool:
        return all(not peer.live or peer.link.has_room() for peer in self.peers)

    def _note_range(self, inode: Inode, start: int, stop: int) -> list[Slot]:
        first = start >> _REGION_SHIFT
        last = (stop - 1) >> _REGION_SHIFT if stop > start else first
        if last - first > 8:
            return self._note(((inode, KIND_OBJECT, 0),))
        return self._note(tuple((inode, KIND_DATA, region) for region in range(first, last + 1)))

    async def _clear_privileges(self, inode: Inode) -> None:
        """A write takes set-id bits and capabilities away (write(2), chmod(2))."""
        mode = self.tree.stat(inode).st_mode & 0o7777
        cleared = mode & ~_stat.S_ISUID
        if mode & _stat.S_IXGRP:
            cleared &= ~_stat.S_ISGID
        if cleared != mode:
            await self._set_attributes(inode, mode=cleared)
        if b"security.capability" in self.tree.list_xattrs(inode):
            await self.removexattr(inode.nodeid, b"security.capability")
        inode.privileges = False

    async def _truncate(self, inode: Inode, size: int, mtime: int | None, fd: int) -> None:
        """Set the size: a data operation on everything from the smaller size to the end."""
        began = time.monotonic_ns()
        if inode.gone:
            os.ftruncate(fd if fd >= 0 else self.tree.data_fd(inode), size)
            inode.size = size
            return
        if self.tree.must_clear_privileges(inode):
            await self._clear_privileges(inode)
        low = min(size, self.tree.stat(inode).st_size)
        ticket = await self.claim(footprint.data(inode, low, END), "truncate")
        slots: list[Slot] = []
        flight = Flight(self, "truncate")
        failed = 0
        try:
            policy = self.policies.effective(inode)
            replicated = policy != Policy.NONE and bool(self.peers)
            if replicated:
                self.tree.ensure_id(inode)
                await self._prepare(inode, policy)
                slots = self._note(((inode, KIND_OBJECT, 0),))
            stamp = time.time_ns() if mtime is None else mtime
            own = fd if fd >= 0 else self.tree.data_fd(inode)
            if replicated:
                self._send(ops.Truncate(inode.id, size, stamp), None, flight, low)
            try:
                os.ftruncate(own, size)
                syscalls.utimens(own, None, stamp)
                inode.size = size
            except OSError as error:
                failed = error.errno or errno.EIO
            if flight.waiting:
                await self._confirmed(flight)
            flight.settle(strict=policy == Policy.STRICT, failed=failed)
        finally:
            for slot in slots:
                self.activity.end(slot)
            self.release_claim(ticket)
            self._measure("truncate", began)
        if failed:
            raise failure(failed)

    # Attributes ----------------------------------------------------------------------------------

    async def setattr(
        self,
        nodeid: int,
        number: int | None,
        *,
        size: int | None,
        mode: int | None,
        uid: int | None,
        gid: int | None,
        atime: int | None,
        mtime: int | None,
    ) -> Found:
        """The size first, as data; then the rest, as metadata."""
        inode = self.inode(nodeid)
        if inode.foreign:
            raise failure(errno.EXDEV)
        if size is not None:
            fd = self.handle(number).fd if number is not None else -1
            await self._truncate(inode, size, mtime, fd)
        if any(value is not None for value in (mode, uid, gid, atime)) or (
            mtime is not None and size is None
        ):
            await self._set_attributes(inode, mode=mode, uid=uid, gid=gid, atime=atime, mtime=mtime)
        return inode, self.tree.stat(inode)

    async def _set_attributes(
        self,
        inode: Inode,
        *,
        mode: int | None = None,
        uid: int | None = None,
        gid: int | None = None,
        atime: int | None = None,
        mtime: int | None = None,
    ) -> None:
        tree = self.tree

        def apply() -> ops.AnyOp | None:
            owner = uid is not None or gid is not None
            if owner:
                tree.set_owner(
                    inode, ops.KEEP if uid is None else uid, ops.KEEP if gid is None else gid
                )
            if mode is not None:
                tree.set_mode(inode, mode)
            if atime is not None or mtime is not None:
                tree.set_times(inode, atime, mtime)
            if inode.gone:
                return None
            changed_mode = ops.KEEP
            if (owner or mode is not None) and inode.type != _stat.S_IFLNK:
                # chown(2) may clear set-id bits, chmod(2) the set-group-ID one: what resulted
                # travels.
                changed_mode = tree.stat(inode).st_mode & 0o7777
            return ops.SetAttr(
                inode.id,
                changed_mode,
                ops.KEEP if uid is None else uid,
                ops.KEEP if gid is None else gid,
                atime,
                mtime,
            )

        touched = () if inode.gone else ((inode, KIND_OBJECT, 0),)
        await self._change(
            "setattr",
            footprint.whole(inode),
            inode,
            touched,
            apply,
            policy=Policy.NONE if inode.gone else None,
        )

    # Names ---------------------------------------------------------------------------------------

    async def make(
        self,
        parent_id: int,
        name: bytes,
        mode: int,
        *,
        owner: tuple[int, int],
        umask: int = 0,
        rdev: int = 0,
        target: bytes = b"",
        kind: str = "mknod",
    ) -> Found:
        """A new object of any type, with one reference of the kernel's."""
        inode, found, fd = await self._make(parent_id, name, mode, owner, umask, rdev, target, kind)
        if fd >= 0:
            os.close(fd)
        return inode, found

    async def create(
        self,
        parent_id: int,
        name: bytes,
        mode: int,
        flags: int,
        *,
        owner: tuple[int, int],
        umask: int,
    ) -> tuple[Handle, Inode, os.stat_result]:
        """A new file, open."""
        try:
            inode, found, fd = await self._make(
                parent_id, name, mode, owner, umask, 0, b"", "create"
            )
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            existing, found = self.lookup(parent_id, name)
            handle = await self.open(existing.nodeid, flags)
            return handle, existing, self.tree.stat(existing)
        handle = self.table.open(inode, fd)
        handle.writable = True
        handle.synchronous = os.O_SYNC if flags & os.O_SYNC == os.O_SYNC else flags & os.O_DSYNC
        return handle, inode, found

    async def _make(
        self,
        parent_id: int,
        name: bytes,
        mode: int,
        owner: tuple[int, int],
        umask: int,
        rdev: int,
        target: bytes,
        kind: str,
    ) -> tuple[Inode, os.stat_result, int]:
        parent = self.inode(parent_id)
        self.tree.check_name(parent, name)
        made: tuple[Inode, os.stat_result, int] | None = None
        tree = self.tree

        def apply() -> ops.AnyOp | None:
            nonlocal made
            tree.set_umask(umask)
            inode, found, above, fd = tree.make(
                parent, name, mode, rdev=rdev, target=target, owner=owner
            )
            made = inode, found, fd
            inode.lookups += 1
            if not self.policies.is_replicated_name(parent, name, inode):
                return None
            return ops.Make(
                inode.id,
                parent.id,
                name,
                found.st_mode,
                found.st_uid,
                found.st_gid,
                rdev,
                target,
                found.st_mtime_ns,
                above.st_mtime_ns,
            )

        await self._change(
            kind, footprint.entry(parent, name), parent, ((parent, KIND_NAMES, 0),), apply
        )
        if made is None:
            raise failure(errno.EIO)
        return made

    async def unlink(self, parent_id: int, name: bytes) -> None:
        """Remove a name of anything but a directory."""
        await self._remove(parent_id, name, "unlink")

    async def rmdir(self, parent_id: int, name: bytes) -> None:
        """Remove an empty directory."""
        await self._remove(parent_id, name, "rmdir")

    async def _remove(self, parent_id: int, name: bytes, kind: str) -> None:
        parent = self.inode(parent_id)
        tree = self.tree
        inode, found = tree.lookup(parent, name)
        if inode.foreign:
            raise failure(errno.EBUSY)
        tree.read_record(inode)

        def apply() -> ops.AnyOp | None:
            nonlocal found
            if parent.gone:
                raise failure(errno.ENOENT)
            found = tree.stat(inode) if inode.more or found.st_nlink > 1 else found
            replicated = self.policies.is_replicated_name(parent, name, inode)
            last = kind == "rmdir" or found.st_nlink <= 1
            above = tree.unlink(
                parent, name, inode, directory=kind == "rmdir", links=found.st_nlink
            )
            if last:
                for peer in self.peers:
                    peer.object_removed(inode)
            if not replicated:
                return None
            return ops.Unlink(inode.id, parent.id, name, kind == "rmdir", above.st_mtime_ns)

        await self._change(
            kind,
            footprint.entry_of(parent, name, inode),
            inode,
            ((parent, KIND_NAMES, 0), (inode, KIND_OBJECT, 0)),
            apply,
        )
        tree.drop_unused(inode)

    async def link(self, nodeid: int, parent_id: int, name: bytes) -> Found:
        """One more name; EXDEV between a replicated directory and one that is not."""
        inode = self.inode(nodeid)
        parent = self.inode(parent_id)
        tree = self.tree
        tree.check_name(parent, name)
        if inode.foreign:
            raise failure(errno.EXDEV)
        if self.policies.link_crosses(inode, parent):
            raise failure(errno.EXDEV)
        found: os.stat_result | None = None

        def apply() -> ops.AnyOp | None:
            nonlocal found
            found, above = tree.link(inode, parent, name)
            for peer in self.peers:
                peer.links_changed(inode)
            if not self.policies.is_replicated_name(parent, name, inode):
                return None
            return ops.Link(inode.id, parent.id, name, above.st_mtime_ns)

        await self._change(
            "link",
            footprint.entry_of(parent, name, inode),
            inode,
            ((parent, KIND_NAMES, 0), (inode, KIND_OBJECT, 0)),
            apply,
        )
        if found is None:
            raise failure(errno.EIO)
        inode.lookups += 1
        return inode, found

    async def rename(
        self, parent_id: int, name: bytes, new_parent_id: int, new_name: bytes, flags: int
    ) -> None:
        """Rename, replace, exchange; across policies what must appear or vanish does."""
        parent = self.inode(parent_id)
        new_parent = self.inode(new_parent_id)
        tree = self.tree
        tree.check_name(parent, name)
        tree.check_name(new_parent, new_name)
        if flags & ~(syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE):
            raise failure(errno.EINVAL)
        inode, _ = tree.lookup(parent, name)
        replaced: Inode | None = None
        replaced_links = 0
        try:
            replaced, there = tree.lookup(new_parent, new_name)
            replaced_links = there.st_nlink
        except FileNotFoundError:
            if flags & syscalls.RENAME_EXCHANGE:
                raise
        if inode.foreign or (replaced is not None and replaced.foreign):
            raise failure(errno.EBUSY)
        if replaced is not None and flags & syscalls.RENAME_NOREPLACE:
            raise failure(errno.EEXIST)
        tree.read_record(inode)
        if replaced is not None:
            tree.read_record(replaced)
        if replaced is inode:
            return  # two names of one object: rename(2) does nothing and says success

        def apply() -> ops.AnyOp | None:
            exchange = bool(flags & syscalls.RENAME_EXCHANGE)
            plan = self.policies.plan_rename(
                parent, name, new_parent, new_name, inode, replaced, exchange=exchange
            )
            above, new_above = tree.rename(
                parent,
                name,
                new_parent,
                new_name,
                flags & syscalls.RENAME_EXCHANGE,
                inode=inode,
                replaced=replaced,
                replaced_links=replaced_links,
            )
            self.policies.moved(inode, replaced if exchange else None)
            if replaced is not None and not exchange and replaced.gone:
                for peer in self.peers:
                    peer.object_removed(replaced)
            for peer in self.peers:
                peer.links_changed(inode)
            if plan.local:
                return None
            if plan.crossing:
                # One side of the move is not replicated: the names are recorded, and the resync
                # makes one appear and the other vanish.
                for peer in self.peers:
                    peer.mark_crossing(
                        parent,
                        name,
                        new_parent,
                        new_name,
                        appears=plan.appears,
                        vanishes=plan.vanishes,
                    )
                return None
            return ops.Rename(
                inode.id,
                parent.id,
                name,
                new_parent.id,
                new_name,
                replaced.id if replaced is not None else ops.NO_OBJECT,
                exchange,
                above.st_mtime_ns,
                new_above.st_mtime_ns,
            )

        touched: list[Touched] = [(parent, KIND_NAMES, 0), (inode, KIND_OBJECT, 0)]
        if new_parent is not parent:
            touched.append((new_parent, KIND_NAMES, 0))
        if replaced is not None:
            touched.append((replaced, KIND_OBJECT, 0))
        await self._change(
            "rename",
            footprint.rename(parent, name, new_parent, new_name, inode, replaced),
            inode,
            tuple(touched),
            apply,
        )
        tree.drop_unused(inode)
        if replaced is not None:
            tree.drop_unused(replaced)

    # Files -------------------------------------------------------------------------------------

    async def open(self, nodeid: int, flags: int) -> Handle:
        """A handle; O_TRUNC arrives here and is a truncation like any other."""
        inode = self.inode(nodeid)
        handle = self.open_handle(inode, flags)
        if flags & os.O_TRUNC and handle.writable:
            try:
                await self._truncate(inode, 0, None, handle.fd)
            except BaseException:
                self._close(handle.number)
                raise
        return handle

    async def fsync(self, number: int, *, data_only: bool) -> None:
        """Stable on both sides: what was in flight first, then both disks at once."""
        handle = self.handle(number)
        if handle.inode.gone:
            await trio.to_thread.run_sync(os.fsync, handle.fd)
            return
        await self._flush(handle.inode, data_only=data_only)

    async def fsyncdir(self, number: int, *, data_only: bool) -> None:
        """As `fsync`, for a directory; for the root, everything."""
        inode = self.handle(number).inode
        if inode is self.tree.root:
            await self.checkpoint()
        elif not inode.gone:
            await self._flush(inode, data_only=data_only)

    async def _flush(self, inode: Inode, *, data_only: bool) -> None:
        """Drain the object, then flush it here and on the peers in parallel.

        The claim is given back as soon as both flushes are under way: later operations on the
        object do not wait for the disks.
        """
        began = time.monotonic_ns()
        ticket = await self.claim(footprint.whole(inode), "fsync")
        flight = Flight(self, "fsync")
        fd = -1
        try:
            policy = self.policies.effective(inode)
            if inode.is_directory:
                fd = os.dup(self.tree.directory_fd(inode))
            else:
                fd = os.dup(self.tree.data_fd(inode))
            if policy != Policy.NONE and self.peers:
                self.tree.ensure_id(inode)
                await self._prepare(inode, policy)
                self._send(ops.Sync(inode.id, data_only), None, flight, 0)
        except BaseException:
            if fd >= 0:
                os.close(fd)
            raise
        finally:
            self.release_claim(ticket)
        try:
            await trio.to_thread.run_sync(os.fdatasync if data_only else os.fsync, fd)
        finally:
            os.close(fd)
            if flight.waiting:
                await self._confirmed(flight)
        for peer in self.peers:
            await peer.marks_durable()
        flight.settle(strict=policy == Policy.STRICT)
        self._measure("fsync", began)

    async def checkpoint(self) -> None:
        """Everything acknowledged so far is stable on both sides when this returns."""
        flight = Flight(self, "fsync")
        for peer in self.peers:
            peer.send(ops.Checkpoint(self.policies.generation()), None, flight, 0)
        await trio.to_thread.run_sync(syscalls.syncfs, self.tree.root_fd)
        if flight.waiting:
            await self._confirmed(flight)
        for peer in self.peers:
            await peer.marks_durable()
        flight.settle(strict=False)

    # Extended attributes -----------------------------------------------------------------------

    async def setxattr(self, nodeid: int, name: bytes, value: bytes, *, uid: int) -> None:
        """Set an attribute, or a policy."""
        inode = self.inode(nodeid)
        if name.startswith(b"user.replfs"):
            await self._set_virtual(inode, name, value, uid)
            return
        tree = self.tree

        def apply() -> ops.AnyOp | None:
            tree.set_xattr(inode, name, value)
            return None if inode.gone else ops.SetXattr(inode.id, name, value)

        await self._change_xattr("setxattr", inode, apply)

    async def removexattr(self, nodeid: int, name: bytes, *, uid: int = 0) -> None:
        """Remove an attribute, or a policy."""
        inode = self.inode(nodeid)
        if name.startswith(b"user.replfs"):
            await self._set_virtual(inode, name, None, uid)
            return
        tree = self.tree

        def apply() -> ops.AnyOp | None:
            tree.remove_xattr(inode, name)
            return None if inode.gone else ops.RemoveXattr(inode.id, name)

        await self._change_xattr("removexattr", inode, apply)

    async def _change_xattr(
        self, kind: str, inode: Inode, apply: Callable[[], ops.AnyOp | None]
    ) -> None:
        if inode.foreign:
            raise failure(errno.EXDEV)
        await self._change(
            kind,
            footprint.whole(inode),
            inode,
            () if inode.gone else ((inode, KIND_OBJECT, 0),),
            apply,
            policy=Policy.NONE if inode.gone else None,
        )

    async def _set_virtual(self, inode: Inode, name: bytes, value: bytes | None, uid: int) -> None:
        policy, ack = self.policies.parse(inode, name, value, uid, self.tree.stat(inode))
        await self.set_policy(inode, policy, ack)

    async def set_policy(self, inode: Inode, policy: Policy, ack: Ack) -> None:
        """A barrier: the object is drained, then its policy changes here and on the peers."""
        ticket = await self.claim(footprint.whole(inode), "policy")
        flight = Flight(self, "policy")
        slots: list[Slot] = []
        try:
            self.tree.ensure_id(inode)
            before = self.policies.effective(inode)
            if before != Policy.NONE and self.peers:
                slots = self._note(((inode, KIND_OBJECT, 0),))
            self.tree.set_policy(inode, policy, ack)
            self.policies.changed()
            after = self.policies.effective(inode)
            if (before == Policy.NONE) != (after == Policy.NONE):
                for peer in self.peers:
                    for parent, entry in inode.names():
                        peer.mark_policy_change(parent, entry, inode, removal=after == Policy.NONE)
            elif after != Policy.NONE:
                self._send(ops.SetPolicy(inode.id, policy, ack), None, flight, 0)
            if flight.waiting:
                await self._confirmed(flight)
            flight.settle(strict=False)
        finally:
            for slot in slots:
                self.activity.end(slot)
            self.release_claim(ticket)

    def virtual_xattr(self, inode: Inode, name: bytes) -> bytes:
        """Policy and state, as `user.replfs.*`."""
        answer = self.policies.virtual_xattr(inode, name)
        if answer is not None:
            return answer
        if name == b"user.replfs.state":
            return self.state_of(inode).encode()
        if name == b"user.replfs.dirty_bytes":
            return b"%d" % sum(peer.dirty_bytes_of(inode) for peer in self.peers)
        return super().virtual_xattr(inode, name)

    def state_of(self, inode: Inode) -> str:
        """The object's state, the worst over all peers; of a directory, the worst below it."""
        if self.policies.effective(inode) == Policy.NONE:
            pending = any(peer.removal_pending(inode) for peer in self.peers)
            return "removal-pending" if pending else "local"
        return max((peer.state_of(inode) for peer in self.peers), key=_badness, default="local")

    # Stopping ----------------------------------------------------------------------------------

    async def drained(self) -> None:
        """Wait until nothing is in flight."""
        while self.scheduler.in_flight or self.flights:
            await trio.sleep(0.01)


_STATES: Final = (
    "local", "in-sync", "resync", "dirty", "unrepresentable", "out-of-sync", "removal-pending",
)  # fmt: skip


def _badness(state: str) -> int:
    return _STATES.index(state)


def _not_cancelled(_: object) -> trio.lowlevel.Abort:
    """Every such wait ends by itself: within the peer timeout, or one region's transfer."""
    return trio.lowlevel.Abort.FAILED


Applied = Awaitable[None]
