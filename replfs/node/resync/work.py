"""What all steps of a resync work with: the objects here, turns, and what becomes of failures.

An item that fails does not stop the others: it is tried again, after pauses that double, and is
told meanwhile.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from replfs.core import ops
from replfs.core.policy import Policy
from replfs.core.scheduler import Claim, Ticket
from replfs.errors import PeerLost
from replfs.node.replication.flight import describe
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.places import BULK
from replfs.node.resync.source import Source
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.links import Links
from replfs.store.record import ROOT_ID

log = logging.getLogger(__name__)

RETRY_MIN_S: Final = 0.5
RETRY_MAX_S: Final = 30.0
UNREPRESENTABLE: Final = frozenset({
    errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.EOPNOTSUPP, errno.EILSEQ, errno.EDQUOT,
})  # fmt: skip
"""The peer's store cannot hold the object; trying again would not help."""


class Stuck:
    """An item that failed: why, and when it is tried again."""

    __slots__ = ("delay_s", "path", "reason", "retry_at")

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        self.delay_s = RETRY_MIN_S
        self.retry_at = time.monotonic() + self.delay_s

    def again(self, reason: str) -> None:
        """It failed once more."""
        self.reason = reason
        self.delay_s = min(self.delay_s * 2, RETRY_MAX_S)
        self.retry_at = time.monotonic() + self.delay_s


class Progress:
    """How far a resync has come."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.files = 0
        self.bytes = 0
        self.names = 0
        self.compared = 0


class Work:
    """The resync of *peer*, as its steps see it."""

    def __init__(self, pipeline: Pipeline, peer: Peer, source: Source) -> None:
        self.pipeline = pipeline
        self.source = source
        self.tree = pipeline.tree
        self.policies = pipeline.policies
        self.peer = peer
        self.log = peer.log
        self.progress = Progress()
        self.stuck: dict[object, Stuck] = {}
        """By the key of the item: (step, id of the object, or of the directory and the name)."""
        self.links = Links(pipeline.tree)

    @asynccontextmanager
    async def claim(self, claims: tuple[Claim, ...]) -> AsyncIterator[Ticket]:
        """A turn, behind what is on its way to the peer. Raises PeerLost."""
        async with self.pipeline.claimed(claims, "resync", self.peer) as ticket:
            if not self.peer.live:
                raise PeerLost("the session ended")
            yield ticket
            settling = self.peer.settling
            if not settling.is_empty and settling.is_waited_for(self.log):
                # An application was refused on top of it: the next time it is not.
                await self.settle()

    async def settle(self) -> None:
        """What was cleared is cleared on the disk, too, where that can be written to."""
        try:
            await self.peer.home.make_durable()
        except OSError as error:
            log.warning("what %s has cannot be saved: %s", self.peer.name, error.strerror)

    # Failures ----------------------------------------------------------------------------------

    def is_waiting(self, key: object) -> bool:
        """Whether an item failed, and it is too early to try it again."""
        found = self.stuck.get(key)
        return found is not None and found.retry_at > time.monotonic()

    def failed(self, key: object, inode: Inode | None, reason: str) -> None:
        """An item could not be carried; it is tried again later."""
        path = "/" + inode.path().decode(errors="backslashreplace") if inode is not None else ""
        found = self.stuck.get(key)
        if found is None:
            self.stuck[key] = Stuck(path, reason)
            log.warning("peer %s: %s cannot be brought in sync: %s", self.peer.name, path, reason)
        else:
            found.again(reason)

    def postponed(self, key: object, inode: Inode | None, reason: str, until: float) -> None:
        """An item must wait for something that is no failure, until then (monotonic seconds)."""
        path = "/" + inode.path().decode(errors="backslashreplace") if inode is not None else ""
        found = self.stuck[key] = Stuck(path, reason)
        found.retry_at = min(until, found.retry_at)

    def succeeded(self, key: object) -> None:
        """An item was carried."""
        if self.stuck:
            self.stuck.pop(key, None)

    def refused(self, key: object, inode: Inode, answer: ops.AnyAnswer) -> int:
        """The peer could not do something for *inode*; the errno.

        ESTALE means that it does not have the object where we think: its place is looked at again.
        """
        number = answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
        if number == errno.ESTALE and inode.parent is not None:
            self.peer.located[BULK].intersection_update({ROOT_ID})
            self.log.mark_name(
                self.tree.ensure_id(inode.parent),
                inode.name,
                handle=locators.of(self.tree, inode.parent),
            )
        self.failed(key, inode, describe(number))
        return number

    def unrepresentable(self, inode: Inode, number: int) -> None:
        """The peer's store cannot hold it: listed, and no longer in the way of the others."""
        path = inode.path().decode(errors="backslashreplace")
        self.peer.unrepresentable.add(self.tree, inode, f"/{path}: {describe(number)}")
        log.warning("peer %s cannot hold /%s: %s", self.peer.name, path, describe(number))
        self.log.forget(inode.id)

    # Finding things ----------------------------------------------------------------------------

    def find(self, object_id: bytes) -> Inode | None:
        """The object here. One that cannot be found is compared with everything else."""
        marks = self.log.marks(object_id)
        if marks is None:
            return None
        self.succeeded(("find", object_id))
        inode = locators.find(self.tree, marks.handle, object_id)
        if inode is None:
            inode = self._find_elsewhere(object_id, marks.handle)
        if inode is None:
            return None
        if not self.is_on_peers(inode):
            self.log.forget(object_id)
            return None
        return inode

    def _find_elsewhere(self, object_id: bytes, locator: bytes) -> Inode | None:
        """An object that is not under a name that it was known by."""
        if locators.is_gone(self.tree, locator):
            # Its names are marked where they were; there is nothing to carry.
            self.log.forget(object_id)
            return None
        number = locators.inode_number(self.tree, locator)
        inode = self.links.find(number)
        if inode is not None:
            self.tree.read_record(inode)
            if inode.id == object_id:
                return inode
            # It lost its id, to a power loss say: under that it is nowhere.
            self.tree.drop_unused(inode)
        elif number and self.links.seek(number):
            reason = "its name is being looked for"
            self.postponed(("find", object_id), None, reason, self.links.may_walk_at)
            return None
        log.warning(
            "peer %s: a changed object is not where it was: comparing everything", self.peer.name
        )
        self.log.mark_unknown(ROOT_ID, directory=True, deep=True)
        self.log.forget(object_id)
        return None

    def is_on_peers(self, inode: Inode) -> bool:
        """Whether the peers shall have the object: the root always, for its policy is theirs, too.

        Asked again when its turn has come: a change of policy may have been before it.
        """
        return inode.parent is None or self.policies.effective(inode) != Policy.NONE

    def child(self, directory: Inode, name: bytes) -> Inode | None:
        """What the peer shall have under a name, with its id; None: nothing.

        What a primary has is whole: it was promoted over the resync that had not finished it.
        """
        inode = self.policies.child(directory, name)
        if inode is not None:
            self.source.ensure_id(inode)
            self.tree.set_whole(inode)
        return inode
