"""A secondary whose disk fails to write something: what it is worth, and that none is promoted."""

from __future__ import annotations

import errno
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from helpers.states import opened

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Lineage
from replfs.errors import NotInSync
from replfs.node.failover.promotion import of_state, promote_stopped
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.resync.machine import Resync
from replfs.node.roles.roles import Roles
from replfs.node.roles.secondary import Secondary
from replfs.store import syscalls
from replfs.store.tree import Tree

GENERATION = b"g" * 16
BEGIN = ops.Phase(inconsistent=True, generation=GENERATION, history=[])
END = ops.Phase(inconsistent=False, generation=GENERATION, history=[])


class Place:
    """A secondary in sync with its primary, and a disk that fails when told to."""

    def __init__(self, state: Any, tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
        self.state = state
        self.errors = [0]
        monkeypatch.setattr(syscalls, "syncfs", self.syncfs)
        self.events: list[str] = []
        roles: Any = SimpleNamespace(
            state=state, primary=None, event=lambda kind, **_: self.events.append(kind)
        )
        self.unwritten = Unwritten(lambda number: Roles._note_unwritten(roles, number))
        settings: Any = SimpleNamespace(none_patterns=())
        progress: Any = SimpleNamespace(number=7)
        self.secondary = Secondary(
            settings, state, tree, self.unwritten, progress=progress, event=lambda *_, **__: None
        )

    def syncfs(self, _fd: int) -> None:
        if number := self.errors.pop() if self.errors else 0:
            raise OSError(number, os.strerror(number))

    async def ask(self, op: ops.AnyOp) -> int:
        send, receive = trio.open_memory_channel[ops.AnyAnswer](1)
        answer = self.secondary.replica.apply(0, op, None, send.send_nowait)
        found = await receive.receive() if answer is None else answer
        assert isinstance(found, ops.Done)
        return found.errno


@pytest.fixture
async def place(tmp_path, monkeypatch, nursery):
    (tmp_path / "store").mkdir()
    fd = os.open(tmp_path / "store", os.O_RDONLY | os.O_DIRECTORY)
    with opened(tmp_path / "store") as state:
        state.update(
            role="secondary", volume=GENERATION, generation=GENERATION, uninitialized=False
        )
        state.started()
        tree = Tree(fd)
        place = Place(state, tree, monkeypatch)
        place.secondary.replica.run_in(nursery)
        yield place
        await place.secondary.replica.idle()
        tree.close_all()
    os.close(fd)


async def test_it_is_not_promoted_before_it_was_sent_that_again(place):
    place.errors = [errno.EIO]
    assert not of_state(place.state)
    assert await place.ask(ops.Checkpoint(GENERATION)) == errno.EIO
    # The primary dies before it has heard of it. The next flush succeeds, and says nothing.
    assert await place.ask(ops.Checkpoint(GENERATION)) == 0
    assert of_state(place.state)
    assert place.state.identity().disk_failed
    assert place.secondary.progress == 0
    assert place.events == ["disk"]
    assert await place.ask(BEGIN) == 0
    assert await place.ask(END) == 0
    assert not place.unwritten.number
    assert not of_state(place.state)
    assert not place.state.identity().disk_failed


async def test_what_failed_while_a_resync_went_on_is_not_mended_by_its_end(place):
    assert await place.ask(BEGIN) == 0
    place.errors = [errno.EIO]
    assert await place.ask(ops.Checkpoint(GENERATION)) == errno.EIO
    assert await place.ask(END) == 0
    assert of_state(place.state)
    assert await place.ask(BEGIN) == 0
    assert await place.ask(END) == 0
    assert not of_state(place.state)


async def test_so_the_primary_begins_another_one_before_it_ends_that():
    """Else the peer would be in sync, and for ever one that must not be promoted."""
    told: list[bool | None] = []

    async def ask(op: ops.AnyOp) -> ops.AnyAnswer:
        peer.unflushed |= not told  # after it has been told that the first one begins
        told.append(op.inconsistent if isinstance(op, ops.Phase) else None)
        return ops.Done(0)

    async def nothing(*_: object) -> None:
        """As much as there is to be done."""

    home = SimpleNamespace(
        lineage=lambda: Lineage(GENERATION, [], []), make_durable=nothing, may_have=lambda *_: None
    )
    peer: Any = SimpleNamespace(
        home=home, ask=ask, align=nothing, advance=lambda *_: None, progressed=lambda: None,
        understands=lambda _: False, is_asked=True, unrecorded=False, unflushed=False,
        settling=SimpleNamespace(is_empty=True), link=SimpleNamespace(session=1),
        check_told=lambda: None,
    )  # fmt: skip
    resync: Any = object.__new__(Resync)
    resync._peer, resync._log = peer, DirtyLog()
    resync._names = SimpleNamespace(forget=lambda: None)
    resync.work = SimpleNamespace(stuck={}, pipeline=SimpleNamespace(changes=0))
    await resync._resync()
    assert told == [True, True, None, False]


async def test_nor_does_it_take_the_role_that_it_is_handed(place):
    asked = []
    place.secondary._on_handover = lambda *_: asked.append("to take over")
    place.errors = [errno.EIO]
    assert await place.ask(ops.Checkpoint(GENERATION)) == errno.EIO
    session: Any = None
    handover = ops.Handover(GENERATION, commit=False)
    answer = place.secondary._handover(session, handover, lambda _: None)
    assert answer == ops.Done(errno.EIO)
    assert await place.ask(BEGIN) == 0
    assert await place.ask(END) == 0
    assert place.secondary._handover(session, handover, lambda _: None) is None
    assert asked == ["to take over"]


async def test_nothing_that_is_only_in_memory_is_told_as_what_the_disk_has(place, monkeypatch):
    forgotten = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *arguments: forgotten.append(arguments))
    replica = place.secondary.replica
    object_id = b"i" * 16
    root = replica.tree.root.id
    made = ops.Make(object_id, root, b"file", 0o100644, 0, 0, 0, b"", 7, 7)
    assert replica.apply(0, made, None, lambda _: None) == ops.Done(0)

    async def ask(op: ops.AnyOp) -> Any:
        send, receive = trio.open_memory_channel[ops.AnyAnswer](1)
        replica.apply(1, op, None, send.send_nowait)
        return await receive.receive()

    for is_broken in (False, True):
        await ask(ops.Digest(object_id, 0, 1, 1 << 16))
        assert bool(forgotten) == is_broken
        listing = await ask(ops.List(root, b"", digests=True))
        assert bool(listing.entries[0].digest) != is_broken
        place.unwritten.failed(OSError(errno.EIO, "disk"))


