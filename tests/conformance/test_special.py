"""Devices, fifos and sockets in use, programs that are run, and set-user-ID.

Source: fifo(7), unix(7), execve(2).
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import socket
import stat
import subprocess

import pytest
from helpers.cases import bound_socket, fails, fd_of, in_directory, outcome, read, write
from helpers.children import OTHER_USER, USER, as_user, spawn, together


def test_devices_work(tree):
    for name, minor in (("null", 3), ("zero", 5)):
        os.mknod(tree / name, stat.S_IFCHR | 0o666, os.makedev(1, minor))
        os.chmod(tree / name, 0o666)

    def use():
        with fd_of(tree / "null", os.O_RDWR) as null, fd_of(tree / "zero") as zero:
            return os.write(null, b"gone"), os.read(null, 10), os.read(zero, 10)

    assert use() == (4, b"", bytes(10))
    assert as_user(use) == (4, b"", bytes(10))


def test_a_fifo_carries_data(tree):
    os.mkfifo(tree / "fifo", 0o600)

    def send():
        with fd_of(tree / "fifo", os.O_WRONLY) as fd:
            for number in range(100):
                os.write(fd, b"%d\n" % number)

    def receive():
        return read(tree / "fifo")

    received = together(send, receive)[1]
    assert received == b"".join(b"%d\n" % number for number in range(100))
    assert os.stat(tree / "fifo").st_size == 0


def test_a_fifo_through_two_names(tree):
    os.mkfifo(tree / "one")
    os.link(tree / "one", tree / "two")
    with fd_of(tree / "one", os.O_RDWR) as one, fd_of(tree / "two", os.O_RDWR) as two:
        os.write(one, b"data")
        assert os.read(two, 10) == b"data"


def test_a_socket_can_be_connected(tree):
    server = bound_socket(tree / "socket")
    assert stat.S_ISSOCK(os.lstat(tree / "socket").st_mode)

    def talk():
        with socket.socket(socket.AF_UNIX) as client:
            with in_directory(tree):
                client.connect("socket")
            client.sendall(b"hello")
            return client.recv(10)

    child = spawn(talk)
    connection = server.accept()[0]
    assert connection.recv(10) == b"hello"
    connection.sendall(b"back")
    assert child.result() == b"back"
    connection.close()
    with in_directory(tree), socket.socket(socket.AF_UNIX) as second, fails(errno.EADDRINUSE):
        second.bind("socket")
    os.rename(tree / "socket", tree / "moved")
    with in_directory(tree), socket.socket(socket.AF_UNIX) as client:
        client.connect("moved")
    server.close()
    with in_directory(tree), socket.socket(socket.AF_UNIX) as client, fails(errno.ECONNREFUSED):
        client.connect("moved")


def test_the_mode_of_a_socket_counts(tree):
    os.umask(0o077)
    server = bound_socket(tree / "socket")

    def attempt():
        with in_directory(tree), socket.socket(socket.AF_UNIX) as client:
            return outcome(client.connect, "socket")

    assert as_user(attempt) == "EACCES"
    os.chmod(tree / "socket", 0o777)
    assert as_user(attempt) == "ok"
    server.close()


@pytest.fixture
def program(tree):
    """A copy of a real program, executable by all."""
    path = tree / "program"
    shutil.copy(shutil.which("id") or "/bin/id", path)
    os.chmod(path, 0o755)
    return path


def execute(*command, **options):
    return subprocess.run(
        [os.fspath(part) for part in command],
        capture_output=True, text=True, check=False, timeout=60, **options,
    )  # fmt: skip


def test_programs_and_scripts_run(tree, program):
    assert execute(program, "-u").stdout == "0\n"
    write(tree / "script", b'#!/bin/sh\necho "$0 $1"\n')
    os.chmod(tree / "script", 0o755)
    assert execute(tree / "script", "x").stdout == f"{tree / 'script'} x\n"
    assert execute("./script", "y", cwd=tree).stdout == "./script y\n"


def test_without_an_x_nothing_runs(program):
    os.chmod(program, 0o644)
    with fails(errno.EACCES):
        os.execv(program, ["id"])
    os.chmod(program, 0o744)

    def attempt():
        with fails(errno.EACCES):
            os.execv(program, ["id"])

    as_user(attempt)


def test_set_user_id(program):
    os.chown(program, OTHER_USER, -1)
    os.chmod(program, 0o4755)
    assert as_user(lambda: execute(program, "-u").stdout, uid=USER) == f"{OTHER_USER}\n"
    os.chmod(program, 0o755)
    assert as_user(lambda: execute(program, "-u").stdout, uid=USER) == f"{USER}\n"


def test_set_group_id(program):
    os.chown(program, -1, 4711)
    os.chmod(program, 0o2755)
    assert as_user(lambda: execute(program, "-g").stdout, uid=USER) == "4711\n"


def change_while_running(directory):
    path = directory / "sleep"
    shutil.copy(shutil.which("sleep") or "/bin/sleep", path)
    os.chmod(path, 0o755)
    with subprocess.Popen([path, "1000"]) as process:
        try:
            # Popen returns when execve has succeeded.
            return (
                outcome(os.open, path, os.O_WRONLY),
                outcome(os.open, path, os.O_RDWR | os.O_TRUNC),
                outcome(os.truncate, path, 0),
                outcome(os.chmod, path, 0o700),
                outcome(os.rename, path, directory / "moved"),
                outcome(os.unlink, directory / "moved"),
            )
        finally:
            process.kill()


def test_a_running_program_cannot_be_written(tree, tmp_path):
    found = change_while_running(tree)
    # Linux 6.11 and 6.12 allow it, on every filesystem.
    assert found == change_while_running(tmp_path)
    assert found[0] in ("ETXTBSY", "ok")
    assert found[3:] == ("ok", "ok", "ok")


def test_a_file_open_for_writing_cannot_be_run(program):
    with fd_of(program, os.O_WRONLY):
        done = outcome(execute, program, "-u")
    assert done == "ETXTBSY" or platform.release().startswith(("6.11.", "6.12."))
    assert execute(program, "-u").stdout == "0\n"


def test_an_unlinked_program_runs_on(tree, program):
    with fd_of(program, os.O_RDONLY) as fd:
        os.unlink(program)
        done = execute(f"/proc/self/fd/{fd}", "-u", pass_fds=[fd])
    assert done.stdout == "0\n"
