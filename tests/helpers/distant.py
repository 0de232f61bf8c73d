"""A pair whose two nodes are on two hosts, with a cable between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from helpers import nodes
from helpers.hosts import Hosts
from helpers.nodes import Pair

PORT: Final = 4710
"""Every host has ports of its own."""


class DistantPair(Pair):
    """`mount` runs on `hosts` 0 and `agent` on 1; not started before `start()`."""

    def __init__(
        self, hosts: Hosts, timeout: str, *, prepare: Callable[[Pair], None] | None = None
    ) -> None:
        super().__init__(start=False, prepare=prepare)
        endpoint = f"tcp://{hosts.addresses[1]}:{PORT}"
        options = ["--insecure", "--peer-timeout", timeout]
        self.agent = nodes.agent(
            self.secondary_store, endpoint, rundir=self.rundir, log=self.base / "agent.log",
            arguments=options,
        )  # fmt: skip
        self.mount = nodes.mount(
            self.primary_store, self.mountpoint, [endpoint], rundir=self.rundir,
            log=self.base / "mount.log", arguments=options,
        )  # fmt: skip
        self.mount.prefix = hosts.inside(0)
        self.agent.prefix = hosts.inside(1)
