"""The secondary's side: applies what the primary sends to the local tree, in order, exactly.

One method per operation. Every object is addressed by id and must have been located in this
session (or placed by it); what is not known answers ESTALE, and the primary records it dirty.
Nothing here decides anything about replication: that is the primary's.
"""

from __future__ import annotations

import bisect
import errno
import os
import stat as _stat
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final

import trio
import xxhash

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.policy import NO_PATTERNS, NamePatterns
from replfs.core.unstable import Unstable
from replfs.node.asking.attributes import inspect
from replfs.node.asking.suspects import Pages
from replfs.node.pacing.courtesy import Slice
from replfs.node.replica.beside import Beside
from replfs.node.replica.limbo import Limbo
from replfs.store import locators, syscalls
from replfs.store.holes import segments
from replfs.store.inode import Inode
from replfs.store.record import INCOMPLETE, Record, can_carry
from replfs.store.tree import RESERVED, Tree

OK: Final = ops.Done(0)
STALE: Final = ops.Done(errno.ESTALE)
_BLOCK_MAX: Final = 1 << 16
"""No file system's blocks are larger."""
_FLUSHES_MAX: Final = 16
"""Flushes at once: each is a thread that waits for the disk."""
_EMPTY_S: Final = 1.0
"""Seconds after which emptying limbo is answered with EAGAIN: the primary asks again."""
_LARGE_DIRECTORY: Final = 256 << 10
"""Bytes: a larger one is read and sorted in a thread."""

_CHANGES: Final = frozenset({
    ops.Write, ops.Truncate, ops.Make, ops.Link, ops.Unlink, ops.Rename, ops.SetAttr, ops.SetXattr,
    ops.RemoveXattr, ops.SetPolicy, ops.Gather, ops.Place, ops.Clear, ops.Data, ops.Finish,
})  # fmt: skip
"""What changes the store."""

Reply = Callable[[ops.AnyAnswer], None]


