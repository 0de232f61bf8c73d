"""The comparer finds each kind of difference, and nothing where there is none."""

from __future__ import annotations

import os
import socket
import struct
import threading
from pathlib import Path

import pytest
from helpers.compare import compare_trees, describe, wait_equal

OLD_NS = 1_500_000_000_123_456_789
ACL = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", tag, permissions, identity)
    for tag, permissions, identity in (
        (0x01, 6, 0xFFFFFFFF), (0x02, 4, 12345), (0x04, 4, 0xFFFFFFFF),
        (0x10, 4, 0xFFFFFFFF), (0x20, 0, 0xFFFFFFFF),
    )
)  # fmt: skip


def fill(root: Path) -> None:
    """A tree with one of everything; equal whenever it is made."""
    root.mkdir()
    (root / "file").write_bytes(b"content" * 1000)
    (root / "empty").touch()
    (root / "dir" / "deeper").mkdir(parents=True)
    (root / "dir" / "deeper" / "leaf").write_bytes(b"leaf")
    os.link(root / "file", root / "dir" / "link")
    (root / "symlink").symlink_to("no/where")
    os.mkfifo(root / "fifo", 0o640)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "socket"))
    os.mknod(root / "null", 0o020666, os.makedev(1, 3))
    os.setxattr(root / "file", "user.colour", b"green")
    os.setxattr(root / "dir", "user.colour", b"blue")
    os.makedirs(os.fsencode(root) + b"/\xff\xfe not text")
    with (root / "sparse").open("wb") as file:
        file.seek(5 << 30)
        file.write(b"end")
    for path in sorted(root.rglob("*"), reverse=True):
        os.utime(path, ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    os.utime(root, ns=(OLD_NS, OLD_NS))


@pytest.fixture
def trees(tmp_path):
    fill(tmp_path / "left")
    fill(tmp_path / "right")
    return tmp_path / "left", tmp_path / "right"


def found(trees, **options):
    return [
        (os.fsdecode(difference.path), difference.kind.split(" at ")[0].split(" in ")[0])
        for difference in compare_trees(*trees, **options)
    ]


def change_file(path: Path, offset: int, data: bytes) -> None:
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def untouched(directory: Path) -> None:
    os.utime(directory, ns=(OLD_NS, OLD_NS))


def test_equal_trees_have_no_differences(trees):
    assert compare_trees(*trees, holes=4096) == []


def test_a_tree_equals_itself(trees):
    assert compare_trees(trees[0], trees[0], holes=4096) == []


def test_the_reserved_directory_is_ignored_in_the_root_only(trees):
    (trees[1] / ".replfs").mkdir()
    (trees[1] / "dir" / ".replfs").mkdir()
    untouched(trees[1])
    untouched(trees[1] / "dir")
    assert found(trees) == [("dir/.replfs", "existence")]


@pytest.mark.parametrize("name", ["trusted.replfs.id", "trusted.replfs", "user.replfs.id"])
def test_the_hidden_xattr_is_ignored(trees, name):
    os.setxattr(trees[1] / "file", name, b"1234")
    assert found(trees) == []


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_name(trees, side):
    (trees[side] / "empty").unlink()
    untouched(trees[side])
    assert found(trees) == [("empty", "existence")]


def test_a_missing_name_deep_down(trees):
    (trees[0] / "dir/deeper/leaf").unlink()
    untouched(trees[0] / "dir/deeper")
    assert found(trees) == [("dir/deeper/leaf", "existence")]


def test_a_name_that_is_not_text(trees):
    os.chmod(os.fsencode(trees[1]) + b"/\xff\xfe not text", 0o700)
    [difference] = compare_trees(*trees)
    assert difference.path == b"\xff\xfe not text"
    assert "mode" in str(difference)


def test_the_type(trees):
    (trees[1] / "empty").unlink()
    (trees[1] / "empty").mkdir()
    untouched(trees[1])
    assert found(trees) == [("empty", "type")]


@pytest.mark.parametrize("offset", [0, 6999])
def test_content(trees, offset):
    change_file(trees[1] / "file", offset, b"X")
    # Found under the first of the file's two names, once.
    assert found(trees) == [("dir/link", "content")]
    assert f"byte {offset}" in describe(trees[0], trees[1], compare_trees(*trees))


def test_content_in_what_is_a_hole_on_the_other_side(trees):
    change_file(trees[0] / "sparse", 3 << 30, b"X")
    assert found(trees) == [("sparse", "content")]


def test_zeros_equal_a_hole_unless_holes_are_compared(trees):
    change_file(trees[0] / "sparse", 3 << 30, bytes(65536))
    assert found(trees) == []
    assert found(trees, holes=65536) == [("sparse", "holes")]


def test_a_hole_below_the_unit_is_no_difference(trees):
    for side, offset in ((0, 1 << 30), (1, (1 << 30) + 8192)):
        change_file(trees[side] / "sparse", offset, bytes(4096))
    assert found(trees, holes=65536) == []
    assert found(trees, holes=4096) == [("sparse", "holes")]


@pytest.mark.parametrize("size", [3, 8000])
def test_the_size(trees, size):
    os.truncate(trees[1] / "dir/deeper/leaf", size)
    os.utime(trees[1] / "dir/deeper/leaf", ns=(OLD_NS, OLD_NS))
    assert found(trees) == [("dir/deeper/leaf", "size")]


def test_the_mode(trees):
    (trees[1] / "dir").chmod(0o1755)
    assert found(trees) == [("dir", "mode")]


@pytest.mark.parametrize("owner", [(1, -1), (-1, 1)])
@pytest.mark.parametrize("name", ["empty", "dir", "symlink", "fifo"])
def test_the_owner(trees, name, owner):
    os.chown(trees[0] / name, *owner, follow_symlinks=False)
    assert found(trees) == [(name, "owner")]


@pytest.mark.parametrize("name", ["empty", "dir", "symlink", "null"])
def test_one_nanosecond(trees, name):
    os.utime(trees[1] / name, ns=(OLD_NS, OLD_NS + 1), follow_symlinks=False)
    assert found(trees) == [(name, "mtime")]
    assert found(trees, times=False) == []


def test_atime_is_not_compared(trees):
    os.utime(trees[1] / "empty", ns=(OLD_NS - 1, OLD_NS))
    assert found(trees) == []


def test_a_symlink_target(trees):
    (trees[1] / "symlink").unlink()
    (trees[1] / "symlink").symlink_to("no/wher3")
    os.utime(trees[1] / "symlink", ns=(OLD_NS, OLD_NS), follow_symlinks=False)
    untouched(trees[1])
    assert found(trees) == [("symlink", "target")]


def test_a_device_number(trees):
    (trees[1] / "null").unlink()
    os.mknod(trees[1] / "null", 0o020666, os.makedev(1, 5))
    (trees[1] / "null").chmod((trees[0] / "null").stat().st_mode & 0o7777)
    untouched(trees[1] / "null")
    untouched(trees[1])
    assert found(trees) == [("null", "device")]


@pytest.mark.parametrize("name", ["file", "dir"])
def test_an_xattr_value(trees, name):
    os.setxattr(trees[1] / name, "user.colour", b"red")
    expected = [("dir", "xattr user.colour")]
    if name == "file":
        expected = [("dir/link", "xattr user.colour"), ("file", "xattr user.colour")]
    assert sorted(found(trees)) == expected


@pytest.mark.parametrize("side", [0, 1])
def test_a_missing_xattr(trees, side):
    os.setxattr(trees[side] / "empty", "user.more", b"")
    assert found(trees) == [("empty", "xattr user.more")]


def test_an_acl(trees):
    for tree in trees:
        (tree / "empty").chmod(0o640)
    os.setxattr(trees[1] / "empty", "system.posix_acl_access", ACL)
    assert found(trees) == [("empty", "xattr system.posix_acl_access")]


def test_a_default_acl(trees):
    os.setxattr(trees[1] / "dir", "system.posix_acl_default", ACL)
    assert found(trees) == [("dir", "xattr system.posix_acl_default")]


def test_a_copy_in_the_place_of_a_link(trees):
    copy = trees[1] / "file"
    data = copy.read_bytes()
    copy.unlink()
    copy.write_bytes(data)
    os.setxattr(copy, "user.colour", b"green")
    untouched(copy)
    untouched(trees[1])
    kinds = {kind for _, kind in found(trees)}
    assert kinds == {"nlink", "links"}


def test_a_link_in_the_place_of_a_copy(trees):
    for tree in trees:
        (tree / "one").write_bytes(b"same")
        (tree / "two").write_bytes(b"same")
    (trees[1] / "two").unlink()
    os.link(trees[1] / "one", trees[1] / "two")
    assert ("two", "links") in found(trees, times=False)


def test_links_that_pair_up_differently(trees):
    for tree in trees:
        for name in "abcd":
            (tree / name).write_bytes(b"same")
    for tree, second in ((trees[0], "bd"), (trees[1], "db")):
        for first, other in zip("ac", second, strict=True):
            (tree / other).unlink()
            os.link(tree / first, tree / other)
    assert {kind for _, kind in found(trees, times=False)} == {"links"}


def test_a_link_to_outside_the_tree(trees):
    os.link(trees[1] / "empty", trees[1].parent / "outside")
    assert found(trees) == [("empty", "nlink")]


def test_the_root_itself(trees):
    trees[1].chmod(0o700)
    os.setxattr(trees[1], "user.colour", b"red")
    os.utime(trees[1], ns=(0, 0))
    assert sorted(found(trees)) == [("", "mode"), ("", "mtime"), ("", "xattr user.colour")]
    assert found(trees, root_attributes=False) == []


def test_deeper_than_a_path_can_be(trees):
    for side, tree in enumerate(trees):
        fd = os.open(tree, os.O_RDONLY)
        for _ in range(40):
            os.mkdir(b"d" * 200, dir_fd=fd)
            below = os.open(b"d" * 200, os.O_RDONLY, dir_fd=fd)
            os.close(fd)
            fd = below
        os.mknod(b"leaf", 0o100600 + side, dir_fd=fd)
        os.close(fd)
    [difference] = compare_trees(*trees, times=False)
    assert difference.kind == "mode"
    assert len(difference.path) > 4096


def test_the_list_is_bounded(trees):
    for number in range(200):
        (trees[0] / str(number)).touch()
    assert len(compare_trees(*trees, limit=7)) == 7


def test_it_leaves_no_descriptors(trees):
    before = sorted(os.listdir("/proc/self/fd"))
    compare_trees(*trees)
    for number in range(20):
        (trees[0] / str(number)).touch()
    compare_trees(*trees, limit=3)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_waiting_returns_when_they_become_equal(trees):
    (trees[1] / "empty").unlink()
    untouched(trees[1])

    def repair() -> None:
        (trees[1] / "empty").touch()
        os.utime(trees[1] / "empty", ns=(OLD_NS, OLD_NS))
        untouched(trees[1])

    timer = threading.Timer(0.05, repair)
    timer.start()
    wait_equal(*trees, timeout_s=30)
    timer.join()


def test_waiting_in_vain_says_what_differs(trees):
    (trees[1] / "empty").unlink()
    with pytest.raises(AssertionError, match="'empty': existence: True != False"):
        wait_equal(*trees, timeout_s=0.05)
