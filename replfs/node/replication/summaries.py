"""Asking a peer whether it has had what it was sent, so that nothing diverges in silence.

A peer is declared in sync only when it says so, and says so again at each common checkpoint, which
there is also whenever applications rest. Where the two disagree there is a defect somewhere, and
what it touched is not known: all that was sent on the live stream since the last checkpoint is
compared, and all that the peer has applied since then; what the bulk stream carried has no such
bound, and everything is. The session ends, for it cannot agree any more.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from replfs.core import ops
from replfs.core.messages import BULK, LIVE, STREAMS
from replfs.core.relationship import Event, State
from replfs.errors import PeerLost
from replfs.node.asking.question import Question
from replfs.node.replication.flight import describe
from replfs.node.replication.peer import LastError, Peer
from replfs.store.record import ROOT_ID
from replfs.transport.link import Link

log = logging.getLogger(__name__)


class Comparison:
    """One summary on its way; the sink of its answer."""

    __slots__ = ("_peer", "_question", "_stream", "is_whole")

    def __init__(self, peer: Peer, stream: int, *, is_whole: bool) -> None:
        self._peer = peer
        self._stream = stream
        self._question = Question()
        self.is_whole = is_whole
        """The peer's generation and its number of changes are compared, too."""

    def answered(self, link: Link, answer: ops.AnyAnswer) -> None:
        """The peer has compared."""
        if isinstance(answer, ops.Done) and answer.errno == ops.DISAGREES:
            _disagrees(self._peer, self._stream)
        self._question.answered(link, answer)

    def lost(self, link: Link) -> None:
        """There is no answer."""
        self._question.lost(link)

    async def agreed(self) -> None:
        """Wait until the peer has said that it agrees. Raises PeerLost where it does not."""
        answer = await self._question.answer()
        if not isinstance(answer, ops.Done) or answer.errno:
            number = answer.errno if isinstance(answer, ops.Done) else 0
            raise PeerLost(f"the peer does not agree on what it was sent: {describe(number)}")


def begin(peer: Peer, stream: int, changes: int, *, is_told: bool = False) -> Comparison | None:
    """Have the peer compare what it was sent before on *stream*; a disagreement is seen to here.

    *changes*: the number of the last change. *is_told*: the peer has answered that it knows that
    it is whole, as it has done if it is in sync. None: its release cannot compare.

    Raises:
        PeerLost: there is no session.
    """
    if not peer.understands(ops.Summary):
        return None
    # What it does not get meanwhile is another generation's, and not counted there.
    is_told = is_told or peer.state is State.IN_SYNC
    lacks = not peer.gets_all or peer.diverged or peer.unrecorded
    is_whole = stream == LIVE and is_told and not lacks
    number, checksum = peer.link.sent(stream)
    op = ops.Summary(
        number,
        checksum,
        peer.peer_generation if is_whole else b"",
        changes if is_whole and peer.understands(ops.Progress) else 0,
    )
    comparison = Comparison(peer, stream, is_whole=is_whole)
    peer.link.send(op, None, comparison, stream)
    return comparison


async def agree(peer: Peer, changes: Callable[[], int]) -> bool:
    """Wait until the peer, to which nothing is being carried, agrees on both streams.

    *changes* is asked when that is sent. False: something was recorded for the peer just then, so
    that its generation and its changes were not compared.

    Raises:
        PeerLost: it does not agree, or is gone.
    """
    if not peer.understands(ops.Summary):
        return True
    while not all(peer.link.has_room(stream) for stream in STREAMS):
        for stream in STREAMS:
            await peer.link.wait_room(stream)
    begun = [one for stream in STREAMS if (one := begin(peer, stream, changes(), is_told=True))]
    for one in begun:
        await one.agreed()
    return any(one.is_whole for one in begun)


def _disagrees(peer: Peer, stream: int) -> None:
    """The peer has compared, and has had something else."""
    number, _ = peer.link.sent(stream)
    reason = f"the peer has not had the same {number} operations as were sent"
    _find_out(peer, stream, reason)
    peer.link.disagreed(reason)


def differed(peer: Peer, stream: int, what: str) -> None:
    """Of its last session, which was lost, the peer had something else: *what*, in words.

    What was unanswered then is recorded already; what was answered is not.
    """
    _find_out(peer, stream, f"of the session that was lost the peer has not had the same: {what}")


def _find_out(peer: Peer, stream: int, reason: str) -> None:
    """Something was applied that was not sent, or sent and not applied: find out what it was."""
    try:
        peer.begin_divergence()
        lost = None if stream == BULK else peer.unstable.snapshot(everywhere=False)
        if lost is None:
            peer.log.mark_unknown(ROOT_ID, directory=True, deep=True)
            log.error("peer %s: %s: everything is compared", peer.name, reason)
        else:
            peer.log.absorb(lost, compare=True)
            log.error("peer %s: %s: %d objects are compared", peer.name, reason, len(lost))
    except OSError as error:
        peer.unrecorded = True
        log.error("peer %s: %s, and: %s", peer.name, reason, error.strerror)
    # What it may have applied beside that, it tells.
    peer.is_asked = False
    peer.last_error = LastError("/", reason)
    peer.advance(Event.OP_LOST, reason)
    peer.home.changed(peer)
