"""open, creat, access, and who may do what. Source: open(2), access(2), path_resolution(7)."""

from __future__ import annotations

import errno
import os
import stat

import pytest
from helpers.cases import (
    KINDS,
    fails,
    fd_of,
    make,
    make_owned,
    mode_of,
    outcome,
    owner_of,
    read,
    stamps,
    unchanged,
    write,
)
from helpers.children import GROUP, OTHER_GROUP, OTHER_USER, USER, as_user, run
from helpers.libc import faccessat

ACCESS = {os.O_RDONLY: 4, os.O_WRONLY: 2, os.O_RDWR: 6}

# who -> (uid, gid, groups, how far its three bits are shifted), for an object of USER:GROUP
CLASSES = {
    "owner": (USER, OTHER_GROUP, (), 6),
    "group": (OTHER_USER, GROUP, (), 3),
    "supplementary group": (OTHER_USER, OTHER_GROUP, (7, GROUP, 9), 3),
    "other": (OTHER_USER, OTHER_GROUP, (7, 9), 0),
}
classes = pytest.mark.parametrize("who", CLASSES)


def expect(allowed: bool) -> str:
    return "ok" if allowed else "EACCES"


@classes
def test_permission_to_open(tree, who):
    uid, gid, groups, shift = CLASSES[who]
    for bits in range(8):
        # The other classes have just what this one lacks: only the right class counts.
        mode = (bits << shift) | (0o777 & ~(7 << shift) & ((7 - bits) * 0o111))
        make_owned("file", tree / str(bits), USER, GROUP, mode)

    def attempt():
        return {
            (bits, flags): outcome(os.open, tree / str(bits), flags)
            for bits in range(8)
            for flags in ACCESS
        }

    assert as_user(attempt, uid=uid, gid=gid, groups=groups) == {
        (bits, flags): expect(bits & ACCESS[flags] == ACCESS[flags])
        for bits in range(8)
        for flags in ACCESS
    }


@classes
def test_permission_by_access(tree, who):
    uid, gid, groups, shift = CLASSES[who]
    for bits in range(8):
        make_owned("file", tree / str(bits), USER, GROUP, bits << shift)

    def attempt():
        return [
            outcome(faccessat, tree / str(bits), wanted) for bits in range(8) for wanted in range(8)
        ]

    assert as_user(attempt, uid=uid, gid=gid, groups=groups) == [
        expect(bits & wanted == wanted) for bits in range(8) for wanted in range(8)
    ]


@classes
def test_permission_in_a_directory(tree, who):
    uid, gid, groups, shift = CLASSES[who]
    for bits in range(8):
        os.mkdir(tree / str(bits))
        write(tree / str(bits) / "file", b"")
        os.chmod(tree / str(bits) / "file", 0o666)
        os.chown(tree / str(bits), USER, GROUP)
        os.chmod(tree / str(bits), bits << shift)

    def attempt():
        found = {}
        for bits in range(8):
            directory = tree / str(bits)
            found[bits] = (
                outcome(os.listdir, directory),
                outcome(os.stat, directory / "file"),
                outcome(os.open, directory / "file", os.O_RDWR),
                outcome(os.mkdir, directory / "new"),
                outcome(os.unlink, directory / "file"),
            )
        return found

    assert as_user(attempt, uid=uid, gid=gid, groups=groups) == {
        bits: (
            expect(bool(bits & 4)),
            expect(bool(bits & 1)),
            expect(bool(bits & 1)),
            expect(bits & 3 == 3),
            expect(bits & 3 == 3),
        )
        for bits in range(8)
    }


def test_root_needs_an_x_to_execute_and_nothing_else(tree):
    make_owned("file", tree / "file", USER, GROUP, 0)
    assert outcome(faccessat, tree / "file", os.R_OK | os.W_OK) == "ok"
    assert outcome(faccessat, tree / "file", os.X_OK) == "EACCES"
    os.chmod(tree / "file", 0o001)
    assert outcome(faccessat, tree / "file", os.X_OK) == "ok"
    os.mkdir(tree / "dir", 0)
    assert outcome(faccessat, tree / "dir", os.R_OK | os.W_OK | os.X_OK) == "ok"
    assert os.listdir(tree / "dir") == []


