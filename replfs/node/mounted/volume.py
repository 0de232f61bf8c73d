"""A primary's mount: names, attributes, extended attributes and policies, on top of the files."""

from __future__ import annotations

import errno
import os
import stat as _stat
from collections.abc import Callable
from typing import Final

from replfs.core import footprint, ops
from replfs.core.policy import Ack, Policy
from replfs.errors import HalfDone
from replfs.node.mounted.files import Files
from replfs.node.mounted.view import Found
from replfs.node.replication.flight import UNRECORDED, Flight
from replfs.node.replication.pipeline import Steps, Touched
from replfs.store import syscalls
from replfs.store.activity import KIND_ATTRS, KIND_NAMES, Slot
from replfs.store.inode import Handle, Inode
from replfs.store.syscalls import failure


class Volume(Files):
    """Every operation of a primary's mount."""

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
        if mtime is not None and self.policies.writeback:
            self._late_times.said(inode, mtime)
        if size is not None:
            fd = self.handle(number).fd if number is not None else -1
            await self.truncate(inode, size, mtime, fd)
        if size is None and all(value is None for value in (mode, uid, gid, atime, mtime)):
            # chown(2) of neither owner nor group, which takes set-id bits away all the same.
            uid = ops.KEEP
        if any(value is not None for value in (mode, uid, gid, atime)) or (
            mtime is not None and size is None
        ):
            found = await self.set_attributes(
                inode, mode=mode, uid=uid, gid=gid, atime=atime, mtime=mtime
            )
            if found is not None:
                return inode, found
        return inode, self.tree.stat(inode)

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
        self.check_confirmable(self.inode(parent_id))
        try:
            inode, found, fd = await self._make(
                parent_id, name, mode, owner, umask, 0, b"", "create"
            )
        except FileExistsError:
            if flags & os.O_EXCL:
                raise
            existing, found = self.lookup(parent_id, name)
            try:
                if existing.type != _stat.S_IFREG:
                    # The kernel knows nothing of it: it was made, and the call failed all the
                    # same. Told that, the kernel looks again; opened here, a pipe would wait.
                    raise failure(errno.ESTALE)
                handle = await self.open(existing.nodeid, flags)
            except BaseException:
                self.forget([(existing.nodeid, 1)])
                raise
            return handle, existing, self.tree.stat(existing)
        handle = self.table.open(inode, fd)
        inode.unconfirmed = self.inode(parent_id).unconfirmed
        handle.writable = True
        handle.synchronous = os.O_SYNC if flags & os.O_SYNC == os.O_SYNC else flags & os.O_DSYNC
        self.decide_silence(handle)
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

        def apply() -> Steps:
            nonlocal made
            tree.set_umask(umask)
            inode, found, above, fd = tree.make(
                parent, name, mode, rdev=rdev, target=target, owner=owner
            )
            made = inode, found, fd
            inode.lookups += 1
            if self.policies.is_replicated_name(parent, name, inode):
                yield self._made(inode, parent, name, found, above, target, fd)
            else:
                yield self._time_of(parent, above.st_mtime_ns)

        try:
            await self.pipeline.change(
                kind, footprint.entry(parent, name), parent, ((parent, KIND_NAMES, 0),), apply
            )
        except BaseException:
            # It may have been made all the same, but the caller does not learn of it.
            if made is not None:
                self._unmake(*made)
            raise
        if made is None:
            raise failure(errno.EIO)
        return made

    def _made(
        self,
        inode: Inode,
        parent: Inode,
        name: bytes,
        found: os.stat_result,
        above: os.stat_result,
        target: bytes = b"",
        fd: int = -1,
    ) -> ops.Make:
        """What the peers are told of a new object: what has become of it, not what was asked.

        *fd* is a descriptor of it, if there is one.
        """
        acls = self.tree.acls(inode, fd) if self.tree.inherits_acl(parent) else ()
        return ops.Make(
            inode.id,
            parent.id,
            name,
            found.st_mode,
            found.st_uid,
            found.st_gid,
            found.st_rdev,
            target,
            found.st_mtime_ns,
            above.st_mtime_ns,
            *acls,
        )

    def _unmake(self, inode: Inode, _found: os.stat_result, fd: int) -> None:
        if fd >= 0:
            os.close(fd)
        inode.lookups -= 1
        self.tree.drop_unused(inode)

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
        is_directory = kind == "rmdir"

        def apply() -> Steps:
            if parent.gone or not inode.has_name(parent, name):
                raise failure(errno.ENOENT)
            several = inode.more or found.st_nlink > 1
            links = tree.stat(inode).st_nlink if several else found.st_nlink
            stamp = tree.now()
            if self.policies.is_replicated_name(parent, name, inode):
                tree.ensure_id(inode)
                yield ops.Unlink(inode.id, parent.id, name, is_directory, stamp)
            else:
                yield self._time_of(parent, stamp)
            tree.unlink(parent, name, inode, directory=is_directory, links=links)
            for peer in self.pipeline.peers:
                if is_directory or links <= 1:
                    peer.object_removed(inode, parent, name)
                else:
                    peer.moved(inode)
            self._stamp(parent, stamp)

        await self.pipeline.change(
            kind,
            footprint.entry_of(parent, name, inode),
            inode,
            ((parent, KIND_NAMES, 0),),
            apply,
            # What makes a directory not empty may be on one side only.
            here_first=is_directory,
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
        if self.policies.link_crosses(inode, parent, name):
            raise failure(errno.EXDEV)
        found: os.stat_result | None = None

        def apply() -> Steps:
            nonlocal found
            if parent.gone:
                raise failure(errno.ENOENT)
            tree.ensure_id(inode)
            for peer in self.pipeline.peers:
                peer.moving(inode)
            stamp = tree.now()
            if self.policies.is_replicated_name(parent, name, inode):
                yield ops.Link(inode.id, parent.id, name, stamp)
            else:
                yield self._time_of(parent, stamp)
            tree.link(inode, parent, name)
            for peer in self.pipeline.peers:
                peer.links_changed(inode)
            self._stamp(parent, stamp)
            found = tree.stat(inode)

        await self.pipeline.change(
            "link",
            footprint.entry_of(parent, name, inode),
            inode,
            ((parent, KIND_NAMES, 0),),
            apply,
            # The peers cannot be told where it is before it has a name.
            here_first=not inode.named,
        )
        await self.pipeline.together(self.pipeline.window.sent)
        if found is None:
            raise failure(errno.EIO)
        inode.lookups += 1
        return inode, found

    def _stamp(self, directory: Inode, mtime: int) -> None:
        """A name in *directory* was changed: it has that mtime (ns) then, here as on the peers.

        That this fails is nothing to the caller, whose change is made.
        """
        try:
            syscalls.utimens(self.tree.directory_fd(directory), None, mtime)
        except OSError:
            if self.is_sent(directory):
                self.pipeline.record(lambda peer: peer.mark(ops.SetAttr(directory.id)))

    def _time_of(self, directory: Inode, mtime: int) -> ops.AnyOp | None:
        """What the peers see of a change to a name that they do not have: the directory's time."""
        return ops.SetAttr(directory.id, mtime=mtime) if self.is_sent(directory) else None

    async def rename(
        self,
        parent_id: int,
        name: bytes,
        new_parent_id: int,
        new_name: bytes,
        flags: int,
        *,
        owner: tuple[int, int] = (0, 0),
    ) -> None:
        """Rename, replace, exchange; across policies what must appear or vanish does.

        The whiteout that `RENAME_WHITEOUT` leaves is made here in the same step. The peers learn of
        it in a second one, with the old name noted in the activity log over both.
        """
        parent = self.inode(parent_id)
        new_parent = self.inode(new_parent_id)
        tree = self.tree
        tree.check_name(parent, name)
        tree.check_name(new_parent, new_name)
        if flags & ~_RENAME_FLAGS:
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
        whiteout: Inode | None = None
        exchange = bool(flags & syscalls.RENAME_EXCHANGE)

        def apply() -> Steps:
            nonlocal whiteout
            if new_parent.gone or not inode.has_name(parent, name):
                raise failure(errno.ENOENT)
            plan = self.policies.plan_rename(
                parent, name, new_parent, new_name, inode, replaced, exchange=exchange
            )
            for one in plan.crossed:
                if not one.is_directory and tree.stat(one).st_nlink > 1:
                    # As for link(2): one object would be on the peers and not.
                    raise failure(errno.EXDEV)
            if not plan.local:
                tree.ensure_id(inode)
                if replaced is not None:
                    tree.ensure_id(replaced)
            for peer in self.pipeline.peers:
                peer.moving(inode)
                if exchange and replaced is not None:
                    peer.moving(replaced)
            stamp = tree.now()
            if plan.local:
                yield self._time_of(parent, stamp)
            elif plan.crossing:
                yield None
            else:
                yield ops.Rename(
                    inode.id,
                    parent.id,
                    name,
                    new_parent.id,
                    new_name,
                    replaced.id if replaced is not None else ops.NO_OBJECT,
                    exchange,
                    stamp,
                    stamp,
                )
            tree.rename(
                parent,
                name,
                new_parent,
                new_name,
                flags & ~syscalls.RENAME_NOREPLACE,
                inode=inode,
                replaced=replaced,
                replaced_links=replaced_links,
            )
            if flags & syscalls.RENAME_WHITEOUT:
                whiteout = tree.lookup(parent, name)[0]
                tree.hold(whiteout)
            self.policies.moved(inode, replaced if exchange else None)
            if replaced is not None and not exchange and replaced.gone:
                for peer in self.pipeline.peers:
                    peer.object_removed(replaced, new_parent, new_name)
            for peer in self.pipeline.peers:
                peer.moved(inode)
                if exchange and replaced is not None:
                    peer.moved(replaced)
                peer.links_changed(inode)
            if plan.local and new_parent is not parent and self.is_sent(new_parent):
                for peer in self.pipeline.peers:
                    peer.mark(ops.SetAttr(new_parent.id))
            if plan.crossing:
                # One side of the move is not replicated: the names are recorded, and the resync
                # makes one appear and the other vanish.
                for peer in self.pipeline.peers:
                    peer.mark_crossing(
                        parent,
                        name,
                        new_parent,
                        new_name,
                        appears=plan.appears,
                        vanishes=plan.vanishes,
                    )
            self._stamp(parent, stamp)
            if new_parent is not parent:
                self._stamp(new_parent, stamp)

        touched: list[Touched] = [(parent, KIND_NAMES, 0)]
        if new_parent is not parent:
            touched.append((new_parent, KIND_NAMES, 0))
        slots: list[Slot] = []
        if flags & syscalls.RENAME_WHITEOUT and self.pipeline.peers:
            tree.ensure_id(parent)
            slots = self.pipeline.note(((parent, KIND_NAMES, 0),))
        try:
            await self.pipeline.change(
                "rename",
                footprint.rename(parent, name, new_parent, new_name, inode, replaced),
                inode,
                tuple(touched),
                apply,
                # A directory may not be empty, or be above where it is to go, on one side only.
                here_first=bool(flags & ~syscalls.RENAME_NOREPLACE)
                or inode.is_directory
                or (replaced is not None and replaced.is_directory),
            )
        finally:
            if whiteout is not None:
                await self._announce(parent, name, whiteout, owner)
            for slot in slots:
                self.pipeline.activity.end(slot)
        await self.pipeline.together(self.pipeline.window.sent)
        tree.drop_unused(inode)
        if replaced is not None:
            tree.drop_unused(replaced)

    async def _announce(
        self, parent: Inode, name: bytes, whiteout: Inode, owner: tuple[int, int]
    ) -> None:
        """The peers learn of a whiteout that is there already; whatever fails, the log does."""
        tree = self.tree
        announced = False

        def apply() -> Steps:
            nonlocal announced
            above = os.fstat(tree.directory_fd(parent))
            uid, gid = owner
            tree.set_owner(whiteout, uid, ops.KEEP if above.st_mode & _stat.S_ISGID else gid)
            if whiteout.gone or not self.policies.is_replicated_name(parent, name, whiteout):
                announced = True
                yield self._time_of(parent, above.st_mtime_ns)
                return
            tree.ensure_id(whiteout)
            announced = True
            yield self._made(whiteout, parent, name, tree.stat(whiteout), above)

        try:
            await self.pipeline.change(
                "mknod", footprint.entry(parent, name), parent, ((parent, KIND_NAMES, 0),), apply
            )
        finally:
            if not announced:
                self.pipeline.record(lambda peer: peer.mark_touched(((parent, KIND_NAMES, 0),)))
            tree.release(whiteout)

    # Extended attributes -----------------------------------------------------------------------

    async def setxattr(
        self, nodeid: int, name: bytes, value: bytes, *, uid: int, groups: Callable[[], set[int]]
    ) -> None:
        """Set an attribute, or a policy. *groups*: all of the caller's."""
        inode = self.inode(nodeid)
        if name.startswith(b"user.replfs"):
            await self._set_virtual(inode, name, value, uid)
            return
        tree = self.tree

        def apply() -> Steps:
            tree.set_xattr(inode, name, value)
            if self.is_sent(inode):
                yield ops.SetXattr(inode.id, name, value)

        await self.change_xattr("setxattr", inode, apply)
        if uid and name == b"system.posix_acl_access":
            # As for chmod(2): who is not in the file's group may not leave its set-group-ID bit.
            found = tree.stat(inode)
            if found.st_mode & _stat.S_ISGID and found.st_gid not in groups():
                await self.set_attributes(inode, mode=found.st_mode & 0o7777 & ~_stat.S_ISGID)

    async def removexattr(self, nodeid: int, name: bytes, *, uid: int = 0) -> None:
        """Remove an attribute, or a policy."""
        inode = self.inode(nodeid)
        if name.startswith(b"user.replfs"):
            await self._set_virtual(inode, name, None, uid)
            return
        tree = self.tree

        def apply() -> Steps:
            is_there = self._is_there(inode, name)
            tree.remove_xattr(inode, name)
            if is_there and self.is_sent(inode):
                yield ops.RemoveXattr(inode.id, name)

        await self.change_xattr("removexattr", inode, apply)

    def _is_there(self, inode: Inode, name: bytes) -> bool:
        """Whether an attribute may be there. Of an ACL the store does not say so when it removes.

        Who copies a tree takes a default ACL away from each directory.
        """
        try:
            self.tree.get_xattr(inode, name)
        except OSError as error:
            return error.errno != errno.ENODATA
        return True

    async def _set_virtual(self, inode: Inode, name: bytes, value: bytes | None, uid: int) -> None:
        if inode.foreign:
            raise failure(errno.EXDEV)
        policy, ack = self.policies.parse(inode, name, value, uid, self.tree.stat(inode))
        await self.set_policy(inode, policy, ack)

    async def set_policy(self, inode: Inode, policy: Policy, ack: Ack) -> None:
        """A barrier: the object is drained, then its policy changes here and on the peers."""
        ticket = await self.pipeline.claim(footprint.whole(inode), "policy")
        if self.pipeline.is_over:
            self.pipeline.release_claim(ticket)
            raise failure(errno.EROFS)
        flight = Flight(self.pipeline, "policy")
        slots: list[Slot] = []
        try:
            self.tree.ensure_id(inode)
            before = self.policies.effective(inode)
            if self.pipeline.peers and not inode.gone:
                # The root has no name; what changes with its policy are the names in it.
                above = [parent for parent, _ in inode.names()] or [inode]
                for parent in above:
                    self.tree.ensure_id(parent)
                touched = ((inode, KIND_ATTRS, 0), *((one, KIND_NAMES, 0) for one in above))
                slots = self.pipeline.note(touched)
            self.tree.set_policy(inode, policy, ack)
            self.policies.changed()
            after = self.policies.effective(inode)
            if inode.gone:
                pass
            elif (before == Policy.NONE) != (after == Policy.NONE):
                removal = after == Policy.NONE
                failed = self.pipeline.record(
                    lambda peer: peer.mark_policy_change(inode, removal=removal)
                )
                if failed is not None:
                    raise HalfDone(errno.EIO, UNRECORDED) from failed
            elif after != Policy.NONE:
                self.pipeline.send(ops.SetPolicy(inode.id, policy, ack), None, flight, 0)
            if flight.waiting:
                await self.pipeline.confirmed(flight)
            flight.settle(strict=False)
        finally:
            for slot in slots:
                self.pipeline.activity.end(slot)
            self.pipeline.release_claim(ticket)

    def virtual_xattr(self, inode: Inode, name: bytes) -> bytes:
        """Policy and state, as `user.replfs.*`."""
        answer = self.policies.virtual_xattr(inode, name)
        if answer is not None:
            return answer
        if name == b"user.replfs.state":
            return self.state_of(inode).encode()
        if name == b"user.replfs.dirty_bytes":
            return b"%d" % sum(peer.dirty_bytes_of(inode) for peer in self.pipeline.peers)
        return super().virtual_xattr(inode, name)

    def state_of(self, inode: Inode) -> str:
        """The object's state, the worst over all peers; of a directory, the worst below it."""
        if self.policies.effective(inode) == Policy.NONE:
            pending = any(peer.removal_pending(inode) for peer in self.pipeline.peers)
            return "removal-pending" if pending else "local"
        return max(
            (peer.state_of(inode) for peer in self.pipeline.peers), key=_badness, default="local"
        )


_RENAME_FLAGS: Final = (
    syscalls.RENAME_NOREPLACE | syscalls.RENAME_EXCHANGE | syscalls.RENAME_WHITEOUT
)
_STATES: Final = (
    "local", "in-sync", "resync", "dirty", "unrepresentable", "out-of-sync", "removal-pending",
)  # fmt: skip


def _badness(state: str) -> int:
    return _STATES.index(state)
