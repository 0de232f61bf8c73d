"""What is mounted: one FUSE session for as long as the mount is there, whatever role the node has.

A change of role exchanges what stands behind the handlers, tells the kernel to forget what it was
told by the other role, and remounts. Inode numbers and handles are the tree's, so what is open
stays open.
"""

from __future__ import annotations

import errno
import logging
import os
import select
from collections.abc import Callable
from typing import Any, Final, Protocol

import trio

from replfs.core.policy import Ack, Policy
from replfs.front.operations import FOREVER_S, Mounted, Operations
from replfs.front.session import FuseSession, MountOptions
from replfs.node.mounted.view import ReadOnlyView
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.node.settings.config import Settings
from replfs.store.state import State
from replfs.store.tree import Tree

log = logging.getLogger(__name__)

_REPLICA_TIMEOUT_S: Final = 0.5
"""How long the kernel may trust what a replica's mount told it: changes show within a second."""
_FORGET_AT_ONCE: Final = 500
"""Inodes of which the kernel is told to forget its pages, between two turns of the event loop."""


class Serving(Protocol):
    """The primary, as far as its mount knows it."""

    @property
    def volume(self) -> Mounted:
        """What answers the kernel."""

    @property
    def pipeline(self) -> Pipeline:
        """The way of every change."""

    @property
    def policies(self) -> Policies:
        """Which change waits for what."""


class FrontEnd:
    """The mount of one node, on one mountpoint."""

    def __init__(
        self,
        settings: Settings,
        mountpoint: str,
        state: State,
        tree: Tree,
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.mountpoint = mountpoint
        # Asked while nothing of ours is mounted there: it would wait for this very process.
        self.is_covering = os.path.realpath(mountpoint) == os.path.realpath(settings.store)
        """Whether the mount hides STORE itself."""
        self._settings = settings
        self._state = state
        self._tree = tree
        self._status = status
        self._primary: Serving | None = None
        self._exclusive = False
        self._writeback = False
        self.over = trio.Event()
        """The session has ended: everything is unmounted and closed."""
        self.session: FuseSession | None = None
        self._operations: Operations | None = None
        self._poll: Callable[[int], object] = lambda _timeout: []

    # Beginning and end ---------------------------------------------------------------------------

    def mount(self, primary: Serving | None) -> None:
        """Mount for *primary*, or for a secondary; blocks for some milliseconds.

        Raises:
            UsageError, OSError: it cannot be mounted.
        """
        settings = self._settings
        self._exclusive = primary is not None
        # With the kernel as the owner of sizes a replica's mount would not see them change.
        self._writeback = settings.writeback and primary is not None
        self._operations = Operations(
            self._behind(primary),
            acl=settings.acl,
            writeback=self._writeback,
            generation=self._tree.table.generation if settings.export else None,
        )
        self._tree.table.keeps = settings.export
        self._tell_times(primary)
        options = MountOptions(
            read_only=settings.read_only or primary is None,
            allow_other=settings.allow_other,
            fsname=settings.store,
            writeback=self._writeback,
            acl=settings.acl,
            nosuid=settings.nosuid,
            nodev=settings.nodev,
            noexec=settings.noexec,
            noatime=settings.noatime,
            exclusive=self._exclusive,
            max_background=settings.max_background,
        )
        session = FuseSession(
            self._operations,
            self.mountpoint,
            options,
            chores=self._operations.chores,
            may_spin=self._may_spin if settings.spin else lambda: False,
            spin_ns=60_000 if settings.spin else 0,
        )
        session.mount()
        self.session = session
        self._operations.served_by(session, directly=session.tuned)
        poller = select.poll()
        poller.register(session.fd, select.POLLIN)
        self._poll = poller.poll
        self._attend(primary)
        if not session.tuned:
            log.warning("the mount is slower than it could be: %s", session.reason)

    async def run(self) -> None:
        """Serve until unmounted or stopped."""
        if self.session is not None:
            await self.session.run()
        self.over.set()

    def unmount(self) -> None:
        """Free everything, after `run` has returned."""
        if self.session is not None:
            self.session.unmount()

    # What stands behind --------------------------------------------------------------------------

    def _may_spin(self) -> bool:
        primary = self._primary
        if primary is None:
            return False
        return primary.pipeline.flights == primary.pipeline.detached

    def _is_ready(self) -> bool:
        return bool(self._poll(0))

    def _attend(self, primary: Serving | None) -> None:
        self._primary = primary
        if primary is not None:
            primary.pipeline.fuse_ready = self._is_ready
            if self._operations is not None:
                primary.pipeline.do_chore = self._operations.chores.do_one
            primary.policies.writeback = self._writeback
            if self._settings.writeback and not self._writeback:
                log.warning("no writeback: %s was mounted for a secondary", self.mountpoint)

    def _behind(self, primary: Serving | None) -> Mounted:
        if primary is not None:
            return primary.volume
        settings = self._settings
        policies = Policies(
            self._tree,
            Policy[settings.policy.upper()],
            Ack[settings.ack.upper()],
            used=True,
            on_used=lambda: None,
            generation=lambda: self._state.identity().generation,
        )
        return ReadOnlyView(self._tree, self._status, policies.virtual_xattr)

    def _tell_times(self, primary: Serving | None) -> None:
        operations = self._operations
        if operations is None:
            return
        operations.timeout_s = FOREVER_S if primary is not None else _REPLICA_TIMEOUT_S
        operations.keep_cache = primary is not None
        # Where the kernel was told at mount that nobody else changes files, it would not notice
        # that the primary does.
        operations.direct_io = primary is None and self._exclusive

    # A change of role ----------------------------------------------------------------------------

    @property
    def is_fixed(self) -> bool:
        """It is mounted and cannot be remounted: only root may (mount(2))."""
        return not self.over.is_set() and os.geteuid() != 0

    async def freeze(self) -> bool:
        """Remount read-only, through what still serves. False: files are open for writing."""
        try:
            await self._remount(read_only=True)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    async def thaw(self) -> None:
        """Remount read-write, where it is a primary's to be."""
        if not self._settings.read_only:
            await self._remount(read_only=False)

    async def _remount(self, *, read_only: bool) -> None:
        session = self.session
        if session is not None and not self.over.is_set():
            await trio.to_thread.run_sync(session.remount, read_only)

    async def exchange(self, primary: Serving | None) -> None:
        """From here on *primary*, or for None the replica, stands behind the mount."""
        operations = self._operations
        if operations is None or self.over.is_set():
            return
        operations.mounted = self._behind(primary)
        self._tell_times(primary)
        self._attend(primary)
        await self._make_kernel_forget()
        if primary is None and self._writeback and self.session is not None:
            log.warning("%s is unmounted: writeback is not for a secondary", self.mountpoint)
            await trio.to_thread.run_sync(self.session.detach)

    async def _make_kernel_forget(self) -> None:
        """Pages, attributes and names that the kernel has from the other role are not used again.

        Names that nobody uses went with the remount (relies on: reconfigure_super drops them).
        """
        session = self.session
        if session is None:
            return
        known = [inode for inode in self._tree.table.by_nodeid.values() if inode.lookups > 0]
        for start in range(0, len(known), _FORGET_AT_ONCE):
            part = [
                (inode.nodeid, [(above.nodeid, name) for above, name in inode.names()])
                for inode in known[start : start + _FORGET_AT_ONCE]
                if inode.lookups > 0
            ]
            await trio.to_thread.run_sync(session.forget, part)
