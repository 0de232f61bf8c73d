"""A primary at work: the volume, its peers, their links and resyncs.

Owns what belongs to all peers together: identity, generation, the activity log, checkpoints.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import trio
import zmq

from replfs.core import generation as generations
from replfs.core.generation import Decision, Side
from replfs.core.messages import Hello, Welcome
from replfs.core.ops import Phase
from replfs.core.policy import Ack, Policy
from replfs.core.relationship import State
from replfs.errors import PeerLost
from replfs.node.config import Settings
from replfs.node.identity import hello_of, side_of, side_of_message
from replfs.node.peer import Peer
from replfs.node.pipeline import Pipeline
from replfs.node.policies import Policies
from replfs.node.resync import Resync
from replfs.node.volume import Volume
from replfs.store.activity import KIND_DATA, KIND_FILE, KIND_NAMES, ActivityLog
from replfs.store.record import ROOT_ID
from replfs.store.state import State as StoreState
from replfs.store.tree import Tree
from replfs.transport.link import Link
from replfs.transport.security import Curve

log = logging.getLogger(__name__)

_FIRST_CONTACT_S: Final = 1.0
"""How long a start waits for its peers, so that the first change already goes to them."""
_RESERVE_MIN: Final = 256 << 10
"""Bytes kept back for marks below which a change that some peer lacks is refused (ENOSPC)."""
_ACTIVITY_SHIFT: Final = 20


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
        *,
        event: Callable[..., None],
        status: Callable[[], dict[str, Any]],
    ) -> None:
        self.settings = settings
        self.state = state
        self.tree = tree
        self._event = event
        self._durable = trio.Lock()
        self._dirty_since_durable = True
        self.policies = Policies(
            tree,
            Policy[settings.policy.upper()],
            Ack[settings.ack.upper()],
            used=state.identity().policies_used,
            on_used=lambda: void(state.update(policies_used=True)),
            generation=lambda: state.identity().generation,
        )
        self.pipeline = Pipeline(tree, activity, self.policies)
        self.volume = Volume(self.pipeline, status)
        self.pipeline.strict_timeout_s = settings.peer_timeout_s
        self.pipeline.strict_peers = settings.strict_peers or 0
        self.resyncs: dict[str, Resync] = {}
        for wanted in settings.peers:
            self._add_peer(wanted.name, wanted.endpoint, context, curve)
        self._note_left_out()

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

    def _add_peer(
        self,
        name: str,
        endpoint: str,
        context: zmq.Context[zmq.Socket[bytes]],
        curve: Curve | None,
    ) -> None:
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
        peer.peer_generation = saved.generation
        peer.diverged = saved.generation != self.state.identity().generation
        if saved.last_in_sync_ns:
            peer.last_in_sync = saved.last_in_sync_ns / 1e9
        peer.link = Link(
            context,
            endpoint,
            peer,
            peer_timeout_s=self.settings.peer_timeout_s,
            security=curve,
            name=name,
            on_refused=peer.refused,
        )
        self.pipeline.peers.append(peer)
        self.resyncs[name] = Resync(self.pipeline, peer, self.settings.resync_rate_bytes)

    # After a start -----------------------------------------------------------------------------

    def recover(self, activity: list[tuple[bytes, int, int, bytes]]) -> None:
        """Mark what an earlier run left undecided.

        Everything after a power loss, else what was in flight when its process ended.
        """
        if not self.pipeline.peers:
            return
        with self.state.batch():
            for peer in self.pipeline.peers:
                if self.state.memory_lost:
                    peer.log.mark_unknown(ROOT_ID, directory=True, deep=True)
                    continue
                for object_id, kind, region, handle in activity:
                    self._recover_one(peer, object_id, kind, region, handle)
        if self.state.memory_lost:
            log.warning("this machine lost power: everything is compared with the peers")
        elif activity:
            log.info("the last run was killed: %d regions are compared", len(activity))
        self.state.compared()

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
        """This node's identity, as it is now."""
        return hello_of(self.state)

    def decide(self, peer: Peer, welcome: Welcome) -> Decision:
        """What the two stores are to each other."""
        mine = side_of(self.state)
        theirs = side_of_message(welcome)
        decision = generations.decide(mine, theirs)
        log.info("peer %s: %s", peer.name, decision.sentence)
        return decision

    def side(self) -> Side:
        """This store, for a decision."""
        return side_of(self.state)

    def diverging(self, peer: Peer) -> None:
        """A new generation begins, before the first change that *peer* does not get."""
        if peer.state is State.UNINITIALIZED or peer.state is State.BASELINE:
            return
        if peer.peer_generation and peer.peer_generation == self.state.identity().generation:
            self.state.new_generation()
            self._dirty_since_durable = True
            log.info("a new generation begins: %s does not get what follows", peer.name)
            for other in self.pipeline.peers:
                if other is not peer and other.live and other.state is State.IN_SYNC:
                    other.wake_generation()

    def changed(self, peer: Peer) -> None:
        """Remember and tell a peer's new state."""
        if peer.state is State.IN_SYNC:
            peer.last_in_sync = time.time()
        self._dirty_since_durable = True
        self.state.save_peer(
            peer.name,
            state=peer.state.value,
            node=peer.peer_node,
            generation=peer.peer_generation,
            reason=peer.reason,
            last_in_sync_ns=int((peer.last_in_sync or 0) * 1e9),
            paused_by=peer.reason if peer.paused else "",
        )
        self._event("peer", peer=peer.name, state=peer.state.value, reason=peer.reason)

    def can_record(self) -> bool:
        """Whether there is room kept back for dirty marks."""
        return self.state.statistics().reserve >= _RESERVE_MIN

    async def make_durable(self) -> None:
        """Marks and generation are on stable storage; one flush serves all that wait for it."""
        async with self._durable:
            self.state.flush()
            await trio.to_thread.run_sync(self.state.harden)

    # Running -----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Links and resyncs, until cancelled."""
        async with trio.open_nursery() as nursery:
            for peer in self.pipeline.peers:
                nursery.start_soon(peer.link.run)
                nursery.start_soon(self.resyncs[peer.name].run)
                nursery.start_soon(self._carry_generations, peer)

    async def _carry_generations(self, peer: Peer) -> None:
        """Tell a peer in sync of generations that began because of another peer."""
        while True:
            await peer.wait_generation()
            identity = self.state.identity()
            if not peer.live or peer.state is not State.IN_SYNC:
                continue
            try:
                await peer.ask(
                    Phase(
                        inconsistent=False,
                        generation=identity.generation,
                        history=list(identity.history),
                    )
                )
            except PeerLost:
                continue
            peer.peer_generation = identity.generation
            peer.diverged = False
            self.changed(peer)

    async def first_contact(self) -> None:
        """Wait a moment for the peers that answer at once."""
        with trio.move_on_after(_FIRST_CONTACT_S):
            while not all(peer.live for peer in self.pipeline.peers):
                await trio.sleep(0.01)

    async def checkpoint(self) -> None:
        """Everything acknowledged is stable on both sides, marks included."""
        await self.volume.checkpoint()
        await self.make_durable()

    def state_word(self) -> str:
        """The worst of the peers' states."""
        states = [peer.state for peer in self.pipeline.peers]
        if not states:
            return "alone"
        order = [State.IN_SYNC, *(state for state in State if state is not State.IN_SYNC)]
        worst: str = max(states, key=order.index).value
        return worst.replace("_", "-")


def void(_: object) -> None:
    """For callbacks that return nothing."""
