"""Simulated nodes: the real `Node`, whose process, mount and control socket are simulated.

Each may be the primary or a secondary, and change that while it runs. A node is started in a life,
which can end at any moment; what it leaves is its directory, and the activity log until power is
lost.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import time
from collections.abc import Awaitable, Callable
from datetime import datetime, tzinfo
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
import trio
import zmq
from simulation.harness.check import Slots
from simulation.harness.disk import Disk
from simulation.harness.kernel import Kernel
from simulation.harness.ledger import InSync, Ledger
from simulation.harness.life import Life
from simulation.harness.network import FakeLink, FakeListener

from replfs.core.relationship import State as PeerState
from replfs.errors import ReplfsError
from replfs.front import mounting
from replfs.node import node as node_module
from replfs.node.asking import inspector as inspector_module
from replfs.node.asking import probe as probe_module
from replfs.node.failover import splitbrain as splitbrain_module
from replfs.node.node import Node
from replfs.node.recovery import fetch as fetch_module
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.roles import primary as primary_module
from replfs.node.roles import reception as reception_module
from replfs.node.roles import reign as reign_module
from replfs.node.roles import roles as roles_module
from replfs.node.roles.primary import Primary
from replfs.node.settings import memory as memory_module
from replfs.node.settings.config import Settings
from replfs.node.settings.values import PeerSetting
from replfs.store.database import Database
from replfs.store.state import State
from replfs.store.tree import Tree

HEARTBEAT_S = 5.0


class Member:
    """One node of the group: its store, and the process that runs on it, if one does."""

    def __init__(
        self,
        base: Path,
        name: str,
        names: tuple[str, ...],
        policy: str,
        ack: Literal["op", "close"],
    ) -> None:
        self.name = name
        self.path = base / name
        self.raw = os.fsencode(self.path)
        self.endpoint = endpoint_of(name)
        self.disk = Disk(self.raw, self.raw + b"-graveyard")
        self._rundir = base / "run" / name
        self._rundir.mkdir(parents=True, exist_ok=True)
        self._rundir.chmod(0o700)
        self.settings = Settings(
            command="mount" if name == names[0] else "agent",
            store=str(self.path),
            mountpoint=f"/simulated/{name}",
            name=name,
            listen=self.endpoint,
            peers=tuple(PeerSetting(one, endpoint_of(one)) for one in names if one != name),
            policy=policy,  # type: ignore[arg-type]
            ack=ack,
            rundir=str(self._rundir),
        )
        self.life: Life | None = None
        self.node: Node | None = None
        self.is_ready = False
        """It serves."""
        self.was_primary = False
        """Applications have used it, since its disk was new."""
        self.settled = trio.Event()
        """It has read its state and has its role, or has ended."""
        self.failure = ""
        """Why it ended by itself."""
        self.is_other = False
        """Its store was replaced or lost power, and the primary does not know that yet."""
        self.is_alone = False
        """It was started without what its peers may have."""
        self._was_inconsistent = False
        self.slots_at_death: Slots = set()
        self.in_sync_at_death: set[InSync] = set()
        self.ledger: Ledger
        """What the applications were told that use this node, or the primary it follows."""
        self.commands: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self.mounted: Callable[[Primary | None], Awaitable[None]]
        """Told what stands behind the mount, in a task of the mount's."""
        self.front: FakeFront | None = None
        self.kernel: Kernel | None = None
        """The one above its mount, where that can be written to."""
        self._put_back: Callable[[], None] | None = None

    # What it is ----------------------------------------------------------------------------------

    @property
    def is_alive(self) -> bool:
        return self.life is not None and not self.life.dead

    @property
    def primary(self) -> Primary | None:
        roles = self.node._roles if self.node is not None else None
        return roles.primary if roles is not None else None

    @property
    def pipeline(self) -> Pipeline:
        primary = self.primary
        if primary is None:
            raise RuntimeError(f"{self.name} is no primary")
        return primary.pipeline

    @property
    def state(self) -> State:
        assert self.node is not None
        return self.node.state

    @property
    def tree(self) -> Tree:
        assert self.node is not None
        return self.node.tree

    @property
    def unwritten(self) -> int:
        """The errno of a flush that failed; 0: none has."""
        roles = self.node._roles if self.node is not None else None
        return roles.unwritten.number if roles is not None else 0

    @property
    def is_busy(self) -> bool:
        """Applications wait for it."""
        return self.kernel is not None and self.kernel.inside > 0

    @property
    def is_leaving(self) -> bool:
        """It gives up being the primary."""
        return self.primary is None or self.pipeline.is_over

    @property
    def is_inconsistent(self) -> bool:
        """It was in the middle of a resync when it ended."""
        state = getattr(self.node, "state", None)
        # Where it died before it had read its state, that is as it was before.
        return self._was_inconsistent if state is None else state.identity().inconsistent

    def peer(self, name: str) -> Peer:
        """What this primary knows of another node."""
        return next(peer for peer in self.pipeline.peers if peer.name == name)

    def in_sync(self) -> set[InSync]:
        """Stores that have all that was acknowledged, its own among them."""
        return {(self.name, 0)} | {
            (peer.name, peer.link.session)
            for peer in self.pipeline.peers
            if peer.state is PeerState.IN_SYNC and peer.log.is_empty
        }

    def in_flight(self) -> Slots:
        """What operations have begun and not ended."""
        return {key for key, slot in self.pipeline.activity._by_key.items() if slot.refs}

    # Its life ------------------------------------------------------------------------------------

    def main(self, life: Life) -> Callable[[], Awaitable[None]]:
        """What is to be run in *life*."""
        self.life = life
        life.disk = self.disk
        life.member = self
        self.is_ready = False
        self.settled = trio.Event()
        self.failure = ""
        self.kernel = None
        self.slots_at_death = set()
        self.in_sync_at_death = {(self.name, 0)}
        self._was_inconsistent = self.is_inconsistent
        self.node = None
        self._put_back = None

        async def run() -> None:
            node = Node(self.settings, self._ready)
            self.node = node
            try:
                await node.main()
            except ReplfsError as error:
                self.failure = str(error)
            except BaseExceptionGroup as group:
                sentences, others = group.split(ReplfsError)
                if sentences is None or others is not None:
                    raise
                found: BaseException = sentences
                while isinstance(found, BaseExceptionGroup):
                    found = found.exceptions[0]
                self.failure = str(found)

        return run

    def start_alone(self, *, alone: bool) -> None:
        """Whether at the next start it does without what its peers may have."""
        self.settings = msgspec.structs.replace(self.settings, start_alone=alone)

    def _ready(self, _endpoint: str) -> None:
        self.is_ready = True

    @property
    def is_built(self) -> bool:
        """It has read its state, and has its role."""
        node = self.node
        roles = node._roles if node is not None else None
        return roles is not None and (roles.primary or roles.secondary) is not None

    def died(self) -> None:
        """At the moment of death, before anything of it unwinds."""
        if self.primary is not None:
            self.slots_at_death = self.in_flight()
            self.in_sync_at_death = self.in_sync()
        if os.path.exists(self.raw + b"/.replfs/state.db"):
            self._put_back = self.disk.keep_state()

    def bury(self) -> None:
        """Nothing of the process is left: the kernel has closed its files."""
        self.life = None
        self.front = None
        if self._put_back is not None:
            self._put_back()
        self.settled.set()

    def lose_power(self, rng: random.Random) -> str:
        """What was not flushed goes, in part; what became of it, for a trace. It is buried."""
        self.is_other = True
        shutil.rmtree(self._rundir)
        self._rundir.mkdir(mode=0o700)
        return self.disk.lose_power(rng)

    def wipe(self) -> None:
        """The disk is replaced by an empty one."""
        self.is_other = True
        self.was_primary = self._was_inconsistent = False
        self.node = None
        # Whatever it was, it begins again as a secondary.
        self.settings = msgspec.structs.replace(self.settings, command="agent")
        shutil.rmtree(self.path)
        self.path.mkdir()
        self.disk.forget()


