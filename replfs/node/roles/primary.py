"""A primary at work: the volume, its peers, their links and resyncs.

Owns what belongs to all peers together: identity, generation, the activity log, checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import trio
import zmq

from replfs.core import generation as generations
from replfs.core import ops
from replfs.core.generation import Decision, Lineage
from replfs.core.marks import NotKept
from replfs.core.messages import Hello, Identity, Welcome
from replfs.core.ops import AnyAnswer, Done
from replfs.core.policy import Ack, NamePatterns, Policy
from replfs.core.relationship import State, word
from replfs.errors import NotInSync, UsageError
from replfs.node.asking.identity import hello_of, make_tellable, side_of, side_of_message
from replfs.node.mounted.volume import Volume
from replfs.node.pacing.commit import GroupCommit
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.recovery.checkpoints import Checkpoints
from replfs.node.replication import summaries
from replfs.node.replication.congestion import Congestion
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.policies import Policies
from replfs.node.resync.machine import Resync
from replfs.node.roles import reign
from replfs.node.settings.config import Settings
from replfs.node.settings.values import PeerSetting, parse_peer
from replfs.node.verify.rescan import Rescan
from replfs.node.verify.verifier import Verifier
from replfs.store.activity import KIND_DATA, KIND_FILE, KIND_NAMES, ActivityLog
from replfs.store.record import ROOT_ID
from replfs.store.snapshots import snapshots_of
from replfs.store.state import State as StoreState
from replfs.store.tree import Tree
from replfs.transport.link import Link
from replfs.transport.security import Curve, require_curve

log = logging.getLogger(__name__)

_FIRST_CONTACT_S: Final = 1.0
"""How long a start waits for its peers, so that the first change already goes to them."""
_RESERVE_MIN: Final = 256 << 10
"""Bytes kept back for marks below which a change that some peer lacks is refused (ENOSPC)."""
CLOCKS_APART_S: Final = 2.0
"""A difference of clocks that is worth a warning."""
_ACTIVITY_SHIFT: Final = 20
_RUN_SHIFT: Final = 40
"""Bits for the changes of one run: at 100,000 a second, four months of nothing else."""
_REPLACES: Final = "replaces"
"""In a peer's saved settings: the configured endpoint that is not its own any more."""
_ADDED: Final = {"added": "yes"}
"""A peer's saved settings, where it is known although it is not configured."""


def configured(settings: Settings, state: StoreState, curve: Curve | None) -> list[PeerSetting]:
    """The peers of this run: those of the command line, and those added while mounted."""
    saved = {peer.name: peer for peer in state.peers()}
    found = []
    for wanted in settings.peers:
        known = saved.pop(wanted.name, None)
        if known is not None and known.settings.get(_REPLACES) == wanted.endpoint:
            log.info("peer %s was replaced: it is at %s", wanted.name, known.endpoint)
            wanted = PeerSetting(wanted.name, known.endpoint)
        elif known is not None and known.settings:
            state.save_peer(wanted.name, settings={})
        found.append(wanted)
    added = [PeerSetting(one.name, one.endpoint) for one in saved.values() if one.settings]
    for one in added:
        require_curve(one.endpoint, settings.insecure, curve)
    return found + added


