"""flock, POSIX and open-file-description locks. Source: flock(2), fcntl(2)."""

from __future__ import annotations

import errno
import fcntl
import os
import struct

import pytest
from helpers.cases import fails, fd_of, make_owned, read, write
from helpers.children import GROUP, USER, as_user, run, spawn, together

# struct flock: l_type, l_whence, l_start, l_len, l_pid
LOCK = "hhqqi4x"


def lock(fd, command, kind, start=0, length=0):
    """fcntl(2) with a struct flock; returns (type, start, length, pid)."""
    done = fcntl.fcntl(fd, command, struct.pack(LOCK, kind, os.SEEK_SET, start, length, 0))
    found = struct.unpack(LOCK, done)
    return found[0], found[2], found[3], found[4]


@pytest.fixture
def file(tree):
    write(tree / "file", b"x" * 1000)
    return tree / "file"


def test_flock_is_exclusive(file):
    with fd_of(file) as one, fd_of(file) as two:
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for kind in (fcntl.LOCK_EX, fcntl.LOCK_SH):
            with fails(errno.EWOULDBLOCK):
                fcntl.flock(two, kind | fcntl.LOCK_NB)
        fcntl.flock(one, fcntl.LOCK_UN)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_flock_is_shared_and_upgraded(file):
    with fd_of(file) as one, fd_of(file) as two:
        fcntl.flock(one, fcntl.LOCK_SH | fcntl.LOCK_NB)
        fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(two, fcntl.LOCK_UN)
        fcntl.flock(one, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_flock_ends_with_the_last_duplicate(file):
    with fd_of(file) as two:
        one = os.open(file, os.O_RDONLY)
        duplicate = os.dup(one)
        fcntl.flock(one, fcntl.LOCK_EX)
        os.close(one)
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(duplicate)
        fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_flock_of_a_process_that_dies_is_released(file):
    reader, writer = os.pipe()

    def hold():
        fcntl.flock(os.open(file, os.O_RDWR), fcntl.LOCK_EX)
        os.write(writer, b"1")
        os.read(os.pipe()[0], 1)  # for ever

    child = spawn(hold)
    os.read(reader, 1)
    with fd_of(file) as fd:
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.kill()
        fcntl.flock(fd, fcntl.LOCK_EX)
    os.close(reader)
    os.close(writer)


def test_flock_waits_and_excludes(tree):
    write(tree / "counter", b"0")

    def count():
        for _ in range(25):
            with fd_of(tree / "counter", os.O_RDWR) as fd:
                fcntl.flock(fd, fcntl.LOCK_EX)
                value = int(os.pread(fd, 20, 0))
                os.pwrite(fd, b"%d" % (value + 1), 0)

    together(*[count] * 4)
    assert read(tree / "counter") == b"100"


def test_posix_locks_wait_and_exclude(tree):
    write(tree / "counter", b"0")

    def count():
        for _ in range(25):
            with fd_of(tree / "counter", os.O_RDWR) as fd:
                fcntl.lockf(fd, fcntl.LOCK_EX)
                value = int(os.pread(fd, 20, 0))
                os.pwrite(fd, b"%d" % (value + 1), 0)

    together(*[count] * 4)
    assert read(tree / "counter") == b"100"


def test_posix_locks_are_on_ranges(file):
    with fd_of(file, os.O_RDWR) as fd:
        lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK, 100, 50)
        lock(fd, fcntl.F_SETLK, fcntl.F_RDLCK, 300, 50)

        def other():
            with fd_of(file, os.O_RDWR) as mine:
                for start, length, kind in (
                    (0, 100, fcntl.F_WRLCK), (150, 150, fcntl.F_WRLCK), (320, 10, fcntl.F_RDLCK)
                ):  # fmt: skip
                    lock(mine, fcntl.F_SETLK, kind, start, length)
                for start, length, kind in (
                    (0, 101, fcntl.F_WRLCK), (149, 1, fcntl.F_RDLCK), (349, 1, fcntl.F_WRLCK),
                    (0, 0, fcntl.F_WRLCK),
                ):  # fmt: skip
                    with fails(errno.EAGAIN, errno.EACCES):
                        lock(mine, fcntl.F_SETLK, kind, start, length)
                return lock(mine, fcntl.F_GETLK, fcntl.F_WRLCK, 0, 0), lock(
                    mine, fcntl.F_GETLK, fcntl.F_WRLCK, 500, 0
                )

        blocker, free = run(other)
        assert blocker == (fcntl.F_WRLCK, 100, 50, os.getpid())
        assert free[0] == fcntl.F_UNLCK


