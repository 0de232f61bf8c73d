"""The acknowledgement level `close`, on a real mount: what waits, what does not, what is kept.

A frozen agent (SIGSTOP) answers nothing, and its peer timeout is long: what needs an answer then
hangs, and what does not returns at once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.cases import fails, fd_of, outcome, read, write
from helpers.children import ChildDied, spawn
from helpers.compare import compare_trees
from helpers.nodes import Pair, run_replfs, wait_for

from replfs.transport.flow import WINDOW_OPS

pytestmark = pytest.mark.mounted

ACK = "user.replfs.ack"
POLICY = "user.replfs.policy"
CLOSE = ("--ack", "close")
PATIENT = ("--peer-timeout", "60s")
QUICK = ("--peer-timeout", "1s")
HANGS_S = 0.3
"""What has not returned by then, hangs."""
SOON_S = 20.0
"""Well below the patient peer timeout."""


@pytest.fixture(scope="module")
def one_pair():
    """A pair whose mount acknowledges at close, and waits long for its peer."""
    with Pair(mount_arguments=(*CLOSE, *PATIENT)) as fresh:
        yield fresh
        fresh.wait_in_sync()
        fresh.assert_equal()


class Place:
    """A directory of its own on a mount that acknowledges at close."""

    def __init__(self, pair: Pair, name: str) -> None:
        self.pair = pair
        self.top = pair.mountpoint / name
        self.here = pair.primary_store / name
        self.there = pair.secondary_store / name
        self.top.mkdir()

    def compare(self) -> None:
        """Nothing is on its way any more: both sides are equal this moment."""
        found = compare_trees(self.here, self.there)
        assert found == [], [str(one) for one in found]


@pytest.fixture
def place(one_pair, request):
    """A fresh directory."""
    return Place(one_pair, request.node.name)


@contextlib.contextmanager
def frozen(pair: Pair) -> Iterator[None]:
    """The agent answers nothing for as long as the block lasts."""
    pair.agent.freeze()
    try:
        yield
    finally:
        pair.agent.thaw()


class Call(threading.Thread):
    """A call that may hang, in a thread of its own."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        super().__init__(daemon=True)
        self._work = function, arguments
        self.error: BaseException | None = None
        self.start()

    def run(self) -> None:
        function, arguments = self._work
        try:
            function(*arguments)
        except OSError as error:
            self.error = error

    def hangs(self) -> bool:
        self.join(HANGS_S)
        return self.is_alive()

    def result(self) -> None:
        self.join(SOON_S)
        assert not self.is_alive(), "it hangs"
        if self.error is not None:
            raise self.error


