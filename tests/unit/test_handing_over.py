"""A switchover that fails after the mount is read-only: this node goes on as the primary."""

from __future__ import annotations

import errno
import os
from types import SimpleNamespace
from typing import Any

import pytest

from replfs.core import ops
from replfs.errors import NotInSync
from replfs.node.failover.switchover import Switchover
from replfs.store.state import State


@pytest.fixture
def state(fd):
    state = State(fd)
    state.update(role="primary", volume=b"V" * 16, generation=b"G" * 16, uninitialized=False)
    yield state
    state.close()


async def handed_over(state: State, answer: int = 0) -> list[str]:
    """What happened on the way; *answer* is the peer's errno."""
    happened: list[str] = []

    async def ask(_op: ops.AnyOp) -> ops.AnyAnswer:
        happened.append("asked")
        return ops.Done(answer)

    async def thaw() -> None:
        happened.append("read-write")

    roles: Any = SimpleNamespace(state=state)
    primary: Any = SimpleNamespace(
        pipeline=SimpleNamespace(is_over=True), reign_again=lambda: happened.append("reigns")
    )
    peer: Any = SimpleNamespace(name="b", ask=ask)
    front: Any = SimpleNamespace(thaw=thaw)
    with pytest.raises(NotInSync, match="nothing has changed"):
        await Switchover(roles)._hand_over(primary, peer, front)
    assert state.identity().role == "primary"
    assert not primary.pipeline.is_over
    return happened


@pytest.mark.parametrize("what", ["update", "harden"])
async def test_where_the_disk_does_not_take_it_nobody_is_asked(state, monkeypatch, what):
    taken = getattr(state, what)

    def fails(**changes: object) -> Any:
        if what == "update" and changes["role"] == "primary":
            return taken(**changes)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(state, what, fails)
    assert await handed_over(state) == ["reigns", "read-write"]


async def test_where_the_peer_says_no_the_role_is_taken_back(state):
    assert await handed_over(state, errno.EBUSY) == ["asked", "reigns", "read-write"]