def test_posix_locks_split_and_end_with_any_close(file):
    def may_lock(start):
        def attempt():
            with fd_of(file, os.O_RDWR) as mine:
                try:
                    lock(mine, fcntl.F_SETLK, fcntl.F_WRLCK, start, 1)
                except OSError:
                    return False
                return True

        return run(attempt)

    with fd_of(file, os.O_RDWR) as fd:
        lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK, 0, 100)
        lock(fd, fcntl.F_SETLK, fcntl.F_UNLCK, 40, 20)
        assert [may_lock(start) for start in (39, 40, 59, 60, 100)] == [
            False, True, True, False, True
        ]  # fmt: skip
        os.close(os.open(file, os.O_RDONLY))
        assert may_lock(39)


def test_posix_locks_are_not_inherited(file):
    with fd_of(file, os.O_RDWR) as fd:
        lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK)

        def child():
            with fails(errno.EAGAIN, errno.EACCES):
                lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK)

        run(child)


def test_posix_locks_find_a_deadlock(file):
    ready = [os.pipe() for _ in range(2)]

    def one(own, other, mine, theirs):
        with fd_of(file, os.O_RDWR) as fd:
            lock(fd, fcntl.F_SETLKW, fcntl.F_WRLCK, own, 1)
            os.write(theirs[1], b"1")
            os.read(mine[0], 1)
            try:
                lock(fd, fcntl.F_SETLKW, fcntl.F_WRLCK, other, 1)
            except OSError as error:
                return error.errno
            return 0

    try:
        found = together(
            lambda: one(0, 1, ready[0], ready[1]), lambda: one(1, 0, ready[1], ready[0])
        )
    finally:
        for fds in ready:
            os.close(fds[0])
            os.close(fds[1])
    assert sorted(found) == [0, errno.EDEADLK]


def test_posix_locks_need_the_access_they_lock(file):
    with fd_of(file, os.O_RDONLY) as fd, fails(errno.EBADF):
        lock(fd, fcntl.F_SETLK, fcntl.F_WRLCK)
    with fd_of(file, os.O_WRONLY) as fd, fails(errno.EBADF):
        lock(fd, fcntl.F_SETLK, fcntl.F_RDLCK)


def test_ofd_locks_belong_to_the_open_file(file):
    with fd_of(file, os.O_RDWR) as one, fd_of(file, os.O_RDWR) as two:
        lock(one, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, 0, 100)
        lock(two, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, 100, 100)
        with fails(errno.EAGAIN, errno.EACCES):
            lock(two, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, 99, 1)
        os.close(os.open(file, os.O_RDONLY))  # unlike POSIX locks, a close elsewhere ends nothing
        found = lock(two, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, 0, 0)
        assert found == (fcntl.F_WRLCK, 0, 100, -1)


def test_locks_survive_rename_and_unlink(tree, file):
    with fd_of(file, os.O_RDWR) as one:
        fcntl.flock(one, fcntl.LOCK_EX)
        os.rename(file, tree / "moved")
        with fd_of(tree / "moved") as two, fails(errno.EWOULDBLOCK):
            fcntl.flock(two, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.unlink(tree / "moved")
        write(file, b"another")
        with fd_of(file) as three:
            fcntl.flock(three, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_user_s_lock_stops_root(tree):
    make_owned("file", tree / "file", USER, GROUP, 0o600)
    os.chmod(tree / "file", 0o666)
    with fd_of(tree / "file") as fd:
        fcntl.flock(fd, fcntl.LOCK_EX)

        def attempt():
            with fd_of(tree / "file") as own, fails(errno.EWOULDBLOCK):
                fcntl.flock(own, fcntl.LOCK_EX | fcntl.LOCK_NB)

        as_user(attempt)


def test_flock_of_a_directory(tree):
    with fd_of(tree) as one, fd_of(tree) as two:
        fcntl.flock(one, fcntl.LOCK_EX)
        with fails(errno.EWOULDBLOCK):
            fcntl.flock(two, fcntl.LOCK_EX | fcntl.LOCK_NB)
