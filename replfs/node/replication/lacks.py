"""What one peer lacks: its dirty region log, what is recorded in it, and what it says of an object.

Nothing here sends anything: `node.replication.peer` does, and `node.resync` empties the log.
"""

from __future__ import annotations

import stat as _stat
import time
from abc import ABC, abstractmethod
from typing import Final

import trio

from replfs.core import ops, splitter
from replfs.core.dirty import DirtyLog
from replfs.core.relationship import State
from replfs.core.settling import Settling
from replfs.core.unstable import Unstable
from replfs.store import locators
from replfs.store.activity import KIND_NAMES
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree
from replfs.store.unrepresentable import Unrepresentable

_STATE_SCAN_MAX: Final = 10_000
"""Dirty objects looked at to tell the state of a directory."""


class Lacks(ABC):
    """One peer, as far as what it lacks goes; `Peer` adds the rest."""

    def __init__(self, tree: Tree, dirty: DirtyLog) -> None:
        self._tree = tree
        self.log = dirty
        self.live = False
        """Operations are sent: the session is up and both sides agreed on it."""
        self.state = State.UNINITIALIZED
        self.diverged = False
        """A generation has begun that the peer does not have."""
        self.unflushed = False
        """It has failed to flush something since the resync began that is going on, or was last."""
        self.settling = Settling()
        """What it has, and the disk here still says that it lacks."""
        dirty.watch(self.settling)
        self.unstable = Unstable()
        """What it was sent and may not have on its disk yet."""
        self.unrepresentable = Unrepresentable()
        self.located: tuple[set[bytes], set[bytes]] = (set(), set())
        """The objects it was told the place of in this session, by stream."""
        self._wake = trio.Event()
        self._state_cache: tuple[float, dict[int, str]] = (0.0, {})

    def wake_resync(self) -> None:
        """There is something to carry, or to stop carrying."""
        self._wake.set()

    async def wait_work(self) -> None:
        """Wait until there may be something for the resync to do."""
        await self._wake.wait()
        self._wake = trio.Event()

    # Recording ---------------------------------------------------------------------------------

    def _locator(self, object_id: bytes) -> bytes:
        tree = self._tree
        inode = tree.table.by_id.get(object_id)
        return b"" if inode is None else locators.of(tree, inode)

    def mark(self, op: ops.AnyOp, *, length: int = 0, start: int = 0) -> None:
        """Record that the peer lacks what *op* does. Raises ENOSPC if that cannot be kept.

        Before the first contact there is nothing to record: the baseline carries everything.
        """
        if self.state is State.UNINITIALIZED and not self.live:
            return
        self.begin_divergence()
        splitter.mark(self.log, op, self._locator, length=length, start=start)
        self.wake_resync()

    def mark_touched(self, touched: tuple[tuple[Inode, int, int], ...]) -> None:
        """What a metadata operation touched may differ, for it failed here halfway."""
        if self.state is State.UNINITIALIZED and not self.live:
            return
        self.begin_divergence()
        for inode, kind, _ in touched:
            handle = self._locator(inode.id)
            if kind == KIND_NAMES:
                self.log.mark_names_all(inode.id, handle=handle)
            else:
                self.log.mark_attrs(inode.id, handle=handle)
        self.wake_resync()

    def begin_divergence(self) -> None:
        """Before the first change that the peer does not get: a generation without it begins."""
        if not self.diverged and (self.live or self.state is not State.UNINITIALIZED):
            self.diverged = self._diverging()

    @abstractmethod
    def _diverging(self) -> bool:
        """The first change that the peer does not get is about to be recorded.

        Whether there is a generation without it now.
        """

    def mark_unflushed(self, object_id: bytes) -> None:
        """The peer may not have on its disk what it has in memory: all of it is sent again."""
        self.unflushed = True
        self.begin_divergence()
        handle = self._locator(object_id)
        inode = self._tree.table.by_id.get(object_id)
        if inode is not None and inode.is_directory:
            self.log.mark_names_all(object_id, handle=handle)
        else:
            self.log.mark_tail(object_id, 0, handle=handle)
        self.wake_resync()

    def object_removed(self, inode: Inode, parent: Inode, name: bytes) -> None:
        """The object's last name is gone: nothing of it is to be carried any more.

        A directory that the peer may still have something in is removed there by the resync.
        """
        if not inode.id:
            return
        if not self.log.is_empty:
            marks = self.log.marks(inode.id)
            if marks is not None and marks.names is not None:
                splitter.mark_name(self.log, self._tree.ensure_id(parent), name, self._locator)
            self.log.forget(inode.id)
        self.unrepresentable.discard(inode.id)
        self.unstable.forget(inode.id)
        for known in self.located:
            known.discard(inode.id)

    def moving(self, inode: Inode) -> None:
        """An object is about to get or lose a name.

        Where all that is below a directory is unknown, so is what leaves it before it is looked at.
        """
        if self.log.is_empty:
            return
        for parent, _ in inode.names():
            one: Inode | None = parent
            while one is not None:
                marks = self.log.marks(one.id)
                if marks is not None and marks.deep:
                    self._mark_unknown(inode)
                    return
                one = one.parent

    def moved(self, inode: Inode) -> None:
        """An object that is not a directory has another parent: its marks say where it is now."""
        if inode.is_directory:
            return
        self.unstable.moved(inode.id, self._locator)
        if self.log.is_empty or not self.log.marks(inode.id):
            return
        self.log.mark_attrs(inode.id, handle=self._locator(inode.id))

    def links_changed(self, inode: Inode) -> None:
        """An object with several names: while the peer is out of sync, all of them are looked at,

        so that the resync finds the object under one of them and links instead of copying.
        """
        if not inode.more or (self.live and self.log.is_empty):
            return
        tree = self._tree
        for parent, name in inode.names():
            splitter.mark_name(self.log, tree.ensure_id(parent), name, self._locator)

    def mark_crossing(
        self,
        parent: Inode,
        name: bytes,
        new_parent: Inode,
        new_name: bytes,
        *,
        appears: tuple[Inode, ...],
        vanishes: bool,
    ) -> None:
        """A rename between replicated and not: a name is to be removed there, or to appear."""
        tree = self._tree
        self.begin_divergence()
        splitter.mark_name(self.log, tree.ensure_id(parent), name, self._locator, removal=vanishes)
        splitter.mark_name(self.log, tree.ensure_id(new_parent), new_name, self._locator)
        for inode in appears:
            self._mark_unknown(inode)
        self.wake_resync()

    def mark_policy_change(self, inode: Inode, *, removal: bool) -> None:
        """The object's names are to vanish from the peer, or to appear there."""
        tree = self._tree
        self.begin_divergence()
        for parent, name in inode.names():
            splitter.mark_name(
                self.log, tree.ensure_id(parent), name, self._locator, removal=removal
            )
        if not removal or inode is tree.root:
            self._mark_unknown(inode)
        if not inode.is_directory and tree.stat(inode).st_nlink > len(inode.names()):
            # It has names that nobody has looked up: they are anywhere.
            self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
        self.wake_resync()

    def _mark_unknown(self, inode: Inode) -> None:
        object_id = self._tree.ensure_id(inode)
        handle = self._locator(object_id)
        if inode.is_directory or inode.type == _stat.S_IFREG:
            self.log.mark_unknown(object_id, directory=inode.is_directory, deep=True, handle=handle)
        else:
            self.log.mark_attrs(object_id, handle=handle)

    # What it lacks -----------------------------------------------------------------------------

    def is_clean(self, inode: Inode) -> bool:
        """Whether the object, its names and those of its parents are on the peer."""
        dirty = self.log
        if inode.is_directory:
            marks = dirty.marks(inode.id)
            # Single names need not hold up what is done to another one.
            if marks is not None and (marks.names_all or (marks.attrs and marks.names is None)):
                return False
        elif not dirty.object_is_clean(inode.id):
            return False
        one = inode
        while one.parent is not None:
            if not dirty.name_is_clean(one.parent.id, one.name):
                return False
            one = one.parent
        return self.settling.is_empty or self._has_settled(inode)

    def _has_settled(self, inode: Inode) -> bool:
        """Whether the disk here says of a clean object that the peer has it."""
        if not self.settling.object_is_settled(inode.id):
            return False
        one = inode
        while one.parent is not None:
            if not self.settling.name_is_settled(one.parent.id, one.name):
                return False
            one = one.parent
        return True

    def state_of(self, inode: Inode) -> str:
        """`in-sync`, `resync`, `dirty` or `out-of-sync`; of a directory, the worst below it."""
        if inode.id in self.unrepresentable:
            return "unrepresentable"
        base = "in-sync" if self.live else "out-of-sync"
        if self.log.is_empty:
            return base
        worse = "resync" if self.live else "dirty"
        if not self.is_clean(inode) or not self.log.object_is_clean(inode.id):
            return worse
        if not inode.is_directory:
            return base
        now = time.monotonic()
        if now - self._state_cache[0] > 1:
            self._state_cache = (now, {})
        cached = self._state_cache[1].get(inode.ino)
        if cached is None:
            cached = worse if self._is_dirty_below(inode) else base
            self._state_cache[1][inode.ino] = cached
        return cached

    def _is_dirty_below(self, directory: Inode) -> bool:
        tree = self._tree
        for count, object_id in enumerate(self.log.objects()):
            if count >= _STATE_SCAN_MAX:
                return True
            marks = self.log.marks(object_id)
            if marks is None:
                continue
            inode: Inode | None = locators.find(tree, marks.handle, object_id)
            while inode is not None:
                if inode is directory:
                    return True
                inode = inode.parent
        return False

    def dirty_bytes_of(self, inode: Inode) -> int:
        """Bytes of a file that the peer lacks, in whole regions; of others, 0."""
        if inode.is_directory:
            return self.log.dirty_bytes if inode.id == ROOT_ID else 0
        return (
            sum(last - first for first, last in self.log.dirty_regions(inode.id, inode.size)) << 16
        )

    def removal_pending(self, inode: Inode) -> bool:
        """Whether the peer still has a name that policy took away."""
        return any(self.log.is_removal(parent.id, name) for parent, name in inode.names())
