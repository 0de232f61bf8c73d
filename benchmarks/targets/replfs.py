"""replfs: a mount and its agents, on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final

from benchmarks import images
from benchmarks.errors import BenchmarkError
from benchmarks.processes import Namespace, end, own_name, wait_for_log
from benchmarks.targets.base import Running

_START_S: Final = 30.0
_PORT: Final = 4710
_STATE: Final = re.compile(
    r"(?P<moment>\S+Z) +\w+ +node\.replication\.peer: peer \S+: (?P<state>\w+) \("
)
"""A line of a log that tells of a peer's new state."""


@dataclass(frozen=True)
class Replfs:
    """A mount with *options* and *peers* agents over TCP; *python* has replfs installed."""

    title: str
    options: tuple[str, ...] = ()
    peers: int = 1
    python: str = sys.executable
    packages: tuple[str, ...] = ()

    @contextlib.contextmanager
    def start(self, base: Path) -> Iterator[Running]:
        """Ready, and in sync."""
        with nodes(self, base) as made, made.agents(), made.mounted():
            made.wait_in_sync()
            yield made.running


class Nodes:
    """The nodes of a `Replfs` below *base*, with the stores `primary`, `secondary0`, ..."""

    def __init__(self, target: Replfs, base: Path, stores: Path, namespace: Namespace) -> None:
        self.target = target
        self.namespace = namespace
        self.mount = base / "mount"
        self.store = stores / "primary"
        self.running = Running(self.mount, stores, namespace)
        self._base = base
        self._ports = [_PORT + number for number in range(target.peers)]
        for directory in (self.mount, self.store):
            directory.mkdir()

    @contextlib.contextmanager
    def agents(self) -> Iterator[list[int]]:
        """With an agent for each peer; gives the ports at which they listen."""
        with contextlib.ExitStack() as stack:
            for number, port in enumerate(self._ports):
                replica = self.running.stores / f"secondary{number}"
                replica.mkdir(exist_ok=True)
                listening = ("--listen", _endpoint(port))
                stack.enter_context(self._node(f"agent{number}", "agent", replica, *listening))
            yield self._ports

    @contextlib.contextmanager
    def mounted(self, through: list[int] | None = None) -> Iterator[None]:
        """With the mount; *through* are the ports that it dials instead of the agents' own."""
        peers = [
            word
            for number, port in enumerate(through or self._ports)
            for word in ("--peer", f"peer{number}={_endpoint(port)}")
        ]
        options = (*peers, *self.target.options)
        try:
            with self._node("mount", "mount", self.store, self.mount, *options):
                yield
        finally:
            images.unmount(self.mount)

    def replfs(self, command: str, *words: str) -> str:
        """A command to the mount's node."""
        program = (self.target.python, "-m", "replfs")
        return self.namespace.run(*program, command, self.mount, *words, "--rundir", self._rundir)

    def wait_in_sync(self) -> None:
        """Until nothing is dirty on any peer."""
        if self.target.peers:
            self.replfs("wait", "--for", "in-sync")

    def resync_seconds(self) -> float:
        """How long the last resync took that has ended, as the mount's log says."""
        began = ended = 0.0
        for line in (self._base / "mount.log").read_text(errors="replace").splitlines():
            found = _STATE.match(line)
            if found is None:
                continue
            moment = datetime.fromisoformat(found["moment"]).timestamp()
            if found["state"] == "in_sync":
                ended = moment
            else:
                began = moment
        if not 0 < began < ended:
            raise BenchmarkError("the log of the mount tells of no resync that has ended")
        return ended - began

    def in_sync(self) -> bool:
        """Asked of the mount, which costs little."""
        return os.getxattr(self.mount, "user.replfs.state") == b"in-sync"

    @contextlib.contextmanager
    def _node(self, name: str, *words: str | Path) -> Iterator[None]:
        log = self._base / f"{name}.log"
        log.write_bytes(b"")
        program = (self.target.python, "-m", "replfs")
        child = self.namespace.start(*program, *words, "-f", "--rundir", self._rundir, log=log)
        try:
            wait_for_log(child, log, " is ready", _START_S)
            yield
        finally:
            end(child)

    @property
    def _rundir(self) -> Path:
        return self._base / "run"


@contextlib.contextmanager
def nodes(target: Replfs, base: Path, inodes: int = images.INODES) -> Iterator[Nodes]:
    """On a fresh image; nothing is started yet."""
    with images.fresh(base, inodes) as stores, Namespace(own_name(base.name)) as namespace:
        yield Nodes(target, base, stores, namespace)


def _endpoint(port: int) -> str:
    return f"tcp://127.0.0.1:{port}"
