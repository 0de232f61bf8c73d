"""What a killed node leaves in memory: whose it is, and that it is taken away when asked for."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from replfs.cli import doctor
from replfs.errors import UsageError
from replfs.node.settings import memory
from replfs.node.settings.memory import Memory, leftovers


@pytest.fixture
def directory(tmp_path: Path, monkeypatch) -> Path:
    found = tmp_path / "memory"
    found.mkdir()
    monkeypatch.setattr(memory, "memory_directory", lambda _rundir: str(found))
    return found


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store" / ".replfs").mkdir(parents=True)
    return tmp_path / "store"


def run_node(store: Path) -> Memory:
    found = Memory("/run", str(store))
    Path(found.path("activity", b"binding")).write_bytes(b"in flight")
    return found


def test_nothing_is_left_of_a_clean_end(directory: Path, store: Path):
    node = run_node(store)
    Path(node.path("activity", b"binding")).unlink()
    node.close(clean=True)
    assert list(directory.iterdir()) == []


def test_what_a_running_node_has_is_nobodys_to_take(directory: Path, store: Path):
    node = run_node(store)
    store.rename(store.with_name("moved"))
    assert list(leftovers("/run")) == []
    node.close(clean=False)
    assert len(list(directory.iterdir())) == 2
    assert [one.store for one in leftovers("/run")] == [str(store)]


def test_what_a_killed_node_had_is_kept_for_its_store(directory: Path, store: Path):
    run_node(store).close(clean=False)
    assert list(leftovers("/run")) == []


def test_doctor_tells_of_what_is_left_and_takes_it_away_when_asked(directory: Path, store: Path):
    run_node(store).close(clean=False)
    (store / ".replfs").rmdir()
    (told,) = doctor._check_leftovers(None, fix=False)
    assert told.good is None
    assert str(store) in told.text
    assert "doctor --fix" in told.text
    assert len(list(directory.iterdir())) == 2
    (done,) = doctor._check_leftovers(None, fix=True)
    assert done.good
    assert list(directory.iterdir()) == []
    assert list(doctor._check_leftovers(None, fix=False)) == []


@pytest.mark.parametrize("name", ["activity", "progress", "store"])
@pytest.mark.parametrize(
    "make", [os.mkdir, os.mkfifo, lambda path: os.symlink("/etc/hostname", path)]
)
def test_what_is_no_file_is_named_and_not_waited_for(directory: Path, store: Path, name: str, make):
    node = run_node(store)
    path = Path(node.path("activity", b"binding"))
    node.close(clean=False)
    path = path.with_name(path.name.replace("activity", name))
    path.unlink(missing_ok=True)
    make(path)
    signal.alarm(10)
    try:
        with pytest.raises(UsageError, match=f"{path} is no file; move it away"):
            Memory("/run", str(store)).path(name, b"binding")
    finally:
        signal.alarm(0)
