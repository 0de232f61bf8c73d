"""The log of a node in the background: it stays small, and nothing of it is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from replfs.cli import logs

PROGRAM = """
import logging, subprocess, sys
from replfs.cli import logs
logs.LOG_SIZE_MAX = 1000
logs.configure("info", "text", sys.argv[1])
for number in range(int(sys.argv[2])):
    logging.getLogger("replfs.try").info("line %d", number)
subprocess.run(["echo", "of another program"], check=True)
"""


def write(log: Path, lines: int, argument: Path | None = None) -> None:
    """What a node does that logs so many lines."""
    with log.open("ab") as output:
        subprocess.run(
            [sys.executable, "-c", PROGRAM, argument or log, str(lines)],
            stdout=output, stderr=output, check=True,
        )  # fmt: skip


def numbers(*files: Path) -> list[int]:
    lines = [line for file in files for line in file.read_text().splitlines() if "line" in line]
    return [int(line.split()[-1]) for line in lines]


def test_a_log_that_is_full_begins_anew_while_the_node_runs(tmp_path: Path):
    log, old = tmp_path / "log", tmp_path / "log.old"
    write(log, 100)
    assert log.stat().st_size < 1200
    assert old.stat().st_size < 1200
    assert numbers(old, log) == list(range(100 - len(numbers(old, log)), 100))
    assert log.read_text().endswith("of another program\n")
    assert {path.name for path in tmp_path.iterdir()} == {"log", "log.old"}


def test_a_log_that_somebody_else_moved_away_is_left_alone(tmp_path: Path):
    log, theirs = tmp_path / "log", tmp_path / "theirs"
    theirs.write_text("not ours\n")
    write(log, 50, theirs)
    assert theirs.read_text() == "not ours\n"
    assert numbers(log) == list(range(50))


def test_a_log_that_is_full_is_moved_away_before_a_start(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(logs, "LOG_SIZE_MAX", 10)
    log = tmp_path / "log"
    log.write_text("short\n")
    logs.rotate(str(log))
    assert log.exists()
    log.write_text("longer than that\n")
    logs.rotate(str(log))
    assert not log.exists()
    assert (tmp_path / "log.old").read_text() == "longer than that\n"
    logs.rotate(str(log))
