"""What is changed in STORE while nothing is mounted is found at the next start, and carried."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time

import pytest
from helpers.compare import compare_trees
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted

MARGIN_S = 2.5
"""What is changed less than two seconds before a stop is looked at, too."""


def settle(pair: Pair) -> None:
    """End the primary cleanly, when nothing has changed for longer than the margin."""
    pair.wait_in_sync()
    time.sleep(MARGIN_S)
    assert pair.mount.stop() == 0


def rescanned(pair: Pair) -> dict[str, int]:
    """Wait for the end of the rescan; its event."""

    def find() -> dict[str, int] | None:
        done = pair.mount.replfs("events", pair.mount.target, "--json")
        lines = [line for line in done.stdout.splitlines() if '"rescan"' in line]
        return json.loads(lines[-1]) if lines else None

    found = wait_for(find, 60, "the rescan to end", 0.1)
    assert found is not None
    return found


@pytest.fixture
def filled():
    with Pair() as pair:
        top = pair.mountpoint
        (top / "d/e").mkdir(parents=True)
        for number in range(50):
            (top / f"d/e/{number}").write_bytes(b"%d" % number)
        (top / "d/big").write_bytes(bytes(3 << 20))
        (top / "d/link").symlink_to("big")
        (top / "gone").write_bytes(b"x")
        (top / "moved").mkdir()
        (top / "moved/inside").write_bytes(b"inside")
        yield pair


def change(pair: Pair) -> None:
    """All kinds of changes, behind the mount."""
    top = pair.primary_store
    with (top / "d/big").open("r+b") as file:
        file.seek(2 << 20)
        file.write(b"changed")
    os.chmod(top / "d/e/3", 0o600)
    os.setxattr(top / "d/e/4", "user.new", b"x")
    os.unlink(top / "gone")
    os.rename(top / "moved", top / "d/elsewhere")
    (top / "d/elsewhere/inside").write_bytes(b"INSIDE")
    os.link(top / "d/e/5", top / "d/hard")
    (top / "d/new").write_bytes(b"new")
    shutil.copytree(top / "d/e", top / "copy")
    # A copy of an object with its hidden record, and its old times.
    subprocess.run(["cp", "-a", top / "d/e/6", top / "d/e/6 copied"], check=True)
    (top / "d/e/7").write_bytes(b"seven")
    os.utime(top / "d/e/7", ns=(1, 1))


def test_everything_that_was_changed_is_found_and_carried(filled):
    settle(filled)
    change(filled)
    filled.mount.start()
    found = rescanned(filled)
    assert found["marked"] > 5
    filled.wait_in_sync()
    filled.assert_equal()


def test_nothing_is_carried_where_nothing_was_changed(filled):
    settle(filled)
    filled.mount.start()
    found = rescanned(filled)
    assert found["files"] >= 55
    assert found["marked"] == 0, found
    filled.wait_in_sync()
    assert filled.peer()["sent_bytes"] < 100_000


def test_it_can_be_left_out():
    with Pair(mount_arguments=("-o", "no-rescan")) as pair:
        (pair.mountpoint / "file").write_bytes(b"x")
        settle(pair)
        (pair.primary_store / "file").write_bytes(b"behind")
        pair.mount.start()
        pair.wait_in_sync()
        assert [str(one) for one in compare_trees(pair.primary_store, pair.secondary_store)]
        assert "rescan" not in pair.mount.replfs("events", pair.mount.target).stdout


def test_after_a_kill_too(filled):
    filled.wait_in_sync()
    filled.mount.kill9()
    change(filled)
    filled.mount.start()
    rescanned(filled)
    filled.wait_in_sync()
    filled.assert_equal()


def test_while_applications_change_the_same(filled):
    """What is changed behind the mount and then through it, before the walk is there."""
    settle(filled)
    change(filled)
    filled.mount.start()
    top = filled.mountpoint
    for number in range(50):
        with (top / f"d/e/{number}").open("ab") as file:
            file.write(b"appended")
    os.rename(top / "d/e", top / "e2")
    (top / "d/new").unlink()
    rescanned(filled)
    filled.wait_in_sync()
    filled.assert_equal()


def test_mounts_inside_the_store_are_not_crossed(filled):
    inside = filled.primary_store / "d/fs"
    inside.mkdir()
    settle(filled)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", inside], check=True)
    try:
        (inside / "file").write_bytes(b"not ours")
        filled.mount.start()
        rescanned(filled)
        filled.wait_in_sync()
        assert not (filled.secondary_store / "d/fs/file").exists()
        assert filled.mount.stop() == 0
    finally:
        subprocess.run(["umount", inside], check=True)