def test_access_judges_the_real_user(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o600)

    def attempt():
        os.setresuid(OTHER_USER, USER, USER)
        return outcome(faccessat, tree / "file", os.R_OK), outcome(
            os.open, tree / "file", os.O_RDONLY
        )

    # Set-user-ID in miniature: the effective user may open what the real one may not.
    assert run(attempt) == ("EACCES", "ok")


def test_creation(tree):
    os.umask(0o027)
    with stamps({tree.path: "mc"}), fd_of(tree / "new", os.O_CREAT | os.O_RDWR, 0o666) as fd:
        assert os.fstat(fd).st_mode == stat.S_IFREG | 0o640
        assert os.fstat(fd).st_size == 0
    assert owner_of(tree / "new") == (0, 0)


def test_o_creat_of_what_exists_changes_nothing(tree):
    write(tree / "file", b"data")
    with unchanged(tree, tree / "file"), fd_of(tree / "file", os.O_CREAT | os.O_RDWR, 0o777):
        pass
    assert read(tree / "file") == b"data"


@pytest.mark.parametrize("mode", [0o000, 0o400, 0o444, 0o222])
def test_a_creator_may_write_whatever_mode_he_gives(tree, mode):
    os.chmod(tree.path, 0o777)

    def create():
        with fd_of(tree / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR, mode) as fd:
            os.write(fd, b"data")
            assert os.pread(fd, 9, 0) == b"data"
        if mode != 0o222:
            with fails(errno.EACCES):
                os.open(tree / "file", os.O_WRONLY)

    as_user(create)
    assert mode_of(tree / "file") == mode & ~0o022
    assert read(tree / "file") == b"data"


@pytest.mark.parametrize("flags", [os.O_WRONLY, os.O_RDWR, os.O_RDONLY])
def test_o_trunc(tree, flags):
    write(tree / "file", b"x" * 100_000)
    with stamps({tree / "file": "mc", tree.path: ""}), fd_of(tree / "file", flags | os.O_TRUNC):
        assert os.stat(tree / "file").st_size == 0
    with fd_of(tree / "file", os.O_WRONLY | os.O_TRUNC | os.O_CREAT) as fd:
        os.write(fd, b"new")
    assert read(tree / "file") == b"new"


def test_o_trunc_of_an_empty_file(tree):
    write(tree / "file", b"")
    with stamps({tree / "file": "mc"}), fd_of(tree / "file", os.O_WRONLY | os.O_TRUNC):
        pass


def test_o_trunc_while_others_have_it_open(tree):
    write(tree / "file", b"x" * 10_000)
    with fd_of(tree / "file", os.O_RDWR) as fd:
        with fd_of(tree / "file", os.O_WRONLY | os.O_TRUNC):
            pass
        assert os.fstat(fd).st_size == 0
        assert os.pread(fd, 10, 0) == b""
        os.pwrite(fd, b"y", 5)
    assert read(tree / "file") == b"\0\0\0\0\0y"


def test_o_trunc_needs_write_permission(tree):
    write(tree / "file", b"data")
    os.chmod(tree / "file", 0o444)
    with unchanged(tree / "file"), fails(errno.EACCES):
        as_user(os.open, tree / "file", os.O_RDONLY | os.O_TRUNC)
    assert read(tree / "file") == b"data"


def test_o_excl_meets_every_kind(tree):
    for kind in KINDS:
        make(kind, tree / kind)
        with unchanged(tree / kind, tree), fails(errno.EEXIST):
            os.open(tree / kind, os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def test_o_creat_makes_what_a_symlink_points_to(tree):
    os.symlink("made", tree / "link")
    with fd_of(tree / "link", os.O_CREAT | os.O_WRONLY) as fd:
        os.write(fd, b"data")
    assert read(tree / "made") == b"data"
    assert os.path.islink(tree / "link")


def test_a_directory_cannot_be_written(tree):
    os.mkdir(tree / "dir")
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC, os.O_CREAT):
        with fails(errno.EISDIR):
            os.open(tree / "dir", flags)
    with fd_of(tree / "dir") as fd:
        with fails(errno.EISDIR):
            os.read(fd, 1)
        with fails(errno.EBADF):
            os.write(fd, b"x")


