"""Two hosts on one machine: network namespaces joined by a virtual cable that can be cut.

    with Hosts() as hosts:
        run a process with the prefix `hosts.inside(0)`, reachable at `hosts.addresses[0]`
        hosts.drop(0)      # what host 1 sends does not reach host 0
        hosts.drop(1)      # nor the other way round
        hosts.heal()

Needs root. Where namespaces cannot be made this raises: such a test must not pass unseen.
"""

from __future__ import annotations

import itertools
import os
import subprocess

from helpers.stage import Stage

_numbers = itertools.count()


class Hosts(Stage):
    """The namespaces `names[0]` and `names[1]`, with one address each."""

    def __init__(self) -> None:
        mark = f"replfs-{os.getpid()}-{next(_numbers)}"
        self.names = [f"{mark}-a", f"{mark}-b"]
        self.addresses = ["10.213.7.1", "10.213.7.2"]
        self._made: list[str] = []

    def start_up(self) -> None:
        """Make the namespaces and the cable."""
        for name in self.names:
            _run("ip", "netns", "add", name)
            self._made.append(name)
        # Both ends are made where they belong: nothing of them is ever seen outside.
        _run("ip", "-n", self.names[0], "link", "add", "cable", "type", "veth",
             "peer", "name", "cable", "netns", self.names[1])  # fmt: skip
        for name, address in zip(self.names, self.addresses, strict=True):
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", name, "link", "set", "cable", "up")

    def clean_up(self) -> None:
        """Remove them, by name; the cable goes with them."""
        while self._made:
            _run("ip", "netns", "delete", self._made.pop())

    def inside(self, number: int) -> list[str]:
        """A prefix that runs a command with the network of this host, and nothing else changed."""
        return ["nsenter", f"--net=/run/netns/{self.names[number]}", "--"]

    def drop(self, number: int) -> None:
        """Nothing reaches this host any more: no answer, no refusal, as with a cut cable."""
        other = self.addresses[1 - number]
        _run(*self.inside(number), "iptables", "-w", "-A", "INPUT", "-s", other, "-j", "DROP")

    def heal(self) -> None:
        """Everything passes again."""
        for number in range(2):
            _run(*self.inside(number), "iptables", "-w", "-F", "INPUT")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
