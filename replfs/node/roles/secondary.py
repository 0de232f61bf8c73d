"""A secondary at work: applies what its primary sends."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from functools import partial
from typing import Final

import trio

from replfs.core import generation as generations
from replfs.core import ops, summary
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Action
from replfs.core.messages import Hello, Welcome
from replfs.core.policy import NamePatterns
from replfs.errors import Refused
from replfs.node.asking.identity import side_of, side_of_message, welcome_of
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.replica.beside import Beside
from replfs.node.replica.freezer import Freezer
from replfs.node.replica.keeper import Keeper
from replfs.node.replica.later import Reply
from replfs.node.replica.replica import Replica
from replfs.node.roles import reign
from replfs.node.settings.config import Settings
from replfs.store.progress import Progress
from replfs.store.snapshots import snapshots_of
from replfs.store.state import State
from replfs.store.tree import Tree
from replfs.store.twins import part_twins
from replfs.transport.listener import Session

HandOver = Callable[[Session, ops.Handover, Reply], None]

log = logging.getLogger(__name__)

_DECIDED_BY: Final = (
    "volume", "node", "role", "generation", "history", "uninitialized", "memory_lost", "features",
    "base", "leader", "led_by", "discarded",
)  # fmt: skip
"""What a primary decides by that a secondary says of itself; but for how far it has followed, by
which only the secondary does, when it lets the primary in."""


class Secondary:
    """Everything a node has while it is a secondary: the applier of its reception's listener."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        tree: Tree,
        unwritten: Unwritten,
        *,
        progress: Progress,
        event: Callable[..., None],
        on_handover: HandOver | None = None,
    ) -> None:
        """*on_handover*: told that the primary wants this node to take its place."""
        self._on_handover = on_handover
        self.is_over = False
        """This node is about to be a primary: nothing is applied any more."""
        self._state = state
        self._progress = progress
        self._event = event
        self.primary_name = ""
        self.session: Session | None = None
        self.kept: list[str] = []
        """Paths below STORE of what was kept beside since the start."""
        self.keeper = Keeper(snapshots_of(tree.root_fd), lambda: state.identity().inconsistent)
        self.replica = Replica(
            tree,
            self._phase,
            NamePatterns(settings.none_patterns),
            self._prepare,
            self._note_kept,
            unwritten,
        )
        self._failures = 0
        """Flushes that had failed when the resync began that is going on, or was the last."""
        if not state.identity().inconsistent:
            # In the middle of a resync what is in the root is the primary's already.
            self.replica.own.claim_root()
        self._suspects: reign.Suspects | None = None
        """What this store may have on its own, since it gave up its role, and who is to know."""
        self.replica.handlers[ops.Generation] = self._generation
        self.replica.handlers[ops.Progress] = self._aligned
        self.replica.suspects.source = self._suspected
        self._keep_suspects()
        self.freezer = Freezer(state, self.replica, lambda: self.session, event)

    def _note_kept(self, path: str) -> None:
        self.kept.append(path)
        self._event("kept", path=path)

    async def run(self) -> None:
        """Serve what takes long, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.replica.run)
            nursery.start_soon(self.keeper.run)

    def unstable(self) -> DirtyLog | None:
        """What this store has, and some other replica may lack; None: anything."""
        if self._suspects is not None or self._state.identity().inconsistent:
            return None
        return self.replica.unstable.snapshot(everywhere=True)

    @property
    def progress(self) -> int:
        """Up to which change of its primary this store has everything; 0: it is not known."""
        lacks = self._state.identity().inconsistent or self._state.memory_lost
        return 0 if lacks else self._progress.number

    def retire(self) -> None:
        """This node is a primary from here on."""
        self.replica.forget_all()
        self.freezer.retire()

    # The listener's applier ---------------------------------------------------------------------

    def welcome(self, hello: Hello) -> Welcome:
        """Whether this primary may be followed."""
        self.freezer.check()
        decision = self._decide(hello)
        if decision.action in {Action.REFUSE, Action.SPLIT_BRAIN, Action.OUTDATED}:
            raise Refused(decision.sentence, decision.action.value)
        if decision.action not in {Action.FOLLOW, Action.FOLLOW_KEEPING}:
            raise Refused(
                f"{hello.name} is not what this store can follow: {decision.sentence}", "refused"
            )
        return welcome_of(self._state, self.progress)

    def _decide(self, hello: Hello) -> generations.Decision:
        return generations.decide(side_of(self._state, self.progress), side_of_message(hello))

    def opened(self, session: Session) -> None:
        """The primary is there."""
        if self.freezer.until is not None:
            session.close("frozen")  # it was welcomed just before
            return
        if not _says_the_same(session.offered, welcome_of(self._state)):
            # Another primary was let in meanwhile, say: this one has decided by what is no longer.
            session.close("this store is not as it said any more")
            return
        hello = session.hello
        if not self._keep_what_is_beyond(session, hello):
            return
        self.session = session
        self.primary_name = session.name
        self.replica.forget_all()
        self._state.update(
            role="secondary",
            volume=hello.volume,
            follows=hello.generation,
            leader=hello.node,
            discarded=self._with_known(hello.discarded),
        )
        self._event("primary", name=session.name, link="up")
        log.info("following %s", session.name)

    def _keep_what_is_beyond(self, session: Session, hello: Hello) -> bool:
        """If this store followed further than its new primary had: remember with what.

        False: it cannot be remembered, so nothing may be taken from that primary.
        """
        keeps = self._decide(hello).action is Action.FOLLOW_KEEPING
        if not keeps or self._suspects is not None:
            return True
        try:
            reign.suspect(self._state, hello.node, self.unstable())
            self._state.flush(durable=True)
            self._keep_suspects()
        except OSError as error:
            session.close(f"what this store has alone cannot be kept: {error.strerror}")
            return False
        log.warning("%s never had what this store may have: that is kept beside", hello.name)
        return True

    def _keep_suspects(self) -> None:
        """From here on what is on record as this store's alone is kept beside. Raises OSError."""
        found = reign.suspects_of(self._state)
        if found is not None:
            beside = Beside(self.replica.tree, found.log, found.label, self._note_kept)
            self.replica.keep_beside(beside)
            # Only now: what is known as suspect is taken to be kept.
            self._suspects = found

    def closed(self, session: Session, reason: str) -> None:
        """The primary is gone, or came back with another session."""
        if self.session is session:
            self.session = None
            self._event("primary", name=session.name, link="down", reason=reason)
            log.info("%s is gone: %s", session.name, reason)

    def apply(
        self,
        session: Session,
        stream: int,
        seq: int,
        op: ops.AnyOp,
        payload: memoryview | bytes | None,
    ) -> ops.AnyAnswer | None:
        """Apply one operation."""
        if self.is_over:
            return ops.Done(errno.EROFS)
        if not stream and type(op) in ops.CHANGES:
            self._progress.count()
        elif stream and type(op) is ops.Handover:
            return self._handover(session, op, partial(session.answer, stream, seq))
        elif type(op) is ops.Summary:
            return self._compare(session, stream, op)
        return self.replica.apply(stream, op, payload, partial(session.answer, stream, seq))

    def catch_up(self) -> None:
        """What was applied has been answered: do what nobody had to wait for."""
        self.replica.catch_up()

    def _suspected(self, everywhere: bool) -> DirtyLog | None:  # noqa: FBT001 - a callback
        """What the primary asks for that may be here and not there; None: anything.

        *everywhere*: it takes this store's place, or others'. Else it lost power, and lacks what it
        sent itself: no word of what this store had alone before, which it shall not get back.
        """
        if everywhere and self._suspects is not None:
            session = self.session
            is_asked_by_it = session is not None and session.node == self._suspects.winner
            return self._suspects.log if is_asked_by_it else None
        return self.replica.unstable.snapshot(everywhere=everywhere)

    def _handover(self, session: Session, op: ops.Handover, reply: Reply) -> ops.AnyAnswer | None:
        identity = self._state.identity()
        if self._on_handover is None or identity.generation != op.generation:
            return ops.Done(errno.EINVAL)
        if identity.inconsistent or self.freezer.until is not None:
            return ops.Done(errno.EBUSY)
        if self._state.memory_lost:
            # In sync it has lost nothing but what its disk failed to write.
            return ops.Done(errno.EIO)
        self._on_handover(session, op, reply)
        return None

    def _generation(self, op: ops.Generation) -> ops.AnyAnswer:
        """What follows, some other replica does not get."""
        if not self._state.identity().inconsistent:
            self._state.update(
                generation=op.generation,
                history=tuple(op.history),
                discarded=self._with_known(op.discarded),
            )
        return ops.Done(0)

    def _with_known(self, discarded: list[bytes]) -> tuple[bytes, ...]:
        """Whoever is promoted is to know them: a loser's followers may meet nobody else."""
        return tuple(dict.fromkeys((*discarded, *self._state.identity().discarded)))

    def _aligned(self, op: ops.Progress) -> ops.AnyAnswer:
        """The primary has nothing recorded for this store."""
        self._progress.number = op.number
        return ops.Done(0)

    def _compare(self, session: Session, stream: int, op: ops.Summary) -> ops.AnyAnswer:
        """Whether this store has had what the primary says it has sent."""
        number, checksum = session.applied(stream)
        identity = self._state.identity()
        found = summary.difference(
            op,
            number=number,
            checksum=checksum,
            generation=b"" if identity.inconsistent else identity.generation,
            change=self.progress,
        )
        if not found:
            return ops.Done(0)
        log.error("%s and this store disagree: %s", session.name, found)
        self._progress.number = 0
        return ops.Done(ops.DISAGREES)

    async def _prepare(self) -> None:
        """Before a resync begins. Raises OSError."""
        if self._state.identity().inconsistent:
            # Of what the one that was cut off had made anew, its old self is not the object.
            await part_twins(self.replica.tree)
        if self.keeper.can_keep:
            await self.keeper.keep()

    def _phase(self, op: ops.Phase) -> None:
        """The primary says that a resync begins or has ended here; durable when it returns."""
        unwritten = self.replica.unwritten
        if op.inconsistent:
            self._failures = unwritten.count
            self._progress.number = 0
            leader = self._state.identity().leader
            self._state.update(inconsistent=True, follows=op.generation, led_by=leader)
        else:
            self._state.update(
                inconsistent=False,
                led_by=b"",
                uninitialized=False,
                generation=op.generation,
                follows=op.generation,
                history=tuple(op.history),
                discarded=self._with_known(op.discarded),
            )
            if unwritten.count == self._failures:
                # What this disk failed to write before, it was sent again.
                unwritten.mended()
                self._state.compared()
            self._suspects = None
            self.replica.keep_beside(None)
            reign.forget_suspects(self._state)
        self._state.flush(durable=True)
        if not op.inconsistent:
            self.keeper.release()
        self._event("data", state="inconsistent" if op.inconsistent else "up-to-date")


def _says_the_same(one: Welcome, other: Welcome) -> bool:
    """Whether a primary would make the same of either."""
    return all(getattr(one, field) == getattr(other, field) for field in _DECIDED_BY)
