"""Common checkpoints: what is written becomes stable on both sides by itself, and both know it."""

from __future__ import annotations

import os
import threading

import pytest
from helpers.cases import write
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted


def wait_stable(pair: Pair, *, timeout_s: float = 30) -> None:
    """Wait until nothing is unstable, as either side sees it."""

    def is_stable() -> bool:
        assert pair.peer()["unstable_objects"] == 0
        assert pair.agent.status()["unstable_objects"] == 0
        return True

    wait_for(is_stable, timeout_s, "nothing to be unstable", 0.05)


def test_what_was_written_becomes_stable_when_applications_rest():
    # The interval alone would be too late for this test.
    with Pair(mount_arguments=("--checkpoint-interval", "1h")) as pair:
        wait_stable(pair)
        before = pair.mount.status()["checkpoints"]
        write(pair.mountpoint / "file", b"x" * 100_000)
        os.mkdir(pair.mountpoint / "dir")
        wait_stable(pair)
        assert pair.mount.status()["checkpoints"] > before
        # And then no more are taken for nothing.
        taken = pair.mount.status()["checkpoints"]
        with pytest.raises(AssertionError):
            wait_for(lambda: pair.mount.status()["checkpoints"] > taken, 2, "one too many")


def test_checkpoints_are_taken_while_applications_go_on():
    with Pair(mount_arguments=("--checkpoint-interval", "300ms")) as pair:
        stop = threading.Event()

        def work() -> None:
            with (pair.mountpoint / "busy").open("wb", buffering=0) as file:
                while not stop.is_set():
                    os.pwrite(file.fileno(), b"x" * 4096, 0)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            before = pair.mount.status()["checkpoints"]
            wait_for(lambda: pair.mount.status()["checkpoints"] > before + 3, 30, "checkpoints")
        finally:
            stop.set()
            thread.join()
        pair.wait_in_sync()
        wait_stable(pair)


def test_a_replica_that_was_away_is_not_told_that_all_is_stable():
    with Pair(mount_arguments=("--checkpoint-interval", "300ms", "--peer-timeout", "1s")) as pair:
        wait_stable(pair)
        pair.agent.kill9()
        write(pair.mountpoint / "file", b"x")
        pair.wait_state("out-of-sync")
        pair.agent.start()
        # What it had before it was killed is not known to it; only a checkpoint with it ends that.
        pair.wait_in_sync()
        wait_stable(pair)
        pair.assert_equal()


def test_a_checkpoint_taken_just_before_a_peer_is_in_sync_is_not_its_last():
    # As often as can be, so that one falls between the last transfer and the end of the resync.
    with Pair(mount_arguments=("--checkpoint-interval", "100ms", "--peer-timeout", "1s")) as pair:
        for number in range(4):
            pair.mount.replfs("resync", pair.mountpoint)
            write(pair.mountpoint / f"{number}", b"x")
            pair.wait_in_sync()
            wait_stable(pair)
