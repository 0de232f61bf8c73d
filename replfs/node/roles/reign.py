"""What a change of role does to the state of a store: the durable half of promotion and fencing.

A reign is the time in which one store is the primary. It begins with a generation of its own, and
with a log for each peer that says what that peer may lack of what this store had before. It ends
with the *suspects*: the log of what this store may have on its own, kept until a resync from its
successor has put it right.

Every function leaves the store in the old or in the new role, whenever it is cut off; nothing here
waits, and nothing is safe from a power loss before `State.harden`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import NamedTuple

from replfs.core import generation as generations
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Action, Decision
from replfs.core.marks import NotKept
from replfs.core.messages import Identity
from replfs.core.ops import OBJECT_ID_SIZE
from replfs.core.relationship import State as Replication
from replfs.node.asking.identity import side_of, side_of_message
from replfs.node.replication.peer import Peer
from replfs.node.settings.values import PeerSetting
from replfs.store.record import ROOT_ID
from replfs.store.state import SUSPECTS, UNSTABLE, State


def decide(state: State, other: Identity) -> Decision:
    """What this store is to another one, by what that said of itself."""
    return generations.decide(side_of(state), side_of_message(other))


def is_outdated(state: State, other: Identity) -> bool:
    """Whether this store is a primary whose place another one took."""
    return decide(state, other).action is Action.STEP_DOWN


# Taking a role -----------------------------------------------------------------------------------


def begin_logs(
    state: State, peers: Iterable[PeerSetting], unstable: DirtyLog | None, base: bytes
) -> None:
    """A log for each peer of a reign that begins; the earlier ones mean nothing more.

    *unstable*: what this store may have and a peer at generation *base* lack; None: anything.

    Raises:
        OSError: they cannot be saved (ENOSPC).
    """
    for wanted in peers:
        state.forget_log(wanted.name)
        state.save_peer(
            wanted.name,
            endpoint=wanted.endpoint,
            node=b"",
            generation=base,
            base=base,
            is_asked=False,
            led_apart=False,
            state=Replication.OUT_OF_SYNC.value,
            reason="not met since this node was promoted",
        )
        with state.batch():
            log = state.load_log(wanted.name)
            if unstable is None:
                log.mark_unknown(ROOT_ID, directory=True, deep=True)
            else:
                log.absorb(unstable, compare=True)
        log.attach(NotKept())


def keep_unstable(state: State, unstable: DirtyLog | None) -> None:
    """A secondary applies nothing any more: keep what it has, and others may lack. None: unknown.

    Raises:
        OSError: it cannot be saved.
    """
    state.forget_peer(UNSTABLE)
    if unstable is not None:
        state.save_peer(UNSTABLE)
        with state.batch():
            log = state.load_log(UNSTABLE)
            log.absorb(unstable)
        log.attach(NotKept())


def kept_unstable(state: State) -> DirtyLog | None:
    """What a secondary kept that has applied nothing since; None: it is not known.

    It is forgotten before anything may be applied: so it says all, however the process ended that
    kept it, unless power was lost since.
    """
    if state.memory_lost or state.peer(UNSTABLE) is None:
        return None
    log = state.load_log(UNSTABLE)
    log.attach(NotKept())
    return log


def begin_stopped(state: State, peers: Iterable[PeerSetting]) -> None:
    """The first start of a primary whose store was promoted while no node served it.

    Raises:
        OSError: it cannot be saved.
    """
    # Where it was a node that promoted it, and died of it, the logs are begun.
    unstable = None if state.unclean else kept_unstable(state)
    if unstable is not None:
        begin_logs(state, peers, unstable, state.identity().base)
    state.forget_peer(UNSTABLE)


def promote(state: State, *, progress: int, clean: bool = False) -> None:
    """The store is a primary, in a generation of its own, from here on.

    *progress*: up to which change of its last primary it has everything; 0: that is not known.
    *clean*: no node serves it, and nothing it had in flight is to be looked for.

    Raises:
        OSError: that cannot be saved; nothing is changed.
    """
    old = state.identity()
    state.forget_peer(SUSPECTS)
    if not clean:
        state.forget_peer(UNSTABLE)  # it is in the logs
    state.update(
        role="primary",
        role_changed=True,
        volume=old.volume or os.urandom(OBJECT_ID_SIZE),
        generation=os.urandom(OBJECT_ID_SIZE),
        history=(old.generation, *old.history) if old.generation else old.history,
        base=old.generation,
        base_progress=0 if old.inconsistent or state.memory_lost else progress,
        follows=b"",
        leader=b"",
        led_by=b"",
        inconsistent=False,
        uninitialized=False,
        memory_lost=False,
        clean=clean,
        # A secondary applies policies and does not count them.
        policies_used=True,
    )
    state.memory_lost = state.unclean = False


def supersede(state: State, loser: Identity) -> None:
    """An operator decides for this store: *loser*'s generation becomes an earlier one of it.

    What the loser began apart from this store stays known as no earlier state of it, though: who
    is at one of those, be it the loser or a node that followed it, has what this store never had.

    Raises:
        OSError: that cannot be saved; nothing is changed.
    """
    old = state.identity()
    history = dict.fromkeys((old.generation, loser.generation, *old.history, *loser.history))
    mine = {old.generation, *old.history}
    apart = [one for one in (loser.generation, *loser.history) if one not in mine]
    state.update(
        generation=os.urandom(OBJECT_ID_SIZE),
        history=tuple(history),
        discarded=tuple(dict.fromkeys((*apart, *old.discarded))),
    )


# Giving it up ------------------------------------------------------------------------------------


def give_up(state: State, peers: Sequence[Peer], winner: Identity | None) -> None:
    """The store is a secondary from here on; what it may have on its own is its suspects.

    *winner*: the primary that takes its place; None where that has all that this store has.

    Raises:
        OSError: that cannot be saved; the store is still a primary.
    """
    state.forget_peer(SUSPECTS)
    if winner is not None:
        suspect(state, successor_of(winner), log_for(peers, winner))
    state.update(role="secondary", role_changed=True)
    for peer in peers:
        # Operations that end only now have nobody to be recorded for.
        peer.log.attach(NotKept())
        state.forget_log(peer.name)


def fence(state: State, winner: Identity) -> None:
    """The store, which no node serves, is a secondary: *winner*, or who that follows, is primary.

    What it may have on its own is what its log of that node says.

    Raises:
        OSError: that cannot be saved; the store is still a primary.
    """
    successor = successor_of(winner)
    names = {peer.node: peer.name for peer in state.peers()}
    name = names.get(successor)
    state.forget_peer(SUSPECTS)
    suspect(state, successor, state.load_log(name) if name is not None else None)
    state.update(role="secondary", role_changed=True)
    for known in names.values():
        state.forget_log(known)
    state.flush(durable=True)


def suspect(state: State, winner: bytes, source: DirtyLog | None) -> None:
    """Remember what this store may have, and the node *winner*, which it follows, never had.

    *source*: that; None: anything.

    Raises:
        OSError: that cannot be saved.
    """
    label = f"{state.identity().name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    state.save_peer(SUSPECTS, node=winner, settings={"label": label})
    with state.batch():
        suspects = state.load_log(SUSPECTS)
        if source is None:
            suspects.mark_unknown(ROOT_ID, directory=True, deep=True)
        else:
            suspects.absorb(source)
    suspects.attach(NotKept())


class Suspects(NamedTuple):
    """What a store may have on its own that gave up its role, or had followed further."""

    winner: bytes
    """The node that took its place, which the log was kept for."""
    label: str
    """What the directory is called in which it is kept beside."""
    log: DirtyLog


def suspects_of(state: State) -> Suspects | None:
    """None: the store gave nothing up, or a resync has put it right since."""
    found = state.peer(SUSPECTS)
    if found is None:
        return None
    return Suspects(found.node, found.settings.get("label", ""), state.load_log(SUSPECTS))


def forget_suspects(state: State) -> None:
    """A resync has put right what this store had on its own. Raises OSError."""
    state.forget_peer(SUSPECTS)


def successor_of(winner: Identity) -> bytes:
    """The node that takes this one's place: *winner*, or whom that follows; empty: nobody knows.

    One that follows the successor is ahead of this store too, and lacks other things of it.
    """
    return winner.node if winner.role == "primary" else winner.leader


def log_for(peers: Sequence[Peer], winner: Identity) -> DirtyLog | None:
    """The log of what the successor lacks of this store; None where there is none."""
    successor = successor_of(winner)
    for peer in peers:
        if successor and peer.peer_node == successor:
            return peer.log
    if successor != winner.node:
        return None
    lineage = {winner.generation, *winner.history}
    for peer in peers:
        # A log begun at a promotion is for whoever was at the generation before.
        if not peer.peer_node and peer.base and peer.base in lineage:
            return peer.log
    return None
