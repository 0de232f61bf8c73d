"""The wheel, in a clean virtual environment of its own: what a person gets who has only pip."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.nodes import REPOSITORY

import replfs

pytestmark = [pytest.mark.mounted, pytest.mark.slow]

NO_INDEX = ("No matching distribution found", "Temporary failure in name resolution", "Retrying")
"""What pip says where it reaches no package index: then nothing can be built."""


def pip(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments],
        capture_output=True, text=True, check=False, timeout=170,
    )  # fmt: skip
    if done.returncode != 0 and any(word in done.stderr for word in NO_INDEX):
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    directory = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-deps", "--wheel-dir", directory, REPOSITORY)
    (found,) = directory.glob("*.whl")
    return found


def test_what_is_in_it(wheel):
    assert wheel.name == f"replfs-{replfs.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    sources = {
        str(path.relative_to(REPOSITORY))
        for path in (REPOSITORY / "replfs").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {name for name in names if name.startswith("replfs/")} == sources
    assert "replfs/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_runs_where_there_is_nothing_else(wheel, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip("--python", venv / "bin/python", "install", "--no-compile", wheel)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [venv / "bin/replfs", *arguments],
            capture_output=True, text=True, check=False, timeout=120, cwd=tmp_path, env=env,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    assert run("--version") == f"replfs {replfs.__version__}\n"
    (tmp_path / "d").mkdir()
    out = run("demo", "--files", "50", "--dir", str(tmp_path / "d"))
    assert out.endswith("Everything was verified.\n")
    assert list((tmp_path / "d").iterdir()) == []
    # What it brings for others, and finds itself.
    assert '"title": "replfs"' in run("dashboard")
    assert f"ExecStart={venv}/bin/replfs agent " in run("systemd", "show")
    run("systemd", "install", "--root", str(tmp_path / "root"))
    assert os.readlink(tmp_path / "root/sbin/mount.replfs") == f"{venv}/bin/mount.replfs"
    assert os.access(venv / "bin/mount.replfs", os.X_OK)
    assert ".TH REPLFS 1" in run("man")
