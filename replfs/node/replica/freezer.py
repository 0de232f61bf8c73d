"""A replica that stands still, so that a backup of it is of one moment.

A frozen secondary has ended its session between two operations, has done what was still going on,
has flushed its STORE, and refuses its primary until it thaws or the time is over. The primary goes
on meanwhile as when a link is lost: it records what the replica lacks, and carries it afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

import trio

from replfs.errors import NotInSync, Refused, UsageError
from replfs.node.replica.replica import Replica
from replfs.store.state import State
from replfs.transport.listener import Session

log = logging.getLogger(__name__)

FREEZE_S: Final = 600.0
"""How long a freeze lasts, unless it is said otherwise."""
_IDLE_S: Final = 30.0
"""How long what was going on in the replica may take to end."""


class Freezer:
    """Holds one replica still, and lets it go again."""

    def __init__(
        self,
        state: State,
        replica: Replica,
        session: Callable[[], Session | None],
        event: Callable[..., None],
    ) -> None:
        self._state = state
        self._replica = replica
        self._session = session
        self._event = event
        self.until: float | None = None
        """Seconds since the epoch; None: it is not frozen."""
        self._scope: trio.CancelScope | None = None

    def check(self) -> None:
        """Raises `Refused` while it is frozen."""
        if self.until is not None:
            raise Refused(self._words(), "frozen")

    def _words(self) -> str:
        moment = datetime.fromtimestamp(self.until or 0.0, UTC)
        return f"its replica is frozen for a backup, until {moment:%Y-%m-%d %H:%M:%S} UTC at most"

    async def freeze(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Stand still for `timeout_s` seconds at most; STORE is flushed when this returns.

        Raises:
            UsageError: it is frozen already.
            NotInSync: what it has is of no single moment, and `force` is not set.
        """
        if self.until is not None:
            raise UsageError(f"{self._words()}: thaw it first")
        identity = self._state.identity()
        if (identity.inconsistent or identity.uninitialized) and not arguments.get("force"):
            raise NotInSync(
                "the replica is inconsistent: a resync is going on or was cut off; wait until it "
                "is in sync, or freeze it as it is with --force"
            )
        timeout_s = float(arguments.get("timeout_s") or FREEZE_S)
        self.until = time.time() + timeout_s
        session = self._session()
        if session is not None:
            session.close(self._words())
        try:
            with trio.fail_after(_IDLE_S):
                await self._replica.idle()
            await self._replica.unwritten.flush(self._replica.tree.root_fd)
        except (trio.TooSlowError, OSError) as error:
            self.until = None
            reason = error.strerror if isinstance(error, OSError) else "it is still busy"
            raise NotInSync(f"the replica cannot be frozen: {reason}") from None
        trio.lowlevel.spawn_system_task(self._thaw_in_time, timeout_s)
        log.info("frozen for %.0f s at most", timeout_s)
        self._event("frozen", until=self.until)
        return {"message": f"frozen and flushed; it thaws by itself after {timeout_s:g} s"}

    async def _thaw_in_time(self, timeout_s: float) -> None:
        with trio.CancelScope() as self._scope:
            await trio.sleep(timeout_s)
            log.warning("the freeze was not ended in time: it thaws by itself")
            self._end("its time is over")

    def retire(self) -> None:
        """There is nothing to be frozen any more."""
        if self._scope is not None:
            self._scope.cancel()
        self.until = None

    def _end(self, reason: str) -> None:
        self.until = None
        self._event("thawed", reason=reason)

    def thaw(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Follow the primary again.

        Raises:
            NotInSync: it was not frozen any more, so a backup may be of more than one moment.
        """
        if self.until is None:
            raise NotInSync(
                "it is not frozen: if it was, its time was over, and a backup that was being made "
                "is of more than one moment"
            )
        if self._scope is not None:
            self._scope.cancel()
        self._end("by an operator")
        log.info("thawed")
        return {"message": "thawed; the primary carries what was changed meanwhile"}
