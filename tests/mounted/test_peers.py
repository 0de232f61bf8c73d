"""Peers that are added, removed and replaced while the volume is mounted."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import nodes
from helpers.compare import compare_trees, wait_equal
from helpers.nodes import Node, Pair, wait_for

from replfs.cli.exit_codes import ExitCode

pytestmark = pytest.mark.mounted


class Spares:
    """More agents beside a pair."""

    def __init__(self, pair: Pair, cleanup: ExitStack) -> None:
        self.pair = pair
        self._cleanup = cleanup

    def start(self, name: str) -> tuple[Node, str]:
        """A new agent with an empty store, and its endpoint."""
        store = self.pair.base / name
        store.mkdir()
        endpoint = f"tcp://127.0.0.1:{nodes.free_port()}"
        agent = nodes.agent(
            store, endpoint, rundir=self.pair.rundir, log=self.pair.base / f"{name}.log", name=name
        )
        self._cleanup.callback(agent.clean_up)
        agent.start()
        return agent, endpoint


@pytest.fixture
def spares() -> Iterator[Spares]:
    with ExitStack() as cleanup, Pair() as pair:
        yield Spares(pair, cleanup)


def command(pair: Pair, *arguments: str | Path, code: int = ExitCode.OK) -> str:
    done = pair.mount.replfs(*arguments, check=False)
    assert done.returncode == code, done
    return done.stdout + done.stderr


def names(pair: Pair) -> list[str]:
    return [peer["name"] for peer in pair.mount.status()["peers"]]


def wait_peer(pair: Pair, name: str) -> None:
    command(pair, "wait", pair.mountpoint, "--peer", name, "--timeout", "60")


def test_a_peer_is_added_and_comes_back_after_a_restart(spares):
    pair = spares.pair
    (pair.mountpoint / "before").write_bytes(b"before" * 1000)
    agent, endpoint = spares.start("third")
    printed = command(pair, "peer", "add", pair.mountpoint, f"third={endpoint}")
    assert "third is added" in printed
    (pair.mountpoint / "after").write_bytes(b"after")
    wait_peer(pair, "third")
    wait_equal(pair.primary_store, agent.store)
    (pair.mountpoint / "together").write_bytes(b"x")
    # In sync: it is there when the call returns.
    assert (agent.store / "together").read_bytes() == b"x"

    pair.mount.restart()
    assert len(names(pair)) == 2
    wait_peer(pair, "third")
    (pair.mountpoint / "after a restart").write_bytes(b"y")
    assert (agent.store / "after a restart").read_bytes() == b"y"
    pair.wait_in_sync()
    assert not compare_trees(pair.primary_store, agent.store)


def test_a_removed_peer_is_forgotten(spares):
    pair = spares.pair
    agent, endpoint = spares.start("third")
    command(pair, "peer", "add", pair.mountpoint, f"third={endpoint}")
    wait_peer(pair, "third")
    printed = command(pair, "peer", "remove", pair.mountpoint, "third")
    assert "third is forgotten" in printed
    assert "configured" not in printed
    assert names(pair) != [] and "third" not in names(pair)
    (pair.mountpoint / "alone").write_bytes(b"x")
    assert not (agent.store / "alone").exists()
    pair.mount.restart()
    pair.wait_in_sync()
    assert "third" not in names(pair)
    # It may come back: then it is compared in full.
    (pair.mountpoint / "more").write_bytes(b"y")
    command(pair, "peer", "add", pair.mountpoint, f"third={endpoint}")
    wait_peer(pair, "third")
    wait_equal(pair.primary_store, agent.store)


def test_the_last_peer_is_removed_while_somebody_waits_for_it(spares):
    pair = spares.pair
    name = names(pair)[0]
    pair.agent.freeze()
    writer = threading.Thread(target=(pair.mountpoint / "file").write_bytes, args=(b"x",))
    writer.start()
    try:
        wait_for(lambda: pair.mount.status()["in_flight"])
        printed = command(pair, "peer", "remove", pair.mountpoint, name)
        assert "still configured" in printed
    finally:
        writer.join(30)
        pair.agent.thaw()
    assert not writer.is_alive()
    assert pair.mount.status()["state"] == "alone"
    (pair.mountpoint / "alone").write_bytes(b"x")
    # The command line still names it: it comes back as a new one.
    pair.mount.restart()
    pair.wait_in_sync()
    pair.assert_equal()


def test_a_replaced_peer_keeps_its_place_after_a_restart(spares):
    pair = spares.pair
    name = names(pair)[0]
    (pair.mountpoint / "file").write_bytes(b"x" * 100_000)
    agent, endpoint = spares.start("other")
    command(pair, "peer", "replace", pair.mountpoint, name, endpoint)
    assert names(pair) == [name]
    wait_peer(pair, name)
    wait_equal(pair.primary_store, agent.store)
    (pair.mountpoint / "new").write_bytes(b"x")
    assert not (pair.secondary_store / "new").exists()
    # The command line names the old machine.
    pair.mount.restart()
    pair.wait_in_sync()
    (pair.mountpoint / "newer").write_bytes(b"x")
    assert (agent.store / "newer").exists()
    assert pair.mount.status()["peers"][0]["endpoint"] == endpoint


def test_what_cannot_be_done_is_refused(spares):
    pair = spares.pair
    name = names(pair)[0]
    free = f"tcp://127.0.0.1:{nodes.free_port()}"
    for arguments, words in (
        (("add", pair.mountpoint, f"{name}={free}"), "there is a peer named"),
        (("add", pair.mountpoint, f"other={pair.endpoint}"), "is the endpoint of"),
        (("add", pair.mountpoint, "other=tcp://192.0.2.1:4710"), "key"),
        (("remove", pair.mountpoint, "nobody"), "no peer named nobody"),
        (("replace", pair.mountpoint, "nobody", free), "no peer named nobody"),
        (("remove", pair.secondary_store, name), "ask its primary"),
    ):
        assert words in command(pair, "peer", *arguments, code=ExitCode.USAGE)
    assert names(pair) == [name]
    os.stat(pair.mountpoint)


def test_a_peer_is_removed_in_the_middle_of_its_first_copy(spares):
    pair = spares.pair
    for number in range(300):
        (pair.mountpoint / f"{number}").write_bytes(bytes(1000))
    _, endpoint = spares.start("third")
    command(pair, "peer", "add", pair.mountpoint, f"third={endpoint}")
    command(pair, "peer", "remove", pair.mountpoint, "third")
    # Nothing is left that an application would wait for.
    (pair.mountpoint / "0").write_bytes(b"x")
    os.rename(pair.mountpoint / "1", pair.mountpoint / "renamed")
    pair.wait_in_sync()
    pair.assert_equal()
    wait_for(lambda: pair.mount.status()["in_flight"] == 0)
    assert pair.mount.stop() == 0
