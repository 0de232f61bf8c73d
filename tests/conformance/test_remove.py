"""unlink, rmdir, and files that are open and have no name. Source: unlink(2), rmdir(2)."""

from __future__ import annotations

import errno
import mmap
import os

import pytest
from helpers.cases import (
    NOT_DIRECTORY,
    exists,
    fails,
    fd_of,
    make,
    outcome,
    read,
    stamps,
    unchanged,
    write,
)
from helpers.children import GROUP, USER, as_user, together


@pytest.mark.parametrize("kind", NOT_DIRECTORY)
def test_unlink(tree, kind):
    make(kind, tree / "object")
    with stamps({tree.path: "mc"}):
        os.unlink(tree / "object")
    assert os.listdir(tree) == []
    with unchanged(tree), fails(errno.ENOENT):
        os.unlink(tree / "object")
    make("directory", tree / "object")


@pytest.mark.parametrize("kind", NOT_DIRECTORY)
def test_rmdir_of_what_is_none(tree, kind):
    make(kind, tree / "object")
    with unchanged(tree / "object", tree), fails(errno.ENOTDIR):
        os.rmdir(tree / "object")


def test_unlink_of_a_directory(tree):
    os.mkdir(tree / "dir")
    with unchanged(tree / "dir", tree), fails(errno.EISDIR, errno.EPERM):
        os.unlink(tree / "dir")


def test_rmdir(tree):
    os.mkdir(tree / "dir")
    with stamps({tree.path: "mc"}):
        os.rmdir(tree / "dir")
    assert (os.listdir(tree), os.stat(tree).st_nlink) == ([], 2)


def test_rmdir_of_a_directory_that_is_not_empty(tree):
    os.makedirs(tree / "dir/sub")
    with unchanged(tree / "dir", tree), fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rmdir(tree / "dir")
    os.rename(tree / "dir/sub", tree / "sub")
    write(tree / "dir/file", b"")
    with fails(errno.ENOTEMPTY, errno.EEXIST):
        os.rmdir(tree / "dir")
    os.unlink(tree / "dir/file")
    os.rmdir(tree / "dir")


def test_rmdir_of_dots(tree):
    os.makedirs(tree / "dir/sub")
    assert outcome(os.rmdir, f"{tree.path}/dir/.") == "EINVAL"
    assert outcome(os.rmdir, f"{tree.path}/dir/sub/..") in ("ENOTEMPTY", "EEXIST")


def test_a_removed_working_directory(tree):
    os.mkdir(tree / "dir")
    os.chdir(tree / "dir")
    os.rmdir(tree / "dir")
    assert os.listdir(".") == []
    for call in (os.mkdir, os.mkfifo, lambda path: os.symlink("x", path)):
        assert outcome(call, "new") == "ENOENT"
    assert outcome(os.open, "new", os.O_CREAT | os.O_WRONLY) == "ENOENT"
    assert os.stat(".").st_nlink == 0
    os.chmod(".", 0o700)
    os.chdir("/")


def test_use_of_an_unlinked_file(tree):
    write(tree / "file", b"some data")
    with fd_of(tree / "file", os.O_RDWR) as fd, fd_of(tree / "file") as reader:
        os.unlink(tree / "file")
        assert os.fstat(fd).st_nlink == 0
        os.pwrite(fd, b"SOME", 0)
        assert os.pread(reader, 99, 0) == b"SOME data"
        os.ftruncate(fd, 200_000)
        assert os.fstat(reader).st_size == 200_000
        os.fchmod(fd, 0o741)
        os.fchown(fd, USER, GROUP)
        os.utime(fd, ns=(1, 2))
        os.fsync(fd)
        os.setxattr(fd, "user.x", b"1")
        assert os.getxattr(fd, "user.x") == b"1"
        status = os.fstat(reader)
        assert (status.st_mode & 0o7777, status.st_uid, status.st_gid) == (0o741, USER, GROUP)
        assert status.st_mtime_ns == 2
        write(tree / "file", b"another")
        assert os.fstat(fd).st_size == 200_000
        assert os.fstat(fd).st_nlink == 0
    assert read(tree / "file") == b"another"


def test_an_unlinked_file_opened_again(tree):
    write(tree / "file", b"data")
    with fd_of(tree / "file", os.O_RDONLY) as fd:
        os.unlink(tree / "file")
        with fd_of(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
            os.pwrite(again, b"D", 0)
        with fd_of(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC) as again:
            os.write(again, b"anew")
        assert os.pread(fd, 9, 0) == b"anew"


def test_a_mapping_of_an_unlinked_file(tree):
    write(tree / "file", bytes(8192))
    with fd_of(tree / "file", os.O_RDWR) as fd:
        mapping = mmap.mmap(fd, 8192)
    os.unlink(tree / "file")
    mapping[5000:5004] = b"data"
    mapping.flush()
    assert mapping[5000:5004] == b"data"
    mapping.close()


def test_an_unlinked_file_in_a_removed_directory(tree):
    os.mkdir(tree / "dir")
    with fd_of(tree / "dir/file", os.O_CREAT | os.O_RDWR) as fd:
        os.unlink(tree / "dir/file")
        os.rmdir(tree / "dir")
        os.mkdir(tree / "dir")
        os.write(fd, b"x" * 100_000)
        assert os.pread(fd, 1 << 20, 0) == b"x" * 100_000
    os.rmdir(tree / "dir")


def test_many_unlinked_files_at_once(tree):
    fds = []
    try:
        for number in range(100):
            fds.append(os.open(tree / "temporary", os.O_CREAT | os.O_EXCL | os.O_RDWR))
            os.unlink(tree / "temporary")
            os.pwrite(fds[-1], b"%d" % number, number)
        for number, fd in enumerate(fds):
            assert os.pread(fd, 999, 0) == bytes(number) + b"%d" % number
    finally:
        for fd in fds:
            os.close(fd)


def test_a_user_removes_in_his_own_directory_only(tree):
    os.mkdir(tree / "own")
    os.chown(tree / "own", USER, GROUP)
    for directory in (tree.path, tree / "own"):
        write(directory / "file", b"")
        os.mkdir(directory / "dir")

    def attempt():
        return [
            outcome(call, directory / name)
            for directory in (tree.path, tree / "own")
            for call, name in ((os.unlink, "file"), (os.rmdir, "dir"))
        ]

    assert as_user(attempt) == ["EACCES", "EACCES", "ok", "ok"]
    assert sorted(os.listdir(tree)) == ["dir", "file", "own"]


def test_only_one_of_many_removes_it(tree):
    for number in range(20):
        write(tree / str(number), b"")
        os.mkdir(tree / f"dir {number}")

    def remove():
        return [
            (outcome(os.unlink, tree / str(number)), outcome(os.rmdir, tree / f"dir {number}"))
            for number in range(20)
        ]

    results = together(*[remove] * 4)
    for number in range(20):
        for call in range(2):
            found = sorted(result[number][call] for result in results)
            assert found == ["ENOENT"] * 3 + ["ok"]
    assert not exists(tree / "0")
