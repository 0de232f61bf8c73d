"""The hook's bounds: what is told, in which order, how long it may take, what is logged."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from helpers.nodes import wait_for

from replfs.errors import UsageError
from replfs.node.operating import hook
from replfs.node.operating.hook import WORDS, Hook, word_of


@pytest.fixture
def hooks():
    made: list[Hook] = []
    yield made
    for one in made:
        one.close()


def program(tmp_path: Path, text: str) -> str:
    path = tmp_path / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def peer(state: str, name: str = "b", reason: str = "") -> dict[str, object]:
    return {"event": "peer", "peer": name, "state": state, "reason": reason}


def test_every_word_is_documented():
    import replfs

    page = Path(replfs.__path__[0]).parent / "docs/operations/configuration.md"
    line = next(one for one in page.read_text().splitlines() if one.startswith("| `REPLFS_EVENT`"))
    assert not [word for word in WORDS if f"`{word}`" not in line]


@pytest.mark.parametrize(
    ("event", "word"),
    [
        (peer("out_of_sync"), "lost"),
        (peer("split_brain"), "split-brain"),
        (peer("uninitialized"), ""),
        ({"event": "data", "state": "inconsistent"}, "inconsistent"),
        ({"event": "primary", "link": "down", "name": "a"}, "lost"),
        ({"event": "primary", "link": "up", "name": "a"}, ""),
        ({"event": "role", "role": "primary"}, "primary"),
        ({"event": "rescan"}, ""),
    ],
)
def test_what_it_is_told_of(event, word):
    assert word_of(event) == word


def test_it_gets_facts_once_and_in_order(tmp_path, hooks):
    out = tmp_path / "out"
    script = f'echo "$1 $REPLFS_PREVIOUS $REPLFS_PEER $REPLFS_REASON $REPLFS_X" >> {out}'
    hooks.append(Hook(program(tmp_path, script), {"REPLFS_X": "x"}))
    for event in (
        peer("incremental"), peer("in_sync"), peer("in_sync"), peer("out_of_sync", "b", "gone"),
        peer("in_sync", "c"),
    ):  # fmt: skip
        hooks[0].tell(event)
    wait_for(lambda: out.read_text().count("\n") == 4, what="four calls")
    assert out.read_text().splitlines() == [
        "resync  b  x", "in-sync resync b  x", "lost in-sync b gone x", "in-sync  c  x",
    ]  # fmt: skip


def test_after_a_promotion_the_role_is_another_one(tmp_path, hooks):
    out = tmp_path / "out"
    script = f'echo "$1 $REPLFS_ROLE" >> {out}'
    hooks.append(Hook(program(tmp_path, script), {"REPLFS_ROLE": "secondary"}))
    for event in ({"event": "frozen"}, {"event": "role", "role": "primary"}, peer("in_sync")):
        hooks[0].tell(event)
    wait_for(lambda: out.read_text().count("\n") == 3, what="three calls")
    assert out.read_text().splitlines() == [
        "frozen secondary", "primary primary", "in-sync primary",
    ]  # fmt: skip


def test_its_output_and_its_failure_are_logged(tmp_path, hooks, caplog):
    caplog.set_level(logging.INFO)
    script = "echo hello; echo oops >&2; printf unfinished; head -c 100000 /dev/zero; exit 3"
    hooks.append(Hook(program(tmp_path, script), {}))
    hooks[0].tell(peer("in_sync"))
    wait_for(lambda: "the hook ended with 3 for in-sync" in caplog.text, what="its end")
    assert caplog.messages[:2] == ["hook: hello", "hook: oops"]
    assert len(caplog.text) < 8 * hook.OUTPUT_MAX


def test_one_that_hangs_is_killed_with_its_children(tmp_path, hooks, caplog, monkeypatch):
    monkeypatch.setattr(hook, "PATIENCE_S", 0.2)
    pid = tmp_path / "pid"
    hooks.append(Hook(program(tmp_path, f"sleep 1000 & echo $! > {pid}; wait"), {}))
    hooks[0].tell(peer("in_sync"))
    wait_for(lambda: "and is killed" in caplog.text, what="it to be killed")
    child = Path("/proc", pid.read_text().strip(), "stat")
    wait_for(lambda: not child.exists() or ") Z" in child.read_text(), what="its child to end")


def test_changes_that_come_too_fast_are_dropped_and_counted(tmp_path, hooks, caplog, monkeypatch):
    monkeypatch.setattr(hook, "WAITING_MAX", 3)
    go, out = tmp_path / "go", tmp_path / "out"
    script = f"echo $REPLFS_PEER >> {out}; while [ ! -e {go} ]; do sleep 0.01; done"
    hooks.append(Hook(program(tmp_path, script), {}))
    hooks[0].tell(peer("in_sync", "first"))
    wait_for(out.exists, what="the first call")
    began = time.monotonic()
    for number in range(20):
        hooks[0].tell(peer("in_sync", str(number)))
    assert time.monotonic() - began < 1
    go.touch()
    wait_for(lambda: out.read_text().split() == ["first", "17", "18", "19"], what="the last three")
    assert "17 changes were not told" in caplog.text


def test_closing_waits_for_no_hanging_program(tmp_path, hooks, monkeypatch):
    monkeypatch.setattr(hook, "CLOSE_S", 0.1)
    out = tmp_path / "out"
    one = Hook(program(tmp_path, f"touch {out}; exec sleep 1000"), {})
    one.tell(peer("in_sync"))
    wait_for(out.exists, what="it to run")
    began = time.monotonic()
    one.close()
    one.tell(peer("out_of_sync"))
    assert time.monotonic() - began < 5
    one._thread.join(10)
    assert not one._thread.is_alive()


def test_what_cannot_be_run_is_refused(tmp_path):
    (tmp_path / "text").write_text("x")
    for path in (tmp_path / "text", tmp_path, tmp_path / "missing"):
        with pytest.raises(UsageError, match=r"is not a program that can be run: chmod \+x it"):
            Hook(str(path), {})
