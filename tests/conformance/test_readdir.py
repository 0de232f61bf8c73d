"""Reading directories: completeness, positions, and changes meanwhile. Source: readdir(3)."""

from __future__ import annotations

import os
import stat
from collections import Counter

import pytest
from helpers.cases import KINDS, TYPES, fails, fd_of, make, write
from helpers.children import as_user, spawn
from helpers.libc import Directory

MANY = 1200


@pytest.fixture
def directory(tree):
    """An open stream on `tree / "dir"`."""
    os.mkdir(tree / "dir")
    stream = Directory(tree / "dir")
    yield stream
    stream.close()


def test_dot_and_dot_dot(tree):
    os.mkdir(tree / "dir")
    for path in (tree.path, tree / "dir"):
        stream = Directory(path)
        entries = {}
        while (entry := stream.read()) is not None:
            entries[entry[0]] = entry[1:]
        stream.close()
        assert entries[b"."] == (os.stat(path).st_ino, 4)
        assert b".." in entries
        assert entries[b".."][1] == 4


def test_types_and_inode_numbers(tree):
    for kind in KINDS:
        make(kind, tree / kind)
    os.link(tree / "file", tree / "link")
    stream = Directory(tree)
    found = {}
    while (entry := stream.read()) is not None:
        found[os.fsdecode(entry[0])] = entry[1:]
    stream.close()
    for kind in KINDS:
        assert found[kind] == (os.lstat(tree / kind).st_ino, TYPES[kind] >> 12)
    assert found["link"] == found["file"]


def test_thousands_of_entries(tree):
    os.mkdir(tree / "dir")
    names = {f"{number:05d}" + "n" * (number % 200) for number in range(MANY)}
    with fd_of(tree / "dir") as fd:
        for name in names:
            os.mknod(name, stat.S_IFREG | 0o600, dir_fd=fd)
    assert sorted(os.listdir(tree / "dir")) == sorted(names)
    _seek_everywhere(tree / "dir")
    # Concurrent change: what is there throughout is listed exactly once.
    _read_under_change(tree / "dir", sorted(names))
    for name in names:
        os.unlink(tree / "dir" / name)
    os.rmdir(tree / "dir")


