"""What is remembered of a STORE and of each of its peers between runs."""

from __future__ import annotations

from typing import Final

import msgspec

from replfs.store.binding import Binding
from replfs.store.unrepresentable import Item

HISTORY_MAX: Final = 64
"""Generations remembered."""
ROLES: Final = frozenset({"unset", "primary", "secondary"})


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who a STORE is."""

    node: bytes
    """16 random bytes, given when the state is made."""
    binding: Binding
    """Where STORE stood then, so that a copy of it is known as one."""
    volume: bytes = b""
    """16 bytes that all replicas share; empty before the store belongs to a volume."""
    name: str = ""
    role: str = "unset"
    role_changed: bool = False
    """A promotion or another store changed the role: both commands start the store in it."""
    generation: bytes = b""
    """16 bytes; empty before there is one."""
    history: tuple[bytes, ...] = ()
    """Earlier generations, newest first, at most `HISTORY_MAX`."""
    discarded: tuple[bytes, ...] = ()
    """Generations of other stores that an operator decided against, newest first."""
    base: bytes = b""
    """The generation in whose place this store's reign began, by a promotion or after a loss of
    power. Empty: it has none, or none from another one's."""
    base_progress: int = 0
    """Up to which change of `base` this store had everything then; 0: not known."""
    progress: int = 0
    """Up to which change of its primary a secondary had everything at its last clean stop."""
    runs: int = 0
    """How often a node was started here; the high bits of the numbers of a primary's changes."""
    follows: bytes = b""
    """The generation of the primary that was let in last, also where no resync from it has ended
    yet: one that does not know it may not change the store any more. Empty: none was."""
    leader: bytes = b""
    """The node of that primary."""
    uninitialized: bool = True
    """The store never was a primary, nor a complete replica."""
    inconsistent: bool = False
    """A resync into this store has begun and not ended."""
    led_by: bytes = b""
    """The node of the primary whose resync that is, also where another one was let in since."""
    policies_used: bool = False
    """Some object has, or once had, a policy of its own."""
    clean: bool = True
    """The last run ended with a drain and a checkpoint, or there was none."""
    memory_lost: bool = False
    """A power loss has happened since the store was last compared with its peers."""
    disk_failed: bool = False
    """Nor has its disk since then had all that it was given: a flush failed."""
    stopped_ns: int = 0
    """Until when all changes of the store are known to have gone through a node, in ns since the
    epoch: when the last run ended, or was last known to be at work. 0: not known. A hint."""
    none_patterns: tuple[str, ...] = ()
    """The names that were `none` by the configuration of the last run as a primary."""
    boot_id: str = ""
    mount_id: str = ""
    """Both those of the last run: see `State.memory_lost`."""


class Peer(msgspec.Struct, frozen=True, kw_only=True):
    """What is remembered about a peer between runs."""

    name: str
    endpoint: str = ""
    node: bytes = b""
    """16 bytes; empty if never met."""
    state: str = "uninitialized"
    """A replication state of `core.relationship`, by its value."""
    data: str = "inconsistent"
    """What the peer's data is, as there."""
    reason: str = ""
    paused_by: str = ""
    generation: bytes = b""
    """The peer's, when last seen."""
    apart: bool = False
    """Whatever the peer has, a power loss of this STORE cannot take: it was flushed since the peer
    was last there."""
    led_apart: bool = False
    """Another primary had begun a resync into it that did not end, nor has one of this one since:
    what it has may be from there."""
    base: bytes = b""
    """The generation from which on the log holds all that this primary changed, where it was begun
    by a promotion: for whatever node answers there, if it was at that generation. Empty: the log
    was kept for `node` from the first."""
    is_asked: bool = True
    """What the peer may have on its own is in the log; until then it is asked at every session."""
    last_in_sync_ns: int = 0
    """Nanoseconds since the epoch, to be shown. It decides nothing."""
    unrepresentable: list[Item] = []
    """What its store cannot hold."""
    settings: dict[str, str] = {}