@pytest.mark.parametrize("by_force", [False, True])
@pytest.mark.parametrize("error", [0, errno.EIO])
async def test_all_that_was_acknowledged_is_on_the_disk_before_a_reign_begins(
    place, tmp_path, error, by_force
):
    """Nobody has it once the record of it is dropped, and what the disk has would overwrite it."""
    done = []

    class Promoted(Exception):
        """As far as this test goes."""

    def promote() -> None:
        done.append("promoted")
        raise Promoted

    roles: Any = SimpleNamespace(
        secondary=place.secondary,
        unwritten=place.unwritten,
        tree=place.secondary.replica.tree,
        state=place.state,
        _activity_path=lambda: str(tmp_path / "activity"),
        _go_on=lambda _: done.append("goes on"),
    )
    roles._flush_before_reign = partial(Roles._flush_before_reign, roles)
    place.errors = [error]
    with pytest.raises(NotInSync if error and not by_force else Promoted):
        await Roles.take_over(roles, promote, by_force=by_force)
    assert not place.errors
    assert done == (["goes on"] if error and not by_force else ["promoted", "goes on"])
    assert place.unwritten.number == error


@pytest.mark.parametrize("by_force", [False, True])
async def test_nor_is_a_stopped_one_promoted_whose_disk_cannot_be_flushed(place, by_force):
    place.errors = [errno.EIO]
    with pytest.raises(NotInSync, match="cannot be flushed"):
        promote_stopped(place.state, 0, force=False, tentative=False)
    assert place.state.identity().role == "secondary"
    place.errors = [errno.EIO if by_force else 0]
    promote_stopped(place.state, 0, force=by_force, tentative=False)
    assert place.state.identity().role == "primary"
    assert place.state.identity().disk_failed == by_force
