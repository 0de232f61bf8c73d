"""Who this node is, as the handshake tells it and as the decision wants it."""

from __future__ import annotations

from typing import Final

import msgspec

import replfs
from replfs.core import features
from replfs.core.generation import Side
from replfs.core.messages import Hello, Identity, Welcome
from replfs.errors import Refused
from replfs.store.state import SUSPECTS, State

PROBE: Final = "probe"
"""In a greeting's features: it only asks who this is."""
INSPECTION: Final = "inspection"
"""In a greeting's features: the session it begins changes nothing."""
YIELDING: Final = "yielding"
"""In a greeting's features: an operator gave up what was changed in this store's generation."""
WITHOUT_ACLS: Final = "no-acl"
"""In a reply's features: the store's file system keeps no access control lists."""
INCONSISTENT: Final = "inconsistent"
"""In a reply's features: a resync into the store has begun and not ended."""
SUSPECTED: Final = "suspects"
"""In a reply's features: the store knows what it may have on its own since it gave up its role."""


def hello_of(state: State, *marks: str) -> Hello:
    """This store, for a greeting; *marks* are put among its features."""
    mine = state.identity()
    return Hello(
        volume=mine.volume,
        node=mine.node,
        name=mine.name,
        store=mine.binding.digest(),
        role=mine.role,
        generation=mine.generation,
        history=list(mine.history),
        clean=not state.unclean,
        uninitialized=mine.uninitialized,
        memory_lost=state.memory_lost,
        features=[*features.WORDS.values(), *marks],
        release=replfs.__version__,
        base=mine.base,
        base_progress=mine.base_progress,
        discarded=list(mine.discarded),
    )


def make_tellable(state: State) -> None:
    """Before a primary says who it is: its generation is on the disk.

    Told, and then forgotten with a loss of power, it would make others give up their place, or
    follow what this store is not any more.

    Raises:
        Refused: the disk fails.
    """
    if state.is_generation_durable:
        return
    try:
        state.flush(durable=True)
    except OSError as error:
        raise Refused(
            f"{state.identity().name} cannot save its generation ({error.strerror}), and tells it "
            "nobody before",
            "refused",
        ) from error


def welcome_of(state: State, progress: int = 0) -> Welcome:
    """This store, for a reply; *progress*: a secondary's, as far as it is known."""
    mine = hello_of(state)
    return Welcome(
        volume=mine.volume,
        node=mine.node,
        name=mine.name,
        store=mine.store,
        role=mine.role,
        generation=mine.generation,
        history=mine.history,
        clean=mine.clean,
        uninitialized=mine.uninitialized,
        memory_lost=mine.memory_lost,
        features=features_of(state),
        release=mine.release,
        progress=progress,
        leader=state.identity().leader,
        led_by=state.identity().led_by,
        base=mine.base,
        base_progress=mine.base_progress,
        discarded=mine.discarded,
    )


def features_of(state: State) -> list[str]:
    """What else there is to be said."""
    found = list(features.WORDS.values())
    if state.identity().inconsistent:
        found.append(INCONSISTENT)
    if not state.has_acls:
        found.append(WITHOUT_ACLS)
    return found if state.peer(SUSPECTS) is None else [*found, SUSPECTED]


def led_by(said: Identity) -> bytes:
    """The node of the primary that has begun to bring that store something, and has not ended.

    Empty: there is none, or it is not known.
    """
    return (said.led_by or said.leader) if INCONSISTENT in said.features else b""


def side_of(state: State, progress: int = 0) -> Side:
    """This store, for a decision; *progress* as for `welcome_of`."""
    side = side_of_message(welcome_of(state, progress))
    return msgspec.structs.replace(side, follows=state.identity().follows)


def side_of_message(said: Identity) -> Side:
    """The other store, as it described itself."""
    return Side(
        store=said.store,
        node=said.node,
        volume=said.volume,
        role=said.role,
        generation=said.generation,
        history=tuple(said.history),
        uninitialized=said.uninitialized,
        inconsistent=INCONSISTENT in said.features,
        memory_lost=said.memory_lost,
        has_acls=WITHOUT_ACLS not in said.features,
        progress=said.progress,
        leader=said.leader,
        base=said.base,
        base_progress=said.base_progress,
        discarded=tuple(said.discarded),
    )
