"""A primary and its replicas, started the way `node.node` starts them, and killed in other ways."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import trio
from simulation.harness.check import Slots
from simulation.harness.disk import Disk
from simulation.harness.ledger import InSync
from simulation.harness.life import Life, acting
from simulation.harness.network import FakeListener

from replfs.core.dirty import DirtyLog
from replfs.core.relationship import State as PeerState
from replfs.node.config import PeerSetting, Settings
from replfs.node.primary import Primary
from replfs.node.secondary import Secondary
from replfs.store.activity import ActivityLog, is_lost, recover
from replfs.store.state import State
from replfs.store.tree import Tree


class Store:
    """One node's directory, and the part of a node that both roles have."""

    def __init__(self, path: Path, command: str, **settings: Any) -> None:
        self.path = path
        self.raw = os.fsencode(path)
        self.disk = Disk(self.raw, self.raw + b"-graveyard")
        self.settings = Settings(command=command, store=str(path), name=path.name, **settings)  # type: ignore[arg-type]
        self.life: Life | None = None
        self.was_started = False
        self._fd = -1
        self.state: State
        self.tree: Tree

    @property
    def is_inconsistent(self) -> bool:
        """It was in the middle of a resync when it ended."""
        return hasattr(self, "state") and self.state.identity().inconsistent

    @property
    def is_alive(self) -> bool:
        return self.life is not None and not self.life.dead

    def _open(self, life: Life) -> None:
        self.life = life
        life.disk = self.disk
        self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.state = State(self._fd)
        self.was_started = True
        self._take_role()
        self.tree = Tree(self._fd)

    def _take_role(self) -> None:
        if self.state.identity().role != "unset":
            return
        if self.settings.command == "mount":
            self.state.update(
                role="primary",
                name=self.path.name,
                volume=os.urandom(16),
                generation=os.urandom(16),
                uninitialized=False,
            )
        else:
            self.state.update(role="secondary", name=self.path.name)

    def bury(self) -> None:
        """What the kernel does for a process that died: its descriptors are closed."""
        self.life = None
        self.tree.close_all()
        put_back = self.disk.keep_state()
        self.state._cleanup.close()
        put_back()
        os.close(self._fd)

    def lose_power(self, rng: random.Random) -> str:
        """What was not flushed goes, in part; what became of it, for a trace. It is buried."""
        return self.disk.lose_power(rng)

    def wipe(self) -> None:
        """The disk is replaced by an empty one."""
        shutil.rmtree(self.path)
        self.path.mkdir()
        self.disk.forget()


class ReplicaNode(Store):
    """A secondary."""

    def __init__(self, path: Path, endpoint: str) -> None:
        super().__init__(path, "agent", listen=endpoint)
        self.endpoint = endpoint
        self.secondary: Secondary
        self.listener: FakeListener
        self.is_other = False
        """It was replaced by an empty one, or lost power, and its primary does not know it yet."""

    def start(self, life: Life) -> Callable[[], Any]:
        """Start it; what is to be run in *life*."""
        with acting(life):
            self._open(life)
            self.secondary = Secondary(self.settings, self.state, self.tree, event=_ignore)
            self.listener = FakeListener(
                None, self.endpoint, self.secondary, security=None, peer_timeout_s=5.0
            )
            self.state.started()

        def welcomed() -> None:
            self.is_other = False

        self.listener.on_welcomed = welcomed

        async def main() -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.secondary.run)
                await nursery.start(self.listener.run)

        return main

    def lose_power(self, rng: random.Random) -> str:
        self.is_other = True
        return super().lose_power(rng)


class PrimaryNode(Store):
    """A primary."""

    def __init__(
        self,
        path: Path,
        endpoints: list[str],
        rundir: Path,
        policy: str,
        ack: Literal["op", "close"],
    ) -> None:
        peers = tuple(PeerSetting(f"r{n}", endpoint) for n, endpoint in enumerate(endpoints))
        super().__init__(path, "mount", peers=peers, policy=policy, ack=ack)
        self.primary: Primary
        self.activity: ActivityLog
        self.slots_at_death: Slots = set()
        self.in_sync_at_death: set[InSync] = set()
        self._activity = str(rundir / "activity")

    def start(self, life: Life) -> Callable[[], Any]:
        """Start it, as `Node` does; what is to be run in *life*."""
        with acting(life):
            self._open(life)
            if self.state.unclean and is_lost(self._activity, self.state.identity().node):
                self.state.memory_lost = True
            unfinished = (
                recover(self._activity) if self.state.unclean and not self.state.memory_lost else []
            )
            self.activity = ActivityLog(self._activity, self.state.identity().node)
            self.primary = Primary(
                self.settings,
                self.state,
                self.tree,
                self.activity,
                None,  # type: ignore[arg-type]
                None,
                event=_ignore,
                status=dict,
            )
            self.primary.recover(
                [(one.object, one.kind, one.region, one.handle) for one in unfinished]
            )
            self.activity.clear()
            self.state.started()
        return self.primary.run

    def lose_power(self, rng: random.Random) -> str:
        Path(self._activity).unlink(missing_ok=True)
        return super().lose_power(rng)

    def in_sync(self) -> set[InSync]:
        """Stores that have all that was acknowledged, its own among them."""
        peers = self.primary.pipeline.peers
        return {(self.path.name, 0)} | {
            (peer.name, peer.link.session)
            for peer in peers
            if peer.state is PeerState.IN_SYNC and peer.log.is_empty
        }

    def in_flight(self) -> Slots:
        """What operations had begun and not ended; of a dead one too."""
        return {key for key, slot in self.activity._by_key.items() if slot.refs}

    def saved_logs(self) -> dict[str, DirtyLog]:
        """The logs as the next process will find them."""
        return {peer.name: peer.log for peer in self.primary.pipeline.peers}

    def bury(self) -> None:
        super().bury()
        self.activity.close()


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


def _ignore(*_args: object, **_keywords: object) -> None:
    return
