"""The units: what systemd itself says of them, and what is installed where."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from replfs.cli import main, systemd
from replfs.cli.exit_codes import ExitCode
from replfs.node.settings import config

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="no systemd-analyze(1)"
)
EXPOSURE_MAX = {"replfs-agent@.service": 6.5, "replfs-mount@.service": 6.5}
"""Of 10; a unit that says nothing has 9.6. What is left is what a filesystem must be able to do."""


@pytest.fixture
def root(tmp_path, capsys):
    assert main.main(["systemd", "install", "--root", str(tmp_path)]) == 0
    return tmp_path


def units(root: Path) -> list[Path]:
    return sorted((root / systemd.UNIT_DIRECTORY).iterdir())


def test_what_is_installed(root):
    assert [path.name for path in units(root)] == sorted(systemd.UNITS)
    for path in units(root):
        text = path.read_text()
        assert "@REPLFS@" not in text
        command = text.partition("\nExecStart=")[2].split()[0]
        assert os.access(command, os.X_OK)
        # Twice: the second time replaces the first.
    assert main.main(["systemd", "install", "--root", str(root)]) == 0
    link = root / systemd.HELPER
    if link.exists():
        assert os.access(os.readlink(link), os.X_OK)


def test_what_is_in_the_way_is_said(tmp_path, capsys):
    (tmp_path / "etc").write_text("")
    assert main.main(["systemd", "install", "--root", str(tmp_path)]) == ExitCode.USAGE
    assert "cannot be written: Not a directory" in capsys.readouterr().err


@needs_systemd
@pytest.mark.parametrize("name", systemd.UNITS)
def test_systemd_finds_nothing_wrong(root, name, tmp_path):
    instance = tmp_path / name.replace("@", "@data")
    shutil.copy(root / systemd.UNIT_DIRECTORY / name, instance)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", instance],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    ours = [line for line in done.stderr.splitlines() if "replfs" in line]
    assert (done.returncode, ours) == (0, [])


@needs_systemd
@pytest.mark.parametrize("name", systemd.UNITS)
def test_what_it_needs_not_is_taken_from_it(root, name, tmp_path):
    instance = tmp_path / name.replace("@", "@data")
    shutil.copy(root / systemd.UNIT_DIRECTORY / name, instance)
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--no-pager", instance],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    found = re.search(r"exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found is not None, done.stdout + done.stderr
    assert float(found[1]) <= EXPOSURE_MAX[name]


def allowed(words: list[str]) -> set[str]:
    """The system calls of a filter, groups taken apart by systemd itself."""
    found, groups = set(), [word for word in words if word.startswith("@")]
    seen = set(groups)
    while groups:
        done = subprocess.run(
            ["systemd-analyze", "syscall-filter", groups.pop()],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        for line in done.stdout.splitlines()[1:]:
            word = line.strip()
            if word.startswith("@") and word not in seen:
                seen.add(word)
                groups.append(word)
            elif word and word[0].isalpha():
                found.add(word)
    return found | {word for word in words if not word.startswith("@")}


@needs_systemd
@pytest.mark.parametrize("name", systemd.UNITS)
def test_the_system_calls_of_a_store_are_allowed(name):
    """The rare ones; what Python and every daemon needs is in the groups."""
    line = re.search(r"^SystemCallFilter=(.+)$", systemd.unit(name), re.MULTILINE)
    assert line is not None
    rare = {
        "copy_file_range", "fallocate", "fchmodat", "flock", "fsetxattr", "linkat", "memfd_create",
        "mknodat", "mount", "name_to_handle_at", "open_by_handle_at", "openat2", "pidfd_open",
        "pidfd_send_signal", "prctl", "pwritev2", "renameat2", "statx", "syncfs", "umount2",
        "utimensat", "vfork",
    }  # fmt: skip
    assert rare <= allowed(line[1].split())


def test_an_agent_without_a_store_has_the_state_directory(monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", "/var/lib/replfs/data:/var/lib/other")
    settings = config.build("agent", {"listen": "tcp://127.0.0.1:0"}, config_file="/dev/null")
    assert settings.store == "/var/lib/replfs/data"
    settings = config.build(
        "agent", {"listen": "tcp://127.0.0.1:0", "store": "/srv/x"}, config_file="/dev/null"
    )
    assert settings.store == "/srv/x"
