"""Roles that change: promotion, fencing, the old primary's return."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from helpers.children import spawn
from helpers.group import Group
from helpers.nodes import Node, wait_for

pytestmark = pytest.mark.mounted


def promote(node: Node, *arguments: str) -> str:
    return node.replfs("promote", node.store, *arguments).stdout


def refusal(node: Node, *arguments: str | Path, code: int) -> str:
    """What the node says when it refuses a command."""
    done = node.replfs(*arguments, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stderr


def work(mountpoint: Path, report: Path, seed: int) -> None:
    """Write records until it fails; the report, outside of replfs, holds what was acknowledged."""
    rng = random.Random(seed)
    with report.open("wb", buffering=0) as out:
        for number in range(1_000_000):
            name = f"file-{number % 20}"
            line = b"%d-%d\n" % (seed, number)
            try:
                with (mountpoint / name).open("ab", buffering=0) as file:
                    file.write(line)
                if rng.random() < 0.1:
                    os.rename(mountpoint / name, mountpoint / f"kept-{seed}-{number}")
                    name = f"kept-{seed}-{number}"
                if rng.random() < 0.05:
                    os.mkdir(mountpoint / f"dir-{seed}-{number}")
            except OSError:
                return
            out.write(line)


def assert_all_there(store: Path, report: Path) -> int:
    """Every acknowledged line is in some file of the store; how many there are."""
    present = set()
    for path in store.iterdir():
        if path.is_file():
            present |= set(path.read_bytes().splitlines())
    wanted = report.read_bytes().splitlines()
    missing = [line for line in wanted if line not in present]
    assert not missing, f"{len(missing)} of {len(wanted)}, {missing[:3]}"
    return len(wanted)


def test_the_primary_dies_under_load_and_returns():
    """Promotion in place, everything acknowledged there, the old one fenced and resynchronised."""
    with Group(2) as group:
        a, b = group.nodes
        big = os.urandom(1 << 20)
        for number in range(16):
            (a.top / f"big-{number}").write_bytes(big)
        group.wait_in_sync(a)
        report = group.base / "report"
        worker = spawn(work, a.top, report, 1)
        wait_for(lambda: report.exists() and report.stat().st_size > 4000)
        a.kill9()
        worker.result()

        with pytest.raises(OSError, match="Read-only") as raised:
            (b.top / "new").write_bytes(b"x")
        assert raised.value.errno == errno.EROFS
        assert "this node is the primary now" in promote(b)
        assert assert_all_there(b.top, report) > 100
        (b.top / "new").write_bytes(b"by the new primary")
        (b.top / "big-3").unlink()

        # By the same command line as before; it is the one in its fstab.
        a.start()
        assert a.status()["role"] == "secondary"
        with pytest.raises(OSError, match="Read-only"):
            (a.top / "other").write_bytes(b"x")
        group.wait_in_sync(b)
        sent = group.peer(b, "a")["sent_bytes"]
        assert sent < 8 << 20, "a full copy would be 16 MiB"
        group.assert_equal()
        assert (a.top / "new").read_bytes() == b"by the new primary"
        assert_all_there(a.store, report)


def test_a_promotion_that_is_refused_says_why_and_changes_nothing():
    with Group(2) as group:
        a, b = group.nodes
        (a.top / "f").write_bytes(b"x")
        before = b.status()
        said = refusal(b, "promote", b.store, "--force", code=2)
        assert "the primary a is connected: use 'replfs switchover'" in said
        said = refusal(a, "promote", a.store, code=2)
        assert "is the primary already" in said
        after = b.status()
        assert (after["role"], after["generation"]) == ("secondary", before["generation"])
        (a.top / "f").write_bytes(b"y")
        group.assert_equal()
