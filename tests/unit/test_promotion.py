"""A promotion that is only asked for: what it says, and that nothing is changed by it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import trio

from replfs.errors import UsageError
from replfs.node.failover.promotion import Promotion
from replfs.node.pacing.unwritten import Unwritten


class Session:
    """That of a primary, which may give no sign any more."""

    name = "a"

    def __init__(self, *, is_silent: bool) -> None:
        self._is_silent = is_silent
        self._heard = 0
        self.is_open = True

    @property
    def heard_ns(self) -> int:
        self._heard += not self._is_silent
        return self._heard

    def close(self, _reason: str) -> None:
        self.is_open = False


class State:
    """A secondary against which nothing speaks."""

    memory_lost = unclean = False

    def identity(self) -> Any:
        return SimpleNamespace(
            role="secondary",
            generation=b"G",
            volume=b"V",
            uninitialized=False,
            inconsistent=False,
            disk_failed=False,
        )


def promotion(session, monkeypatch):
    secondary = SimpleNamespace(session=session, keeper=SimpleNamespace(place=None))
    roles: Any = SimpleNamespace(
        primary=None,
        secondary=secondary,
        front=None,
        changing=trio.Lock(),
        state=State(),
        settings=SimpleNamespace(peer_timeout_s=1.0),
        taken=[],
        unwritten=Unwritten(),
    )

    async def take_over(promote: Any, *, by_force: bool) -> None:
        roles.taken.append(promote)

    roles.take_over, roles.begin_reign = take_over, None
    made = Promotion(roles)

    async def nobody() -> list[Any]:
        return []

    monkeypatch.setattr(made, "_look_around", nobody)
    monkeypatch.setattr(made, "_of_others", lambda _: [])
    monkeypatch.setattr(made, "_removals", list)
    return made, roles


async def test_a_silent_primary_loses_its_session_only_to_a_promotion(monkeypatch, autojump_clock):
    session = Session(is_silent=True)
    made, roles = promotion(session, monkeypatch)
    answer = await made.command({"tentative": True})
    assert answer["message"] == "it would be promoted: nothing speaks against it"
    assert session.is_open
    assert not roles.taken
    await made.command({})
    assert not session.is_open
    assert roles.taken


async def test_a_primary_that_is_there_is_told_of(monkeypatch, autojump_clock):
    session = Session(is_silent=False)
    made, roles = promotion(session, monkeypatch)
    answer = await made.command({"tentative": True})
    assert answer["message"].startswith("it would be refused: the primary a is connected")
    with pytest.raises(UsageError, match="the primary a is connected"):
        await made.command({"force": True})
    assert session.is_open
    assert not roles.taken