def is_connected(peer: Peer) -> bool:
    """Whether there is a session with it, not only in the primary's eyes."""
    link = peer.link
    return isinstance(link, FakeLink) and link.is_connected


def endpoint_of(name: str) -> str:
    """Where a node listens."""
    return f"ipc://{name}"


def _member() -> Member:
    life = Life.current
    if life is None or not isinstance(life.member, Member):
        raise RuntimeError("there is no node")
    return life.member


class FakeFront:
    """`node.frontend.FrontEnd`: the mount. The world makes the kernel above it."""

    def __init__(self, settings: Settings, mountpoint: str, *_: Any) -> None:
        del settings
        self.mountpoint = mountpoint
        self.is_covering = self.is_fixed = False
        self.over = trio.Event()
        self.session = self
        self.tuned, self.reason = True, ""
        self._member = _member()
        self._member.front = self
        self._primary: Primary | None = None
        self._detached = trio.Event()
        self._nursery: trio.Nursery | None = None

    def mount(self, primary: Primary | None) -> None:
        self._primary = primary

    async def run(self) -> None:
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._member.mounted, self._primary)
            await self._detached.wait()
            self._nursery.cancel_scope.cancel()
        self.over.set()

    def detach(self) -> None:
        self._detached.set()

    stop = unmount = detach

    def has_writers(self) -> bool:
        return any(handle.writable for handle in self._member.tree.table.handles.values())

    async def exchange(self, primary: Primary | None) -> None:
        self._primary = primary
        if self._nursery is not None:
            self._nursery.start_soon(self._member.mounted, primary)

    async def freeze(self) -> bool:
        return not self.has_writers()

    def forget(self, known: list[tuple[int, list[tuple[int, bytes]]]]) -> None:
        kernel = self._member.kernel
        for _, names in known:
            for parent, name in names:
                if kernel is not None:
                    kernel.look_again(parent, name)

    async def thaw(self) -> None:
        return


