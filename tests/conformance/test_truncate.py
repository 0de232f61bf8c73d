"""truncate, ftruncate, and what a write or a truncate does to set-ID bits.

Source: truncate(2), POSIX.1-2024 ftruncate(), write(2).
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import signal

import pytest
from helpers.cases import (
    BOTH_CACHES,
    NOT_SYMLINK,
    fails,
    fd_of,
    make,
    make_owned,
    mode_of,
    outcome,
    read,
    stamps,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_USER, USER, ChildDied, as_user, run, spawn

pytestmark = BOTH_CACHES

DATA = bytes(range(256)) * 40
SIZES = (0, 1, 4095, 4096, 4097, len(DATA) - 1, len(DATA), len(DATA) + 1, 65_536, 1_000_003)


def by_path(path, size):
    os.truncate(path, size)


def by_descriptor(path, size):
    with fd_of(path, os.O_WRONLY) as fd:
        os.ftruncate(fd, size)


ways = pytest.mark.parametrize("truncate", [by_path, by_descriptor])


@ways
@pytest.mark.parametrize("size", SIZES)
def test_content_afterwards(tree, truncate, size):
    write(tree / "file", DATA)
    truncate(tree / "file", size)
    assert os.stat(tree / "file").st_size == size
    assert read(tree / "file") == DATA[:size] + bytes(max(0, size - len(DATA)))


@ways
def test_what_was_cut_off_does_not_come_back(tree, truncate):
    write(tree / "file", b"x" * 10_000)
    for size in (5_000, 9_000, 4_100, 4_096, 12_000, 100, 12_000):
        truncate(tree / "file", size)
    assert read(tree / "file") == b"x" * 100 + bytes(11_900)


def test_a_cut_then_a_write_beyond(tree):
    write(tree / "file", b"x" * 9_000)
    with fd_of(tree / "file", os.O_RDWR) as fd:
        os.ftruncate(fd, 10)
        os.pwrite(fd, b"y", 8_999)
        assert os.pread(fd, 99_999, 0) == b"x" * 10 + bytes(8_989) + b"y"


@ways
def test_time_stamps(tree, truncate):
    write(tree / "file", DATA)
    for size in (10, 100):
        with stamps({tree / "file": "mc", tree.path: ""}):
            truncate(tree / "file", size)


def test_time_stamps_when_the_size_stays(tree):
    write(tree / "file", DATA)
    with stamps({tree / "file": "mc"}):
        by_descriptor(tree / "file", len(DATA))


def test_what_cannot_be_truncated(tree):
    os.chdir(tree)
    found = {}
    for kind in NOT_SYMLINK:
        make(kind, kind)
        found[kind] = outcome(os.truncate, kind, 0)
    assert found == {
        "file": "ok", "directory": "EISDIR", "fifo": "EINVAL", "block": "EINVAL",
        "character": "EINVAL", "socket": "EINVAL",
    }  # fmt: skip
    assert outcome(os.truncate, "file", -1) == "EINVAL"
    with fd_of("directory") as fd:
        assert outcome(os.ftruncate, fd, 0) == "EINVAL"


def test_a_size_beyond_what_the_filesystem_can(tree):
    write(tree / "file", b"data")
    with unchanged(tree / "file"), fails(errno.EFBIG, errno.EINVAL):
        os.truncate(tree / "file", 1 << 60)


def test_the_size_limit_of_a_process(tree):
    write(tree / "file", b"data")

    def attempt():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        found = [outcome(os.truncate, tree / "file", 10_001)]
        with fd_of(tree / "file", os.O_WRONLY) as fd:
            found.append(outcome(os.pwrite, fd, b"x", 10_000))
            found.append(str(os.pwrite(fd, b"x" * 100, 9_990)))
        os.truncate(tree / "file", 9_000)
        return found

    assert run(attempt) == ["EFBIG", "EFBIG", "10"]
    assert os.stat(tree / "file").st_size == 9_000


def test_write_permission_is_needed(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o644)
    with unchanged(tree / "file"), fails(errno.EACCES):
        as_user(os.truncate, tree / "file", 5, uid=OTHER_USER)
    as_user(os.truncate, tree / "file", 5)
    assert os.stat(tree / "file").st_size == 5


def test_an_open_descriptor_keeps_the_right_to(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o600)

    def attempt():
        with fd_of(tree / "file", os.O_RDWR) as fd:
            os.chmod(tree / "file", 0o400)
            os.ftruncate(fd, 7)
            return outcome(os.truncate, tree / "file", 8)

    assert as_user(attempt) == "EACCES"
    assert os.stat(tree / "file").st_size == 7


def test_a_mapping_shrinks_with_its_file(tree):
    write(tree / "file", b"x" * 3 * mmap.PAGESIZE)

    def attempt():
        with fd_of(tree / "file", os.O_RDWR) as fd:
            mapping = mmap.mmap(fd, 3 * mmap.PAGESIZE)
            os.ftruncate(fd, 100)
            assert mapping[99:101] == b"x\0"
            return mapping[mmap.PAGESIZE]

    with pytest.raises(ChildDied) as died:
        spawn(attempt).result()
    assert died.value.signal == signal.SIGBUS


def do_write(path):
    with fd_of(path, os.O_WRONLY) as fd:
        os.write(fd, b"x")


def do_nothing_written(path):
    with fd_of(path, os.O_WRONLY) as fd:
        os.write(fd, b"")


def do_open_truncating(path):
    with fd_of(path, os.O_WRONLY | os.O_TRUNC):
        pass


CHANGES = {
    "write": do_write,
    "O_TRUNC": do_open_truncating,
    "truncate": lambda path: by_path(path, 3),
    "ftruncate": lambda path: by_descriptor(path, 300),
}
changes = pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)


@changes
@pytest.mark.parametrize(
    ("before", "after"), [(0o4777, 0o777), (0o2777, 0o777), (0o6777, 0o777), (0o2767, 0o2767)]
)
def test_a_change_by_a_user_clears_set_id_bits(tree, change, before, after):
    path = tree / "file"
    write(path, b"12345")
    os.chown(path, OTHER_USER, GROUP)  # a member of the group, so 2767 is not a set-ID bit
    os.chmod(path, before)
    as_user(change, path)
    assert mode_of(path) == after


@changes
def test_a_change_by_root_and_set_id_bits(tree, change):
    write(tree / "file", b"12345")
    os.chmod(tree / "file", 0o6777)
    change(tree / "file")
    # Who writes is not visible through FUSE here, so a mount clears them for root, too. POSIX
    # (write(), "Upon successful completion") leaves that to the implementation.
    assert mode_of(tree / "file") == (0o777 if tree.mounted else 0o6777)


def test_writing_nothing_changes_nothing(tree):
    make_owned("file", tree / "file", OTHER_USER, GROUP, 0o6777)
    with unchanged(tree / "file"):
        as_user(do_nothing_written, tree / "file")
