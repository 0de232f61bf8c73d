"""The comparer of `replfs demo`: it finds every kind of difference, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from replfs.cli import trees


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two equal trees with everything in them."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    ours.mkdir()
    trees.copy_in(str(ours), trees.sample(60), trees.Work())
    subprocess.run(["cp", "-a", ours, theirs], check=True)
    return ours, theirs


def compare(pair: tuple[Path, Path]) -> list[str]:
    ours, theirs = (trees.describe(str(top), trees.Work()) for top in pair)
    return trees.differences(ours, theirs)


def test_equal_trees_are_equal(pair):
    assert compare(pair) == []
    (pair[0] / ".replfs").mkdir()
    (pair[0] / ".replfs" / "state").write_text("x")
    os.utime(pair[0], ns=(0, os.stat(pair[1]).st_mtime_ns))
    assert compare(pair) == []
    os.setxattr(pair[0] / "special/two names", "user.replfs.id", b"x")
    assert compare(pair) == []


def _rewrite(path: Path) -> None:
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(0, status.st_mtime_ns))


def _unlink_one_name(special: Path) -> None:
    os.unlink(special / "two names")
    shutil.copy2(special / "zwei Namen äöü", special / "two names")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda top: (top / "special/new").touch(), "special/new: only on the peer"),
        (lambda top: os.unlink(top / "special/fifo"), "special/fifo: only on the primary"),
        (lambda top: _rewrite(top / "special/hole"), "special/hole: content"),
        (lambda top: os.chmod(top / "special/hole", 0o604), "special/hole: mode"),
        (lambda top: os.utime(top / "special/hole", ns=(0, 7)), "special/hole: mtime_ns"),
        (lambda top: os.setxattr(top / "special/hole", "user.x", b""), "special/hole: xattrs"),
        (
            lambda top: _unlink_one_name(top / "special"),
            "special/zwei Namen äöü: links, first_name",
        ),
        (lambda top: os.utime(top, ns=(0, 7)), ".: mtime_ns"),
    ],
)
def test_differences_are_found(pair, change, found):
    change(pair[1])
    assert any(line.startswith(found) for line in compare(pair))


def test_owners_and_devices_are_compared(pair):
    if os.geteuid() != 0:
        pytest.skip("needs root to give a file away")
    os.chown(pair[1] / "special/hole", 7, 8)
    os.mknod(pair[0] / "null", 0o600 | 0o020000, os.makedev(1, 3))
    os.mknod(pair[1] / "null", 0o600 | 0o020000, os.makedev(1, 5))
    lines = compare(pair)
    assert "special/hole: uid, gid" in lines
    assert any(line.startswith("null: ") and "device" in line for line in lines)


def test_changes_change_much_and_twice_the_same(pair):
    paths = trees.sample(60)
    trees.change(str(pair[0]), paths, trees.Work())
    lines = compare(pair)
    assert len(lines) > trees.NEW_FILES
    assert "and/deep/7: only on the primary" in lines
    trees.change(str(pair[1]), paths, trees.Work())
    assert all("mtime_ns" in line for line in compare(pair))


def test_work_can_be_stopped(pair):
    work = trees.Work()
    work.stop.set()
    with pytest.raises(trees.Stopped):
        trees.describe(str(pair[0]), work)
    assert work.files == 1
