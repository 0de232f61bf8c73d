"""`freeze` and `thaw`: the replica stands still, flushed, and catches up afterwards."""

from __future__ import annotations

import contextlib
import threading

import pytest
from helpers.nodes import Pair, run_replfs, wait_for

from replfs.cli.exit_codes import ExitCode

pytestmark = pytest.mark.mounted


@pytest.fixture
def pair():
    with Pair() as fresh:
        yield fresh


def on_replica(pair: Pair, *arguments: str):
    command, *rest = arguments
    return pair.agent.replfs(command, pair.agent.target, *rest, check=False)


@contextlib.contextmanager
def appending(pair: Pair):
    """Numbered lines go into two files, one after the other, for as long as the block runs."""
    stop = threading.Event()
    failed: list[OSError] = []

    def write() -> None:
        number = 0
        while not stop.is_set():
            for name in ("first", "second"):
                try:
                    with (pair.mountpoint / name).open("a") as file:
                        file.write(f"{number}\n")
                except OSError as error:
                    failed.append(error)
                    return
            number += 1

    writer = threading.Thread(target=write)
    writer.start()
    try:
        wait_for(lambda: (pair.secondary_store / "second").stat().st_size > 100, what="lines")
        yield
    finally:
        stop.set()
        writer.join(30)
    assert not failed


def content(pair: Pair) -> list[bytes]:
    return [(pair.secondary_store / name).read_bytes() for name in ("first", "second")]


def test_a_frozen_replica_stands_still_and_catches_up(pair):
    with appending(pair):
        done = on_replica(pair, "freeze", "--timeout", "5m")
        assert (done.returncode, done.stdout) == (
            0, "frozen and flushed; it thaws by itself after 300 s\n",
        )  # fmt: skip
        frozen = content(pair)
        # Of one moment: the second file is at most one line behind the first.
        assert 0 <= frozen[0].count(b"\n") - frozen[1].count(b"\n") <= 1
        peer = pair.wait_state("out-of-sync")
        assert "frozen for a backup" in peer["reason"]
        size = (pair.primary_store / "second").stat().st_size
        wait_for(lambda: (pair.primary_store / "second").stat().st_size > size + 100, what="lines")
        # The link has tried again by then, and was refused: it says why, and keeps its state.
        wait_for(
            lambda: (
                (found := pair.peer())["state"] == "out-of-sync"
                and found["reason"].startswith("its replica is frozen")
            ),
            what="a refusal",
        )
        assert content(pair) == frozen
        assert pair.agent.status()["frozen_until"] > 0
        assert "thaw it first" in on_replica(pair, "freeze").stderr
        assert on_replica(pair, "thaw").returncode == 0
        pair.wait_in_sync()
    pair.assert_equal()
    assert pair.agent.status()["frozen_until"] is None
    done = on_replica(pair, "thaw")
    assert done.returncode == ExitCode.NOT_IN_SYNC
    assert "it is not frozen" in done.stderr


def test_it_thaws_by_itself(pair):
    assert on_replica(pair, "freeze", "--timeout", "1s").returncode == 0
    (pair.mountpoint / "file").write_text("hello")
    pair.wait_in_sync()
    pair.assert_equal()
    assert "it thaws by itself" in pair.agent.log_tail()


def test_what_cannot_be_frozen(pair):
    done = pair.mount.replfs("freeze", pair.mount.target, check=False)
    assert done.returncode == ExitCode.USAGE
    assert "this node is a primary" in done.stderr
    done = run_replfs("freeze", pair.secondary_store, "--timeout", "0", check=False)
    assert done.returncode == ExitCode.USAGE
    assert "it must be 1s to 7d" in done.stderr


def test_a_replica_in_the_middle_of_a_resync_is_not_frozen():
    def seed(pair: Pair) -> None:
        for number in range(4):
            (pair.primary_store / str(number)).write_bytes(bytes(1 << 20))

    with Pair(prepare=seed, mount_arguments=["--resync-rate", "64KiB"], start=False) as pair:
        pair.agent.start(wait=False)
        pair.mount.start()
        pair.wait_state("baseline")
        done = on_replica(pair, "freeze")
        assert done.returncode == ExitCode.NOT_IN_SYNC
        assert "the replica is inconsistent" in done.stderr
        done = on_replica(pair, "freeze", "--force")
        assert done.returncode == 0
        assert on_replica(pair, "thaw").returncode == 0
