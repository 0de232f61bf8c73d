"""A primary with a mount and several secondaries, as real processes.

with Cluster(2) as cluster:
    (cluster.mountpoint / "f").write_bytes(b"x")
    cluster.agents[0].kill9()
    cluster.wait_peer(0, "out-of-sync")
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import nodes
from helpers.compare import wait_equal
from helpers.stage import Stage


class Cluster(Stage):
    """`agents[n]` serves `stores[n]` and is the peer named `p<n>`; `mount` is the primary."""

    def __init__(self, count: int, *, mount_arguments: Sequence[str | Path] = ()) -> None:
        self.base = nodes.make_base()
        self.primary_store = self.base / "primary"
        self.mountpoint = self.base / "mnt"
        self.rundir = self.base / "run"
        self.stores = [self.base / f"secondary-{number}" for number in range(count)]
        for directory in (self.primary_store, self.mountpoint, self.rundir, *self.stores):
            directory.mkdir()
        endpoints = [f"tcp://127.0.0.1:{nodes.free_port()}" for _ in self.stores]
        self.agents = [
            nodes.agent(
                store,
                endpoint,
                rundir=self.rundir,
                log=self.base / f"agent-{number}.log",
                name=f"p{number}",
            )
            for number, (store, endpoint) in enumerate(zip(self.stores, endpoints, strict=True))
        ]
        self.mount = nodes.mount(
            self.primary_store,
            self.mountpoint,
            [f"p{number}={endpoint}" for number, endpoint in enumerate(endpoints)],
            rundir=self.rundir,
            log=self.base / "mount.log",
            arguments=mount_arguments,
        )

    def start_up(self) -> None:
        """Start all and wait until every peer is in sync."""
        for agent in self.agents:
            agent.start(wait=False)
        self.mount.start()
        self.wait_in_sync()

    def notes(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{node.command[0]} {node.log_tail(30)}" for node in self._nodes())

    def _nodes(self) -> list[nodes.Node]:
        return [self.mount, *self.agents]

    def clean_up(self) -> None:
        """End all processes, detach the mount, remove the directory."""
        for node in self._nodes():
            node.clean_up()
        nodes.remove_base(self.base)

    def wait_in_sync(self, number: int | None = None, timeout_s: float = 60.0) -> None:
        """Wait until all peers, or one, are in sync."""
        only = [] if number is None else ["--peer", f"p{number}"]
        self.mount.check()
        self.mount.replfs(
            "wait", self.mount.target, "--for", "in-sync", "--timeout", f"{timeout_s:g}", *only,
            timeout_s=timeout_s + 30,
        )  # fmt: skip

    def peer(self, number: int) -> dict[str, Any]:
        """The status of one peer, as the primary sees it."""
        peers = {peer["name"]: peer for peer in self.mount.status()["peers"]}
        found: dict[str, Any] = peers[f"p{number}"]
        return found

    def wait_peer(self, number: int, state: str, timeout_s: float = 60.0) -> None:
        """Wait until one peer has this replication state."""

        def has_state() -> bool:
            peer = self.peer(number)
            assert peer["state"] == state, peer
            return True

        nodes.wait_for(has_state, timeout_s, f"p{number} to be {state}", 0.05)

    def assert_equal(self, number: int | None = None, timeout_s: float = 15.0) -> None:
        """The primary's store and all, or one, of the others are equal."""
        for index, store in enumerate(self.stores):
            if number in (None, index):
                wait_equal(self.primary_store, store, timeout_s=timeout_s)
