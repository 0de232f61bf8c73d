"""`replfs demo` from outside: it verifies what it says, and leaves nothing, however it ends."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from replfs.cli import spawn
from replfs.cli.exit_codes import ExitCode
from replfs.node.settings.rundir import replfs_mounts

pytestmark = pytest.mark.mounted

FILES = 120
STEPS = 10
DEADLINE_S = 150.0


class DemoRun:
    """One run in a session of its own, as a terminal starts it."""

    def __init__(self, directory: Path, *more: str) -> None:
        self.directory = directory
        self.lines: list[str] = []
        self._news = threading.Condition()
        self.process = subprocess.Popen(
            [*spawn.python(), "demo", "--files", str(FILES), "--dir", str(directory), *more],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=spawn.environment(), start_new_session=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._news:
                self.lines.append(line)
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def wait_line(self, start: str) -> None:
        """Wait until a line that begins so has been printed."""
        deadline = time.monotonic() + DEADLINE_S
        with self._news:
            while not any(line.startswith(start) for line in self.lines):
                assert self._reader.is_alive(), f"it ended: {''.join(self.lines)}"
                assert time.monotonic() < deadline, f"no {start!r} in {''.join(self.lines)}"
                self._news.wait(1.0)

    def ctrl_c(self) -> None:
        """What a terminal does: the signal goes to the whole foreground process group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> int:
        """Its exit status."""
        code = self.process.wait(DEADLINE_S)
        self._reader.join(DEADLINE_S)
        return code

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def assert_nothing_left(self) -> None:
        """No file, no mount, no process."""
        assert list(self.directory.iterdir()) == [], self.output
        assert not [path for path in replfs_mounts() if path.startswith(str(self.directory))]
        assert _processes_with(str(self.directory)) == []


def _processes_with(text: str) -> list[str]:
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = Path(entry.path, "cmdline").read_bytes().replace(b"\0", b" ").decode()
                if text in words and "replfs" in words and int(entry.name) != os.getpid():
                    found.append(f"{entry.name}: {words}")
    return found


@contextlib.contextmanager
def demo(directory: Path, *more: str) -> Iterator[DemoRun]:
    run = DemoRun(directory, *more)
    try:
        yield run
    finally:
        if run.process.poll() is None:
            run.process.terminate()
            try:
                run.process.wait(DEADLINE_S)
            finally:
                run.process.kill()
        run._reader.join(DEADLINE_S)
        assert run.process.stdout is not None
        run.process.stdout.close()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "d"
    path.mkdir()
    return path


def test_it_verifies_everything_and_leaves_nothing(directory):
    with demo(directory) as run:
        code = run.wait()
    assert code == ExitCode.OK, run.output
    assert run.lines[-1] == "Everything was verified.\n"
    for number in range(1, STEPS + 1):
        assert f"\n[{number}/{STEPS}] " in run.output
    assert "objects are equal in both stores and on the mount" in run.output
    run.assert_nothing_left()


@pytest.mark.parametrize("step", [1, 2, 3, 5, 7, 9])
def test_ctrl_c_at_any_step_ends_it_with_130_and_leaves_nothing(directory, step):
    with demo(directory) as run:
        run.wait_line(f"[{step}/{STEPS}]")
        run.ctrl_c()
        code = run.wait()
    assert code == ExitCode.INTERRUPTED, run.output
    assert run.lines[-1] == "interrupted by SIGINT; everything is cleaned up\n"
    run.assert_nothing_left()


def test_ctrl_c_while_it_cleans_up_changes_nothing(directory):
    with demo(directory) as run:
        run.wait_line(f"[3/{STEPS}]")
        while run.process.poll() is None:
            run.ctrl_c()
            time.sleep(0.005)
        code = run.wait()
    assert code == ExitCode.INTERRUPTED, run.output
    run.assert_nothing_left()


def test_sigterm_is_143(directory):
    with demo(directory) as run:
        run.wait_line(f"[2/{STEPS}]")
        run.process.terminate()
        code = run.wait()
    assert code == ExitCode.TERMINATED, run.output
    run.assert_nothing_left()


def test_a_directory_that_cannot_be_used_is_a_failure(directory):
    with demo(directory, "--dir", "/proc") as run:
        code = run.wait()
    assert code == ExitCode.ERROR
    assert run.output.startswith("replfs: demo failed: /proc cannot carry extended attributes")
    run.assert_nothing_left()


def test_a_dead_primary_is_a_failure_and_its_log_is_shown(directory):
    with demo(directory) as run:
        run.wait_line(f"[3/{STEPS}]")
        for line in _processes_with(str(directory)):
            if " mount " in line:
                os.kill(int(line.partition(":")[0]), signal.SIGKILL)
        code = run.wait()
    assert code == ExitCode.ERROR, run.output
    assert "replfs: demo failed: " in run.output
    assert "\n  primary: " in run.output
    run.assert_nothing_left()
