"""The benchmarks: nothing is three times slower than it was, and nothing is left of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gross, results
from benchmarks.processes import PREFIX
from benchmarks.rows import ROWS

TINY = (
    "--slice-s", "0.02", "--small-files", "20", "--tree-files", "24", "--stream-mib", "1",
    "--large-tree-files", "24", "--large-directory-files", "10",
)  # fmt: skip

pytestmark = [pytest.mark.mounted, pytest.mark.slow]


def start(directory: Path, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "run", "--into", str(directory), "--name", "run",
         *TINY, *options],
        cwd=results.REPOSITORY, env=os.environ | {"TMPDIR": str(directory)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def left_of(directory: Path, pid: int) -> list[str]:
    """Mounts, namespaces, processes and directories of a run."""
    mounts = [line for line in Path("/proc/self/mounts").read_text().splitlines()
              if str(directory) in line]  # fmt: skip
    loops = [
        backing
        for file in Path("/sys/block").glob("loop*/loop/backing_file")
        if str(directory) in (backing := file.read_text())
    ]
    namespaces = [name for name in os.listdir("/run/netns") if name.startswith(f"{PREFIX}{pid}-")]
    workspaces = [path.name for path in directory.iterdir() if path.name.startswith(PREFIX)]
    return mounts + loops + namespaces + workspaces


def test_no_gross_regression():
    assert gross.check() == []


def test_a_run_measures_every_row_and_leaves_nothing(tmp_path):
    run = start(tmp_path, "--targets", "ext4,passthrough,replfs", "--repeat", "1")
    output, _ = run.communicate(timeout=150)
    assert run.returncode == 0, output
    assert "failed" not in output
    assert left_of(tmp_path, run.pid) == []
    found = results.load(tmp_path / "run.json")
    assert set(found.samples) == set(ROWS)
    assert "| goal | asked | found |" in (tmp_path / "run.md").read_text()


def test_an_interrupted_run_keeps_what_it_found_and_leaves_nothing(tmp_path):
    run = start(tmp_path, "--targets", "passthrough,replfs", "--repeat", "1000")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.json").exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)
    # Twice, as an impatient person does it.
    run.send_signal(signal.SIGINT)
    time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 0, output
    assert left_of(tmp_path, run.pid) == []
    assert results.load(tmp_path / "run.json").samples
    assert (tmp_path / "run.md").exists()


def test_the_next_run_removes_what_a_killed_one_has_left(tmp_path):
    run = start(tmp_path, "--targets", "passthrough", "--repeat", "1000")
    deadline = time.monotonic() + 60
    while not (tmp_path / "run.json").exists():
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)
    run.kill()
    run.communicate(timeout=60)
    assert len(left_of(tmp_path, run.pid)) > 3
    again = start(tmp_path, "--targets", "ext4", "--workloads", "sequential", "--repeat", "1")
    output, _ = again.communicate(timeout=60)
    assert again.returncode == 0, output
    assert "removed what a killed run has left" in output
    assert left_of(tmp_path, run.pid) == []


def test_a_bad_command_line_changes_nothing(tmp_path):
    run = start(tmp_path, "--targets", "ext5")
    output, _ = run.communicate(timeout=60)
    assert run.returncode == 2
    assert "ext5 is not known; there are ext4, " in output
    assert list(tmp_path.iterdir()) == []
