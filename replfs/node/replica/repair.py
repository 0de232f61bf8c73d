"""The replica's part of a resync: each name gets the right object, then its contents are put right.

What stands in the wrong place goes to limbo, from which it is placed again or removed at the end.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
import time
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

import trio

from replfs.core import ops
from replfs.core.policy import Policy
from replfs.core.unstable import Unstable
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.replica.beside import Beside
from replfs.node.replica.later import Later, Reply
from replfs.node.replica.limbo import Limbo
from replfs.node.replica.objects import Objects
from replfs.node.replica.own import Own, is_own
from replfs.node.replica.planting import Planting
from replfs.node.replica.writeback import Writeback
from replfs.store import syscalls
from replfs.store.contents import write_all
from replfs.store.inode import Inode
from replfs.store.record import INCOMPLETE, Record, can_carry
from replfs.store.syscalls import failure
from replfs.store.tree import Tree

_OK: Final = ops.Done(0)
_BLOCK_MAX: Final = 1 << 16
"""No file system's blocks are larger."""
_EMPTY_S: Final = 1.0
"""Seconds after which emptying limbo is answered with EAGAIN: the primary asks again."""


class Repair:
    """Puts *tree* right as a primary's resync says."""

    def __init__(
        self,
        tree: Tree,
        objects: Objects,
        unstable: Unstable,
        later: Later,
        own: Own,
        unwritten: Unwritten,
        on_phase: Callable[[ops.Phase], None],
        prepare: Callable[[], Awaitable[None]] | None,
    ) -> None:
        """The last two as in `Replica`."""
        self._beside: Beside | None = None
        self._own = own
        self._limbo = Limbo(tree, own)
        self._tree = tree
        self._objects = objects
        self._unstable = unstable
        self._later = later
        self._on_phase = on_phase
        self._prepare = prepare
        self._unwritten = unwritten
        self._indexing = trio.Lock()
        self._writeback = Writeback(later, self._flush)
        self.handlers: dict[type, Callable[[Any], ops.AnyAnswer]] = {
            ops.Gather: self._gather,
            ops.Clear: self._clear,
        }
        """What is done at once, for each kind; they raise OSError."""

    def begin_session(self) -> None:
        """What was known of limbo may be wrong."""
        self._limbo.forget()

    def spare(self, objects: Iterable[bytes]) -> None:
        """What is left of these in limbo is kept beside when that is emptied."""
        self._limbo.spared = frozenset(objects)

    def keep_beside(self, beside: Beside | None) -> None:
        """What this store may have on its own, and the primary not, is kept there."""
        self._beside = self._limbo.beside = beside

    # Begin and end -----------------------------------------------------------------------------

    def phase(self, op: ops.Phase, reply: Reply) -> ops.AnyAnswer | None:
        """A resync begins or has ended; recorded durably before it is answered."""
        if not op.inconsistent:
            return self._later.do(partial(self._settle, op, self._later.still()), reply)
        if self._prepare is not None:
            return self._later.do(partial(self._begin_resync, self._prepare, op), reply)
        self._on_phase(op)
        return _OK

    async def _begin_resync(
        self, prepare: Callable[[], Awaitable[None]], op: ops.Phase
    ) -> ops.AnyAnswer:
        is_wanted = self._later.still()
        await prepare()
        if not is_wanted():
            return ops.Done(errno.EINTR)
        self._on_phase(op)
        return _OK

    async def _settle(self, op: ops.Phase, is_wanted: Callable[[], bool]) -> ops.AnyAnswer:
        """The data is whole again: on stable storage before that is recorded.

        A resync makes objects anew that an fsync had made stable.
        """
        await self._flush()
        if not is_wanted():
            return ops.Done(errno.EINTR)
        self._on_phase(op)
        return _OK

    async def _flush(self) -> None:
        """Everything. Raises OSError."""
        await self._unwritten.flush(self._tree.root_fd, self._later.flushes)

    # Names -------------------------------------------------------------------------------------

    def place(
        self, op: ops.Place, contents: bytes | memoryview, pin: int, reply: Reply
    ) -> ops.AnyAnswer | None:
        """Have the right object under a name. None: the answer comes later. Raises OSError."""
        if self._must_index(op):
            return self._later.do(partial(self._place_indexed, op, bytes(contents), pin), reply)
        answer = self._place(op, contents)
        self._objects.pin(op.object, pin)
        return answer

    def place_many(
        self, op: ops.PlaceMany, contents: bytes | memoryview, pin: int, reply: Reply
    ) -> ops.AnyAnswer | None:
        """Have the right objects under many names of a directory; answered later."""
        return self._later.do(partial(self._place_many, op, bytes(contents), pin), reply)

    async def _place_many(self, op: ops.PlaceMany, contents: bytes, pin: int) -> ops.AnyAnswer:
        is_wanted = self._later.still()
        if not await self._index(is_wanted):
            return ops.Done(errno.EINTR)

        def place(one: ops.Place, data: memoryview) -> ops.Done | ops.Placed:
            try:
                answer = self._place(one, data)
            except OSError as error:
                return ops.Done(error.errno or errno.EIO)
            if not (answer.complete and answer.created):
                self._objects.pin(one.object, pin)
            return answer

        def note(one: ops.Place) -> None:
            self._unstable.note(one, self._objects.locator)

        planting = Planting(self._tree, self._limbo, self._unstable, place, note)
        answer = await planting.place_many(op, contents, is_wanted)
        self._writeback.placed(len(op.items))
        return answer

    async def _index(self, is_wanted: Callable[[], bool]) -> bool:
        """Learn what is in limbo. False: nobody wants it any more."""
        async with self._indexing:
            if is_wanted():
                await self._limbo.index(is_wanted)
        return is_wanted()

    def _gather(self, op: ops.Gather) -> ops.AnyAnswer:
        parent = self._objects.known(op.parent)
        for name, wanted in zip(op.names, op.wanted, strict=True):
            inode = self._objects.at(parent, name)
            if inode is None:
                continue
            if inode.id and inode.id == wanted and not is_own(inode):
                inode.pins |= 2
            elif self._has_its_place(inode, name, wanted):
                self._tree.drop_unused(inode)
            elif inode.id:
                # One without an id may be what is wanted, put there by an earlier copy: `Place`
                # decides.
                self._limbo.take(parent, name, inode)
            else:
                self._tree.drop_unused(inode)
        return _OK

    def _has_its_place(self, inode: Inode, name: bytes, wanted: bytes) -> bool:
        """Whether what stands at a name is the node's own, and the primary has nothing there."""
        return wanted == ops.NO_OBJECT and self._own.stands_at(inode, name)

    def _place(self, op: ops.Place, contents: bytes | memoryview) -> ops.Placed:
        parent = self._objects.directory(op.parent, op.name)
        current = self._objects.at(parent, op.name)
        if current is not None and is_own(current):
            self._limbo.take(parent, op.name, current)
            current = None
        if current is not None and current.id == op.object and self._is_sure(current, op):
            return ops.Placed(self._objects.is_whole(current), created=False)
        found = self._find(op, current)
        if current is not None:
            if found is None and self._may_adopt(current, op.attributes):
                self._tree.set_record(
                    current, Record(op.object, INCOMPLETE, op.attributes.policy, op.attributes.ack)
                )
                return ops.Placed(complete=False, created=False)
            self._limbo.take(parent, op.name, current)
        if found is not None:
            self._bring(found, parent, op.name)
            return ops.Placed(self._objects.is_whole(found), created=False)
        attributes = op.attributes
        self._tree.set_umask(0)
        made, _, fd = self._tree.make_like(
            parent,
            op.name,
            attributes.mode,
            rdev=attributes.rdev,
            target=attributes.target,
            owner=(attributes.uid, attributes.gid),
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
        if self._beside is not None:
            self._beside.made(op.object)
        return ops.Placed(complete=complete, created=True)

    def _find(self, op: ops.Place, current: Inode | None) -> Inode | None:
        """The object, wherever this replica has it; *current* is what stands at its name."""
        found = self._find_any(op, current)
        if found is not None and self._own.holds(found):
            self._own.part(found)
            return None
        return found

    def _find_any(self, op: ops.Place, current: Inode | None) -> Inode | None:
        """As `_find`; it may be this node's own.

        Where it was made anew before its old self was found, that one is in limbo: what the primary
        knows to have been placed comes first.
        """
        inode = self._tree.table.by_id.get(op.object)
        if inode is None or not (inode.named and self._objects.still_stands(inode)):
            return self._find_by_hint(op, current) or self._limbo.find(op.object)
        if not self._is_sure(inode, op):
            return None
        if self._limbo.contains(inode):
            return self._find_by_hint(op, current) or inode
        return inode

    def _find_by_hint(self, op: ops.Place, current: Inode | None) -> Inode | None:
        for parent_id, name in op.hints:
            parent = self._tree.table.by_id.get(parent_id)
            if parent is None or not parent.named:
                continue
            try:
                inode = self._objects.at(parent, name)
            except OSError:
                continue
            if inode is not None:
                if inode.id == op.object:
                    return inode
                if inode is not current:  # under another of its names
                    self._tree.drop_unused(inode)
        return None

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
            return self._tree.readlink(inode) == attributes.target
        if inode.type in {_stat.S_IFCHR, _stat.S_IFBLK}:
            return self._tree.stat(inode).st_rdev == attributes.rdev
        return True

    def _bring(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """Give a found object the name: moved out of limbo, else as one more link."""
        above = inode.parent
        if above is None:
            raise failure(errno.ESTALE)
        if self._beside is not None:
            self._beside.moving(inode)
        # A name in a directory that is in limbo goes with that directory to where it is placed.
        if inode.is_directory or self._limbo.holds(inode):
            self._tree.rename(
                above, inode.name, parent, name, 0, inode=inode, replaced=None, replaced_links=0
            )
        else:
            self._tree.link(inode, parent, name)

    def _clear(self, op: ops.Clear) -> ops.AnyAnswer:
        parent = self._objects.directory(op.parent, op.name)
        current = self._objects.at(parent, op.name)
        if current is not None and not self._has_its_place(current, op.name, ops.NO_OBJECT):
            self._limbo.take(parent, op.name, current)
        return _OK

    def empty_limbo(self, _op: ops.EmptyLimbo, reply: Reply) -> ops.AnyAnswer | None:
        """Remove what no name wanted: it was deleted on the primary."""
        return self._later.do(self._empty_limbo, reply)

    async def _empty_limbo(self) -> ops.AnyAnswer:
        is_wanted = self._later.still()
        until = time.monotonic() + _EMPTY_S
        if await self._limbo.empty(lambda: is_wanted() and time.monotonic() < until):
            return _OK
        # Of a session that is over, what is left belongs to the next one's resync.
        return ops.Done(errno.EAGAIN if is_wanted() else errno.EINTR)

    def _must_index(self, op: ops.Place) -> bool:
        """Whether the object may be inside a directory in limbo that was not looked into."""
        if self._limbo.is_indexed:
            return False
        inode = self._tree.table.by_id.get(op.object)
        return (inode is None or not inode.named) and self._limbo.find(op.object) is None

    async def _place_indexed(self, op: ops.Place, contents: bytes, pin: int) -> ops.AnyAnswer:
        if not await self._index(self._later.still()):
            return ops.Done(errno.EINTR)
        try:
            answer = self._place(op, contents)
        finally:
            self._unstable.note(op, self._objects.locator)
        self._objects.pin(op.object, pin)
        return answer

    # Contents ----------------------------------------------------------------------------------

    def fill(
        self, op: ops.Data | ops.Finish, payload: bytes | memoryview, reply: Reply
    ) -> ops.AnyAnswer | None:
        """Data or attributes of an object. None: the answer comes later. Raises OSError."""
        if self._beside is not None and self._must_keep(self._beside, op):
            return self._later.do(partial(self._keep_first, op, bytes(payload)), reply)
        return self._data(op, payload) if isinstance(op, ops.Data) else self._finish(op)

    def _must_keep(self, beside: Beside, op: ops.Data | ops.Finish) -> bool:
        """Whether *op* takes something away that this store may have alone."""
        inode = self._tree.table.by_id.get(op.object)
        if inode is None or not beside.holds_contents(inode):
            return False
        if isinstance(op, ops.Finish):
            return self._tree.stat(inode).st_size != op.attributes.size
        return not op.hole or beside.differs(inode, op.offset, op.offset + op.hole)

    async def _keep_first(self, op: ops.Data | ops.Finish, payload: bytes) -> ops.AnyAnswer:
        is_wanted = self._later.still()
        inode = self._objects.known(op.object)
        self._tree.hold(inode)
        try:
            if self._beside is not None:
                await self._beside.keep_contents(inode)
        finally:
            self._tree.release(inode)
        if not is_wanted():
            return ops.Done(errno.EINTR)
        return self._data(op, payload) if isinstance(op, ops.Data) else self._finish(op)

    def _data(self, op: ops.Data, payload: bytes | memoryview) -> ops.AnyAnswer:
        inode = self._objects.known(op.object)
        fd = self._tree.data_fd(inode)
        if op.hole:
            size = os.fstat(fd).st_size
            if op.offset < size:
                # Beyond the end there is nothing, and a last block is given up only as a whole.
                past_end = op.offset + op.hole >= size
                length = size - op.offset + _BLOCK_MAX if past_end else op.hole
                syscalls.punch_hole(fd, op.offset, length)
            return _OK
        written = write_all(fd, payload, op.offset)
        self._writeback.wrote(inode, fd, written)
        return ops.Done(0, written)

    def _finish(self, op: ops.Finish) -> ops.AnyAnswer:
        inode = self._objects.known(op.object)
        self._complete(inode, op.attributes)
        if self._writeback.is_due(inode):
            self._writeback.finished(inode, self._tree.data_fd(inode))
        return _OK

    def _complete(self, inode: Inode, new: ops.Attributes) -> None:
        """Size, attributes and xattrs become exactly *new*; only then the object is complete."""
        found = self._tree.stat(inode)
        if inode.type == _stat.S_IFREG and found.st_size != new.size:
            self._tree.truncate(inode, new.size)
        if (found.st_uid, found.st_gid) != (new.uid, new.gid):
            self._tree.set_owner(inode, new.uid, new.gid)
        self._set_xattrs(inode, new.xattrs)
        if inode.type != _stat.S_IFLNK:
            self._tree.set_mode(inode, new.mode)
        self._tree.set_times(inode, None, new.mtime)
        policy = new.policy
        if policy == Policy.NONE and inode.parent is not None:
            # It was changed while this was on its way: the object is about to be removed here.
            policy = Policy.INHERIT
        if (inode.flags & INCOMPLETE, inode.policy, inode.ack) != (0, policy, new.ack):
            self._tree.set_record(
                inode, Record(inode.id, inode.flags & ~INCOMPLETE, policy, new.ack)
            )

    def _set_xattrs(self, inode: Inode, wanted: dict[bytes, bytes]) -> None:
        present = set(self._tree.list_xattrs(inode))
        for name in present - wanted.keys():
            self._tree.remove_xattr(inode, name)
        for name, value in wanted.items():
            if name not in present or self._tree.get_xattr(inode, name) != value:
                self._tree.set_xattr(inode, name, value)
