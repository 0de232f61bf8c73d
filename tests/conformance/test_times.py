"""utimensat, futimens, and which calls change which time stamps.

Source: utimensat(2), inode(7) "The last ... timestamp", POSIX.1-2024 XBD 4.12.
"""

from __future__ import annotations

import errno
import os
from itertools import pairwise

import pytest
from helpers.cases import (
    BOTH_CACHES,
    KINDS,
    OLD_NS,
    fails,
    fd_of,
    make,
    make_owned,
    outcome,
    stamps,
    tick,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_USER, USER, as_user
from helpers.libc import UTIME_NOW, UTIME_OMIT, utimensat

pytestmark = BOTH_CACHES

SECOND = 10**9
MOMENTS = {
    "the epoch": 0,
    "the first nanosecond": 1,
    "before 1970": -1,
    "long before 1970": -2_000_000_000 * SECOND + 987_654_321,
    "before 2038": (2**31 - 1) * SECOND + 999_999_999,
    "after 2038": 2**31 * SECOND,
    "long after 2038": 10_000_000_000 * SECOND + 123_456_789,
    "nanoseconds": 1_600_000_000_999_999_999,
}
OMIT, NOW = (0, UTIME_OMIT), (0, UTIME_NOW)


def times(path) -> tuple[int, int]:
    status = os.lstat(path)
    return status.st_atime_ns, status.st_mtime_ns


@pytest.mark.parametrize("moment", MOMENTS.values(), ids=MOMENTS)
def test_explicit_times(tree, moment):
    write(tree / "file", b"")
    os.mkdir(tree / "dir")
    os.symlink("x", tree / "link")
    for name in ("file", "dir", "link"):
        os.utime(tree / name, ns=(moment, moment), follow_symlinks=False)
        assert times(tree / name) == (moment, moment)
        os.utime(tree / name, ns=(OLD_NS, moment), follow_symlinks=False)
        assert times(tree / name) == (OLD_NS, moment)


@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_what_it_is_told_and_ctime(tree, kind):
    path = tree / "object"
    make(kind, path)
    with stamps({path: "mc", tree.path: ""}):
        # In the future, as `stamps` lets no time stamp go back.
        os.utime(path, ns=(5, 4_000_000_000_000_000_000), follow_symlinks=False)
    assert times(path) == (5, 4_000_000_000_000_000_000)


def test_an_explicit_atime_is_on_both_stores(on_mount):
    future = 4_000_000_000_123_456_789
    write(on_mount / "file", b"data")
    os.mkdir(on_mount / "dir")
    for name in ("file", "dir"):
        os.utime(on_mount / name, ns=(future, OLD_NS))
        for store in on_mount.stores():
            assert times(store / name) == (future, OLD_NS)


def test_now_and_omit(tree):
    path = tree / "file"
    write(path, b"")
    os.utime(path, ns=(OLD_NS, OLD_NS))
    utimensat(path, OMIT, (7, 7))
    assert times(path) == (OLD_NS, 7 * SECOND + 7)
    utimensat(path, (8, 8), OMIT)
    assert times(path) == (8 * SECOND + 8, 7 * SECOND + 7)
    before = _now(tree)
    utimensat(path, NOW, OMIT)
    assert before <= times(path)[0] <= _now(tree)
    assert times(path)[1] == 7 * SECOND + 7
    utimensat(path, OMIT, NOW)
    assert before <= times(path)[1] <= _now(tree)
    os.utime(path)
    assert before <= min(times(path)) <= max(times(path)) <= _now(tree)


def _now(tree) -> int:
    tick(tree)
    write(tree / "clock", b"")
    return os.stat(tree / "clock").st_mtime_ns


def test_omitting_both_does_nothing(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o600)
    with unchanged(tree / "file"):
        utimensat(tree / "file", OMIT, OMIT)
        as_user(utimensat, tree / "file", OMIT, OMIT, uid=OTHER_USER)


def test_invalid_nanoseconds(tree):
    write(tree / "file", b"")
    with unchanged(tree / "file"):
        for nanoseconds in (SECOND, -1):
            with fails(errno.EINVAL):
                utimensat(tree / "file", (1, nanoseconds), OMIT)


def test_a_symlink_itself_or_what_it_points_to(tree):
    write(tree / "file", b"")
    os.symlink("file", tree / "link")
    os.utime(tree / "file", ns=(1, 1))
    os.utime(tree / "link", ns=(2, 2), follow_symlinks=False)
    assert (times(tree / "file"), times(tree / "link")) == ((1, 1), (2, 2))
    os.utime(tree / "link", ns=(3, 3))
    assert times(tree / "file") == (3, 3)
    assert times(tree / "link")[1] == 2


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY])
def test_through_a_descriptor(tree, flags):
    write(tree / "file", b"")
    with fd_of(tree / "file", flags) as fd:
        os.utime(fd, ns=(OLD_NS, OLD_NS))
    assert times(tree / "file") == (OLD_NS, OLD_NS)


