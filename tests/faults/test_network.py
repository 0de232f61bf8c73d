"""The network between two hosts fails and comes back: by itself everything is equal again."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.cases import read, write
from helpers.children import Child, spawn
from helpers.distant import DistantPair
from helpers.hosts import Hosts
from helpers.nodes import Pair, wait_for
from helpers.tcp_proxy import TcpProxy

pytestmark = pytest.mark.mounted

MIB = 1 << 20


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts and the cable between them."""
    with Hosts() as made:
        yield made


def work(top: Path, stop: Path) -> int:
    """Changes of all kinds, one after the other, that must all succeed."""
    rng = random.Random(3)
    top.mkdir()
    with (top / "log").open("wb", buffering=0) as log:
        for number in itertools.count():
            if stop.exists():
                return number
            log.write(b"%d\n" % number)
            path = top / f"{rng.randrange(20)}"
            write(path, rng.randbytes(rng.randrange(40_000)))
            if number % 3 == 0:
                os.rename(path, top / f"r{rng.randrange(20)}")
    return 0


def start_work(pair: Pair, proxy: TcpProxy | None = None) -> tuple[Child, Path]:
    stop = pair.base / "stop"

    def apart() -> int:
        if proxy is not None:
            proxy.close_inherited()
        return work(pair.mountpoint / "work", stop)

    child = spawn(apart)
    wait_more(pair)
    return child, stop


def wait_more(pair: Pair) -> None:
    """Wait until the worker has done more."""
    path = pair.primary_store / "work" / "log"
    before = path.stat().st_size if path.exists() else 0
    wait_for(lambda: path.stat().st_size > before + 100, 60, "the work to go on")


@pytest.mark.parametrize("cut", ["both ways", "to the primary", "to the secondary"])
def test_a_cut_cable_heals_by_itself(hosts, cut):
    with DistantPair(hosts, "1s") as pair:
        pair.start()
        child, stop = start_work(pair)
        for _ in range(2):
            if cut != "to the secondary":
                hosts.drop(0)
            if cut != "to the primary":
                hosts.drop(1)
            pair.wait_state("out-of-sync")
            wait_more(pair)
            if cut == "both ways":
                # Nothing gets through, not even slowly.
                before = (pair.secondary_store / "work" / "log").stat().st_size
                wait_more(pair)
                assert (pair.secondary_store / "work" / "log").stat().st_size == before
            hosts.heal()
            wait_for(lambda: pair.peer()["state"] != "out-of-sync", 60, "the link to come back")
            wait_more(pair)
        stop.touch()
        assert child.result() > 20
        pair.wait_in_sync()
        pair.assert_equal()
        pair.check_alive()


def test_a_short_cut_is_waited_out(hosts):
    """Shorter than the peer timeout: nothing is lost and nothing to be repaired afterwards."""
    with DistantPair(hosts, "30s") as pair:
        pair.start()
        child, stop = start_work(pair)
        for _ in range(2):
            hosts.drop(0)
            hosts.drop(1)
            wait_for(lambda: pair.mount.status()["in_flight"] > 0, 30, "an operation to wait")
            hosts.heal()
            wait_more(pair)
        stop.touch()
        child.result()
        assert b"session" not in pair.mount.log_since_start().partition(b"is up")[2]
        assert pair.peer()["state"] == "in-sync"
        pair.assert_equal()


def test_starting_without_a_network(hosts):
    with DistantPair(hosts, "1s") as pair:
        hosts.drop(0)
        pair.agent.start()
        pair.mount.start()
        write(pair.mountpoint / "file", b"x" * MIB)
        assert pair.peer()["link"] != "up"
        hosts.heal()
        pair.wait_in_sync()
        assert read(pair.secondary_store / "file") == b"x" * MIB
        pair.assert_equal()


def test_broken_connections_are_resumed_and_nothing_is_done_twice():
    """TCP connections reset at any byte: the session goes on, each operation is applied once."""
    proxies: list[TcpProxy] = []

    def through(endpoint: str) -> str:
        proxies.append(TcpProxy("127.0.0.1", int(endpoint.rpartition(":")[2])))
        proxies[0].__enter__()
        return proxies[0].endpoint

    try:
        with Pair(through=through, mount_arguments=("--peer-timeout", "20s")) as pair:
            proxy = proxies[0]
            rng = random.Random(5)
            child, stop = start_work(pair, proxy)
            for count in range(1, 26):
                proxy.cut_after(rng.randrange(1, 200_000))
                wait_for(lambda count=count: proxy.cuts >= count, 60)  # type: ignore[misc]
            stop.touch()
            child.result()
            peer = pair.peer()
            assert peer["state"] == "in-sync", peer
            assert "last_error" not in peer, peer
            assert b"is over" not in pair.mount.log_since_start()
            pair.assert_equal()
    finally:
        for proxy in proxies:
            proxy.__exit__()
