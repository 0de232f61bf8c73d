"""A primary that lost power, before it serves: from which peer it fetches what it lost.

What it had acknowledged, and not flushed, its peers have. One that was in sync has all of it: the
first such that answers is enough for what was promised. Of several the one that has followed
furthest has what was acknowledged before all of them had it (`async`), too: those that answer in
the same moment are compared, and what another one has beyond is kept beside there when it follows,
since a new generation begins here. If there is none, each of the others has a part. A peer that was
away when this store was last flushed has nothing that this store lacks.

A peer that lost power too has no memory either. If all have, the stores are compared in full, and
what is here counts.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import os
import time
from collections.abc import Awaitable, Callable
from typing import Final

import trio
import zmq

from replfs.core import generation as generations
from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Action
from replfs.core.messages import Hello, Identity, Refuse, Welcome
from replfs.core.policy import Ack, NamePatterns, Policy
from replfs.errors import PeerLost, Refused
from replfs.node.asking import suspects
from replfs.node.asking.identity import hello_of, led_by, side_of, side_of_message
from replfs.node.asking.question import ask
from replfs.node.recovery.restore import Restore
from replfs.node.replica.replica import Replica
from replfs.node.replication.places import BULK
from replfs.node.replication.policies import Policies
from replfs.node.settings.config import Settings
from replfs.node.settings.values import PeerSetting
from replfs.store import syscalls
from replfs.store.identity import Peer
from replfs.store.reach import KEPT, LIMBO, RESERVED
from replfs.store.state import State
from replfs.store.tree import Tree
from replfs.store.twins import part_twins
from replfs.transport.link import Link
from replfs.transport.security import Curve

log = logging.getLogger(__name__)

_LOOK_S: Final = 0.05
_WATCH_S: Final = 1.0


Who = Callable[[str, str], Awaitable[Welcome | None]]


class _Standing(enum.Enum):
    """What is known of a peer."""

    AWAITED = "it does not answer"
    READY = "it can be fetched from"
    DONE = "all that it has was fetched"
    NOTHING = "it has nothing to fetch"


class _Source:
    """One peer that may have what was lost, in a session of its own."""

    def __init__(self, state: State, peer: Peer) -> None:
        self._state = state
        self.peer = peer
        self.link: Link
        self.standing = _Standing.AWAITED
        self.reason = _Standing.AWAITED.value
        self.is_partial = False
        """It does not have all yet: what this store's log of it covers is right here."""
        self.is_replica = False
        """It had all once, and knows what it was sent since."""
        self.progress = 0
        self.superseded_by: Identity | None = None
        """It, or the primary it follows, was made one in place of this store."""

    # The link's owner --------------------------------------------------------------------------

    def hello(self) -> Hello:
        """This store, as it is now."""
        return hello_of(self._state)

    def welcomed(self, link: Link, welcome: Welcome) -> None:
        """The peer is there: is there anything to fetch?"""
        del link
        decision = generations.decide(side_of(self._state), side_of_message(welcome))
        if decision.action is Action.STEP_DOWN:
            self.superseded_by = welcome
        elif decision.action in {Action.REFUSE, Action.SPLIT_BRAIN, Action.OUTDATED}:
            raise Refused(decision.sentence, "refused")
        elif welcome.node == self.peer.node:
            is_loser = welcome.generation in self._state.identity().discarded
            is_strange = self._is_led_apart(welcome) or (is_loser and not self._was_asked(welcome))
            if not welcome.memory_lost and not is_strange:
                self.progress = welcome.progress
                self.is_replica = decision.action is not Action.BASELINE and not is_loser
                self.is_partial = not self.is_replica or not self._was_complete()
                self.standing = _Standing.READY
                return
        self.standing = _Standing.NOTHING

    def _was_asked(self, welcome: Welcome) -> bool:
        """Whether the log here has what that one changed apart from this store, too.

        Before, it was sent nothing; and what it has alone an operator decided against.
        """
        return self.peer.is_asked and self.peer.generation == welcome.generation

    def _is_led_apart(self, welcome: Welcome) -> bool:
        """Whether what it has may be what another primary began to bring to it."""
        return self.peer.led_apart or led_by(welcome) not in {b"", self._state.identity().node}

    def _was_complete(self) -> bool:
        """Whether it may have been in sync since this store's reign began.

        What the log called unknown at the beginning was on the disk here by then, and nothing was
        sent on top of it since; the peer may have an older version of it, or half of one.
        """
        own = self._state.identity()
        if own.disk_failed or own.base not in own.history:
            return True  # what is on this disk is not known to be right
        reign = (own.generation, *own.history[: own.history.index(own.base)])
        return self.peer.generation in reign

    def refused(self, link: Link, refuse: Refuse) -> None:
        """One side said no."""
        del link
        self.reason = refuse.reason

    def went_down(self, link: Link, reason: str) -> None:
        """The session is over."""
        del link
        self.reason = reason
        if self.standing is _Standing.READY:
            self.standing = _Standing.AWAITED

    # Questions ---------------------------------------------------------------------------------

    async def ask(self, op: ops.AnyOp) -> ops.AnyAnswer:
        """The answer. Raises PeerLost."""
        return await ask(self.link, op)

    def tell(self, op: ops.Locate | ops.Forget) -> None:
        """What has no answer. Raises PeerLost."""
        self.link.send(op, None, None, BULK)


