"""`stop` and `umount` say how the node ended: drained and flushed, or what somebody lacks."""

from __future__ import annotations

import subprocess
import threading

import pytest
from helpers.nodes import Pair, wait_for

from replfs.cli.exit_codes import ExitCode

pytestmark = pytest.mark.mounted


def stop(pair: Pair, *arguments: str) -> subprocess.CompletedProcess[str]:
    return pair.mount.replfs("stop", pair.mount.target, *arguments, check=False)


def test_in_sync_both_sides_are_flushed():
    with Pair() as pair:
        (pair.mountpoint / "file").write_text("hello")
        done = stop(pair)
        # It says so when the process is gone, and its mount with it.
        assert not pair.mount.is_running
        assert (done.returncode, done.stdout) == (0, "drained, both sides are flushed\n")
        assert pair.mount.wait_ended() == ExitCode.OK
        done = pair.agent.replfs("stop", pair.agent.target)
        assert done.stdout == "drained, flushed\n"


def test_without_its_peer_it_says_what_the_peer_lacks():
    with Pair() as pair:
        pair.agent.kill9()
        pair.wait_state("out-of-sync")
        (pair.mountpoint / "file").write_text("hello")
        done = pair.mount.replfs("umount", pair.mountpoint, check=False)
        assert done.returncode == ExitCode.OK
        assert done.stdout.startswith("drained, this side is flushed; 127.0.0.1:")
        assert " lacks 1 file and 1 name: recorded, and carried when both run again" in done.stdout


def test_a_peer_that_does_not_answer_is_cut_off_when_the_time_is_over():
    with Pair(mount_arguments=["--peer-timeout", "300s", "--slow-peer", "0"]) as pair:
        (pair.mountpoint / "file").write_bytes(b"old")
        pair.agent.freeze()
        failed = []

        def write() -> None:
            try:
                (pair.mountpoint / "file").write_bytes(b"new")
            except OSError as error:
                # The mount is taken away from under it; what was begun is done all the same.
                failed.append(error)

        writer = threading.Thread(target=write, daemon=True)
        writer.start()
        wait_for(lambda: pair.mount.status()["in_flight"], what="a write in flight")
        done = stop(pair, "--timeout", "1s")
        assert done.returncode == ExitCode.OK, done
        assert "this side is flushed" in done.stdout
        assert " lacks " in done.stdout
        assert pair.mount.wait_ended() == ExitCode.OK
        assert "has not answered" in pair.mount.log_tail()
        writer.join(30)
        assert not writer.is_alive()
        pair.agent.thaw()
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()