class Primary:
    """Everything a node has while it is a primary."""

    def __init__(
        self,
        settings: Settings,
        state: StoreState,
        tree: Tree,
        activity: ActivityLog,
        context: zmq.Context[zmq.Socket[bytes]],
        curve: Curve | None,
        unwritten: Unwritten,
        *,
        event: Callable[..., None],
        status: Callable[[], dict[str, Any]],
        on_outdated: Callable[[Peer], None] = lambda _peer: None,
        fetched: frozenset[str] = frozenset(),
        promoted: bool = False,
    ) -> None:
        """*promoted*: this process was its secondary just now.

        *on_outdated*: told that a peer says this node's place was taken. *fetched*: the peers of
        which this store, which lost power, has everything again.
        """
        self.outdated = on_outdated
        self._fetched = fetched
        self.settings = settings
        self.state = state
        self.tree = tree
        self._event = event
        self.make_durable = GroupCommit(self._harden)
        """Marks and generation are on stable storage; one flush serves all that wait for it."""
        self.policies = Policies(
            tree,
            Policy[settings.policy.upper()],
            Ack[settings.ack.upper()],
            used=state.identity().policies_used,
            on_used=lambda: void(state.update(policies_used=True)),
            generation=lambda: state.identity().generation,
            patterns=NamePatterns(settings.none_patterns),
        )
        self.pipeline = Pipeline(tree, activity, self.policies, unwritten)
        # No two runs give the same number to different changes, and later ones are higher.
        self.pipeline.changes = (state.identity().runs + 1) << _RUN_SHIFT
        self.snapshots = snapshots_of(tree.root_fd)
        self.checkpoints = Checkpoints(
            self.pipeline,
            settings.checkpoint_interval_s,
            self.make_durable,
            self._note_stable,
        )
        self.volume = Volume(self.pipeline, status, self.checkpoints.take)
        self.pipeline.async_queue_bytes = settings.async_queue_bytes
        self.pipeline.strict_timeout_s = settings.peer_timeout_s
        if settings.strict_on_loss == "suspend":
            self.pipeline.suspend_s = settings.suspend_timeout_s
        self.pipeline.strict_peers = settings.strict_peers or 0
        self.resyncs: dict[str, Resync] = {}
        self._context = context
        self._curve = curve
        self._membership = trio.Lock()
        self._nursery: trio.Nursery | None = None
        self._serving: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        for wanted in configured(settings, state, curve):
            self._add_peer(wanted.name, wanted.endpoint)
        self._note_left_out()
        self._note_patterns()
        self.rescan = Rescan(
            self.pipeline,
            # Nor is there anything to be found where this process served the store until now.
            state.identity().stopped_ns if self._is_rescanned() and not promoted else 0,
            batch=state.batch,
            event=event,
        )
        self.verifier = Verifier(
            self.pipeline,
            settings.resync_rate_bytes,
            [path for path in (settings.mountpoint, settings.store) if path],
        )

    def _note_patterns(self) -> None:
        """With other patterns other names are replicated: which ones, a comparison finds."""
        patterns = self.settings.none_patterns
        if patterns == self.state.identity().none_patterns:
            return
        for peer in self.pipeline.peers:
            if peer.state is not State.UNINITIALIZED:
                peer.log.mark_unknown(ROOT_ID, directory=True, deep=True)
        self.state.update(none_patterns=patterns)

    def _note_left_out(self) -> None:
        """Peers that are known but not configured in this run get nothing of it.

        What they miss is not recorded one by one: all of it is compared when they are back.
        """
        configured = {peer.name for peer in self.pipeline.peers}
        for known in self.state.peers():
            if known.name in configured:
                continue
            log.warning("peer %s is known but not configured: it gets nothing", known.name)
            self.state.load_log(known.name).mark_unknown(ROOT_ID, directory=True, deep=True)
            if known.generation == self.state.identity().generation:
                self.state.new_generation()

    def _add_peer(self, name: str, endpoint: str) -> Peer:
        known = {peer.name: peer for peer in self.state.peers()}.get(name)
        saved = self.state.save_peer(name, endpoint=endpoint)
        dirty = self.state.load_log(name)
        peer = Peer(self, name, endpoint, dirty, self.settings.peer_timeout_s)
        if known is None or known.state == State.UNINITIALIZED.value:
            dirty.mark_names_all(ROOT_ID)
        else:
            peer.state = State.OUT_OF_SYNC
        if saved.paused_by:
            peer.paused = True
            peer.state = State.PAUSED
            peer.reason = saved.paused_by
        peer.peer_node = saved.node
        peer.apart = saved.apart
        peer.led_apart = saved.led_apart
        peer.peer_generation = saved.generation
        peer.base = saved.base
        peer.is_asked = saved.is_asked
        peer.unrepresentable.restore(saved.unrepresentable, dirty)
        peer.diverged = saved.generation != self.state.identity().generation
        if saved.last_in_sync_ns:
            peer.last_in_sync = saved.last_in_sync_ns / 1e9
        peer.link = Link(
            self._context,
            endpoint,
            peer,
            peer_timeout_s=self.settings.peer_timeout_s,
            security=self._curve,
            name=name,
            on_refused=peer.refused,
            on_difference=partial(summaries.differed, peer),
        )
        self.resyncs[name] = Resync(
            self.pipeline, peer, self.settings.resync_rate_bytes, self.snapshots
        )
        # A new list: operations are walking over the old one.
        self.pipeline.peers = [*self.pipeline.peers, peer]
        return peer

    # Peers that come and go ----------------------------------------------------------------------

    async def command_add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Replicate to one more peer, from now on and after a restart."""
        wanted = _peer_setting(arguments)
        async with self._membership:
            if any(peer.name == wanted.name for peer in self.pipeline.peers):
                raise UsageError(
                    f"there is a peer named {wanted.name}; replace it, or write NAME=ENDPOINT"
                )
            self._join(wanted, _ADDED)
        return {"message": f"{wanted.name} is added; see 'replfs status' for how far it is"}

    async def command_remove(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Forget a peer, with all that it lacks."""
        name = str(arguments.get("name"))
        async with self._membership:
            await self._leave(self._peer(name))
        message = f"{name} is forgotten, its store is left as it is"
        if any(one.name == name for one in self.settings.peers):
            message += "; it is still configured: with --peer, it is a new one at the next mount"
        return {"message": message}

    async def command_replace(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Another machine takes a peer's place: nothing is known of what it has."""
        wanted = _peer_setting(arguments)
        async with self._membership:
            peer = self._peer(wanted.name)
            configured = {one.name: one.endpoint for one in self.settings.peers}.get(wanted.name)
            self._check_endpoint(wanted)
            await self._leave(peer)
            self._join(wanted, {_REPLACES: configured} if configured else _ADDED)
        return {"message": f"{wanted.name} is at {wanted.endpoint} now, and is compared in full"}

    def _peer(self, name: str) -> Peer:
        for peer in self.pipeline.peers:
            if peer.name == name:
                return peer
        raise UsageError(f"there is no peer named {name}; see 'replfs peer list'")

    def _check_endpoint(self, wanted: PeerSetting) -> None:
        for peer in self.pipeline.peers:
            if peer.endpoint == wanted.endpoint:
                raise UsageError(f"{wanted.endpoint} is the endpoint of {peer.name} already")
        require_curve(wanted.endpoint, self.settings.insecure, self._curve)

    def _join(self, wanted: PeerSetting, settings: dict[str, str]) -> None:
        self._check_endpoint(wanted)
        peer = self._add_peer(wanted.name, wanted.endpoint)
        self.state.save_peer(wanted.name, settings=settings)
        self._event("peer-added", peer=wanted.name, endpoint=wanted.endpoint)
        if self._nursery is not None:
            self._nursery.start_soon(self._serve, peer)

    async def _leave(self, peer: Peer) -> None:
        scope, ended = self._serving[peer.name]
        scope.cancel()
        # The end of the session releases all that wait for this peer.
        with trio.CancelScope(shield=True):
            await ended.wait()
        self.pipeline.peers = [one for one in self.pipeline.peers if one is not peer]
        # An operation that is just being settled may still mark something.
        peer.log.attach(NotKept())
        del self.resyncs[peer.name], self._serving[peer.name]
        self.state.remove_peer(peer.name)
        self._event("peer-removed", peer=peer.name)

    # After a start -----------------------------------------------------------------------------

    def _is_rescanned(self) -> bool:
        """Whether to look for what was changed here and is not recorded.

        After a fetch that is what was in flight when the power was lost, and what no peer has heard
        of. Where everything is compared anyway there is no need.
        """
        if self.state.memory_lost:
            return bool(self._fetched)
        return self.settings.rescan

    def recover(self, activity: list[tuple[bytes, int, int, bytes]]) -> None:
        """Mark what an earlier run left undecided.

        Everything after a power loss, else what was in flight when its process ended.
        """
        if not self.pipeline.peers:
            return
        with self.state.batch():
            for peer in self.pipeline.peers:
                if self.state.memory_lost:
                    self._recover_memory(peer)
                    continue
                for object_id, kind, region, handle in activity:
                    self._recover_one(peer, object_id, kind, region, handle)
        if self.state.memory_lost:
            if not self._fetched:
                log.warning("this machine lost power: everything is compared with the peers")
        elif activity:
            log.info("the last run was killed: %d regions are compared", len(activity))
        self.state.compared()

    def _recover_memory(self, peer: Peer) -> None:
        """This store lost power. With what it fetched from one peer it has what all of them have.

        So another one lacks what is in its log, and may have more, of which it is asked.
        """
        if not self._fetched or peer.state is State.UNINITIALIZED:
            peer.log.mark_unknown(ROOT_ID, directory=True, deep=True)
        elif peer.name not in self._fetched:
            peer.is_asked = False
            self.state.save_peer(peer.name, is_asked=False)

    @staticmethod
    def _recover_one(peer: Peer, object_id: bytes, kind: int, region: int, handle: bytes) -> None:
        if kind == KIND_NAMES:
            peer.log.mark_names_all(object_id, handle=handle)
        elif kind == KIND_DATA:
            start = region << _ACTIVITY_SHIFT
            peer.log.mark_data(
                object_id, start, start + (1 << _ACTIVITY_SHIFT), handle=handle, compare=True
            )
        elif kind == KIND_FILE:
            peer.log.mark_tail(object_id, 0, handle=handle, compare=True)
        else:
            peer.log.mark_attrs(object_id, handle=handle)

    # What peers need ---------------------------------------------------------------------------

    def hello(self) -> Hello:
        """This node's identity, as it is now. Raises Refused: it cannot be told."""
        make_tellable(self.state)
        return hello_of(self.state)

    def lineage(self) -> Lineage:
        """This node's generation and the earlier ones, on the disk or not."""
        mine = self.state.identity()
        return Lineage(mine.generation, list(mine.history), list(mine.discarded))

    def decide(self, peer: Peer, welcome: Welcome) -> Decision:
        """What the two stores are to each other."""
        mine = side_of(self.state)
        theirs = side_of_message(welcome)
        decision = generations.decide(mine, theirs)
        log.info("peer %s: %s", peer.name, decision.sentence)
        peer.release = welcome.release
        peer.clock_difference_s = (welcome.clock_ns - time.time_ns()) / 1e9
        apart = abs(peer.clock_difference_s)
        if welcome.clock_ns and apart > CLOCKS_APART_S:
            log.warning("peer %s: its clock differs by %.0f s", peer.name, apart)
        return decision

    @property
    def is_reigning(self) -> bool:
        """The role is this node's; False: it has given it up, durably, and may get it back."""
        return self.state.identity().role == "primary"

    def diverging(self, peer: Peer) -> bool:
        """A new generation begins, before the first change that *peer* does not get.

        Not while the role is being handed over: who takes it begins one in place of that which
        this store was at when it gave the role up, and another one here would part the two.
        Nothing changes here any more. What did before is on all peers; should one of them not
        have it on its disk, that is recorded, and `reign_again` sees to it. False: none began.
        """
        if not self.is_reigning:
            return False
        if peer.peer_generation and peer.peer_generation == self.state.identity().generation:
            self.state.new_generation()
            # Before what diverges can be on the disk: a power loss that took the generation and
            # not the change would leave two stores that differ and seem to be equal.
            try:
                told = self._expect(but=peer)
                self.state.flush(durable=True)
            except OSError as error:
                # The change is applied: it must be recorded for all, and no fsync will return. Nor
                # does anybody hear of a generation that a loss of power takes back.
                log.error("the new generation is not on the disk yet: %s", error.strerror)
                return True
            log.info("a new generation begins: %s does not get what follows", peer.name)
            self._announce(told)
        return True

    def reign_again(self) -> None:
        """The role was not taken, and is this node's again: nothing is as if it had been."""
        for peer in self.pipeline.peers:
            if not peer.log.is_empty:
                try:
                    peer.begin_divergence()
                except OSError as error:
                    peer.doubt_all(error)

    def _expect(self, but: Peer) -> list[Peer]:
        """The peers that are about to be told of the generation that it is now.

        From here on each may have it, whether that is ever confirmed or not, and what it does not
        get begins another one. That is saved with the generation: a later run must not take a peer
        for one of an earlier generation that lacks something anyway. Raises OSError.
        """
        generation = self.lineage().generation
        told = [
            other
            for other in self.pipeline.peers
            if other is not but and other.live and other.state is State.IN_SYNC
        ]
        for other in told:
            if other.understands(ops.Generation):
                self.may_have(other, generation)
        return told

    def _announce(self, told: list[Peer]) -> None:
        """Tell peers what generation it is from here on."""
        lineage = self.lineage()
        for other in told:
            self.pipeline.announcing += 1
            sink = _Announcement(self.pipeline, other)
            if not other.announce(lineage, sink):
                self.pipeline.announcement_ended()

    def may_have(self, peer: Peer, generation: bytes) -> None:
        """*peer* is about to be told that it is at that generation. Raises OSError."""
        if peer in self.pipeline.peers:
            self.state.save_peer(peer.name, generation=generation, led_apart=False)
            peer.led_apart = False
        peer.peer_generation = generation

    def supersede(self, peer: Peer, theirs: Identity) -> None:
        """An operator decides a split brain for this store, durably, before anybody hears of it.

        Raises:
            NotInSync: this node is handing its role over.
            OSError: that cannot be saved.
        """
        if not self.is_reigning:
            raise NotInSync("this node is handing its role over: see 'replfs status', try again")
        reign.supersede(self.state, theirs)
        told = self._expect(but=peer)
        self.state.flush(durable=True)
        log.warning("what %s changed apart from this node is given up", peer.name)
        self._event("decided", peer=peer.name, winner=self.settings.name)
        self._announce(told)

    def is_self(self, node: bytes) -> bool:
        """Whether that is this node."""
        return node == self.state.identity().node

    def is_discarded(self, generation: bytes) -> bool:
        """Whether an operator decided against what was changed in that generation."""
        return generation in self.state.identity().discarded

    def changed(self, peer: Peer) -> None:
        """Remember and tell a peer's new state."""
        if peer.state is State.IN_SYNC:
            peer.last_in_sync = time.time()
        if peer not in self.pipeline.peers:
            return
        self.state.save_peer(
            peer.name,
            state=peer.state.value,
            node=peer.peer_node,
            generation=peer.peer_generation,
            is_asked=peer.is_asked,
            reason=peer.reason,
            last_in_sync_ns=int((peer.last_in_sync or 0) * 1e9),
            paused_by=peer.reason if peer.paused else "",
            unrepresentable=peer.unrepresentable.saved(),
        )
        self._event("peer", peer=peer.name, state=peer.state.value, reason=peer.reason)

    def can_record(self) -> bool:
        """Whether there is room kept back for dirty marks."""
        return self.state.statistics().reserve >= _RESERVE_MIN

    async def _harden(self) -> None:
        self.state.flush()
        peers = self.pipeline.peers
        if self.state.are_clears_lost:
            self.state.save_logs({peer.name: peer.log for peer in peers})
        for peer in peers:
            peer.settling.begin()
        await trio.to_thread.run_sync(self.state.harden)
        for peer in peers:
            peer.settling.settle(peer.log)

    def _note_stable(self, began: int) -> None:
        """Up to then all changes went through this node and are on the disk, for a later rescan."""
        with contextlib.suppress(OSError):  # a full disk: the rescan then looks at more
            self.state.update(stopped_ns=began)

    def note_led_apart(self, peer: Peer) -> None:
        """Remember that what another primary began to bring to the peer may be in it."""
        self.state.save_peer(peer.name, led_apart=True)
        self.state.flush(durable=True)
        peer.led_apart = True

    def set_apart(self, peer: Peer, *, apart: bool) -> None:
        """Remember whether the peer may have what a power loss here would take."""
        self.state.save_peer(peer.name, apart=apart)
        if not apart:
            # Before anything is sent to it: afterwards it has what only memory has here.
            self.state.flush(durable=True)

    # Running -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Links, resyncs and the rescan, until cancelled."""
        async with trio.open_nursery() as nursery:
            for peer in self.pipeline.peers:
                nursery.start_soon(self._serve, peer)
            nursery.start_soon(self.rescan.run)
            nursery.start_soon(self.checkpoints.run)
            self._nursery = nursery
            await trio.sleep_forever()

    async def _serve(self, peer: Peer) -> None:
        """One peer's tasks, until it is removed."""
        ended = trio.Event()
        congestion = Congestion(self.pipeline, peer, self.settings.slow_peer_s)
        try:
            with trio.CancelScope() as scope:
                self._serving[peer.name] = scope, ended
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(peer.link.run)
                    nursery.start_soon(self._resync, peer)
                    nursery.start_soon(congestion.run)
        finally:
            ended.set()

    async def _resync(self, peer: Peer) -> None:
        if self._fetched:
            # Until then something may differ that nobody knows of.
            await self.rescan.is_over.wait()
        await self.resyncs[peer.name].run()

    async def first_contact(self, *, patiently: bool) -> None:
        """Wait a moment for the peers that answer at once; *patiently*: for the peer timeout.

        Who takes the place of a primary that ended badly is met before anything is changed here.
        """
        with trio.move_on_after(self.settings.peer_timeout_s if patiently else _FIRST_CONTACT_S):
            while not all(peer.live or peer.is_refused for peer in self.pipeline.peers):
                await trio.sleep(0.01)

    def retire(self) -> None:
        """Another node is the primary from here on: nothing is sent or recorded any more."""
        self.pipeline.peers = []

    async def checkpoint(self) -> None:
        """Everything acknowledged is stable on both sides, marks included."""
        await self.checkpoints.take()

    def state_word(self) -> str:
        """The worst of the peers' states."""
        states = [peer.state for peer in self.pipeline.peers]
        if not states:
            return "alone"
        order = [State.IN_SYNC, *(state for state in State if state is not State.IN_SYNC)]
        return word(max(states, key=order.index))


class _Announcement:
    """A generation on its way to one peer."""

    def __init__(self, pipeline: Pipeline, peer: Peer) -> None:
        self._pipeline = pipeline
        self._peer = peer

    def answered(self, link: Link, answer: AnyAnswer) -> None:
        """The peer knows it, or could not save it: then the resync tells it again."""
        del link
        if not isinstance(answer, Done) or answer.errno:
            self._peer.doubt("the peer could not save a generation")
        self._pipeline.announcement_ended()

    def lost(self, link: Link) -> None:
        """It may know it or not: at the next session it says so."""
        del link
        self._pipeline.announcement_ended()


def _peer_setting(arguments: dict[str, Any]) -> PeerSetting:
    try:
        return parse_peer(f"{arguments.get('name')}={arguments.get('endpoint')}")
    except ValueError as error:
        raise UsageError(f"the peer {error}") from None


def void(_: object) -> None:
    """For callbacks that return nothing."""