class Replica:
    """Applies operations to *tree*."""

    def __init__(
        self,
        tree: Tree,
        on_phase: Callable[[ops.Phase], None],
        kept_names: NamePatterns = NO_PATTERNS,
        prepare: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """*on_phase* records durably that the data became inconsistent or consistent again.

        *kept_names*: what is this node's own, by its name. *prepare* is awaited before the data
        becomes inconsistent.
        """
        self.tree = tree
        self.limbo = Limbo(tree, kept_names)
        self.beside: Beside | None = None
        """What this store may have on its own, and the primary not, is kept beside."""
        self._on_phase = on_phase
        self._prepare = prepare
        self._listing: tuple[bytes, list[bytes]] = (b"", [])
        self._flush_limit = trio.CapacityLimiter(_FLUSHES_MAX)
        self._read_limit = trio.CapacityLimiter(_FLUSHES_MAX)
        self._nursery: trio.Nursery | None = None
        """For what takes long, and is answered when it is done."""
        self._indexing = trio.Lock()
        self._sessions = 0
        self.applied = 0
        """Operations applied since the process started."""
        self.unstable = Unstable()
        """What was applied and may not be on both disks yet."""
        self.suspects = Pages(tree, self._unstable_marks)
        """What this replica may have and its primary lack."""
        self.handlers: dict[type, Callable[[Any], ops.AnyAnswer]] = {
            ops.Truncate: self._truncate,
            ops.Make: self._make,
            ops.Link: self._link,
            ops.Unlink: self._unlink,
            ops.Rename: self._rename,
            ops.SetAttr: self._set_attr,
            ops.SetXattr: self._set_xattr,
            ops.RemoveXattr: self._remove_xattr,
            ops.SetPolicy: self._set_policy,
            ops.Gather: self._gather,
            ops.Clear: self._clear,
            ops.Finish: self._finish,
            ops.Inspect: self._inspect,
            ops.Suspects: self.suspects.answer,
            ops.Stable: self._stable,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve what takes long, until cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            await trio.sleep_forever()

    def run_in(self, nursery: trio.Nursery) -> None:
        """Serve what takes long in a nursery that is there already, instead of `run`."""
        self._nursery = nursery

    async def idle(self) -> None:
        """Wait until nothing that takes long is going on."""
        while self._nursery is not None and self._nursery.child_tasks:
            await trio.sleep(0.01)

    def forget_all(self) -> None:
        """A new session: the primary has located nothing yet."""
        self._sessions += 1
        self.limbo.forget()
        self._listing = (b"", [])
        for inode in list(self.tree.table.by_nodeid.values()):
            if inode.pins & 3:
                inode.pins &= ~3
                self.tree.drop_unused(inode)

    def apply(
        self, stream: int, op: ops.AnyOp, payload: bytes | memoryview | None, reply: Reply
    ) -> ops.AnyAnswer | None:
        """Apply one operation now. None: the answer comes later, through *reply*."""
        self.unstable.catch_up()
        self.applied += 1
        try:
            if type(op) is ops.Write:
                return self._write(op, payload or b"")
            if type(op) is ops.Locate:
                self._locate(op, 1 << stream)
                return OK
            if type(op) is ops.Forget:
                self._forget(op, 1 << stream)
                return OK
            if (
                self.beside is not None
                and isinstance(op, ops.Data | ops.Finish)
                and self._must_keep(self.beside, op)
            ):
                return self._later(partial(self._keep_first, op, bytes(payload or b"")), reply)
            if type(op) is ops.Data:
                return self._data(op, payload or b"")
            if type(op) is ops.Sync or type(op) is ops.Checkpoint:
                return self._flush(op, reply)
            if type(op) is ops.Digest:
                return self._digest(op, reply)
            if type(op) is ops.List:
                return self._list(op, reply)
            if type(op) is ops.Fetch:
                return self._fetch(op, reply)
            if type(op) is ops.Phase:
                return self._phase(op, reply)
            if type(op) is ops.EmptyLimbo:
                return self._later(self._empty_limbo, reply)
            if type(op) is ops.Place:
                if self._must_index(op):
                    contents = bytes(payload or b"")
                    return self._later(
                        partial(self._place_indexed, op, contents, 1 << stream), reply
                    )
                answer = self._place(op, payload or b"")
            else:
                answer = self.handlers[type(op)](op)
            if type(op) is ops.Make or type(op) is ops.Place:
                self._pin(op.object, 1 << stream)
            return answer
        except OSError as error:
            return ops.Done(error.errno or errno.EIO)
        finally:
            # Also where it failed: part of it may have been done.
            if type(op) in _CHANGES:
                self.unstable.note_soon(op, self._locator, length=len(payload) if payload else 0)

    def _locator(self, object_id: bytes) -> bytes:
        inode = self.tree.table.by_id.get(object_id)
        return b"" if inode is None else locators.of(self.tree, inode)

    def _pin(self, object_id: bytes, pin: int) -> None:
        made = self.tree.table.by_id.get(object_id)
        if made is not None:
            made.pins |= pin

    # What takes long ---------------------------------------------------------------------------

    def _later(
        self, work: Callable[[], Awaitable[ops.AnyAnswer]], reply: Reply
    ) -> ops.AnyAnswer | None:
        """Do *work* beside everything else, and answer when it is done."""
        if self._nursery is None:
            return ops.Done(errno.EIO)
        self._nursery.start_soon(self._answer_with, work, reply)
        return None

    @staticmethod
    async def _answer_with(work: Callable[[], Awaitable[ops.AnyAnswer]], reply: Reply) -> None:
        try:
            answer = await work()
        except OSError as error:
            answer = ops.Done(error.errno or errno.EIO)
        reply(answer)

    def _still(self) -> Callable[[], bool]:
        """Tells whether the session that is current now still is."""
        session = self._sessions
        return lambda: self._sessions == session

    # Where things are --------------------------------------------------------------------------

    def _directory(self, object_id: bytes, name: bytes) -> Inode:
        """A directory in which *name* may be changed."""
        inode = self._known(object_id)
        if not inode.is_directory:
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        self.tree.check_name(inode, name)
        return inode

    def _known(self, object_id: bytes) -> Inode:
        inode = self.tree.table.by_id.get(object_id)
        if inode is None or not inode.named:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return inode

    def _at(self, parent: Inode, name: bytes) -> Inode | None:
        """What stands at a name, with its record read; None where nothing does."""
        try:
            inode = self.tree.lookup(parent, name)[0]
        except FileNotFoundError:
            return None
        self.tree.read_record(inode)
        return inode

    def _expect(self, parent: Inode, name: bytes, object_id: bytes) -> Inode:
        """The object at a name, which must be *object_id*: nothing else may be touched."""
        inode = self._at(parent, name)
        if inode is None or not self.tree.is_object(inode, object_id):
            if inode is not None:
                self.tree.drop_unused(inode)
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return inode

    def _locate(self, op: ops.Locate, pin: int) -> None:
        inode = self.tree.table.by_id.get(op.object)
        if inode is None or not inode.named:
            parent = self.tree.table.by_id.get(op.parent)
            if parent is None or not parent.is_directory:
                return
            try:
                inode = self._at(parent, op.name)
            except OSError:
                return
            if inode is None:
                return
            if not self.tree.is_object(inode, op.object):
                self.tree.drop_unused(inode)
                return
        inode.pins |= pin

    def _forget(self, op: ops.Forget, pin: int) -> None:
        for object_id in op.objects:
            inode = self.tree.table.by_id.get(object_id)
            if inode is not None and inode.pins & pin:
                inode.pins &= ~pin
                self.tree.drop_unused(inode)

    # Live: data --------------------------------------------------------------------------------

    def _write(self, op: ops.Write, payload: bytes | memoryview) -> ops.AnyAnswer:
        inode = self.tree.table.by_id.get(op.object)
        if inode is None:
            return STALE
        fd = self.tree.data_fd(inode)
        written = write_all(fd, payload, op.offset)
        syscalls.utimens(fd, None, op.mtime)
        return ops.Done(0, written)

    def _truncate(self, op: ops.Truncate) -> ops.AnyAnswer:
        inode = self._known(op.object)
        fd = self.tree.data_fd(inode)
        os.ftruncate(fd, op.size)
        syscalls.utimens(fd, None, op.mtime)
        return OK

    # Live: metadata ----------------------------------------------------------------------------

    def _touch(self, directory: Inode, mtime: int) -> None:
        syscalls.utimens(self.tree.directory_fd(directory), None, mtime)

    def _make(self, op: ops.Make) -> ops.AnyAnswer:
        parent = self._directory(op.parent, op.name)
        self.tree.set_umask(0)
        inode, found, _, fd = self.tree.make(
            parent,
            op.name,
            op.mode,
            rdev=op.rdev,
            target=op.target,
            owner=(op.uid, op.gid),
            inherit_group=False,
            object_id=op.object,
        )
        if fd >= 0:
            self.tree.keep_data_fd(inode, fd)  # most new files are written at once
        # What the parent's default ACL, which may not be the primary's yet, made of them.
        changed = self.tree.set_acls(inode, op.acl, op.default_acl, fd)
        if inode.type != _stat.S_IFLNK and (changed or found.st_mode != op.mode):
            self.tree.set_mode(inode, op.mode)
        self.tree.set_times(inode, op.mtime, op.mtime)
        self._touch(parent, op.parent_mtime)
        return OK

    def _link(self, op: ops.Link) -> ops.AnyAnswer:
        inode = self._known(op.object)
        parent = self._directory(op.parent, op.name)
        self.tree.link(inode, parent, op.name)
        for other, name in inode.names():
            self.unstable.note_name(other.id, name, self._locator)
        self._touch(parent, op.parent_mtime)
        return OK

    def _unlink(self, op: ops.Unlink) -> ops.AnyAnswer:
        parent = self._directory(op.parent, op.name)
        inode = self._expect(parent, op.name, op.object)
        links = self.tree.stat(inode).st_nlink
        if op.directory or links <= 1:
            inode.pins = 0
        self._keep_removed(parent, op.name, inode, links)
        self.tree.unlink(parent, op.name, inode, directory=op.directory, links=links)
        if inode.gone:
            self.unstable.forget(op.object)
        self._touch(parent, op.parent_mtime)
        return OK

    def _rename(self, op: ops.Rename) -> ops.AnyAnswer:
        parent = self._directory(op.parent, op.name)
        new_parent = self._directory(op.new_parent, op.new_name)
        inode = self._expect(parent, op.name, op.object)
        replaced = self._at(new_parent, op.new_name)
        if (replaced.id if replaced is not None else b"") != op.replaced:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        links = self.tree.stat(replaced).st_nlink if replaced is not None else 0
        if replaced is not None and not op.exchange:
            self._keep_removed(new_parent, op.new_name, replaced, links)
        self.tree.rename(
            parent,
            op.name,
            new_parent,
            op.new_name,
            syscalls.RENAME_EXCHANGE if op.exchange else 0,
            inode=inode,
            replaced=replaced,
            replaced_links=links,
        )
        if replaced is not None and replaced.gone:
            replaced.pins = 0
            self.unstable.forget(replaced.id)
            self.tree.drop_unused(replaced)
        self._touch(parent, op.parent_mtime)
        if new_parent is not parent:
            self._touch(new_parent, op.new_parent_mtime)
        return OK

    def _set_attr(self, op: ops.SetAttr) -> ops.AnyAnswer:
        inode = self._known(op.object)
        if op.uid != ops.KEEP or op.gid != ops.KEEP:
            self.tree.set_owner(inode, op.uid, op.gid)
        if op.mode != ops.KEEP and inode.type != _stat.S_IFLNK:
            self.tree.set_mode(inode, op.mode)
        if op.atime is not None or op.mtime is not None:
            self.tree.set_times(inode, op.atime, op.mtime)
        return OK

    def _set_xattr(self, op: ops.SetXattr) -> ops.AnyAnswer:
        self.tree.set_xattr(self._known(op.object), op.name, op.value)
        return OK

    def _remove_xattr(self, op: ops.RemoveXattr) -> ops.AnyAnswer:
        try:
            self.tree.remove_xattr(self._known(op.object), op.name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
        return OK

    def _set_policy(self, op: ops.SetPolicy) -> ops.AnyAnswer:
        self.tree.set_policy(self._known(op.object), op.policy, op.ack)
        return OK

    # Barriers ----------------------------------------------------------------------------------

    def _flush(self, op: ops.Sync | ops.Checkpoint, reply: Reply) -> ops.AnyAnswer | None:
        if isinstance(op, ops.Checkpoint):
            self.unstable.begin()
            fd = os.dup(self.tree.root_fd)
            call: Callable[[int], None] = syscalls.syncfs
        else:
            inode = self._known(op.object)
            if inode.is_directory:
                fd = os.dup(self.tree.directory_fd(inode))
            elif inode.type == _stat.S_IFREG:
                fd = os.dup(self.tree.data_fd(inode))
            else:
                return OK
            call = os.fdatasync if op.data_only else os.fsync
        return self._later(partial(self._flush_in_thread, call, fd), reply)

    async def _flush_in_thread(self, call: Callable[[int], None], fd: int) -> ops.AnyAnswer:
        try:
            await trio.to_thread.run_sync(call, fd, limiter=self._flush_limit)
        finally:
            os.close(fd)
        return OK

    def _stable(self, op: ops.Stable) -> ops.AnyAnswer:
        self.unstable.settle(everywhere=op.everywhere)
        return OK

    def _unstable_marks(self, everywhere: bool) -> DirtyLog | None:  # noqa: FBT001 - a callback
        return self.unstable.snapshot(everywhere=everywhere)

    # Resync: names -----------------------------------------------------------------------------

    def _gather(self, op: ops.Gather) -> ops.AnyAnswer:
        parent = self._known(op.parent)
        for name, wanted in zip(op.names, op.wanted, strict=True):
            inode = self._at(parent, name)
            if inode is None:
                continue
            if inode.id and inode.id == wanted:
                inode.pins |= 2
            elif inode.id:
                # One without an id may be what is wanted, put there by an earlier copy: `Place`
                # decides.
                self.limbo.take(parent, name, inode)
            else:
                self.tree.drop_unused(inode)
        return OK

    def _place(self, op: ops.Place, contents: bytes | memoryview) -> ops.AnyAnswer:
        parent = self._directory(op.parent, op.name)
        current = self._at(parent, op.name)
        if current is not None and current.id == op.object and self._is_sure(current, op):
            return ops.Placed(not current.flags & INCOMPLETE, created=False)
        found = self._find(op, current)
        if current is not None:
            if found is None and self._may_adopt(current, op.attributes):
                self.tree.set_record(
                    current, Record(op.object, INCOMPLETE, op.attributes.policy, op.attributes.ack)
                )
                return ops.Placed(complete=False, created=False)
            self.limbo.take(parent, op.name, current)
        if found is not None:
            self._bring(found, parent, op.name)
            return ops.Placed(not found.flags & INCOMPLETE, created=False)
        attributes = op.attributes
        self.tree.set_umask(0)
        made, _, _, fd = self.tree.make(
            parent,
            op.name,
            attributes.mode,
            rdev=attributes.rdev,
            target=attributes.target,
            owner=(attributes.uid, attributes.gid),
            inherit_group=False,
            object_id=op.object,
            flags=INCOMPLETE,
        )
        try:
            complete = op.whole and (fd < 0 or write_all(fd, contents, 0) == len(contents))
        finally:
            if fd >= 0:
                os.close(fd)
        if complete:
            self._complete(made, attributes)
        return ops.Placed(complete=complete, created=True)

    def _find(self, op: ops.Place, current: Inode | None) -> Inode | None:
        """The object, wherever this replica has it; *current* is what stands at its name."""
        inode = self.tree.table.by_id.get(op.object)
        if inode is not None and inode.named and self._still_stands(inode):
            return inode if self._is_sure(inode, op) else None
        inode = self.limbo.find(op.object)
        if inode is not None:
            return inode
        for parent_id, name in op.hints:
            parent = self.tree.table.by_id.get(parent_id)
            if parent is None or not parent.named:
                continue
            try:
                inode = self._at(parent, name)
            except OSError:
                continue
            if inode is not None:
                if inode.id == op.object:
                    return inode
                if inode is not current:  # under another of its names
                    self.tree.drop_unused(inode)
        return None

    def _still_stands(self, inode: Inode) -> bool:
        """Whether an object is where it is known to be: behind the node's back it may have gone."""
        for parent, name in inode.names():
            try:
                directory = self.tree.directory_fd(parent)
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
                stands = found.st_ino == inode.ino
            except OSError:
                stands = False
            if not stands:
                inode.drop_name(parent, name)
        if not inode.named:
            inode.pins &= ~3
            inode.gone = True
            self.tree.drop_unused(inode)
        return inode.named

    def _is_sure(self, inode: Inode, op: ops.Place) -> bool:
        """Whether an object is the wanted one because it has its id."""
        return can_carry(inode.type) or self._is_like(inode, op.attributes)

    def _may_adopt(self, inode: Inode, attributes: ops.Attributes) -> bool:
        """Whether an object without an id can become the wanted one, where it stands."""
        has_id = inode.id and can_carry(inode.type)
        return not has_id and not inode.foreign and self._is_like(inode, attributes)

    def _is_like(self, inode: Inode, attributes: ops.Attributes) -> bool:
        """Whether an object is what is wanted, as far as that cannot be changed any more."""
        if inode.type != _stat.S_IFMT(attributes.mode):
            return False
        if inode.type == _stat.S_IFLNK:
            return self.tree.readlink(inode) == attributes.target
        if inode.type in {_stat.S_IFCHR, _stat.S_IFBLK}:
            return self.tree.stat(inode).st_rdev == attributes.rdev
        return True

    def _bring(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Give a found object the name: moved out of limbo, else as one more link."""
        above = inode.parent
        if above is None:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        # A name in a directory that is in limbo goes with that directory to where it is placed.
        if inode.is_directory or self.limbo.holds(inode):
            self.tree.rename(
                above, inode.name, parent, name, 0, inode=inode, replaced=None, replaced_links=0
            )
        else:
            self.tree.link(inode, parent, name)

    def _clear(self, op: ops.Clear) -> ops.AnyAnswer:
        parent = self._directory(op.parent, op.name)
        current = self._at(parent, op.name)
        if current is not None:
            self.limbo.take(parent, op.name, current)
        return OK

    async def _empty_limbo(self) -> ops.AnyAnswer:
        is_wanted = self._still()
        until = time.monotonic() + _EMPTY_S
        if await self.limbo.empty(lambda: is_wanted() and time.monotonic() < until):
            return OK
        # Of a session that is over, what is left belongs to the next one's resync.
        return ops.Done(errno.EAGAIN if is_wanted() else errno.EINTR)

    def _must_index(self, op: ops.Place) -> bool:
        """Whether the object may be inside a directory in limbo that was not looked into."""
        if self.limbo.is_indexed:
            return False
        inode = self.tree.table.by_id.get(op.object)
        return (inode is None or not inode.named) and self.limbo.find(op.object) is None

    async def _place_indexed(self, op: ops.Place, contents: bytes, pin: int) -> ops.AnyAnswer:
        is_wanted = self._still()
        async with self._indexing:
            if is_wanted():
                await self.limbo.index(is_wanted)
        if not is_wanted():
            return ops.Done(errno.EINTR)
        try:
            answer = self._place(op, contents)
        finally:
            self.unstable.note(op, self._locator)
        self._pin(op.object, pin)
        return answer

    def _list(self, op: ops.List, reply: Reply) -> ops.AnyAnswer | None:
        directory = self._known(op.parent)
        if op.after and self._listing[0] == op.parent:
            return self._later(partial(self._page, directory, op, self._listing[1]), reply)
        fd = self.tree.directory_fd(directory)
        if os.fstat(fd).st_size > _LARGE_DIRECTORY:
            return self._later(partial(self._list_large, directory, op, os.dup(fd)), reply)
        names = sorted(self.tree.names(directory))
        self._listing = (op.parent, names)
        return self._later(partial(self._page, directory, op, names), reply)

    async def _list_large(self, directory: Inode, op: ops.List, fd: int) -> ops.AnyAnswer:
        is_wanted = self._still()
        self.tree.hold(directory)
        try:
            names = await trio.to_thread.run_sync(_sorted_names, fd, limiter=self._read_limit)
            if not is_wanted():
                return ops.Done(errno.EINTR)
            names = [name for name in names if name != RESERVED]
            self._listing = (op.parent, names)
            return await self._page(directory, op, names)
        finally:
            os.close(fd)
            self.tree.release(directory)

    async def _page(self, directory: Inode, op: ops.List, names: list[bytes]) -> ops.AnyAnswer:
        with self.tree.held(directory):
            return await self._entries(directory, op, names)

    async def _entries(self, directory: Inode, op: ops.List, names: list[bytes]) -> ops.AnyAnswer:
        is_wanted = self._still()
        start = _after(names, op.after)
        entries = []
        share = Slice()
        for name in names[start : start + ops.NAMES_PER_MESSAGE]:
            await share.breathe()
            if not is_wanted():
                return ops.Done(errno.EINTR)
            inode = self._at(directory, name)
            if inode is None:
                continue
            entries.append(ops.Entry(name, inode.id, not inode.flags & INCOMPLETE))
            self.tree.drop_unused(inode)
        more = start + ops.NAMES_PER_MESSAGE < len(names)
        if not more:
            self._listing = (b"", [])
        return ops.Listing(entries, more)

    # Resync: contents --------------------------------------------------------------------------

    def _digest(self, op: ops.Digest, reply: Reply) -> ops.AnyAnswer | None:
        inode = self._known(op.object)
        fd = os.dup(self.tree.data_fd(inode))
        return self._later(partial(self._digest_in_thread, op, fd), reply)

    async def _digest_in_thread(self, op: ops.Digest, fd: int) -> ops.AnyAnswer:
        try:
            digests = await trio.to_thread.run_sync(
                digest_regions, fd, op.start, op.count, op.size, limiter=self._read_limit
            )
            return ops.Digests(digests, os.fstat(fd).st_size)
        finally:
            os.close(fd)

    def _fetch(self, op: ops.Fetch, reply: Reply) -> ops.AnyAnswer | None:
        inode = self._known(op.object)
        if op.xattr:
            value = self.tree.get_xattr(inode, op.xattr)
            return ops.Fetched(value[op.offset : op.offset + op.length], [], len(value))
        fd = os.dup(self.tree.data_fd(inode))
        return self._later(partial(self._fetch_in_thread, op, fd), reply)

    async def _fetch_in_thread(self, op: ops.Fetch, fd: int) -> ops.AnyAnswer:
        try:
            return await trio.to_thread.run_sync(
                read_range, fd, op.offset, op.length, limiter=self._read_limit
            )
        finally:
            os.close(fd)

    def _inspect(self, op: ops.Inspect) -> ops.AnyAnswer:
        inode = self._known(op.parent)
        if op.name:
            found = self._at(inode, op.name)
            if found is None:
                return ops.Inspected(ops.NO_OBJECT, complete=False, attributes=None)
            inode = found
            if inode.more:
                self._still_stands(inode)
        answer = ops.Inspected(
            inode.id,
            complete=not inode.flags & INCOMPLETE,
            attributes=inspect(self.tree, inode),
        )
        self.tree.drop_unused(inode)
        return answer

    def _must_keep(self, beside: Beside, op: ops.Data | ops.Finish) -> bool:
        """Whether *op* takes something away that this store may have alone."""
        inode = self.tree.table.by_id.get(op.object)
        if inode is None or not beside.holds_contents(inode):
            return False
        if isinstance(op, ops.Finish):
            return self.tree.stat(inode).st_size > op.attributes.size
        return not op.hole or beside.differs(inode, op.offset, op.offset + op.hole)

    async def _keep_first(self, op: ops.Data | ops.Finish, payload: bytes) -> ops.AnyAnswer:
        is_wanted = self._still()
        inode = self._known(op.object)
        self.tree.hold(inode)
        try:
            if self.beside is not None:
                await self.beside.keep_contents(inode)
        finally:
            self.tree.release(inode)
        if not is_wanted():
            return ops.Done(errno.EINTR)
        return self._data(op, payload) if isinstance(op, ops.Data) else self._finish(op)

    def _keep_removed(self, parent: Inode, name: bytes, inode: Inode, links: int) -> None:
        """An object is about to lose a name through the live stream."""
        beside = self.beside
        if beside is not None and links <= 1 and beside.holds_contents(inode):
            beside.keep_removed(parent, name, inode, inode.path())

    def _data(self, op: ops.Data, payload: bytes | memoryview) -> ops.AnyAnswer:
        inode = self._known(op.object)
        fd = self.tree.data_fd(inode)
        if op.hole:
            size = os.fstat(fd).st_size
            if op.offset < size:
                # Beyond the end there is nothing, and a last block is given up only as a whole.
                past_end = op.offset + op.hole >= size
                length = size - op.offset + _BLOCK_MAX if past_end else op.hole
                syscalls.punch_hole(fd, op.offset, length)
            return OK
        return ops.Done(0, write_all(fd, payload, op.offset))

    def _finish(self, op: ops.Finish) -> ops.AnyAnswer:
        self._complete(self._known(op.object), op.attributes)
        return OK

    def _complete(self, inode: Inode, new: ops.Attributes) -> None:
        """Size, attributes and xattrs become exactly *new*; only then the object is complete."""
        found = self.tree.stat(inode)
        if inode.type == _stat.S_IFREG and found.st_size != new.size:
            self.tree.truncate(inode, new.size)
        if (found.st_uid, found.st_gid) != (new.uid, new.gid):
            self.tree.set_owner(inode, new.uid, new.gid)
        self._set_xattrs(inode, new.xattrs)
        if inode.type != _stat.S_IFLNK:
            self.tree.set_mode(inode, new.mode)
        self.tree.set_times(inode, None, new.mtime)
        if (inode.flags & INCOMPLETE, inode.policy, inode.ack) != (0, new.policy, new.ack):
            self.tree.set_record(
                inode, Record(inode.id, inode.flags & ~INCOMPLETE, new.policy, new.ack)
            )

    def _set_xattrs(self, inode: Inode, wanted: dict[bytes, bytes]) -> None:
        present = set(self.tree.list_xattrs(inode))
        for name in present - wanted.keys():
            self.tree.remove_xattr(inode, name)
        for name, value in wanted.items():
            if name not in present or self.tree.get_xattr(inode, name) != value:
                self.tree.set_xattr(inode, name, value)

    def _phase(self, op: ops.Phase, reply: Reply) -> ops.AnyAnswer | None:
        if not op.inconsistent:
            return self._later(partial(self._settle, op, self._still()), reply)
        if self._prepare is not None:
            return self._later(partial(self._begin_resync, self._prepare, op), reply)
        self._on_phase(op)
        return OK

    async def _begin_resync(
        self, prepare: Callable[[], Awaitable[None]], op: ops.Phase
    ) -> ops.AnyAnswer:
        is_wanted = self._still()
        await prepare()
        if not is_wanted():
            return ops.Done(errno.EINTR)
        self._on_phase(op)
        return OK

    async def _settle(self, op: ops.Phase, is_wanted: Callable[[], bool]) -> ops.AnyAnswer:
        """The data is whole again: on stable storage before that is recorded.

        A resync makes objects anew that an fsync had made stable.
        """
        fd = os.dup(self.tree.root_fd)
        try:
            await trio.to_thread.run_sync(syscalls.syncfs, fd, limiter=self._flush_limit)
        finally:
            os.close(fd)
        if not is_wanted():
            return ops.Done(errno.EINTR)
        self._on_phase(op)
        return OK


def write_all(fd: int, data: bytes | memoryview, offset: int) -> int:
    """pwrite all of *data*; fewer bytes only where the disk takes no more, never an error then."""
    written = os.pwrite(fd, data, offset)
    size = len(data)
    while written < size:
        try:
            more = os.pwrite(fd, memoryview(data)[written:], offset + written)
        except OSError:
            return written
        if not more:
            break
        written += more
    return written


def digest_regions(fd: int, start: int, count: int, size: int) -> bytes:
    """xxh3_128 of each of *count* regions of *size* bytes from *start*; the last may be short."""
    return b"".join(
        xxhash.xxh3_128_digest(os.pread(fd, size, start + index * size)) for index in range(count)
    )


def read_range(fd: int, offset: int, length: int) -> ops.Fetched:
    """Up to *length* bytes from *offset*, the holes among them told apart."""
    size = os.fstat(fd).st_size
    parts = []
    holes = []
    for start, stop, is_hole in segments(fd, offset, min(offset + length, size)):
        if is_hole:
            holes.append((start, stop))
        else:
            parts.append(os.pread(fd, stop - start, start))
    return ops.Fetched(b"".join(parts), holes, size)


def _sorted_names(fd: int) -> list[bytes]:
    return sorted(os.fsencode(name) for name in os.listdir(fd))


def _after(names: list[bytes], after: bytes) -> int:
    """Index of the first name beyond *after* in a sorted list."""
    return bisect.bisect_right(names, after) if after else 0
