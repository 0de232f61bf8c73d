"""Everything an operator can do to a primary and two peers, at random, while writers never stop.

Pauses, resyncs, verifications, freezes, peers removed and added, policies that change, nodes killed
and restarted. At the end nothing is held off any more: all three stores become equal by themselves.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path

from helpers.cluster import Cluster
from helpers.nodes import run_replfs
from helpers.writer import Report, Writers

from soak.story import TIMEOUT_S, Story, record_directory

HEALS_S = 120.0
_POLICIES = ("sync", "async", "none")
_LEVELS = ("op", "close")


def run(
    count: int, seed: int, story: Story, *, writers: int = 3, rest_s: float = 0.0, files: int = 120
) -> Report:
    """*count* things done, a few at a time between two looks at everything; the writers' report.

    Raises:
        AssertionError: a command fails, something does not heal or is lost, or the stores differ.
    """
    arguments = ("--peer-timeout", f"{TIMEOUT_S:g}s", "--checkpoint-interval", "500ms")
    with (
        Cluster(2, mount_arguments=arguments) as cluster,
        record_directory(cluster.base) as records,
        Writers(
            cluster.mountpoint, records, count=writers, seed=seed, rest_s=rest_s, files=files
        ) as all_writers,
    ):
        operator = _Operator(cluster, all_writers, random.Random(seed))
        done = 0
        while done < count:
            for _ in range(min(count - done, 5)):
                all_writers.wait_more(10)
                done += 1
                story.say(f"{done}: {operator.act()}")
            took = operator.settle()
            story.say(f"all equal, {took:.1f} s after the last of it")
        report = all_writers.stop()
        operator.check_all()
    story.say(f"writers: {report}")
    return report


class _Operator:
    """Does one thing after the other, and knows how to end what it began."""

    def __init__(self, cluster: Cluster, writers: Writers, rng: random.Random) -> None:
        self._cluster = cluster
        self._writers = writers
        self._random = rng
        self._open: dict[str, Callable[[], object]] = {}
        """What ends what was begun, by what it is."""
        self._actions: list[Callable[[int], str]] = [
            self._pause, self._resync, self._verify, self._freeze, self._replace, self._policy,
            self._level, self._kill_agent, self._stop_agent, self._kill_mount, self._flush,
            self._look,
        ]  # fmt: skip

    def act(self) -> str:
        """One thing; what it was."""
        # At a random moment: this is the case, not a wait.
        time.sleep(self._random.uniform(0, 0.3))
        return self._random.choice(self._actions)(self._random.randrange(2))

    def settle(self) -> float:
        """End all that was begun, wait until everything is in sync, and look; seconds it took."""
        began = time.monotonic()
        while self._open:
            self._open.popitem()[1]()
        self._cluster.wait_in_sync(timeout_s=HEALS_S)
        took = time.monotonic() - began
        with self._writers.held():
            self.check_all()
        return took

    def check_all(self) -> None:
        """With nobody at work: all stores are equal, and hold all that was acknowledged."""
        self._cluster.wait_in_sync()
        self._cluster.assert_equal()
        for store in (self._cluster.primary_store, *self._cluster.stores):
            self._writers.check(store)

    def _call(self, command: str, *arguments: str | Path, ok: tuple[int, ...] = (0,)) -> str:
        done = self._cluster.mount.replfs(command, *arguments, check=False, timeout_s=HEALS_S)
        said = done.stdout + done.stderr
        assert done.returncode in ok, (command, arguments, done.returncode, said)
        return said

    def _end(self, what: str) -> bool:
        """End it, if it was begun."""
        end = self._open.pop(what, None)
        if end is not None:
            end()
        return end is not None

    # What is done ------------------------------------------------------------------------------

    def _pause(self, number: int) -> str:
        mount, peer = self._cluster.mount.target, f"p{number}"
        if self._end(f"pause {number}"):
            return f"resume {peer}"
        self._call("pause", mount, "--peer", peer)
        self._open[f"pause {number}"] = lambda: self._call("resume", mount, "--peer", peer)
        return f"pause {peer}"

    def _resync(self, number: int) -> str:
        how = self._random.choice([["--full"], [], ["--tentative"], ["--full", "--tentative"]])
        # A peer that is paused, or away, cannot be brought in sync now: that is said.
        mount = self._cluster.mount.target
        self._call("resync", mount, "--peer", f"p{number}", *how, ok=(0, 1, 2, 4, 6))
        return " ".join(["resync", f"p{number}", *how])

    def _verify(self, number: int) -> str:
        part = self._cluster.mountpoint / f"w{number}"
        how = ["--repair"] if self._random.random() < 0.5 else []
        said = self._call("verify", self._cluster.mount.target, part, *how, ok=(0, 4, 6))
        assert "differs" not in said, said
        return " ".join(["verify", part.name, *how])

    def _freeze(self, number: int) -> str:
        agent = self._cluster.agents[number]
        if self._end(f"freeze {number}"):
            return f"thaw p{number}"
        if not agent.is_running:
            return f"p{number} is not there to be frozen"
        # In the middle of a resync it is refused; a thaw finds that it thawed with its end.
        done = agent.replfs("freeze", agent.target, check=False, timeout_s=HEALS_S)
        if done.returncode:
            return f"freeze p{number}: {(done.stdout + done.stderr).strip()}"
        self._open[f"freeze {number}"] = lambda: agent.replfs("thaw", agent.target, check=False)
        return f"freeze p{number}"

    def _replace(self, number: int) -> str:
        mount = self._cluster.mount.target
        if self._end(f"removed {number}"):
            return f"peer add p{number}"
        self._end(f"pause {number}")
        (endpoint,) = (
            peer["endpoint"]
            for peer in self._cluster.mount.status()["peers"]
            if peer["name"] == f"p{number}"
        )
        self._call("peer", "remove", mount, f"p{number}")
        self._open[f"removed {number}"] = lambda: self._call(
            "peer", "add", mount, f"p{number}={endpoint}"
        )
        return f"peer remove p{number}"

    def _policy(self, number: int) -> str:
        directory = self._cluster.mountpoint / f"w{number}"
        if self._end(f"policy {number}"):
            return f"policy clear {directory.name}"
        policy = self._random.choice(_POLICIES)
        run_replfs("policy", "set", policy, directory)
        self._open[f"policy {number}"] = lambda: run_replfs("policy", "clear", directory)
        return f"policy set {policy} {directory.name}"

    def _level(self, number: int) -> str:
        directory = self._cluster.mountpoint / f"w{number}"
        level = self._random.choice(_LEVELS)
        os.setxattr(directory, "user.replfs.ack", level.encode())
        return f"ack={level} {directory.name}"

    def _kill_agent(self, number: int) -> str:
        agent = self._cluster.agents[number]
        if self._end(f"agent {number}"):
            return f"start p{number}"
        self._open.pop(f"freeze {number}", None)
        agent.kill9()
        self._open[f"agent {number}"] = agent.start
        return f"kill p{number}"

    def _stop_agent(self, number: int) -> str:
        agent = self._cluster.agents[number]
        if f"agent {number}" in self._open:
            return f"p{number} is not there to be stopped"
        self._open.pop(f"freeze {number}", None)
        agent.restart()
        return f"restart p{number}"

    def _kill_mount(self, _number: int) -> str:
        with self._writers.mount_down():
            self._cluster.mount.kill9()
            self._cluster.mount.start()
        return "kill and start the mount"

    def _flush(self, _number: int) -> str:
        self._call("sync", self._cluster.mount.target, ok=(0, 1, 4, 6))
        return "sync"

    def _look(self, _number: int) -> str:
        self._call("status", self._cluster.mount.target, ok=(0, 4, 6))
        run_replfs("policy", "report", self._cluster.mountpoint)
        return "status"
