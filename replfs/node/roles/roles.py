"""Which role the node has, and how it takes the other one while it runs.

Tree, state, listener and mount are the node's for its whole life; primary and secondary are
exchanged between them. What decides whether that may happen stands elsewhere (`core.generation`,
`node.failover.promotion`); here is the order in which it is done, so that a crash between any two
steps leaves a store whose role is the old or the new one, and never two primaries where there was
one.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, Final

import trio
import zmq

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.messages import Identity
from replfs.errors import NotInSync, Refused, ReplfsError, StoreError
from replfs.node.asking.probe import probe
from replfs.node.mounted.frontend import FrontEnd
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.replica.later import Reply
from replfs.node.replication.peer import Peer
from replfs.node.roles import reign
from replfs.node.roles.primary import Primary
from replfs.node.roles.reception import Reception
from replfs.node.roles.secondary import Secondary
from replfs.node.settings.config import Settings
from replfs.node.settings.memory import Memory
from replfs.node.settings.values import PeerSetting
from replfs.store.activity import ActivityLog, is_lost, recover
from replfs.store.progress import Progress
from replfs.store.state import UNSTABLE, State
from replfs.store.tree import Tree
from replfs.store.twins import UNPARTED, part_twins
from replfs.transport.listener import Session
from replfs.transport.security import Curve

log = logging.getLogger(__name__)

UNFLUSHED: Final = (
    "this node's disk cannot be flushed: what was acknowledged may be in its memory only"
)
_LOOK_S: Final = 0.01
_FAREWELL_S: Final = 1.0
"""How long the one that handed its role over has to end its session, before it is ended here."""
_STEP_DOWN_S: Final = 30.0
"""How long what is in flight may take to be recorded, when the role is given up."""


class Roles:
    """The roles of one node."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        tree: Tree,
        context: zmq.Context[zmq.Socket[bytes]],
        curve: Curve | None,
        rundir: str,
        *,
        event: Callable[..., None],
        status: Callable[[], dict[str, Any]],
        fail: Callable[[ReplfsError], None],
        on_unmounted: Callable[[], None],
    ) -> None:
        """*fail*: ends the node, because of an error that is a sentence for people."""
        self.settings = settings
        self.state = state
        self.tree = tree
        self.context = context
        self.curve = curve
        self.event = event
        self._status = status
        self._fail = fail
        self._on_unmounted = on_unmounted
        self.on_mounting: Callable[[str], None] = lambda _mountpoint: None
        """Told of a mountpoint, before anything is mounted there."""
        self._memory = Memory(rundir, settings.store)
        self.unwritten = Unwritten(self._note_unwritten)
        """What this node's disk could not write, in either role."""
        self._activity: ActivityLog | None = None
        self._progress: Progress | None = None
        self.primary: Primary | None = None
        self.secondary: Secondary | None = None
        self.front: FrontEnd | None = None
        self.changing = trio.Lock()
        """Held while the role is being exchanged, or it is being decided whether to."""
        self._nursery: trio.Nursery | None = None
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        self._suspected: set[str] = set()
        self.fetched: frozenset[str] = frozenset()
        """The peers from which a store that lost power has fetched what it lost."""
        self.reception = Reception(
            settings,
            state,
            tree,
            context,
            curve,
            on_outdated=self._superseded,
            on_yield=self._yielded,
            changed=self._changed_apart,
        )

    # Beginning and end ---------------------------------------------------------------------------

    def build(self) -> None:
        """Become what the state says."""
        if self.state.identity().role == "primary":
            reign.begin_stopped(self.state, self.peers())
            self._build_primary()
        elif self.state.memory_lost:
            self._build_secondary(0)
            self.state.forget_peer(UNSTABLE)
        else:
            # Of a run that was killed the number is where it left it.
            self._build_secondary(None if self.state.unclean else self.state.identity().progress)
            unstable = reign.kept_unstable(self.state)
            if unstable is not None and self.secondary is not None:
                self.secondary.replica.unstable.restore(unstable)
            # From here on more may be applied.
            self.state.forget_peer(UNSTABLE)

    @property
    def progress(self) -> int:
        """Up to which change of its primary this node has everything; 0: it is not known."""
        return self.secondary.progress if self.secondary is not None else 0

    def keep_unstable(self) -> None:
        """Before a clean end: what the next run, or a promotion before it, has to know."""
        if self.secondary is not None:
            reign.keep_unstable(self.state, self.secondary.unstable())

    def close(self, *, clean: bool) -> None:
        """After the end; *clean*: nothing is left that the next run would have to compare."""
        progress, self._progress = self._progress, None
        if progress is not None:
            progress.close(clean=clean)
        activity, self._activity = self._activity, None
        if activity is not None:
            activity.close()
            if clean:
                with contextlib.suppress(OSError):
                    os.unlink(self._activity_path())
        self._memory.close(clean=clean)

    async def start(self, nursery: trio.Nursery) -> str:
        """Run the role and the listener in *nursery*; the endpoint that is listened on, or ''.

        A primary has met those of its peers that answer at once when this returns, and has stepped
        down if it was outdated.
        """
        self._nursery = nursery
        self._start_role()
        listening = ""
        if self.settings.listen is not None:
            listening = await nursery.start(self.reception.run)
        if self.primary is not None:
            await self.primary.first_contact(patiently=self.state.unclean)
            while self._suspected:
                await trio.sleep(_LOOK_S)
        async with self.changing:
            return listening

    def _start_role(self) -> None:
        if self._nursery is None:
            raise RuntimeError("the node does not run")
        self._scope = trio.CancelScope()
        self._over = trio.Event()
        role = self.primary or self.secondary
        if role is not None:
            self._nursery.start_soon(self._run_role, role.run, self._scope, self._over)

    @staticmethod
    async def _run_role(
        run: Callable[[], Awaitable[None]], scope: trio.CancelScope, over: trio.Event
    ) -> None:
        try:
            with scope:
                await run()
        finally:
            over.set()

    async def _end_role(self) -> None:
        self._scope.cancel()
        await self._over.wait()

    def mount(self, mountpoint: str) -> None:
        """Mount for the role that the node has now, and for those it will have.

        Raises:
            UsageError, OSError: it cannot be mounted.
        """
        if self._nursery is None:
            raise RuntimeError("the node does not run")
        front = FrontEnd(self.settings, mountpoint, self.state, self.tree, self._status)
        if self.front is not None:
            self.front.unmount()  # an earlier one, which has ended: a process has one session
        self.on_mounting(mountpoint)
        front.mount(self.primary)
        self.front = front
        self._nursery.start_soon(self._run_front, front)

    async def _run_front(self, front: FrontEnd) -> None:
        await front.run()
        self._on_unmounted()

    # Building ------------------------------------------------------------------------------------

    def _in_memory(self, what: str) -> str:
        """Where a file of this store is that is to survive the process, and no more."""
        return self._memory.path(what, self.state.identity().binding.digest())

    def _activity_path(self) -> str:
        return self._in_memory("activity")

    def _build_primary(self, *, promoted: bool = False) -> Primary:
        """*promoted*: this process just promoted the store, which has nothing in flight."""
        state = self.state
        node = state.identity().node
        path = self._activity_path()
        unfinished = state.unclean and not promoted
        if unfinished and is_lost(path, node):
            log.warning("what the last run had in flight is not known: everything is compared")
            state.memory_lost = True
        in_flight = recover(path) if unfinished and not state.memory_lost else []
        self._activity = ActivityLog(path, node)
        primary = Primary(
            self.settings,
            state,
            self.tree,
            self._activity,
            self.context,
            self.curve,
            self.unwritten,
            event=self.event,
            status=self._status,
            on_outdated=self._told_outdated,
            fetched=frozenset() if promoted else self.fetched,
            promoted=promoted,
        )
        primary.recover([(one.object, one.kind, one.region, one.handle) for one in in_flight])
        self._activity.clear()
        self.primary = primary
        if self.unwritten.number:
            self._note_unwritten(self.unwritten.number)
        return primary

    def _build_secondary(self, number: int | None) -> None:
        """*number*: up to which change it has everything; None: as the last run left it."""
        if self.unwritten.number:
            self.state.memory_lost = True
        path = self._in_memory("progress")
        self._progress = Progress(path, self.state.identity().node, number)
        self.secondary = Secondary(
            self.settings,
            self.state,
            self.tree,
            self.unwritten,
            progress=self._progress,
            event=self.event,
            on_handover=self._asked_to_take_over,
        )
        self.reception.follower = self.secondary

    def _note_unwritten(self, number: int) -> None:
        """The disk may lack what was acknowledged: the next start is as after a loss of power."""
        reason = os.strerror(number)
        if self.primary is not None:
            log.error(
                "this node's disk could not be flushed (%s): what was acknowledged since the last "
                "checkpoint may never be on it, and no flush of everything succeeds from here on. "
                "Promote a peer, or start this node again: it then fetches that from a peer",
                reason,
            )
        else:
            log.error(
                "this node's disk could not be flushed (%s): what it was sent may never be on it, "
                "until its primary has sent that again",
                reason,
            )
            self.state.memory_lost = True
        self.event("disk", error=reason)
        with contextlib.suppress(OSError):  # it is the same disk
            self.state.disk_failed()

    # Giving the role up --------------------------------------------------------------------------

    def _superseded(self, by: Identity) -> None:
        """Another primary greets that was made one in place of this node."""
        if self._nursery is not None and self.primary is not None:
            self._nursery.start_soon(self.step_down, by)

    def _yielded(self, by: Identity) -> None:
        """Another primary gives up what it changed apart from this node: this one goes on."""
        primary = self.primary
        if primary is None or not primary.is_reigning:
            return
        # One that is paused has not been told that it is apart; of one that was never met the node
        # is not known.
        meant = [
            peer
            for peer in primary.pipeline.peers
            if peer.peer_node == by.node or peer.is_apart or not peer.peer_node
        ]
        meant.sort(key=lambda peer: (peer.peer_node != by.node, not peer.is_apart))
        if meant:
            primary.supersede(meant[0], by)
            meant[0].link.retry()

    def _changed_apart(self, other: Identity) -> DirtyLog | None:
        """What this primary has and *other* may lack."""
        primary = self.primary
        return None if primary is None else reign.log_for(primary.pipeline.peers, other)

    def _told_outdated(self, peer: Peer) -> None:
        """A peer says that this node is outdated: it is asked who it is, to be sure."""
        if self._nursery is None or peer.name in self._suspected:
            return
        self._suspected.add(peer.name)
        self._nursery.start_soon(self._find_out, peer)

    async def _find_out(self, peer: Peer) -> None:
        try:
            answer = await probe(self, peer.name, peer.endpoint)
            if answer is not None:
                await self.step_down(answer)
        finally:
            self._suspected.discard(peer.name)

    async def step_down(self, winner: Identity) -> None:
        """Become a secondary because *winner* is ahead of this node, if it really is.

        Applications are not asked: from here on every change is EROFS.
        """
        async with self.changing:
            primary = self.primary
            if primary is None or not reign.is_outdated(self.state, winner):
                return
            log.warning("%s took this node's place as primary: it steps down", winner.name)
            self.event("stepping-down", winner=winner.name)
            primary.pipeline.is_over = True
            primary.pipeline.release_suspended()
            primary.verifier.stop()
            # What is in flight to peers that still follow is confirmed by them; then they are told.
            with trio.move_on_after(_STEP_DOWN_S):
                await primary.pipeline.drained()
            await self._end_role()
            if not reign.is_outdated(self.state, winner):
                # A change was acknowledged that the winner does not have: both were changed.
                log.warning("changes were made here meanwhile: this is a split brain")
            with self._ending_by_error():
                reign.give_up(self.state, primary.pipeline.peers, winner)
                await trio.to_thread.run_sync(self.state.harden)
                await self._become_secondary(0)

    async def follow(self) -> None:
        """The state says that this is a secondary, which has nothing on its own: be one."""
        primary = self.primary
        if primary is not None:
            await self._end_role()
            with self._ending_by_error():
                reign.give_up(self.state, primary.pipeline.peers, None)
                await self._become_secondary(primary.pipeline.changes)

    @contextlib.contextmanager
    def _ending_by_error(self) -> Iterator[None]:
        """Nothing of the old role runs any more: a node whose disk refuses it the new one ends.

        Its next start finds either in the state, and goes on from there.
        """
        try:
            yield
        except OSError as error:
            self._fail(
                StoreError(
                    f"this node cannot become a secondary: {self.settings.store} cannot be used "
                    f"({error.strerror}). Start it again when it can"
                )
            )

    async def _become_secondary(self, number: int) -> None:
        """The state says that this is a secondary, and nothing of the primary runs any more.

        *number*: the change of its own reign up to which its successor has everything; 0: unknown.
        """
        primary, self.primary = self.primary, None
        if primary is not None:
            primary.retire()
        self.close(clean=True)
        if self.settings.listen is None:
            self._fail(self._cannot_follow())
            return
        if self.front is not None:
            await self.front.exchange(None)
            with contextlib.suppress(OSError):
                if not await self.front.freeze():
                    log.warning("files are open for writing: changes fail with EROFS")
        self._build_secondary(number)
        self._start_role()
        self.event("role", role="secondary")
        log.info("this node is a secondary now")

    def be_fenced(self, winner: Identity) -> None:
        """Before the start, after a loss of power: *winner* says that this is no primary any more.

        Raises:
            Refused: it does not listen, so that it cannot follow either.
            OSError: it cannot be saved.
        """
        log.warning("%s says that this node's place as primary was taken: it follows", winner.name)
        self.event("stepping-down", winner=winner.name)
        reign.fence(self.state, winner)
        if self.settings.listen is None:
            raise self._cannot_follow()

    def _cannot_follow(self) -> Refused:
        return Refused(
            f"{self.settings.store} is a secondary from now on, since another store is the "
            "primary: start it again with --listen, so that it can follow"
        )

    # Taking it -----------------------------------------------------------------------------------

    async def take_over(
        self,
        promote: Callable[[], None],
        confirm: Callable[[], Awaitable[None]] | None = None,
        *,
        by_force: bool = False,
    ) -> None:
        """Become the primary: *promote* changes the state. The lock is the caller's.

        *confirm* is called when that is durable, while whoever asked for it is still connected.
        *by_force*: also where the disk cannot be flushed.

        Raises:
            NotInSync: it cannot; nothing has changed.
            OSError: the mount cannot be made read-write; the role is the new one all the same.
        """
        secondary = self.secondary
        if secondary is None:
            return
        secondary.is_over = True
        try:
            await secondary.replica.idle()
            if self.state.identity().inconsistent:
                await self._part_twins()
            await self._flush_before_reign(by_force=by_force)
            # Should this process die once the role is written, the next one is to know that
            # nothing was in flight.
            ActivityLog(self._activity_path(), self.state.identity().node).close()
            promote()
        except BaseException:
            self._go_on(secondary)
            raise
        with contextlib.suppress(OSError):
            # A disk that fails is no reason to have no primary. But nobody hears of it.
            await trio.to_thread.run_sync(self.state.harden)
        if confirm is not None:
            await confirm()
        self.reception.close_session("this node becomes the primary")
        await self._end_role()
        self.secondary = None
        self.reception.follower = None
        secondary.retire()
        self.close(clean=True)
        self._build_primary(promoted=True)
        self._start_role()
        self.event("role", role="primary")
        log.info("this node is the primary now")
        if self.front is not None:
            await self.front.exchange(self.primary)
            await self.front.thaw()

    async def _part_twins(self) -> None:
        """What a resync made anew, and was cut off before it removed the old one."""
        try:
            number = await part_twins(self.tree)
        except OSError as error:
            raise NotInSync(f"{UNPARTED} ({error.strerror})") from error
        if number:
            log.warning("%d objects got another id: the resync had made them anew", number)

    async def _flush_before_reign(self, *, by_force: bool) -> None:
        """What the last primary had acknowledged is on this disk, before its record is dropped.

        Who begins a reign is nobody's replica: should its power fail before the first checkpoint,
        there is nobody of whom it could have back what it applied and had in memory only. Worse,
        what its disk has would overwrite what the last primary still has.
        """
        try:
            await self.unwritten.flush(self.tree.root_fd)
        except OSError as error:
            if not by_force:
                raise NotInSync(
                    f"{UNFLUSHED} ({error.strerror}; --force does it all the same)"
                ) from error

    def _go_on(self, secondary: Secondary) -> None:
        """It is not promoted, and may apply again: what was kept for the promotion is not all."""
        try:
            self.state.forget_peer(UNSTABLE)
        except OSError as error:
            self._fail(StoreError(f"{self.settings.store} cannot be written: {error.strerror}"))
        else:
            secondary.is_over = False

    # Being handed it ----------------------------------------------------------------------------

    def _asked_to_take_over(self, session: Session, op: ops.Handover, reply: Reply) -> None:
        if self._nursery is None:
            reply(ops.Done(errno.EBUSY))
            return
        work = self._take_over_from if op.commit else self._could_take_over_from
        self._nursery.start_soon(work, session, reply)

    async def _could_take_over_from(self, session: Session, reply: Reply) -> None:
        """Whether the primary could follow this node: it must lead back to it."""
        if self.front is not None and self.front.is_fixed:
            reply(ops.Done(errno.EPERM))
            return
        leads_back = False

        async def look(peer: PeerSetting) -> None:
            nonlocal leads_back
            answer = await probe(self, peer.name, peer.endpoint)
            if answer is not None and answer.node == session.node:
                leads_back = True

        async with trio.open_nursery() as nursery:
            for peer in self.peers():
                nursery.start_soon(look, peer)
        reply(ops.Done(0 if leads_back else errno.EHOSTUNREACH))

    async def _take_over_from(self, session: Session, reply: Reply) -> None:
        async with self.changing:
            secondary = self.secondary
            if secondary is None or not session.is_open or secondary.session is not session:
                reply(ops.Done(errno.EBUSY))
                return

            async def confirm() -> None:
                reply(ops.Done(0))
                with trio.move_on_after(_FAREWELL_S):
                    while session.is_open:
                        await trio.sleep(_LOOK_S)

            try:
                await self.take_over(self.begin_reign, confirm)
            except (OSError, NotInSync) as error:
                log.error("the role could not be taken over: %s", error)
                if self.state.identity().role != "primary":
                    reply(ops.Done(error.errno or errno.EIO))
                # Else nothing may be said: the other side would take the role back.

    def begin_reign(self) -> None:
        """Logs for the peers, and the role, from what this secondary knows. Raises OSError."""
        unstable = None
        if self.secondary is not None and not self.state.memory_lost:
            unstable = self.secondary.unstable()
        base = self.state.identity().generation
        # If this process dies before the role is written, the next promotion knows as much.
        reign.keep_unstable(self.state, unstable)
        reign.begin_logs(self.state, self.peers(), unstable, base)
        reign.promote(self.state, progress=self.progress)

    def peers(self) -> list[PeerSetting]:
        """The peers a primary has here: those configured, and those added while it was one."""
        wanted = list(self.settings.peers)
        names = {peer.name for peer in wanted}
        return wanted + [
            PeerSetting(one.name, one.endpoint)
            for one in self.state.peers()
            if one.settings and one.name not in names
        ]
