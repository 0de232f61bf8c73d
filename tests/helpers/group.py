"""Nodes that may all become the primary: each listens, dials the others, and is mounted.

with Group(2) as group:
    a, b = group.nodes            # a is the primary
    (a.mountpoint / "f").write_bytes(b"x")
    a.kill9()
    b.replfs("promote", b.store)
    (b.mountpoint / "f").read_bytes()
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from helpers import nodes
from helpers.compare import wait_equal
from helpers.nodes import Node
from helpers.stage import Stage

TIMEOUT_S = 2.0
CRASH = Path(__file__).parent / "crash"


def crashing(where: str) -> dict[str, str]:
    """The environment of a process that dies there."""
    path = f"{CRASH}{os.pathsep}{nodes.REPOSITORY}"
    return {"PYTHONPATH": path, "CRASH_AT": where}


class Member(Node):
    """One node of a group; `top` is where it is mounted."""

    @property
    def top(self) -> Path:
        assert self.mountpoint is not None
        return self.mountpoint


class Group(Stage):
    """`nodes[0]`, made by `replfs mount`, is the primary; the others are made by `replfs agent`."""

    def __init__(
        self,
        count: int,
        *,
        arguments: Sequence[str | Path] = (),
        mounted: bool = True,
        crash: tuple[int, str] | None = None,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        """*crash*: which node is to die where; see `helpers/crash`."""
        self.base = nodes.make_base()
        self.rundir = self.base / "run"
        self.rundir.mkdir()
        self.names = [chr(ord("a") + number) for number in range(count)]
        self.endpoints = [f"tcp://127.0.0.1:{nodes.free_port()}" for _ in self.names]
        self.nodes: list[Member] = []
        for number, name in enumerate(self.names):
            store, mountpoint = self.base / f"store-{name}", self.base / f"mnt-{name}"
            store.mkdir()
            mountpoint.mkdir()
            command: list[str | Path]
            if number == 0:
                command = ["mount", store, mountpoint]
            elif mounted:
                command = ["agent", store, "--mount", mountpoint]
            else:
                command = ["agent", store]
            command += ["--name", name, "--listen", self.endpoints[number]]
            for other, endpoint in zip(self.names, self.endpoints, strict=True):
                if other != name:
                    command += ["--peer", f"{other}={endpoint}"]
            command += ["--peer-timeout", f"{timeout_s:g}s", *arguments]
            self.nodes.append(
                Member(
                    command,
                    store=store,
                    mountpoint=mountpoint if mounted or number == 0 else None,
                    rundir=self.rundir,
                    log=self.base / f"{name}.log",
                    environ=crashing(crash[1]) if crash and crash[0] == number else None,
                )
            )

    def start_up(self) -> None:
        """Start all and wait until every peer is in sync."""
        for node in self.nodes[1:]:
            node.start(wait=False)
        self.nodes[0].start()
        self.wait_in_sync(self.nodes[0])

    def notes(self) -> str:
        """The ends of all logs."""
        return "\n".join(f"{node.store.name} {node.log_tail(40)}" for node in self.nodes)

    def clean_up(self) -> None:
        """End all processes, detach the mounts, remove the directory."""
        for node in self.nodes:
            node.clean_up()
        nodes.remove_base(self.base)

    def wait_in_sync(self, primary: Node, *peers: str, timeout_s: float = 60.0) -> None:
        """Wait until all peers of *primary*, or those named, are in sync."""
        for peer in peers or [""]:
            only = ["--peer", peer] if peer else []
            primary.replfs(
                "wait", primary.store, "--for", "in-sync", "--timeout", f"{timeout_s:g}", *only,
                timeout_s=timeout_s + 30,
            )  # fmt: skip

    def peer(self, primary: Node, name: str) -> dict[str, Any]:
        """The status of one peer, as *primary* sees it."""
        peers = {peer["name"]: peer for peer in primary.status()["peers"]}
        found: dict[str, Any] = peers[name]
        return found

    def wait_role(self, node: Node, role: str, timeout_s: float = 30.0) -> None:
        """Wait until *node* has a role."""

        def has_role() -> bool:
            status = node.status()
            assert status["role"] == role, status
            return True

        nodes.wait_for(has_role, timeout_s, f"{node.store.name} to be a {role}", 0.05)

    def assert_equal(self, *stores: Node, timeout_s: float = 15.0) -> None:
        """All stores, or those of some nodes, are equal."""
        first, *others = stores or self.nodes
        for other in others:
            wait_equal(first.store, other.store, timeout_s=timeout_s)
