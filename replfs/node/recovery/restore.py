"""Taking from a peer what this store lost: the steps of a resync, in the other direction.

A log says what may differ; the peer has what is right, and is only looked at. The local store is
changed by a `Replica`, as a primary would change it: everything that stands in the wrong place is
gathered, then every name is placed, then data is compared region by region and fetched where it
differs, then attributes. States are compared and nothing is replayed, so this can be cut off
anywhere and begun again.

What this store's own log says the peer lacks was changed here after the peer had it, and nothing
was acknowledged on top of that (`core.settling`): there the local version is right, and stays. What
is only unknown is the peer's, unless the object was changed here as well: what is marked of it may
have been fsynced. Of a peer that never had a complete copy all is right here but what was carried
to it. What the policies keep
from the peers is not looked at.

That the peer has nothing at a name says that it was removed, but not of what the peer has elsewhere
and this store does not take from there: a name that is right here, or the peer's limbo, where a
resync that was cut off has left it. What stands here under a name that is free there stays then.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as _stat
from typing import Final, Protocol

import msgspec
import trio
import xxhash

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.marks import ObjectMarks
from replfs.core.policy import Policy
from replfs.core.regions import REGION_SHIFT, REGION_SIZE
from replfs.errors import PeerLost, StoreError
from replfs.node.asking import suspects
from replfs.node.asking.attributes import read as read_attributes
from replfs.node.asking.question import list_all
from replfs.node.pacing.crew import each
from replfs.node.replica.own import is_own
from replfs.node.replica.replica import Replica
from replfs.node.replication.flight import describe
from replfs.store import locators
from replfs.store.contents import digest_regions
from replfs.store.inode import Inode
from replfs.store.record import INCOMPLETE, LIMBO_ID, ROOT_ID
from replfs.store.tree import Tree

log = logging.getLogger(__name__)

_BULK: Final = 1
_PIN: Final = 1 << _BULK
_REGIONS_AT_ONCE: Final = ops.PAYLOAD_MAX // REGION_SIZE
_TASKS: Final = 8
_GONE: Final = frozenset({errno.ESTALE, errno.ENOENT, errno.ENOTDIR})


class Source(Protocol):
    """The peer: asked one question at a time, in a session."""

    async def ask(self, op: ops.AnyOp) -> ops.AnyAnswer:
        """The answer. Raises PeerLost."""

    def tell(self, op: ops.Locate | ops.Forget) -> None:
        """Where an object is there, before it is asked about. Raises PeerLost."""


class Policies(Protocol):
    """What is replicated at all."""

    def is_replicated_name(self, directory: Inode, name: bytes, inode: Inode) -> bool:
        """Whether the peers have the name."""

    def changed(self) -> None:
        """An object has another policy: nothing that was said of others need be so any more."""


class Restore:
    """One restoration of *tree* from *source*."""

    def __init__(
        self,
        tree: Tree,
        replica: Replica,
        policies: Policies,
        source: Source,
        suspicion: suspects.Suspicion | None,
        own: DirtyLog,
        *,
        is_partial: bool = False,
    ) -> None:
        """*suspicion*: what the peer may have and this store lack; None: everything is compared.

        *own*: what the peer lacks, by this store's log of it. *is_partial*: its first copy was not
        finished, so that what the log calls unknown is not there, instead of perhaps equal.
        """
        self._is_partial = is_partial
        self._tree = tree
        self._replica = replica
        self._policies = policies
        self._source = source
        self._own = own
        self._log = DirtyLog()
        self._places: dict[bytes, tuple[bytes, bytes]] = {}
        self._is_all_unknown = suspicion is None
        if suspicion is None:
            self._log.mark_unknown(ROOT_ID, directory=True, deep=True)
        else:
            self._log.absorb(suspicion.marks)
            self._places = suspicion.places
        self._located = {ROOT_ID}
        self._astray: dict[bytes, tuple[bytes, bytes]] = {}
        """Objects that the peer has where this store does not take them from: directory and name.
        """
        self._has_looked_aside = False
        self._made: set[bytes] = set()
        """Objects of the own log that were not here: they have nothing but what is fetched."""
        self.compared = 0
        """Objects looked at."""
        self.changed = 0
        """Names, and objects with data, that were not as on the peer."""
        self.bytes = 0
        """Fetched."""

    async def run(self) -> None:
        """Work until nothing is left. The replica must be running.

        Raises:
            PeerLost: the session ended.
            OSError: the store cannot hold it.
            StoreError: something cannot be brought to be as on the peer.
        """
        self._replica.forget_all()
        while not self._log.is_empty:
            left = self._left()
            for directory in self._log.directories_unknown():
                await self._expand(directory)
            await self._gather()
            for directory, name in self._log.names_pending():
                await self._place(directory, name)
            await each(self._log.objects_with_data(), self._data, tasks=_TASKS)
            await each(self._log.objects_with_attrs(), self._finish, tasks=_TASKS)
            if self._left() == left:
                raise StoreError(f"{left[0]} objects cannot be fetched: {self._example()}")
        await self._look_aside()
        self._replica.spare(self._astray)
        while await self._here(ops.EmptyLimbo()) == errno.EAGAIN:
            pass
        self._replica.forget_all()

    def _left(self) -> tuple[int, ...]:
        dirty = self._log
        return len(dirty), dirty.dirty_names, dirty.dirty_bytes, self.compared, self.changed

    def _example(self) -> str:
        return next((one.hex() for one in self._log.objects()), "")

    # The two sides -----------------------------------------------------------------------------

    async def _here(self, op: ops.AnyOp, payload: bytes | None = None) -> int:
        """Do *op* on this store; the errno, of those that say that something is not there."""
        answer = await self._do(op, payload)
        return answer.errno if isinstance(answer, ops.Done) else 0

    async def _do(self, op: ops.AnyOp, payload: bytes | None = None) -> ops.AnyAnswer:
        done = trio.Event()
        later: list[ops.AnyAnswer] = []

        def reply(answer: ops.AnyAnswer) -> None:
            later.append(answer)
            done.set()

        answer = self._replica.apply(_BULK, op, payload, reply)
        if answer is None:
            await done.wait()
            answer = later[0]
        else:
            await trio.lowlevel.checkpoint()
        if (
            isinstance(answer, ops.Done)
            and answer.errno
            and answer.errno not in _GONE | {errno.EAGAIN}
        ):
            raise OSError(answer.errno, f"{type(op).__name__}: {os.strerror(answer.errno)}")
        return answer

    def _chain(self, object_id: bytes) -> list[ops.Locate]:
        """Where the object and those above it are on the peer, from the top."""
        chain: list[ops.Locate] = []
        while object_id != ROOT_ID and object_id in self._places and len(chain) < ops.PATH_MAX:
            above, name = self._places[object_id]
            chain.append(ops.Locate(object_id, above, name))
            object_id = above
        return chain[::-1]

    def _locate_there(self, object_id: bytes) -> None:
        for place in self._chain(object_id):
            if place.object not in self._located:
                self._source.tell(place)
                self._located.add(place.object)

    def _find(self, object_id: bytes) -> Inode | None:
        """The object on this side, kept known until the end."""
        if object_id == ROOT_ID:
            return self._tree.root
        inode = self._known(object_id)
        if inode is None or not inode.pins & _PIN:
            for place in self._chain(object_id):
                self._replica.apply(_BULK, place, None, _nobody)
            inode = self._known(object_id)
        return inode

    def _known(self, object_id: bytes) -> Inode | None:
        inode = self._tree.table.by_id.get(object_id)
        return inode if inode is not None and inode.named else None

    def _find_changed(self, object_id: bytes) -> Inode | None:
        """The object if it was changed here after the peer had gone, wherever it stands.

        The peer may have it under a name in a directory that is placed before the one in which it
        is here is looked into: made anew, it would be without what only this store has.
        """
        marks = self._own.marks(object_id)
        return None if marks is None else locators.find(self._tree, marks.handle, object_id)

    async def _inspect(self, directory: bytes, name: bytes = b"") -> ops.Inspected | None:
        """What the peer has at a name, or, without one, what *directory* is; None: nothing."""
        self._locate_there(directory)
        answer = await self._source.ask(ops.Inspect(directory, name))
        if isinstance(answer, ops.Inspected) and answer.attributes is not None:
            return answer
        if isinstance(answer, ops.Done) and answer.errno not in _GONE:
            raise PeerLost(f"the peer cannot look at an object: {describe(answer.errno)}")
        return None

    async def _look_aside(self) -> None:
        """Learn once what the peer has in limbo; earlier releases do not tell."""
        if self._has_looked_aside:
            return
        self._has_looked_aside = True
        found = await list_all(self._source.ask, LIMBO_ID)
        if isinstance(found, dict):
            for name, entry in found.items():
                if entry.object:
                    self._astray[entry.object] = LIMBO_ID, name

    # Names -------------------------------------------------------------------------------------

    def _is_own(self, directory: bytes, name: bytes) -> bool:
        """Whether what stands at the name was changed here after the peer had gone."""
        if directory in self._made:
            return False
        if self._is_partial:
            return not self._own.name_is_clean(directory, name)
        marks = self._own.marks(directory)
        return marks is not None and marks.names is not None and name in marks.names

    def _own_marks(self, object_id: bytes) -> ObjectMarks | None:
        return None if object_id in self._made else self._own.marks(object_id)

    def _own_parts(self, object_id: bytes, start: int, stop: int) -> list[tuple[int, int, bool]]:
        """[start, stop) of a file cut into (start, stop, is the peer's)."""
        marks = self._own_marks(object_id)
        if marks is None:
            return [(start, stop, True)]
        if self._is_partial:
            return self._own.split(object_id, start, stop)
        return self._own.split_changed(object_id, start, stop)

    async def _expand(self, directory: bytes) -> None:
        """List a directory on both sides, and mark what may differ."""
        marks = self._log.marks(directory)
        if marks is None or not self._is_placed(directory):
            return
        inode = self._find(directory)
        if inode is None:
            return
        if self._is_partial and self._is_own(directory, b""):
            self._log.clear_names_all(directory)
            return
        deep = marks.deep
        theirs = await self._list(directory)
        for name in self._tree.names(inode):
            child = self._tree.lookup_or_none(inode, name)
            if child is None:
                continue
            self._tree.read_record(child)
            entry = theirs.pop(name, None)
            await self._compare_name(inode, name, child, entry, deep=deep)
            self._tree.drop_unused(child)
        for name, entry in theirs.items():
            if entry.object:
                self._log.mark_name(directory, name)
        self._log.clear_names_all(directory)
        self.compared += 1

    async def _compare_name(
        self, inode: Inode, name: bytes, child: Inode, entry: ops.Entry | None, *, deep: bool
    ) -> None:
        if child.foreign or not self._policies.is_replicated_name(inode, name, child):
            return
        if self._is_partial and self._is_own(inode.id, name):
            return  # nor anything below it
        if entry is None or not entry.object:
            if entry is None:
                self._log.mark_name(inode.id, name)
            return
        if entry.object != child.id or not entry.complete or child.flags & INCOMPLETE:
            self._log.mark_name(inode.id, name)
            return
        self._places[entry.object] = inode.id, name
        if not deep:
            return
        if child.is_directory:
            self._log.mark_unknown(child.id, directory=True, deep=True)
        else:
            # At once: marks of every file would not fit into memory.
            self._log.mark_unknown(child.id, directory=False)
            await self._data(child.id)
            await self._finish(child.id)
            self._replica.apply(_BULK, ops.Forget([child.id]), None, _nobody)
            self._source.tell(ops.Forget([child.id]))
            self._located.discard(child.id)

    async def _list(self, directory: bytes) -> dict[bytes, ops.Entry]:
        self._locate_there(directory)
        found = await list_all(self._source.ask, directory)
        if not isinstance(found, dict):
            raise PeerLost("the peer cannot list a directory")
        return found

    def _is_placed(self, object_id: bytes) -> bool:
        """Whether all names on the way to the object are as on the peer."""
        return all(self._log.name_is_clean(one.parent, one.name) for one in self._chain(object_id))

    async def _gather(self) -> None:
        """Take aside what stands under a dirty name and is not what the peer has there.

        Again until nothing new comes: what is inside a directory that was taken aside is found
        only then. Names first that are right here: what the peer has there is not looked for.
        """
        moved = True
        while moved:
            moved = False
            names = sorted(self._log.ungathered(), key=lambda one: not self._is_own(*one))
            for directory, name in names:
                moved = await self._gather_one(directory, name) or moved

    async def _gather_one(self, directory: bytes, name: bytes) -> bool:
        if self._is_own(directory, name):
            there = await self._inspect(directory, name)
            if there is not None and there.object:
                self._astray[there.object] = directory, name
            self._log.clear_name(directory, name)
            return True
        inode = self._find(directory)
        if inode is None:
            return False
        child = self._tree.lookup_or_none(inode, name)
        if child is not None:
            self._tree.read_record(child)
            if not self._policies.is_replicated_name(inode, name, child) and not (
                await self._became_replicated(directory, name, child)
            ):
                self._log.clear_name(directory, name)
                return True
        there = await self._inspect(directory, name)
        if child is not None and there is None:
            await self._look_aside()
            if child.id in self._astray:
                self._leave(directory, name, child)
                return True
        wanted = there.object if there is not None else ops.NO_OBJECT
        await self._here(ops.Gather(directory, [name], [wanted]))
        self._log.set_gathered(directory, name)
        return True

    async def _became_replicated(self, directory: bytes, name: bytes, child: Inode) -> bool:
        """Whether it is lost that what is `none` here was made known to the peers: it is again.

        The peer has the very object, and by this store's log is not to lose it.
        """
        if not is_own(child):
            return False  # by its name, or by what is above it
        there = await self._inspect(directory, name)
        if there is None or there.object != child.id or there.attributes is None:
            return False
        if there.attributes.policy == Policy.NONE:
            return False
        self._tree.set_policy(child, there.attributes.policy, there.attributes.ack)
        self._policies.changed()
        return True

    def _leave(self, directory: bytes, name: bytes, child: Inode) -> None:
        """An object stays under its name, though the peer has it elsewhere."""
        self._replica.apply(_BULK, ops.Locate(child.id, directory, name), None, _nobody)
        self._places[child.id] = self._astray[child.id]
        if self._is_all_unknown:
            self._log.mark_unknown(child.id, directory=child.is_directory, deep=child.is_directory)
        self._log.clear_name(directory, name)

    async def _place(self, directory: bytes, name: bytes) -> None:
        """Give this side under one name what is there on the peer; its directory first."""
        for place in self._chain(directory):
            if not self._log.name_is_clean(place.parent, place.name):
                await self._place_one(place.parent, place.name)
        if self._is_placed(directory) and not self._log.name_is_clean(directory, name):
            await self._place_one(directory, name)

    async def _place_one(self, directory: bytes, name: bytes) -> None:
        if not self._log.is_gathered(directory, name) and not await self._gather_one(
            directory, name
        ):
            return
        inode = self._find(directory)
        if self._log.name_is_clean(directory, name) or inode is None:
            return
        there = await self._inspect(directory, name)
        if there is None or there.attributes is None:
            await self._here(ops.Clear(directory, name))
        elif there.object:
            # Perhaps under another of its names.
            found = self._find(there.object) or self._find_changed(there.object)
            if found is None or (inode, name) not in found.names():
                self.changed += 1
            self._places[there.object] = directory, name
            answer = await self._do(ops.Place(there.object, directory, name, there.attributes, []))
            if not isinstance(answer, ops.Placed):
                return
            if answer.created and self._own.marks(there.object) is not None:
                self._made.add(there.object)
            if not answer.complete or self._is_all_unknown:
                self._mark_contents(there.object, there.attributes.mode)
        self._log.clear_name(directory, name)

    def _mark_contents(self, object_id: bytes, mode: int) -> None:
        if _stat.S_ISDIR(mode):
            self._log.mark_names_all(object_id, deep=self._is_all_unknown)
        elif _stat.S_ISREG(mode):
            self._log.mark_tail(object_id, 0)
        else:
            self._log.mark_attrs(object_id)

    # Contents ----------------------------------------------------------------------------------

    async def _data(self, object_id: bytes) -> None:
        """Make a file's marked regions those of the peer."""
        marks = self._log.marks(object_id)
        if marks is None or not marks.data or not self._is_placed(object_id):
            return
        inode = self._find(object_id)
        there = await self._inspect(object_id)
        if inode is None or there is None or there.attributes is None:
            self._log.forget(object_id)  # its names say what becomes of it
            return
        if inode.type == _stat.S_IFREG and _stat.S_ISREG(there.attributes.mode):
            end = (there.attributes.size + REGION_SIZE - 1) >> REGION_SHIFT
            first = 0
            before = self.bytes
            while (run := self._log.next_run(object_id, first, end, _REGIONS_AT_ONCE)) is not None:
                start, stop = run[0] << REGION_SHIFT, run[1] << REGION_SHIFT
                for left, right, is_theirs in self._own_parts(object_id, start, stop):
                    if is_theirs:
                        await self._fetch_run(inode, left, right)
                first = run[1]
            self.changed += self.bytes > before
        self._log.clear_regions(object_id, 0, None)
        self._log.clear_tail(object_id, None)
        self.compared += 1

    async def _fetch_run(self, inode: Inode, start: int, stop: int) -> None:
        count = (stop - start + REGION_SIZE - 1) // REGION_SIZE
        answer = await self._source.ask(ops.Digest(inode.id, start, count, REGION_SIZE))
        if not isinstance(answer, ops.Digests):
            raise PeerLost("the peer cannot read a file")
        fd = os.dup(self._tree.data_fd(inode))
        try:
            own = await trio.to_thread.run_sync(digest_regions, fd, start, count, REGION_SIZE)
        finally:
            os.close(fd)
        for index in range(count):
            place = slice(index * 16, index * 16 + 16)
            if own[place] != answer.digests[place]:
                at = start + index * REGION_SIZE
                await self._fetch(inode, at, min(REGION_SIZE, stop - at))

    async def _fetch(self, inode: Inode, start: int, length: int) -> None:
        answer = await self._source.ask(ops.Fetch(inode.id, start, length, b""))
        if not isinstance(answer, ops.Fetched):
            raise PeerLost("the peer cannot read a file")
        stop = min(start + length, answer.size)
        used = 0
        at = start
        for low, high in [*answer.holes, (stop, stop)]:
            if at < low:
                part = answer.data[used : used + low - at]
                await self._here(ops.Data(inode.id, at), part)
                used += len(part)
            if low < high:
                await self._here(ops.Data(inode.id, low, high - low))
            at = high
        self.bytes += used

    async def _finish(self, object_id: bytes) -> None:
        """Make size, attributes and extended attributes exactly those of the peer."""
        marks = self._log.marks(object_id)
        if marks is None or not marks.attrs or marks.names is not None or marks.data:
            return
        if not self._is_placed(object_id):
            return
        inode = self._find(object_id)
        there = await self._inspect(object_id)
        if inode is None or there is None or there.attributes is None:
            self._log.forget(object_id)
            return
        own = self._own_marks(object_id)
        if own is None or not own.attrs or not (own.changed or self._is_partial):
            xattrs = {
                name: await self._xattr(inode, name, digest)
                for name, digest in there.attributes.xattrs.items()
            }
            attributes = msgspec.structs.replace(there.attributes, xattrs=xattrs)
            await self._here(ops.Finish(object_id, attributes))
        elif inode.type == _stat.S_IFREG:
            mine = read_attributes(self._tree, inode)
            size = self._size(object_id, mine.size, there.attributes.size)
            if mine.size != size:
                mine = msgspec.structs.replace(mine, size=size)
                await self._here(ops.Finish(object_id, mine))
        self._log.clear_attrs(object_id)
        self.compared += 1

    def _size(self, object_id: bytes, here: int, there: int) -> int:
        """The size is as there, but for what was changed here beyond it."""
        if self._is_partial:
            marks = self._own.marks(object_id)
            return here if marks is not None and marks.data else there
        end = self._own.changed_end(object_id)
        return here if end is None else max(there, min(here, end))

    async def _xattr(self, inode: Inode, name: bytes, digest: bytes) -> bytes:
        try:
            value = self._tree.get_xattr(inode, name)
        except OSError:
            value = b""
        if xxhash.xxh3_128_digest(value) == digest:
            return value
        answer = await self._source.ask(ops.Fetch(inode.id, 0, ops.XATTR_VALUE_MAX, name))
        if not isinstance(answer, ops.Fetched):
            raise PeerLost("the peer cannot read an extended attribute")
        return answer.data


def _nobody(_answer: ops.AnyAnswer) -> None:
    """What waits for an answer that comes at once."""