def _seek_everywhere(path):
    stream = Directory(path)
    entries, positions = [], [stream.tell()]
    while (entry := stream.read()) is not None:
        entries.append(entry)
        positions.append(stream.tell())
    assert len(entries) == MANY + 2
    for index in (MANY - 1, 0, MANY // 2, 7, MANY + 1):
        stream.seek(positions[index])
        assert stream.read() == entries[index]
        assert stream.read() == (entries[index + 1] if index <= MANY else None)
    stream.rewind()
    assert len(stream.names()) == MANY
    stream.close()


def _read_under_change(path, names):
    stable, volatile = names[::2], names[1::2]

    def change():
        for round_ in range(2):
            for number, name in enumerate(volatile[:100]):
                os.unlink(path / name)
                write(path / f"new {round_} {number}", b"")
                os.rename(path / f"new {round_} {number}", path / name)

    child = spawn(change)
    rounds = 0
    try:
        while rounds < 4:
            stream = Directory(path)
            seen = Counter(map(os.fsdecode, stream.names()))
            stream.close()
            assert all(seen[name] == 1 for name in stable)
            assert set(seen) <= set(names) | {name for name in seen if name.startswith("new ")}
            rounds += 1
    finally:
        child.result()
    assert sorted(os.listdir(path)) == names


def test_removing_while_reading_removes_everything(tree):
    # As rm -r does it, in one pass.
    os.mkdir(tree / "dir")
    for number in range(300):
        os.mknod(tree / f"dir/{number}", stat.S_IFREG | 0o600)
    removed = 0
    with os.scandir(tree / "dir") as entries:
        for entry in entries:
            os.unlink(entry.path)
            removed += 1
    assert removed == 300
    os.rmdir(tree / "dir")


def test_rewinding_shows_what_has_changed(tree, directory):
    assert directory.names() == []
    write(tree / "dir/new", b"")
    directory.rewind()
    assert directory.names() == [b"new"]
    os.rename(tree / "dir/new", tree / "dir/newer")
    os.mkdir(tree / "dir/sub")
    directory.rewind()
    assert sorted(directory.names()) == [b"newer", b"sub"]
    os.unlink(tree / "dir/newer")
    directory.rewind()
    assert directory.names() == [b"sub"]


def test_what_was_listed_once_is_listed_as_it_is_now(tree):
    """The kernel may keep what it has read, until a name changes: in each way that one can."""
    here, other = tree / "dir", tree / "other"
    os.mkdir(here)
    os.mkdir(other)
    write(other / "moved in", b"")
    names = set()

    def changed(*, added=(), removed=()):
        names.difference_update(removed)
        names.update(added)
        for _ in range(2):
            assert sorted(os.listdir(here)) == sorted(names)

    changed()
    for kind in KINDS:
        make(kind, here / kind)
        changed(added=[kind])
    os.link(here / "file", here / "link")
    changed(added=["link"])
    os.rename(here / "file", here / "renamed")
    changed(added=["renamed"], removed=["file"])
    os.rename(here / "renamed", here / "link")  # the same file: nothing happens
    changed()
    write(here / "replacing", b"")
    os.replace(here / "replacing", here / "renamed")
    changed()
    os.rename(other / "moved in", here / "moved in")
    changed(added=["moved in"])
    os.rename(here / "moved in", other / "moved out")
    changed(removed=["moved in"])
    assert os.listdir(other) == ["moved out"]
    os.unlink(here / "link")
    changed(removed=["link"])
    os.rmdir(here / "directory")
    changed(removed=["directory"])


def test_a_directory_removed_while_open(tree, directory):
    os.rmdir(tree / "dir")
    assert directory.names() == []


def test_a_directory_moved_while_open(tree, directory):
    write(tree / "dir/file", b"")
    os.mkdir(tree / "elsewhere")
    os.rename(tree / "dir", tree / "elsewhere/dir")
    directory.rewind()
    assert directory.names() == [b"file"]


def test_through_a_descriptor(tree):
    os.mkdir(tree / "dir")
    write(tree / "dir/file", b"")
    with fd_of(tree / "dir") as fd:
        assert os.listdir(fd) == ["file"]
        write(tree / "dir/second", b"")
        os.lseek(fd, 0, os.SEEK_SET)
        assert sorted(os.listdir(fd)) == ["file", "second"]


def test_what_is_listed_can_be_looked_up_at_once(tree):
    os.mkdir(tree / "dir")
    for number in range(100):
        write(tree / f"dir/{number}", b"x" * number)
    with os.scandir(tree / "dir") as entries:
        for entry in entries:
            status = os.stat(entry.path)
            assert status.st_size == int(entry.name)
            assert status.st_ino == entry.inode()


def test_a_long_listing_is_fresh(tree):
    # Listing may bring attributes along; they must not be older than the last change.
    write(tree / "file", b"")
    os.listdir(tree)
    for number in range(1, 20):
        with open(tree / "file", "ab") as file:
            file.write(b"x")
        os.listdir(tree)
        assert os.stat(tree / "file").st_size == number
        os.chmod(tree / "file", 0o600 + number % 8)
        os.listdir(tree)
        assert os.stat(tree / "file").st_mode & 0o777 == 0o600 + number % 8


def test_a_name_that_was_not_there_is_found_once_it_is(tree):
    for number in range(20):
        path = tree / f"late {number}"
        assert not os.path.exists(path)
        maker = (lambda p: write(p, b""), os.mkdir, lambda p: os.symlink("x", p), os.mkfifo)
        maker[number % 4](path)
        assert os.path.lexists(path)
        os.rename(path, tree / "moved")
        assert not os.path.lexists(path)
        os.rename(tree / "moved", path)
        assert os.path.lexists(path)


def test_a_listing_needs_read_permission_only(tree):
    os.mkdir(tree / "dir")
    write(tree / "dir/file", b"")
    os.chmod(tree / "dir", 0o744)

    def attempt():
        assert os.listdir(tree / "dir") == ["file"]
        with fails(13):
            os.stat(tree / "dir/file")

    as_user(attempt)
