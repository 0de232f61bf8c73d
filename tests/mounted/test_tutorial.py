"""The tutorial does what it says, to the letter."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.nodes import unmount_all

pytestmark = pytest.mark.mounted

PAGE = Path(__file__).parents[2] / "docs" / "tutorial.md"
HOSTS = ("replfs-alpha", "replfs-beta")


def blocks() -> list[str]:
    """What a reader types, in order."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[Path]:
    """Where the tutorial's temporary directory is made; all that it left is taken away."""
    yield tmp_path
    subprocess.run(["pkill", "-9", "-f", f"replfs (agent|mount) {tmp_path}/"], check=False)
    unmount_all(tmp_path)
    for host in HOSTS:
        subprocess.run(["ip", "netns", "delete", host], capture_output=True, check=False)


def test_the_tutorial(scratch):
    bin_directory = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", "\n".join(blocks())],
        env=os.environ | {"TMPDIR": str(scratch), "PATH": f"{bin_directory}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert "in sync" in done.stdout.lower() or "in-sync" in done.stdout.lower()
    assert os.listdir(scratch) == []
