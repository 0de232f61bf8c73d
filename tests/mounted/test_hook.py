"""`hook` with real nodes: a peer that is lost and comes back, seen from both sides."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.nodes import Pair, make_base, remove_base, wait_for

pytestmark = pytest.mark.mounted


@pytest.fixture
def base():
    path = make_base()
    yield path
    remove_base(path)


def program(base: Path, name: str) -> list[str | Path]:
    """The options that give a node a hook which writes to a file."""
    path = base / name
    path.write_text(
        f"#!/bin/sh\necho $REPLFS_ROLE $REPLFS_EVENT >> {base}/{name}.out\n"
        "cat /proc/self/oom_score_adj\n"
    )
    path.chmod(0o755)
    return ["--hook", path, "--peer-timeout", "1s"]


def told(base: Path, name: str) -> list[str]:
    return (base / f"{name}.out").read_text().splitlines()


def test_a_peer_that_is_lost_and_comes_back(base):
    options = {name: program(base, name) for name in ("primary", "secondary")}
    with Pair(mount_arguments=options["primary"], agent_arguments=options["secondary"]) as pair:
        (pair.mountpoint / "file").write_bytes(b"x")
        expected = ["primary resync", "primary in-sync"]
        wait_for(lambda: told(base, "primary") == expected, what="in sync")
        wait_for(
            lambda: told(base, "secondary") == ["secondary inconsistent", "secondary in-sync"],
            what="in sync",
        )
        pair.agent.kill9()
        wait_for(lambda: told(base, "primary") == [*expected, "primary lost"], what="lost")
        (pair.mountpoint / "file").write_bytes(b"y")
        pair.agent.start()
        pair.wait_in_sync()
        wait_for(lambda: told(base, "primary")[3:] == expected, what="in sync again")
        pair.mount.kill9()
        wait_for(lambda: told(base, "secondary")[-1] == "secondary lost", what="lost")
        pair.mount.start()
        pair.wait_in_sync()
        number = len(told(base, "primary"))
        assert pair.mount.stop() == 0
        # Of its own end it says nothing. The OOM killer may have the program.
        assert len(told(base, "primary")) == number
        assert "hook: 0\n" in pair.mount.log_tail(1000)
