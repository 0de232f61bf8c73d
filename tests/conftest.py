"""Fixtures for all tests: pairs of nodes, and a check that no test leaves anything behind."""

from __future__ import annotations

import faulthandler
import os
import signal

import hypothesis
import pytest
from helpers import nodes

# The same examples every time: a run that passed here passes there.
hypothesis.settings.register_profile("steady", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("steady")

FAILURES_MAX = 2


def pytest_configure(config):
    # `kill -USR1` on a hanging run shows where it hangs.
    faulthandler.register(signal.SIGUSR1, file=os.dup(2), all_threads=True)


def _children() -> list[str]:
    found = []
    for task in os.listdir("/proc/self/task"):
        try:
            with open(f"/proc/self/task/{task}/children", encoding="ascii") as pids:
                for pid in pids.read().split():
                    with open(f"/proc/{pid}/cmdline", "rb") as command:
                        found.append(f"{pid}: {command.read().replace(bytes(1), b' ').decode()}")
        except OSError:
            continue  # ended meanwhile
    return found


@pytest.fixture(scope="session", autouse=True)
def nothing_left_behind(tmp_path_factory):
    """At the end of the run no node, no mount and no child process of a test is left."""
    children = _children()
    yield
    left = [node.command for node in nodes.running.values()]
    for node in list(nodes.running.values()):
        node.clean_up()
    assert not left, f"replfs processes left running: {left}"
    for base in (*nodes.bases, tmp_path_factory.getbasetemp()):
        mounts = nodes.mounts_below(base)
        nodes.unmount_all(base)
        assert not mounts, f"mounts left: {mounts}"
    nodes.forget_killed(tmp_path_factory.getbasetemp())
    new_children = [child for child in _children() if child not in children]
    assert not new_children, f"child processes left: {new_children}"


@pytest.fixture(autouse=True)
def process_as_before():
    """What belongs to the whole process is put back after each test: umask and directory."""
    umask, directory = os.umask(0o022), os.getcwd()
    yield
    os.umask(umask)
    os.chdir(directory)


class SharedPair:
    """One pair for many tests; made on first use, and again if a test has broken it."""

    def __init__(self, *mount_arguments: str) -> None:
        self._mount_arguments = mount_arguments
        self._pair: nodes.Pair | None = None
        self._failures: list[BaseException] = []

    def get(self) -> nodes.Pair:
        """The pair, running and in sync when it was made."""
        if self._pair is not None and not (
            self._pair.agent.is_running and self._pair.mount.is_running
        ):
            self.close()
        if self._pair is None:
            if len(self._failures) >= FAILURES_MAX:
                # Hundreds of tests must not wait a minute each for the same thing.
                raise AssertionError(f"no pair has started so far: {self._failures[-1]}")
            try:
                pair = nodes.Pair(mount_arguments=self._mount_arguments)
                self._pair = pair.__enter__()
            except (AssertionError, OSError, nodes.NodeFailed) as error:
                self._failures.append(error)
                raise
        return self._pair

    def close(self) -> None:
        """End it, if there is one."""
        pair, self._pair = self._pair, None
        if pair is not None:
            pair.__exit__(None, None, None)

    def finish(self) -> None:
        """At the end of the run: both whole stores are equal, and both nodes end cleanly."""
        if self._pair is None:
            return
        try:
            self._pair.check_alive()
            self._pair.wait_in_sync()
            self._pair.assert_equal()
            assert self._pair.mount.stop() == 0, self._pair.mount.log_tail()
            assert self._pair.agent.stop() == 0, self._pair.agent.log_tail()
            assert not nodes.mounts_below(self._pair.base)
        finally:
            self.close()


@pytest.fixture(scope="session")
def shared_pairs(nothing_left_behind):
    """The holder of the pair that is shared by tests which only use the mount."""
    shared = SharedPair()
    yield shared
    shared.finish()


@pytest.fixture(scope="session")
def writeback_pairs(nothing_left_behind):
    """The same, of a pair whose mount has the kernel's write-back cache."""
    shared = SharedPair("--writeback")
    yield shared
    shared.finish()


@pytest.fixture
def shared_pair(shared_pairs):
    """A running pair in sync, shared: make a directory of your own on `mountpoint`."""
    return shared_pairs.get()


@pytest.fixture
def pair():
    """A fresh pair in sync, for one test."""
    with nodes.Pair() as fresh:
        yield fresh
