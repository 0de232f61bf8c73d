"""Who a node lets in: its listener, which it keeps through all changes of its role.

A secondary follows the primary that connects, if the two stores agree to it. A primary applies
nothing: it says what the one that connects is to it, and steps down where that is its successor.
In both roles it answers a *probe*, a greeting that only asks who this is and never becomes a
session; and it opens *inspections*, sessions in which nothing can be changed: a secondary only
while no primary is there.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol

import trio
import zmq

from replfs.core import generation as generations
from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Action
from replfs.core.messages import Hello, Welcome
from replfs.errors import Refused
from replfs.node.asking.identity import (
    INSPECTION,
    PROBE,
    YIELDING,
    make_tellable,
    side_of,
    side_of_message,
    welcome_of,
)
from replfs.node.replica.replica import Replica
from replfs.node.settings.config import Settings
from replfs.store.state import State
from replfs.store.tree import Tree
from replfs.transport.listener import Applier, Listener, Session
from replfs.transport.security import Curve

HARMLESS: Final = (
    ops.Locate, ops.Forget, ops.List, ops.Inspect, ops.Digest, ops.Suspects, ops.Fetch,
)  # fmt: skip
"""What is done in an inspection."""


class Inspection:
    """A session in which a primary looks at the tree of another node."""

    def __init__(
        self,
        tree: Tree,
        session: Session,
        changed: Callable[[Hello], DirtyLog | None],
        nursery: trio.Nursery,
    ) -> None:
        """*changed*: what this store has and the one that looks may lack; None: anything."""
        self._session = session
        self._replica = Replica(tree, lambda _op: None)
        self._replica.suspects.source = lambda _everywhere: changed(session.hello)
        # A task of its own might not have begun when the first operation comes.
        self._replica.run_in(nursery)

    def close(self) -> None:
        """The session is over."""
        self._replica.forget_all()

    def apply(self, stream: int, seq: int, op: ops.AnyOp) -> ops.AnyAnswer | None:
        """Do one operation, if it changes nothing."""
        if not isinstance(op, HARMLESS):
            return ops.Done(errno.EROFS)
        return self._replica.apply(stream, op, None, partial(self._session.answer, stream, seq))


class Follower(Applier, Protocol):
    """The secondary."""

    session: Session | None
    """That of its primary."""

    @property
    def progress(self) -> int:
        """Up to which change of its primary it has everything; 0: it is not known."""

    def catch_up(self) -> None:
        """What was applied has been answered: do what could wait until then."""


class Reception:
    """The listener of one node, and who is behind it."""

    def __init__(
        self,
        settings: Settings,
        state: State,
        tree: Tree,
        context: zmq.Context[zmq.Socket[bytes]],
        curve: Curve | None,
        *,
        on_outdated: Callable[[Hello], None],
        on_yield: Callable[[Hello], None],
        changed: Callable[[Hello], DirtyLog | None],
    ) -> None:
        """*on_outdated*: told of a primary that took this node's place.

        *on_yield*: told of one that gives up what it changed apart from this node; raises OSError
        where that cannot be saved. *changed*: what this primary has that another store may lack;
        None: anything.
        """
        self._on_yield = on_yield
        self._changed = changed
        self._state = state
        self._tree = tree
        self._on_outdated = on_outdated
        self.follower: Follower | None = None
        """The secondary; None while this node is a primary."""
        self._inspections: dict[Session, Inspection] = {}
        self._nursery: trio.Nursery | None = None
        self._session: Session | None = None
        self._listener = Listener(
            context,
            settings.listen or "",
            self,
            security=curve,
            peer_timeout_s=settings.peer_timeout_s,
            answered=self._catch_up,
        )

    async def run(self, *, task_status: trio.TaskStatus[str] = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, until cancelled; started with the endpoint."""
        async with trio.open_nursery() as self._nursery:
            task_status.started(await self._nursery.start(self._listener.run))

    def _catch_up(self) -> None:
        if self.follower is not None:
            self.follower.catch_up()

    def close_session(self, reason: str) -> None:
        """Whoever is connected is told to go."""
        if self._session is not None:
            self._session.close(reason)

    # The listener's applier ---------------------------------------------------------------------

    def welcome(self, hello: Hello) -> Welcome:
        """Whether there may be a session, and of what kind."""
        if self.follower is None:
            make_tellable(self._state)
        if PROBE in hello.features:
            progress = self.follower.progress if self.follower is not None else 0
            return welcome_of(self._state, progress)
        if INSPECTION in hello.features:
            return self._welcome_inspection(hello)
        if self.follower is not None:
            return self.follower.welcome(hello)
        decision = generations.decide(side_of(self._state), side_of_message(hello))
        if decision.action is Action.STEP_DOWN:
            self._on_outdated(hello)
        elif decision.action is Action.SPLIT_BRAIN and YIELDING in hello.features:
            try:
                self._on_yield(hello)
            except OSError as error:
                raise Refused(f"that cannot be saved: {error.strerror}", "refused") from error
            decision = generations.decide(side_of(self._state), side_of_message(hello))
        raise Refused(decision.sentence, decision.action.value)

    def _welcome_inspection(self, hello: Hello) -> Welcome:
        identity = self._state.identity()
        if not identity.volume or identity.volume != hello.volume:
            raise Refused("the stores belong to different volumes", "refused")
        if self.follower is not None and self.follower.session is not None:
            raise Refused("this node follows a primary: look at that one", "secondary")
        return welcome_of(self._state)

    def opened(self, session: Session) -> None:
        """Somebody is there."""
        self._session = session
        if INSPECTION in session.hello.features:
            if self._nursery is None:
                return
            self._inspections[session] = Inspection(
                self._tree, session, self._changed, self._nursery
            )
        elif self.follower is not None:
            self.follower.opened(session)
        else:
            session.close("this node became a primary")

    def closed(self, session: Session, reason: str) -> None:
        """They are gone."""
        if self._session is session:
            self._session = None
        inspection = self._inspections.pop(session, None)
        if inspection is not None:
            inspection.close()
        elif self.follower is not None:
            self.follower.closed(session, reason)

    def apply(
        self,
        session: Session,
        stream: int,
        seq: int,
        op: ops.AnyOp,
        payload: memoryview | bytes | None,
    ) -> ops.AnyAnswer | None:
        """Apply one operation."""
        inspection = self._inspections.get(session) if self._inspections else None
        if inspection is not None:
            return inspection.apply(stream, seq, op)
        if self.follower is None:
            return ops.Done(errno.EROFS)
        return self.follower.apply(session, stream, seq, op, payload)