class _Calendar(datetime):
    """The time of day is the simulation's."""

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> _Calendar:
        return cls.fromtimestamp(time.time(), tz)


class _Control:
    """`node.control.ControlServer`: commands are called, not sent."""

    def __init__(self, *_: Any, commands: dict[str, Any], **__: Any) -> None:
        member = _member()
        member.commands = commands
        member.settled.set()

    def also(self, mountpoint: str) -> None:
        return

    def start(self, token: object) -> None:
        return

    def stop(self) -> None:
        return

    def status(self) -> dict[str, Any]:
        return {}


class _Quiet:
    """Stands for what a simulation does without: a ZeroMQ context, the garbage collector."""

    def destroy(self, linger: int) -> None:
        return

    def collect(self) -> None:
        return

    def freeze(self) -> None:
        return


async def _no_signals(_: Node) -> None:
    await trio.sleep_forever()


def replace_surroundings(patch: pytest.MonkeyPatch) -> None:
    """What is around a node in its process."""
    patch.setattr(primary_module, "Link", FakeLink)
    patch.setattr(probe_module, "Link", FakeLink)
    patch.setattr(inspector_module, "Link", FakeLink)
    patch.setattr(fetch_module, "Link", FakeLink)
    patch.setattr(reception_module, "Listener", FakeListener)
    patch.setattr(roles_module, "FrontEnd", FakeFront)
    patch.setattr(memory_module, "memory_directory", lambda rundir: rundir)
    patch.setattr(node_module, "ControlServer", _Control)
    patch.setattr(reign_module, "datetime", _Calendar)
    patch.setattr(splitbrain_module, "datetime", _Calendar)
    patch.setattr(zmq, "Context", _Quiet)
    patch.setattr(mounting, "become_io_flusher", list)
    patch.setattr(node_module, "gc", _Quiet())
    patch.setattr(node_module, "_HEARTBEAT_S", HEARTBEAT_S)
    patch.setattr(Node, "_watch_signals", _no_signals)
    close = Database.close

    def close_and_tell(database: Database, **more: Any) -> None:
        life = Life.current
        close(database, **more)
        if life is not None and life.disk is not None:
            life.disk.closed()

    patch.setattr(Database, "close", close_and_tell)


def populate(path: Path, rng: random.Random, names: tuple[bytes, ...]) -> None:
    """What is in a directory before it becomes a store."""
    root = os.fsencode(path)
    for _ in range(rng.randrange(12)):
        parts = [rng.choice(names) for _ in range(rng.choice((1, 1, 2, 3)))]
        below = root
        for part in parts[:-1]:
            below += b"/" + part
            with contextlib.suppress(OSError):
                os.mkdir(below)
        full = below + b"/" + parts[-1]
        with contextlib.suppress(OSError):
            kind = rng.randrange(6)
            if kind == 0:
                os.symlink(b"target", full)
            elif kind == 1:
                os.mkdir(full)
            elif kind == 2:
                first = os.fsdecode(root) + "/" + os.fsdecode(rng.choice(names))
                os.link(first, full, follow_symlinks=False)
            else:
                size = rng.choice((0, 100, 70_000, 200_000, 1_200_000))
                with open(full, "xb") as file:
                    file.write(rng.randbytes(100) * (size // 100))
