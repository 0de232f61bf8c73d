"""The activity log: what a killed process had in flight is found again, and nothing is made up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import replfs
from replfs.errors import StoreError
from replfs.store import activity
from replfs.store.activity import KIND_DATA, KIND_NAMES, SLOT_SIZE, SLOTS, ActivityLog, recover

NODE = b"n" * 16
OBJECTS = [number.to_bytes(16, "big") for number in range(1, SLOTS + 3)]
HANDLE = b"handle"


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "activity")


@pytest.fixture
def log(path):
    opened = ActivityLog(path, NODE)
    yield opened
    opened.close()


def begin(log, object_id, region=0, kind=KIND_DATA, handle=HANDLE):
    return log.begin(object_id, kind, region, lambda: handle)


def test_what_was_begun_is_recovered(log, path):
    begin(log, OBJECTS[0], 7)
    begin(log, OBJECTS[1], (1 << 63) + 5, handle=b"")
    begin(log, OBJECTS[0], 0, KIND_NAMES, b"x" * activity.HANDLE_MAX)
    assert sorted(recover(path)) == [
        (OBJECTS[0], KIND_DATA, 7, HANDLE),
        (OBJECTS[0], KIND_NAMES, 0, b"x" * activity.HANDLE_MAX),
        (OBJECTS[1], KIND_DATA, (1 << 63) + 5, b""),
    ]


def test_a_hit_writes_nothing_and_asks_nothing(log, path):
    slot = begin(log, OBJECTS[0])
    before = Path(path).read_bytes()

    def never():
        raise RuntimeError("asked")

    assert log.begin(OBJECTS[0], KIND_DATA, 0, never) is slot
    assert slot.refs == 2
    log.end(slot)
    log.end(slot)
    assert log.begin(OBJECTS[0], KIND_DATA, 0, never) is slot
    assert Path(path).read_bytes() == before


def test_an_ended_slot_stays_until_it_is_needed(log, path):
    for object_id in OBJECTS[:SLOTS]:
        log.end(begin(log, object_id))
    assert len(recover(path)) == SLOTS
    begin(log, OBJECTS[SLOTS])
    found = {each.object for each in recover(path)}
    assert OBJECTS[SLOTS] in found
    assert len(found) == SLOTS
    assert OBJECTS[0] not in found


def test_a_slot_in_use_is_never_taken(log, path):
    held = begin(log, OBJECTS[0])
    for object_id in OBJECTS[1 : SLOTS + 2]:
        log.end(begin(log, object_id))
    assert OBJECTS[0] in {each.object for each in recover(path)}
    log.end(held)


def test_none_while_every_slot_is_in_use(log, path):
    slots = [begin(log, object_id) for object_id in OBJECTS[:SLOTS]]
    assert begin(log, OBJECTS[SLOTS]) is None
    # One that is held already is still found.
    assert begin(log, OBJECTS[3]) is slots[3]
    log.end(slots[9])
    assert begin(log, OBJECTS[SLOTS]) is slots[9]
    assert OBJECTS[9] not in {each.object for each in recover(path)}


def test_a_locator_that_fails_costs_no_slot(log):
    def fails():
        raise OSError(5, "no handle")

    for object_id in OBJECTS:
        with pytest.raises(OSError, match="no handle"):
            log.begin(object_id, KIND_DATA, 0, fails)
    assert all(begin(log, object_id) is not None for object_id in OBJECTS[:SLOTS])


def test_a_handle_that_does_not_fit_is_left_out(log, path):
    begin(log, OBJECTS[0], handle=b"x" * (activity.HANDLE_MAX + 1))
    assert recover(path) == [(OBJECTS[0], KIND_DATA, 0, b"")]


def test_clear_forgets_what_is_idle(log, path):
    log.end(begin(log, OBJECTS[0]))
    begin(log, OBJECTS[1])
    log.clear()
    assert [each.object for each in recover(path)] == [OBJECTS[1]]
    assert log.in_use == 1


def test_a_slot_that_was_used_again_is_as_it_was_written_last(log, path):
    slot = begin(log, OBJECTS[0], handle=b"long" * 20)
    log.end(slot)
    log.clear()
    for object_id in OBJECTS[1 : SLOTS + 1]:
        log.end(begin(log, object_id, handle=b""))
    assert {each.handle for each in recover(path)} == {b""}


def test_opening_again_keeps_what_is_not_recovered_yet(log, path):
    begin(log, OBJECTS[0])
    again = ActivityLog(path, NODE)
    assert [each.object for each in recover(path)] == [OBJECTS[0]]
    again.clear()
    again.close()
    assert recover(path) == []


def test_is_lost(log, path):
    assert not activity.is_lost(path, NODE)
    assert activity.is_lost(path, b"m" * 16)
    assert activity.is_lost(path + "-other", NODE)
    os.truncate(path, 5000)
    assert activity.is_lost(path, NODE)
    os.truncate(path, 5)
    assert activity.is_lost(path, NODE)
    os.truncate(path, (SLOTS + 1) * SLOT_SIZE)
    assert activity.is_lost(path, NODE)


def test_no_file_and_an_empty_file_hold_nothing(path):
    assert recover(path) == []
    open(path, "wb").close()
    assert recover(path) == []


def test_another_kind_of_file_is_refused(path):
    with open(path, "wb") as file:
        file.write(b"something else".ljust((SLOTS + 1) * SLOT_SIZE, b"!"))
    with pytest.raises(StoreError, match="not an activity log of this version"):
        recover(path)


def test_a_link_in_the_way_is_not_followed(path, tmp_path):
    os.symlink(tmp_path / "elsewhere", path)
    with pytest.raises(OSError, match="symbolic links"):
        ActivityLog(path, NODE)
    assert not (tmp_path / "elsewhere").exists()


@settings(max_examples=200, deadline=None)
@given(st.integers(0, SLOT_SIZE), st.binary(min_size=SLOT_SIZE, max_size=SLOT_SIZE))
def test_a_slot_cut_off_in_writing_is_not_believed(tmp_path_factory, length, older):
    """Whatever was in the slot, and wherever the writing stopped."""
    path = str(tmp_path_factory.mktemp("torn") / "activity")
    log = ActivityLog(path, NODE)
    begin(log, OBJECTS[0], 99)
    log.close()
    with open(path, "r+b") as file:
        blank = file.read()
        at = next(n for n in range(SLOT_SIZE, len(blank), SLOT_SIZE) if any(blank[n : n + 4]))
        written = blank[at : at + SLOT_SIZE]
        mixed = written[:length] + older[length:]
        file.seek(at)
        file.write(mixed)
    found = recover(path)
    whole = 32 + len(HANDLE)  # the head of a slot, and the handle
    assert found == (
        [(OBJECTS[0], KIND_DATA, 99, HANDLE)] if mixed[:whole] == written[:whole] else []
    )


def test_what_a_killed_process_had_begun_is_found(path):
    """kill -9 while it begins and ends: all that it had told before is there."""
    script = f"""
        import sys
        sys.path.insert(0, {os.path.dirname(replfs.__path__[0])!r})
        from replfs.store.activity import KIND_DATA, ActivityLog
        log = ActivityLog({path!r}, {NODE!r})
        for number in range(1, {SLOTS}):
            slot = log.begin(number.to_bytes(16, "big"), KIND_DATA, number, lambda: b"h")
            print(number, flush=True)
            if number % 2:
                log.end(slot)
        sys.stdin.read()
    """
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            for line in process.stdout:
                if int(line) >= 1000:
                    break
        finally:
            process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines(keepends=True)
    told = 1000 + sum(line.endswith("\n") for line in rest)
    found = {each.region: each for each in recover(path)}
    for number in range(1, told + 1):
        assert found[number] == (number.to_bytes(16, "big"), KIND_DATA, number, b"h")
    assert not activity.is_lost(path, NODE)
