"""A peer that answers, but too slowly for too long, is left behind for a while."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted

STOPPED_S = 0.6
"""How long the peer does nothing at a time: each time a caller waits for it."""


@contextmanager
def sluggish(pair: Pair) -> Iterator[None]:
    """The peer's process is stopped most of the time, but never for a peer timeout."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            pair.agent.freeze()
            stop.wait(STOPPED_S)
            pair.agent.thaw()
            time.sleep(0.05)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(60)


@contextmanager
def writing(pair: Pair) -> Iterator[list[float]]:
    """Somebody who never stops writing; yields how long each write took."""
    stop = threading.Event()
    took: list[float] = []

    def work() -> None:
        fd = os.open(pair.mountpoint / "busy", os.O_WRONLY | os.O_CREAT)
        while not stop.is_set():
            began = time.monotonic()
            os.pwrite(fd, b"x" * 4096, len(took) % 1000 * 4096)
            took.append(time.monotonic() - began)
        os.close(fd)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield took
    finally:
        stop.set()
        thread.join(60)


def test_it_is_left_behind_and_comes_back():
    with Pair(mount_arguments=("--slow-peer", "2s", "--peer-timeout", "30s")) as pair:
        with writing(pair):
            with sluggish(pair):
                found = pair.wait_state("out-of-sync")
                assert found["state"] == "out-of-sync(congested)"
                assert "callers waited for it" in found["reason"]
            wait_for(lambda: pair.peer()["state"] in {"incremental", "in-sync"}, 60)
        pair.wait_in_sync()
        pair.assert_equal()
        events = pair.mount.replfs("events", pair.mountpoint).stdout
        assert "state=congested" in events


def test_not_while_strict_changes_wait_for_it():
    with Pair(mount_arguments=("--slow-peer", "2s", "--peer-timeout", "30s")) as pair:
        path = pair.mountpoint / "strict"
        path.touch()
        os.setxattr(path, "user.replfs.policy", b"strict")
        with writing(pair), sluggish(pair):
            until = time.monotonic() + 6
            while time.monotonic() < until:
                path.write_bytes(b"x")
            assert pair.peer()["state"] != "out-of-sync(congested)"
        # Only when nobody makes strict changes any more.
        with writing(pair), sluggish(pair):
            pair.wait_state("out-of-sync")
        # The next one does not fail: it ends the peer's rest.
        path.write_bytes(b"y")
        assert (pair.secondary_store / "strict").read_bytes() == b"y"
        pair.wait_in_sync()
        pair.assert_equal()


def test_an_operator_can_end_it():
    with Pair(mount_arguments=("--slow-peer", "2s", "--peer-timeout", "30s")) as pair:
        with writing(pair), sluggish(pair):
            pair.wait_state("out-of-sync")
        pair.mount.replfs("resume", pair.mountpoint)
        pair.wait_in_sync()
        pair.assert_equal()


def test_never_where_that_was_asked_for():
    with Pair(mount_arguments=("--slow-peer", "0", "--peer-timeout", "30s")) as pair:
        with writing(pair) as took, sluggish(pair):
            wait_for(lambda: sum(one > STOPPED_S / 2 for one in took) >= 8, 120)
            assert pair.peer()["state"] == "in-sync"