def test_o_directory_and_o_nofollow(tree):
    os.mkdir(tree / "dir")
    write(tree / "file", b"")
    os.symlink("file", tree / "link")
    os.symlink("dir", tree / "link to dir")
    for name in ("file", "link"):
        with fails(errno.ENOTDIR):
            os.open(tree / name, os.O_DIRECTORY)
    with fails(errno.ELOOP):
        os.open(tree / "link", os.O_NOFOLLOW)
    with fails(errno.ENOTDIR):
        os.open(tree / "link to dir", os.O_NOFOLLOW | os.O_DIRECTORY)
    with fd_of(tree / "link", os.O_NOFOLLOW | os.O_PATH) as fd:
        assert stat.S_ISLNK(os.fstat(fd).st_mode)
    with fd_of(tree / "link to dir", os.O_DIRECTORY):
        pass


def test_what_cannot_be_opened(tree):
    os.mkfifo(tree / "fifo")
    make("socket", tree / "socket")
    with fails(errno.ENXIO):
        os.open(tree / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    with fails(errno.ENXIO):
        os.open(tree / "socket", os.O_RDWR)
    os.mknod(tree / "no driver", stat.S_IFCHR | 0o666, os.makedev(4095, 99))
    with fails(errno.ENXIO, errno.ENODEV):
        os.open(tree / "no driver", os.O_RDONLY)


def test_o_path_gives_no_access(tree):
    write(tree / "file", b"data")
    with fd_of(tree / "file", os.O_PATH) as fd:
        with fails(errno.EBADF):
            os.read(fd, 1)
        with fails(errno.EBADF):
            os.ftruncate(fd, 0)
        assert os.fstat(fd).st_size == 4
        assert read(f"/proc/self/fd/{fd}") == b"data"


def test_o_noatime_is_for_the_owner(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o666)
    with fails(errno.EPERM):
        as_user(os.open, tree / "file", os.O_RDONLY | os.O_NOATIME, uid=OTHER_USER)
    assert as_user(lambda: outcome(os.open, tree / "file", os.O_NOATIME)) == "ok"


def test_access_by_the_mode_it_was_opened_with(tree):
    write(tree / "file", b"data")
    with fd_of(tree / "file", os.O_RDONLY) as fd:
        with fails(errno.EBADF):
            os.write(fd, b"x")
        with fails(errno.EINVAL):
            os.ftruncate(fd, 0)
    with fd_of(tree / "file", os.O_WRONLY) as fd, fails(errno.EBADF):
        os.read(fd, 1)


@pytest.mark.parametrize("flags", [os.O_SYNC, os.O_DSYNC])
def test_synchronous_writes(tree, flags):
    with fd_of(tree / "file", os.O_CREAT | os.O_WRONLY | flags) as fd:
        for number in range(5):
            assert os.write(fd, b"%d" % number) == 1
        assert os.pwrite(fd, b"x" * 70_000, 3) == 70_000
    assert read(tree / "file") == b"012" + b"x" * 70_000


def test_opened_by_a_directory_descriptor(tree):
    os.mkdir(tree / "dir")
    write(tree / "dir/file", b"data")
    with fd_of(tree / "dir") as directory:
        os.rename(tree / "dir", tree / "moved")
        fd = os.open("file", os.O_RDONLY, dir_fd=directory)
        assert os.read(fd, 9) == b"data"
        os.close(fd)
        os.mkdir("sub", dir_fd=directory)
        assert os.stat("..", dir_fd=directory).st_ino == os.stat(tree).st_ino
    assert sorted(os.listdir(tree / "moved")) == ["file", "sub"]


def test_more_groups_than_fit_anywhere(tree):
    groups = range(30_000, 30_400)
    make_owned("file", tree / "file", 0, 30_399, 0o060)

    def attempt():
        with fd_of(tree / "file", os.O_RDWR) as fd:
            return os.write(fd, b"data")

    assert as_user(attempt, groups=groups) == 4
    with fails(errno.EACCES):
        as_user(attempt, groups=range(30_000, 30_399))


def test_the_effective_user_counts_not_the_saved_one(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o600)

    def attempt():
        os.setgroups([])
        os.setegid(OTHER_GROUP)
        os.seteuid(OTHER_USER)
        before = outcome(os.open, tree / "file", os.O_RDONLY)
        os.seteuid(0)
        os.seteuid(USER)
        return before, outcome(os.open, tree / "file", os.O_RDONLY)

    assert run(attempt) == ("EACCES", "ok")
