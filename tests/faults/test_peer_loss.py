"""Processes killed and hung in the middle of real work: nothing acknowledged is lost."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import real_tree
from helpers.cases import exists, read, write
from helpers.children import Child, spawn
from helpers.cluster import Cluster
from helpers.compare import compare_trees, describe
from helpers.nodes import Pair, make_base, remove_base, wait_for

pytestmark = pytest.mark.mounted

MIB = 1 << 20
QUICK = ("--peer-timeout", "1s")
LONG_S = 20.0
"""What nothing may take whose limit is a peer timeout of one or two seconds."""


@pytest.fixture(scope="module")
def source(nothing_left_behind):
    """A real tree in a plain directory."""
    base = make_base()
    real_tree.make(base / "tree", 500)
    yield base / "tree"
    remove_base(base)


@pytest.fixture
def quick_pair():
    """A pair whose primary gives a peer up after one second."""
    with Pair(mount_arguments=QUICK) as fresh:
        yield fresh


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    assert took < seconds, f"took {took:.1f} s"


def append(path: Path, data: bytes) -> None:
    with path.open("ab", buffering=0) as file:
        file.write(data)


def count_files(top: Path) -> int:
    return sum(len(names) for _, _, names in os.walk(top))


def wait_files(pair: Pair, count: int, copying: subprocess.Popen[str]) -> None:
    """Wait until the primary has so many files, or the copy has ended."""
    wait_for(
        lambda: count_files(pair.primary_store) > count or copying.poll() is not None,
        what=f"{count} files",
    )


def copy(source: Path, target: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["cp", "-a", source, target], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def assert_same(expected: Path, actual: Path) -> None:
    found = compare_trees(expected, actual)
    assert not found, describe(expected, actual, found)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_the_agent_ends_in_the_middle_of_a_copy(quick_pair, source, how):
    pair = quick_pair
    copying = copy(source, pair.mountpoint / "copy")
    for share in (60, 200, 350):
        wait_files(pair, share, copying)
        if how == signal.SIGKILL:
            pair.agent.kill9()
        else:
            assert pair.agent.stop() == 0
        pair.agent.start()
    output, _ = copying.communicate(timeout=120)
    assert (copying.returncode, output) == (0, "")
    pair.wait_in_sync()
    pair.assert_equal(holes=4096)
    assert_same(source, pair.secondary_store / "copy")
    assert not os.listdir(pair.secondary_store / ".replfs" / "limbo")


def test_the_mount_is_killed_in_the_middle_of_a_copy(quick_pair, source):
    """What cp(1) had done by then is on both; what it does after a remount, too."""
    pair = quick_pair
    for share in (100, 300):
        copying = copy(source, pair.mountpoint / "copy")
        wait_files(pair, share, copying)
        pair.mount.kill9()
        output, _ = copying.communicate(timeout=120)
        assert copying.returncode != 0, output
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()
        shutil.rmtree(pair.mountpoint / "copy")
    copying = copy(source, pair.mountpoint / "copy")
    output, _ = copying.communicate(timeout=120)
    assert output == ""
    pair.assert_equal(holes=4096)
    assert_same(source, pair.secondary_store / "copy")


def test_both_are_killed_at_the_same_time(quick_pair):
    """What was acknowledged before is on both, whichever of them was the last to apply it."""
    pair = quick_pair
    report = pair.base / "report"

    def work() -> None:
        rng = random.Random(1)
        with report.open("wb", buffering=0) as out:
            for number in itertools.count():
                try:
                    with (pair.mountpoint / f"{number % 7}").open("ab", buffering=0) as file:
                        file.write(b"%d\n" % number)
                    if rng.random() < 0.2:
                        os.rename(pair.mountpoint / f"{number % 7}", pair.mountpoint / f"m{number}")
                except OSError:
                    return
                out.write(b"%d\n" % number)

    for _ in range(2):
        worker = spawn(work)
        wait_for(lambda: report.exists() and report.stat().st_size > 500)
        pair.agent.signal(signal.SIGKILL)
        pair.mount.kill9()
        pair.agent.kill9()
        worker.result()
        pair.agent.start(wait=False)
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()
        acknowledged = set(report.read_bytes().split())
        for store in (pair.primary_store, pair.secondary_store):
            found: set[bytes] = set()
            for name in os.listdir(store):
                if name != ".replfs":
                    found |= set(read(store / name).split())
            assert acknowledged <= found
        subprocess.run(["find", pair.mountpoint, "-type", "f", "-delete"], check=True)
        report.unlink()


def test_a_hanging_agent_delays_calls_by_the_peer_timeout_once(quick_pair):
    pair = quick_pair
    path = pair.mountpoint / "file"
    write(path, b"x" * 100_000)
    pair.agent.freeze()
    with path.open("r+b", buffering=0) as file:
        with at_most(LONG_S):
            file.write(b"1")
        assert pair.peer()["state"] == "out-of-sync"
        with at_most(LONG_S):  # a second each would take minutes
            for number in range(300):
                os.pwrite(file.fileno(), b"2", number * 300)
                write(pair.mountpoint / f"new-{number}", b"x")
    assert read(pair.secondary_store / "file") == b"x" * 100_000
    pair.agent.thaw()
    pair.wait_in_sync()
    pair.assert_equal()


def test_many_callers_at_once_wait_for_a_hanging_agent_together(quick_pair):
    pair = quick_pair
    pair.agent.freeze()
    with at_most(LONG_S):
        children = [spawn(write, pair.mountpoint / str(number), b"x") for number in range(25)]
        for child in children:
            child.result()
    pair.agent.thaw()
    pair.wait_in_sync()
    pair.assert_equal()


def test_reads_do_not_wait_for_a_hanging_agent():
    with Pair(mount_arguments=("--peer-timeout", "60s")) as pair:
        top = pair.mountpoint
        (top / "dir").mkdir()
        write(top / "busy", b"x" * 8 * MIB)
        for number in range(20):
            write(top / "dir" / str(number), b"%d" % number * 10_000)
        pair.mount.restart()  # nothing is in the kernel's caches
        pair.wait_in_sync()
        pair.agent.freeze()
        # The kernel has locks of its own: on a directory while a name in it changes, and on a page
        # while it is written. Nothing else may wait.
        writer = spawn(append, top / "busy", b"y")
        wait_for(lambda: (pair.primary_store / "busy").stat().st_size > 8 * MIB)
        with at_most(LONG_S):
            for number in range(20):
                assert read(top / "dir" / str(number)) == b"%d" % number * 10_000
                os.stat(top / "dir" / str(number))
            with (top / "busy").open("rb", buffering=0) as file:
                assert file.read(4096) == b"x" * 4096
            os.listxattr(top / "dir" / "0")
            os.statvfs(top)
            assert pair.mount.status()["in_flight"] >= 1
        assert (pair.secondary_store / "busy").stat().st_size == 8 * MIB
        pair.agent.thaw()
        writer.result()
        assert pair.peer()["state"] == "in-sync"
        pair.assert_equal()


def test_a_killed_caller_is_gone_within_the_peer_timeout(quick_pair):
    pair = quick_pair
    pair.agent.freeze()
    child = spawn(write, pair.mountpoint / "file", b"x" * 1000)
    wait_for(lambda: exists(pair.primary_store / "file"))
    with at_most(LONG_S):
        child.kill()
    pair.agent.thaw()
    pair.wait_in_sync()
    pair.assert_equal()


def test_one_of_several_peers_is_dead():
    with Cluster(3, mount_arguments=QUICK) as cluster:
        top = cluster.mountpoint
        for number in range(50):
            write(top / str(number), b"x" * 1000)
        cluster.assert_equal()
        cluster.agents[0].kill9()
        cluster.agents[1].freeze()
        with at_most(LONG_S):
            for number in range(50):
                write(top / str(number), b"y" * 2000)
                os.rename(top / str(number), top / f"r{number}")
        cluster.wait_peer(0, "out-of-sync")
        cluster.wait_peer(1, "out-of-sync")
        assert cluster.peer(2)["state"] == "in-sync"
        cluster.assert_equal(2)
        # One comes back while the other stays away, and each gets what it lacks.
        cluster.agents[1].thaw()
        cluster.wait_in_sync(1)
        cluster.assert_equal(1)
        write(top / "more", b"z")
        assert read(cluster.stores[1] / "more") == b"z"
        assert cluster.mount.stop() == 0
        cluster.mount.start()
        cluster.wait_in_sync(1)
        cluster.wait_in_sync(2)
        cluster.agents[0].start()
        cluster.wait_in_sync()
        cluster.assert_equal()


def test_a_peer_that_lost_its_store_gets_everything_again(quick_pair):
    pair = quick_pair
    real_tree.special(pair.mountpoint / "special")
    assert pair.agent.stop() == 0
    shutil.rmtree(pair.secondary_store)
    pair.secondary_store.mkdir()
    write(pair.mountpoint / "new", b"x")
    pair.agent.start()
    pair.wait_in_sync()
    pair.assert_equal(holes=4096)


# Storms ------------------------------------------------------------------------------------------


def one_file(path: Path, seed: int, stop: Path) -> int:
    """Overlapping and sparse writes of all sizes to one file, with an fsync at times."""
    rng = random.Random(seed)
    with path.open("w+b", buffering=0) as file:
        for count in itertools.count():
            if stop.exists():
                return count
            data = rng.randbytes(rng.choice((1, 100, 4096, 70_000)))
            os.pwrite(file.fileno(), data, rng.randrange(2 * MIB))
            if count % 50 == 49:
                os.fsync(file.fileno())
    return 0


def storm(top: Path, seed: int, stop: Path) -> int:
    """Truncate, write and rename one file, again and again, through whatever name it has."""
    rng = random.Random(seed)
    names = [top / "storm", top / "storm-b", top / "dir" / "storm-c"]
    (top / "dir").mkdir()
    current = 0
    write(names[0], b"x" * MIB)
    for count in itertools.count():
        if stop.exists():
            return count
        path = names[current]
        match rng.randrange(6):
            case 0:
                os.truncate(path, rng.randrange(MIB))
            case 1 | 2:
                with path.open("r+b", buffering=0) as file:
                    os.pwrite(file.fileno(), rng.randbytes(9000), rng.randrange(MIB))
            case 3:
                current = (current + 1) % 3
                os.rename(path, names[current])
            case 4:
                write(top / "replacement", rng.randbytes(rng.randrange(200_000)))
                os.rename(top / "replacement", path)
            case _:
                os.chmod(path, rng.choice((0o600, 0o644, 0o755)))
                os.utime(path, ns=(count, count))
    return 0


def start_storm(pair: Pair, seed: int) -> tuple[list[Child], Path]:
    stop = pair.base / "stop"
    stop.unlink(missing_ok=True)
    top = pair.mountpoint / f"storm-{seed}"
    top.mkdir()
    children = [spawn(one_file, top / str(number), seed + number, stop) for number in range(4)]
    return [*children, spawn(storm, top, seed, stop)], stop


def test_a_storm_without_faults(quick_pair):
    pair = quick_pair
    for seed in (1, 2):
        children, stop = start_storm(pair, seed)
        wait_writes(pair, 300)
        stop.touch()
        assert min(child.result() for child in children) > 10
        peer = pair.peer()
        assert peer["state"] == "in-sync", peer
        assert "last_error" not in peer, peer
        pair.assert_equal(timeout_s=5)


@pytest.mark.parametrize("fault", ["killed", "stopped", "hanging"])
def test_a_storm_with_restarts_of_the_agent(quick_pair, fault):
    pair = quick_pair
    children, stop = start_storm(pair, 7)
    for round_number in range(3):
        wait_writes(pair, 60)
        if fault == "killed":
            pair.agent.kill9()
        elif fault == "stopped":
            assert pair.agent.stop() == 0
        else:
            pair.agent.freeze()
        pair.wait_state("out-of-sync")
        wait_writes(pair, 60)
        if fault == "hanging":
            pair.agent.thaw()
        else:
            pair.agent.start()
        if round_number == 1:
            continue  # the next one comes in the middle of the resync
        wait_for(lambda: pair.peer()["state"] != "out-of-sync", 60)
    stop.touch()
    assert min(child.result() for child in children) > 10
    pair.wait_in_sync()
    pair.assert_equal()
    assert not os.listdir(pair.secondary_store / ".replfs" / "limbo")


def wait_writes(pair: Pair, count: int) -> None:
    """Wait until so many more writes were made."""
    before = writes(pair)
    wait_for(lambda: writes(pair) >= before + count, 60, f"{count} writes", 0.05)


def writes(pair: Pair) -> int:
    return int(pair.mount.status()["operations"].get("write", {"count": 0})["count"])


def test_a_storm_with_a_killed_mount(quick_pair):
    pair = quick_pair
    for seed in (20, 30):
        children, _ = start_storm(pair, seed)
        wait_writes(pair, 150)
        pair.mount.kill9()
        for child in children:
            with pytest.raises(OSError):
                child.result()
        pair.mount.start()
        pair.wait_in_sync()
        pair.assert_equal()