class Fetch:
    """What a primary does between a loss of power and serving."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        tree: Tree,
        peers: list[PeerSetting],
        make_link: Callable[[str, str, _Source], Link],
        who: Who,
        *,
        event: Callable[..., None],
    ) -> None:
        """*peers*: those of this run. *make_link*: from endpoint, name and owner.

        *who* asks the node of this name and endpoint who it is.
        """
        self._who = who
        self.winner: Identity | None = None
        """Who took this store's place as primary, or follows the one that did."""
        self._settings = settings
        self._state = state
        self._tree = tree
        self._peers = peers
        self._make_link = make_link
        self._event = event

    async def run(self) -> frozenset[str]:
        """Fetch what was lost; the names of the peers that are known to differ nowhere else.

        It ends, with `winner`, where this store is no primary any more.

        Raises:
            PeerLost: no peer that may have it answered in `start-wait`, and not `start-alone`.
            OSError, StoreError: it cannot be stored here.
        """
        generation = self._state.identity().generation
        endpoints = {peer.name: peer.endpoint for peer in self._peers}
        known = [
            peer
            for peer in self._state.peers()
            if peer.name in endpoints and not peer.apart and peer.node
        ]
        complete = [peer for peer in known if peer.generation == generation]
        sources = [_Source(self._state, peer) for peer in complete or known]
        if not sources:
            return frozenset()
        names = ", ".join(source.peer.name for source in sources)
        log.warning("this machine lost power: fetching from %s what it lost", names)
        async with trio.open_nursery() as nursery:
            for source in sources:
                name = source.peer.name
                source.link = self._make_link(endpoints[name], name, source)
                nursery.start_soon(source.link.run)
            nursery.start_soon(self._watch)
            try:
                return await self._fetch(sources, any_will_do=bool(complete))
            finally:
                nursery.cancel_scope.cancel()

    async def _fetch(self, sources: list[_Source], *, any_will_do: bool) -> frozenset[str]:
        until = trio.current_time() + self._settings.start_wait_s
        done: set[str] = set()
        if any_will_do:
            await self._gather(sources)
        while True:
            for source in sorted(sources, key=_progress, reverse=True):
                if source.standing is _Standing.READY and not (done and any_will_do):
                    try:
                        await self._from(source, own_counts=not any_will_do)
                    except PeerLost as error:
                        source.reason = str(error)
                        source.standing = _Standing.AWAITED
                        source.link.fail("begun again")
                    else:
                        source.standing = _Standing.DONE
                        done.add(source.peer.name)
                        if any_will_do and len(sources) > 1:
                            self._begin_anew(source)
                    until = trio.current_time() + self._settings.start_wait_s
            if self._is_superseded(sources):
                return frozenset()  # what this store lost is no longer its to have
            awaited = [one for one in sources if one.standing is _Standing.AWAITED]
            if (done and any_will_do) or not awaited:
                break
            if trio.current_time() >= until:
                await self._alone(awaited)
                return frozenset()
            await trio.sleep(_LOOK_S)
        if not done:
            log.warning("the peers lost power, too: what is here counts")
        # Only one that was in sync differs nowhere else; of the others that is not known.
        return frozenset(done) if any_will_do else frozenset()

    async def _gather(self, sources: list[_Source]) -> None:
        """Wait until one answers, and a moment longer for the others."""
        with trio.move_on_after(self._settings.start_wait_s):
            while not any(one.standing is _Standing.READY for one in sources):
                nothing = all(one.standing is _Standing.NOTHING for one in sources)
                if nothing or self._is_superseded(sources):
                    return
                await trio.sleep(_LOOK_S)
        with trio.move_on_after(self._settings.peer_timeout_s):
            while any(one.standing is _Standing.AWAITED for one in sources):
                await trio.sleep(_LOOK_S)

    def _is_superseded(self, sources: list[_Source]) -> bool:
        for source in sources:
            self.winner = self.winner or source.superseded_by
        return self.winner is not None

    async def _watch(self) -> None:
        """Ask all peers who they are, those that have nothing to fetch, too, at times."""
        while self.winner is None:
            for peer in self._peers:
                answer = await self._who(peer.name, peer.endpoint)
                if answer is None:
                    continue
                decision = generations.decide(side_of(self._state), side_of_message(answer))
                if decision.action is Action.STEP_DOWN:
                    self.winner = answer
            await trio.sleep(_WATCH_S)

    def _begin_anew(self, source: _Source) -> None:
        """What another peer has beyond *source* is not this store's: told apart by a generation."""
        self._state.new_generation(
            base=self._state.identity().generation, base_progress=source.progress
        )
        self._state.flush(durable=True)

    async def _alone(self, awaited: list[_Source]) -> None:
        """Nobody answers: an operator has said that it shall serve all the same, or it does not."""
        who = "; ".join(f"{source.peer.name} ({source.reason})" for source in awaited)
        if not self._settings.start_alone:
            raise PeerLost(
                f"{self._settings.store} lost power, and what it lost may be on {who}, but cannot "
                f"be fetched within {self._settings.start_wait_s:g} s. Start that node, or give up "
                "what was lost with --start-alone"
            )
        log.warning("starting alone: what was lost is given up; it may be on %s", who)
        if self._state.identity().inconsistent:
            self._keep_limbo()
            await part_twins(self._tree)
        self._state.new_generation()
        self._state.update(inconsistent=False)
        self._event("start-alone", waited_for=who)

    def _keep_limbo(self) -> None:
        """A fetch was begun and cannot be ended: what it took aside is kept beside."""
        stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime()).encode()
        flags = os.O_RDONLY | os.O_DIRECTORY
        with contextlib.ExitStack() as cleanup:
            reserved = os.open(RESERVED, flags, dir_fd=self._tree.root_fd)
            cleanup.callback(os.close, reserved)
            limbo = os.open(LIMBO, flags, dir_fd=reserved)
            cleanup.callback(os.close, limbo)
            if os.listdir(limbo):
                kept = KEPT + b"/unfinished-fetch-" + stamp
                os.rename(LIMBO, kept, src_dir_fd=reserved, dst_dir_fd=reserved)
                # Before the state says that it is nothing to be fetched again.
                os.fsync(reserved)
                log.warning("what was being moved is kept in .replfs/%s", kept.decode())

    async def _from(self, source: _Source, *, own_counts: bool) -> None:
        """Fetch from one peer all that it has and this store lacks.

        *own_counts*: what this store's log of it has was changed here after the peer had gone.
        Otherwise it has nothing that the peer lacks: marks in it were cleared, and the clearing was
        lost with the power.
        """
        began = time.monotonic()
        name = source.peer.name
        own_counts = own_counts or source.is_partial
        own = self._state.load_log(name) if own_counts else DirtyLog()
        found = None
        if source.is_replica and not (source.is_partial and own.has_unknown_trees()):
            found = await suspects.ask(source.ask, everywhere=False)
        if found is None:
            log.warning("%s does not know what is unstable: everything is compared with it", name)
        if self._state.identity().inconsistent:
            # A fetch was cut off: of what it had made anew, its old self is not the object.
            await part_twins(self._tree)
        self._state.update(inconsistent=True)
        self._state.flush(durable=True)
        settings = self._settings
        patterns = NamePatterns(settings.none_patterns)
        replica = Replica(self._tree, lambda _: None, patterns)
        policies = Policies(
            self._tree,
            Policy[settings.policy.upper()],
            Ack[settings.ack.upper()],
            used=self._state.identity().policies_used,
            on_used=lambda: None,
            generation=lambda: self._state.identity().generation,
            patterns=patterns,
        )
        restore = Restore(
            self._tree, replica, policies, source, found, own, is_partial=source.is_partial
        )
        async with trio.open_nursery() as nursery:
            await nursery.start(replica.run)
            await restore.run()
            nursery.cancel_scope.cancel()
        await trio.to_thread.run_sync(syscalls.syncfs, self._tree.root_fd)
        self._state.update(inconsistent=False)
        self._state.flush(durable=True)
        seconds = time.monotonic() - began
        log.warning(
            "fetched from %s what this store had lost: %d changes, %d bytes in %.1f s",
            name, restore.changed, restore.bytes, seconds,
        )  # fmt: skip
        self._event(
            "fetched", peer=name, changes=restore.changed, bytes=restore.bytes, seconds=seconds
        )


def _progress(source: _Source) -> int:
    return source.progress


def link_maker(
    context: zmq.Context[zmq.Socket[bytes]], settings: Settings, curve: Curve | None
) -> Callable[[str, str, _Source], Link]:
    """Links to the peers of a node."""

    def make(endpoint: str, name: str, owner: _Source) -> Link:
        return Link(
            context,
            endpoint,
            owner,
            peer_timeout_s=settings.peer_timeout_s,
            security=curve,
            name=name,
            on_refused=owner.refused,
        )

    return make
