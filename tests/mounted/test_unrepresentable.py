"""What a peer's store cannot hold is listed, stops nothing else, and is tried again."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
from helpers.cases import write
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted


@pytest.fixture
def pair() -> Iterator[Pair]:
    with Pair(mount_arguments=("--peer-timeout", "2s")) as pair:
        yield pair
        # Else it could not be removed.
        forbid(pair, "-i")


def forbid(pair: Pair, how: str) -> None:
    """The peer's store refuses names in a directory (`+i`), or takes them again (`-i`)."""
    subprocess.run(["chattr", how, pair.secondary_store / "dir"], check=True)


def listed(pair: Pair, count: int) -> None:
    """Wait until so many objects are listed, and everything else is in sync."""

    def is_so() -> bool:
        status = pair.mount.status()
        assert (status["unrepresentable"], status["state"]) == (count, "in-sync"), status
        return True

    wait_for(is_so, 30, "the list")


def test_it_is_listed_and_tried_again(pair):
    top = pair.mountpoint
    (top / "dir").mkdir()
    forbid(pair, "+i")
    write(top / "dir" / "new", b"x" * 100)
    write(top / "other", b"y")
    listed(pair, 2)  # the directory's own attributes cannot be set, either
    assert os.getxattr(top / "dir" / "new", "user.replfs.state") == b"unrepresentable"
    assert (pair.secondary_store / "other").read_bytes() == b"y"
    # A new session tries again, and so does a new process, which knows the list.
    pair.mount.kill9()
    pair.mount.start()
    listed(pair, 2)
    forbid(pair, "-i")
    pair.mount.kill9()
    pair.mount.start()
    listed(pair, 0)
    pair.assert_equal()


def test_what_is_removed_is_not_listed_any_more(pair):
    top = pair.mountpoint
    (top / "dir").mkdir()
    forbid(pair, "+i")
    write(top / "dir" / "new", b"x" * 100)
    listed(pair, 2)
    os.unlink(top / "dir" / "new")
    listed(pair, 1)
    forbid(pair, "-i")
    pair.agent.kill9()
    pair.agent.start()
    listed(pair, 0)
    pair.assert_equal()