def test_who_may(tree):
    make_owned("file", tree / "writable", OTHER_USER, GROUP, 0o666)
    make_owned("file", tree / "readable", OTHER_USER, GROUP, 0o644)
    make_owned("file", tree / "own", USER, GROUP, 0)

    def attempt():
        return {
            name: (
                outcome(utimensat, tree / name, NOW, NOW),
                outcome(utimensat, tree / name, (1, 1), (1, 1)),
                outcome(utimensat, tree / name, NOW, (1, 1)),
                outcome(utimensat, tree / name, NOW, OMIT),
            )
            for name in ("writable", "readable", "own")
        }

    assert as_user(attempt) == {
        "writable": ("ok", "EPERM", "EPERM", "EPERM"),
        "readable": ("EACCES", "EPERM", "EPERM", "EPERM"),
        "own": ("ok", "ok", "ok", "ok"),
    }


@pytest.mark.parametrize("descriptors", [1, 2])
def test_times_set_after_a_write_stay(tree, descriptors):
    # As cp -p, tar and rsync do it: nothing that comes later may touch the mtime again.
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"x" * 10_000)
        if descriptors == 1:
            os.utime(fd, ns=(OLD_NS, OLD_NS))
        else:
            os.utime(tree / "file", ns=(OLD_NS, OLD_NS))
        assert times(tree / "file")[1] == OLD_NS
        os.chmod(tree / "file", 0o640)
        os.fsync(fd)
        os.pread(fd, 10, 0)
    assert times(tree / "file")[1] == OLD_NS
    os.rename(tree / "file", tree / "moved")
    os.link(tree / "moved", tree / "linked")
    os.setxattr(tree / "moved", "user.x", b"1")
    assert times(tree / "linked")[1] == OLD_NS


def test_times_of_a_directory_set_last_stay(tree):
    os.mkdir(tree / "dir")
    write(tree / "dir/file", b"data")
    os.utime(tree / "dir", ns=(OLD_NS, OLD_NS))
    with open(tree / "dir/file", "ab") as file:
        file.write(b"more")
    os.chmod(tree / "dir/file", 0o600)
    assert os.listdir(tree / "dir") == ["file"]
    assert times(tree / "dir")[1] == OLD_NS


def test_a_write(tree):
    write(tree / "file", b"")
    with fd_of(tree / "file", os.O_RDWR) as fd:
        for call in (os.write, lambda fd, data: os.pwrite(fd, data, 5)):
            with stamps({tree / "file": "mc", tree.path: ""}):
                call(fd, b"data")


def test_calls_that_only_look(tree):
    write(tree / "file", b"data")
    os.symlink("file", tree / "link")
    with unchanged(tree, tree / "file", tree / "link"), fd_of(tree / "file", os.O_RDWR) as fd:
        os.read(fd, 10)
        os.lseek(fd, 0, os.SEEK_SET)
        os.fsync(fd)
        os.listdir(tree)
        os.readlink(tree / "link")
        os.access(tree / "file", os.W_OK)
        os.listxattr(tree / "file")
        os.statvfs(tree)


def test_the_clock_never_goes_back(tree):
    # make(1) believes in it: what was made or written later must not look older. Looked at only
    # afterwards, because looking makes the kernel's time stamps finer (multigrain, Linux 6.13).
    events = []
    for number in range(70):
        kind = KINDS[number % len(KINDS)]
        path = tree / f"{number} {kind}"
        make(kind, path)
        events.append(path)
        if kind == "file":
            with fd_of(path, os.O_WRONLY) as fd:
                os.write(fd, b"x")
        elif kind == "fifo":
            os.truncate(events[-3], number)
            events.append(events[-3])
    by_last_event = list(dict.fromkeys(reversed(events)))[::-1]
    assert len(by_last_event) == 70
    for earlier, later in pairwise(by_last_event):
        assert times(earlier)[1] <= times(later)[1], f"{later.name} looks older than {earlier.name}"