def get(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.replfs.{name}").decode()


def level(path: Path) -> tuple[str, str]:
    """The effective acknowledgement level and where it comes from."""
    return get(path, "ack.effective"), get(path, "ack.source")


# What waits --------------------------------------------------------------------------------------
#
# While the agent is frozen only the first change returns for certain: ten milliseconds later the
# next one waits, and on a busy machine they are over soon.


def changes(top: Path) -> dict[str, Callable[[], object]]:
    """Every kind of change that is not awaited by itself, on what `prepare` made."""
    return {
        "create": lambda: os.open(top / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL),
        "mkdir": lambda: os.mkdir(top / "new"),
        "symlink": lambda: os.symlink("x", top / "new"),
        "mknod": lambda: os.mkfifo(top / "new"),
        "unlink": lambda: os.unlink(top / "other"),
        "rmdir": lambda: os.rmdir(top / "dir"),
        "write": lambda: os.pwrite(os.open(top / "file", os.O_RDWR), b"x", 7),
        "truncate": lambda: os.truncate(top / "file", 3),
        "chmod": lambda: os.chmod(top / "file", 0o600),
        "utime": lambda: os.utime(top / "file", (1, 1)),
        "setxattr": lambda: os.setxattr(top / "file", "user.x", b"y"),
        "removexattr": lambda: os.removexattr(top / "file", "user.a"),
    }


def prepare(top: Path) -> None:
    write(top / "file", b"content")
    os.setxattr(top / "file", "user.a", b"b")
    write(top / "other", b"x")
    os.mkdir(top / "dir")


@pytest.mark.parametrize("waiting", ["fsync", "rename", "link"])
def test_every_change_returns_before_the_peer_and_is_awaited(place, waiting):
    for kind in changes(place.top):
        top = place.top / kind
        top.mkdir()
        prepare(top)
        write(top / "a", b"x")
        with fd_of(top) as directory, fd_of(top / "file") as file:
            awaited: dict[str, tuple[Callable[..., object], Any, Any]] = {
                "fsync": (sync_both, directory, file),
                "rename": (os.rename, top / "a", top / "b"),
                "link": (os.link, top / "a", top / "b"),
            }
            opened = set(os.listdir("/proc/self/fd"))
            with frozen(place.pair):
                changing = Call(changes(top)[kind])
                changing.result()
                calling = Call(*awaited[waiting])
                assert calling.hangs(), kind
            calling.result()
        place.compare()
        for number in set(os.listdir("/proc/self/fd")) - opened:
            with contextlib.suppress(OSError):
                os.close(int(number))


def sync_both(*fds: int) -> None:
    for fd in fds:
        os.fsync(fd)


@pytest.mark.parametrize("kind", ["create", "write", "chmod", "truncate", "setxattr"])
def test_close_awaits_what_was_done_to_the_file(place, kind):
    top = place.top
    write(top / "file", b"content")
    fd = -1 if kind == "create" else os.open(top / "file", os.O_RDWR)
    with frozen(place.pair):
        match kind:
            case "create":
                fd = os.open(top / "new", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            case "write":
                os.write(fd, b"x" * 1000)
            case "chmod":
                os.fchmod(fd, 0o600)
            case "truncate":
                os.ftruncate(fd, 3)
            case "setxattr":
                os.setxattr(fd, "user.x", b"y")
            case _:
                raise AssertionError(kind)
        closing = Call(os.close, fd)
        assert closing.hangs()
    closing.result()
    place.compare()


def test_closing_another_file_waits_for_nothing(place):
    top = place.top
    write(top / "file", b"x")
    write(top / "other", b"x")
    with fd_of(top / "file", os.O_RDWR) as fd:
        other = os.open(top / "other", os.O_RDWR)
        with frozen(place.pair):
            os.write(fd, b"y")
            Call(os.close, other).result()
        os.fsync(fd)


def test_a_synchronous_write_is_awaited(place):
    top = place.top
    for policy in (b"sync", b"async"):
        os.setxattr(top, POLICY, policy)
        with fd_of(top / "file", os.O_RDWR | os.O_CREAT | os.O_SYNC) as fd:
            with frozen(place.pair):
                writing = Call(os.write, fd, b"x")
                assert writing.hangs(), policy
            writing.result()


def test_after_ten_milliseconds_the_next_change_waits(place):
    returned: list[int] = []

    def write_on(fd: int) -> None:
        for number in range(100_000):
            returned.append(os.pwrite(fd, b"x", number % 1000))
            if not frozen_now.is_set() and len(returned) > 1000:
                return

    frozen_now = threading.Event()
    with fd_of(place.top / "file", os.O_RDWR | os.O_CREAT) as fd:
        os.fsync(fd)
        with frozen(place.pair):
            frozen_now.set()
            writing = Call(write_on, fd)
            wait_for(lambda: returned, what="a first write")

            def stands_still() -> bool:
                before = len(returned)
                time.sleep(HANGS_S)
                return len(returned) == before

            wait_for(stands_still, what="the writer to hang")
            assert writing.is_alive()
            assert len(returned) <= WINDOW_OPS
            frozen_now.clear()
        writing.result()
        assert len(returned) > 1000
    place.compare()


# Whose it is -------------------------------------------------------------------------------------


def test_the_level_is_inherited_and_can_be_seen():
    with Pair() as pair:
        top = pair.mountpoint
        (top / "a" / "b").mkdir(parents=True)
        write(top / "a" / "b" / "file", b"x")
        deep = top / "a" / "b" / "file"
        assert level(deep) == ("op", "default")
        os.setxattr(top / "a", ACK, b"close")
        assert level(deep) == ("close", "inherited:/a")
        assert level(top) == ("op", "default")
        os.setxattr(deep, ACK, b"op")
        assert level(deep) == ("op", "local")
        os.removexattr(deep, ACK)
        os.setxattr(top / "a" / "b", POLICY, b"strict")
        assert level(deep) == ("op", "policy")
        os.setxattr(top / "a" / "b", POLICY, b"inherit")
        os.rename(top / "a" / "b", top / "b")
        assert level(top / "b" / "file") == ("op", "default")
        for name in ("ack.effective", "ack.source"):
            assert outcome(os.setxattr, top / "a", f"user.replfs.{name}", b"op") == "EOPNOTSUPP"
        assert os.listxattr(top / "a") == []
        pair.assert_equal()


def test_only_what_has_the_level_returns_early():
    with Pair(mount_arguments=PATIENT) as pair:
        top = pair.mountpoint
        (top / "quick").mkdir()
        os.setxattr(top / "quick", ACK, b"close")
        for name in ("file", "quick/file", "quick/strict"):
            write(top / name, b"x")
        os.setxattr(top / "quick" / "strict", POLICY, b"strict")
        with frozen(pair):
            os.chmod(top / "quick" / "file", 0o600)
            waiting = [Call(os.chmod, top / name, 0o600) for name in ("file", "quick/strict")]
            assert all(call.hangs() for call in waiting)
        for call in waiting:
            call.result()
        # And the other way round. Of the closes of what was open before, the kernel does not tell.
        write(top / "early", b"x")
        early = os.open(top / "early", os.O_RDWR)
        os.setxattr(top, ACK, b"close")
        os.setxattr(top / "quick", ACK, b"op")
        with frozen(pair):
            os.chmod(top / "file", 0o640)
            waiting = [
                Call(os.chmod, top / "quick" / "file", 0o640),
                Call(os.write, early, b"y"),
            ]
            assert all(call.hangs() for call in waiting)
        for call in waiting:
            call.result()
        os.close(early)
        with fd_of(top / "early", os.O_RDWR) as late, frozen(pair):
            Call(os.write, late, b"z").result()
        pair.wait_in_sync()
        pair.assert_equal()


def test_strict_refuses_it(pair):
    top = pair.mountpoint
    write(top / "file", b"x")
    os.setxattr(top / "file", POLICY, b"strict")
    with fails(errno.EINVAL):
        os.setxattr(top / "file", ACK, b"close")
    os.setxattr(top / "file", ACK, b"op")
    os.setxattr(top / "file", POLICY, b"sync")
    os.setxattr(top / "file", ACK, b"close")
    with fails(errno.EINVAL):
        os.setxattr(top / "file", POLICY, b"strict")
    os.mkdir(top / "dir")
    os.setxattr(top / "dir", POLICY, b"strict")
    os.mkdir(top / "dir" / "below")
    with fails(errno.EINVAL):
        os.setxattr(top / "dir" / "below", ACK, b"close")
    # By the command, in words.
    done = run_replfs("policy", "set", "strict", top / "file", check=False)
    assert done.returncode != 0
    assert done.stderr.startswith(f"replfs: {top / 'file'}: strict goes neither with ack=close nor")
    run_replfs("policy", "set", "strict", top / "file", "--ack", "op")
    assert level(top / "file") == ("op", "policy")
    run_replfs("policy", "set", "sync", top / "file", "--ack", "close")
    assert level(top / "file") == ("close", "local")
    pair.assert_equal()


# When something is lost --------------------------------------------------------------------------


def test_a_peer_killed_meanwhile_is_recorded_and_the_close_succeeds():
    with Pair(mount_arguments=(*CLOSE, *QUICK)) as pair:
        top = pair.mountpoint
        write(top / "file", b"x" * 100_000)
        fd = os.open(top / "file", os.O_RDWR)
        os.fsync(fd)
        pair.agent.freeze()
        os.pwrite(fd, b"y" * 100_000, 0)
        pair.agent.kill9()
        os.close(fd)
        assert get(top / "file", "state") == "dirty"
        assert int(get(top / "file", "dirty_bytes")) >= 100_000
        os.unlink(top / "file")
        write(top / "file", b"z" * 1000)
        pair.agent.start()
        pair.wait_in_sync()
        pair.assert_equal()


def test_what_a_peer_cannot_do_is_recorded_and_repaired(place):
    """The answer comes after the call that it is about has returned, and after later ones."""
    top, there = place.top, place.there
    os.mkdir(top / "dir")
    write(top / "dir" / "file", b"x" * 1000)
    os.unlink(there / "dir" / "file")
    os.mkdir(there / "dir" / "new")
    with fd_of(top / "dir" / "new", os.O_RDWR | os.O_CREAT) as fd:
        os.write(fd, b"y" * 1000)
        os.fchmod(fd, 0o600)
    os.truncate(top / "dir" / "file", 500)
    os.unlink(top / "dir" / "file")
    wait_for(lambda: b"could not apply a change" in place.pair.mount.log_since_start())
    place.pair.wait_in_sync()
    place.compare()


def make_files(top: Path, pipe: int, count: int) -> None:
    for number in range(count):
        fd = os.open(top / f"{number:05}", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
        for _ in range(4):
            os.write(fd, b"%05d" % number * 50)
        os.close(fd)
        os.write(pipe, b".")
        os.write(os.open(top / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), b"%05d" % number)


def test_a_killed_primary_loses_nothing_that_was_closed():
    with Pair(mount_arguments=(*CLOSE, *QUICK)) as pair:
        reader, writer = os.pipe()
        child = spawn(make_files, pair.mountpoint, writer, 5000)
        os.close(writer)
        closed = 0
        while closed < 100:
            closed += len(os.read(reader, 10))
        pair.mount.kill9()
        with contextlib.suppress(OSError, ChildDied):
            child.result()
        while more := os.read(reader, 1000):
            closed += len(more)
        os.close(reader)
        for number in range(closed):
            path = pair.secondary_store / f"{number:05}"
            assert read(path) == b"%05d" % number * 200, number
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()
        assert len(os.listdir(pair.primary_store)) >= closed


def test_killed_with_a_full_window_both_sides_converge():
    with Pair(mount_arguments=(*CLOSE, *QUICK)) as pair:
        top = pair.mountpoint
        prepare(top)
        pair.agent.freeze()
        calls = [Call(call) for call in changes(top).values()]
        for call in calls:
            call.join(HANGS_S / 10)
        pair.mount.kill9()
        for call in calls:
            call.join(SOON_S)
        pair.agent.thaw()
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()


@pytest.mark.parametrize("level", ["op", "close"])
def test_a_resync_beside_it(place, level):
    """What is on its way, unawaited, is not overtaken by what a resync carries.

    And it comes to an end, though a few names are marked again faster than it goes.
    """
    top = place.top
    os.setxattr(top, ACK, level.encode())
    over = threading.Event()

    def work(directory: Path) -> None:
        directory.mkdir()
        number = 0
        while not over.is_set():
            number += 1
            write(directory / f"{number % 10}", b"%d" % number * 1000)
            os.truncate(directory / f"{number % 10}", 5)
            write(directory / "passing", b"x")
            os.rename(directory / "passing", directory / "moved")
            if number % 3:
                os.unlink(directory / "moved")

    workers = [Call(work, top / f"d{number}") for number in range(3)]
    for _ in range(4):
        place.pair.mount.replfs("resync", place.pair.mount.target)
        place.pair.wait_in_sync()
    over.set()
    for worker in workers:
        worker.result()
    place.pair.wait_in_sync()
    place.compare()
