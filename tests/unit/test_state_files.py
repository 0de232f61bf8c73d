"""Each file of STORE/.replfs missing, cut short, overwritten or replaced by something else.

What cannot be believed is refused with a sentence that names it and says what to do, and is left as
it is; what can be made anew is.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import socket

import pytest
from helpers.states import opened

from replfs.errors import StoreError
from replfs.store import database, wal
from replfs.store import state as state_module
from replfs.store.lock import Lock
from replfs.store.state import State

FRAME = 24 + 4096
MARKS = 60


@pytest.fixture
def killed(tmp_path):
    """A store whose node was killed in the middle of a run, with all that it had saved."""
    original, store = tmp_path / "original", tmp_path / "store"
    original.mkdir()
    with opened(original) as state:
        state.update(role="primary", volume=b"V" * 16, generation=b"G" * 16)
        state.save_peer("a")
        state.stopped_cleanly()
    with opened(original) as state:
        state.started()
        log = state.load_log("a")
        for number in range(MARKS):
            log.mark_data(bytes([number + 1]) * 16, 0, 1)
        # As its files are at this moment; `opened` would end the run.
        shutil.copytree(original, store, symlinks=True)
    return store


def refusal(store):
    """What is said of it, by which nothing is changed."""
    before = contents(store)
    with pytest.raises(StoreError) as raised, opened(store):
        pass
    assert contents(store) == before
    sentence = str(raised.value)
    assert f"{store}" in sentence
    assert "\n" not in sentence
    assert "; " in sentence
    return sentence


def contents(store):
    found = {}
    for path in sorted((store / ".replfs").iterdir()):
        if path.name not in {"lock", "reserve"}:
            found[path.name] = path.read_bytes() if path.is_file() else path.lstat().st_mode
    return found


def marks(store):
    with opened(store) as state:
        assert state.unclean
        return len(state.load_log("a"))


def test_what_a_kill_leaves_is_taken(killed):
    assert marks(killed) == MARKS
    # And what that one left, whether it began a run or not.
    assert marks(killed) == MARKS


# The log of the database --------------------------------------------------------------------------


def log_of(store):
    return store / ".replfs/state.db-wal"


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "missing or empty"),
        (20, "missing or empty"),
        (33, "cut short"),
        (-1, "cut short"),
        (-4096 - 12, "cut short"),
        (4096 * 7, "cut short"),
    ],
)
def test_a_log_that_was_cut_is_refused(killed, size, words):
    log = log_of(killed)
    os.truncate(log, size if size >= 0 else log.stat().st_size + size)
    assert words in refusal(killed)


@pytest.mark.parametrize("frames", [1, 2, MARKS // 2])
def test_a_log_that_was_cut_between_two_commits_is_refused(killed, frames):
    """It is the log of an earlier moment, with nothing wrong in itself."""
    log = log_of(killed)
    os.truncate(log, log.stat().st_size - frames * FRAME)
    assert "cut short" in refusal(killed)


def test_an_earlier_state_of_the_same_run_is_refused(tmp_path):
    """A copy from before some of the marks, put back after a kill."""
    original, store = tmp_path / "original", tmp_path / "store"
    original.mkdir()
    with opened(original) as state:
        state.started()
        state.save_peer("a")
        log = state.load_log("a")
        log.mark_data(bytes(16), 0, 1)
        shutil.copytree(original / ".replfs", tmp_path / "earlier")
        log.mark_data(b"1" * 16, 0, 1)
        shutil.copytree(original, store)
    for name in ("state.db", "state.db-wal"):
        shutil.copy(tmp_path / "earlier" / name, store / ".replfs")
    assert "cut short" in refusal(store)


def test_a_log_that_began_anew_is_as_long_as_before(killed, tmp_path, monkeypatch):
    """What is in it then is shorter, and nothing of that is missing."""
    monkeypatch.setattr(database, "_CHECKPOINT_COMMITS", 1)
    store = tmp_path / "another"
    with opened(killed) as state:
        state.started()
        log = state.load_log("a")
        for number in range(MARKS):
            log.mark_data(bytes([number + 1]) * 16, 1 << 20, 2 << 20)
        state.harden()
        log.mark_data(b"x" * 16, 0, 1)
        shutil.copytree(killed, store)
    assert marks(store) == MARKS + 1


def test_a_log_that_is_gone_is_refused(killed):
    """The state beneath it says that the run before had ended well: nothing would be compared."""
    log_of(killed).unlink()
    assert "state.db-wal, is missing" in refusal(killed)


def test_so_it_is_where_power_was_lost_since(killed, monkeypatch):
    monkeypatch.setattr(state_module, "boot_id", lambda: "a later boot")
    log_of(killed).unlink()
    with pytest.raises(StoreError, match="older than the last run, which has not ended"):
        State(os.open(killed, os.O_RDONLY | os.O_DIRECTORY))


def test_what_a_loss_of_power_cut_is_taken_as_far_as_it_goes(killed, monkeypatch):
    monkeypatch.setattr(state_module, "boot_id", lambda: "a later boot")
    log = log_of(killed)
    os.truncate(log, log.stat().st_size - 20 * FRAME - 100)
    with opened(killed) as state:
        assert state.memory_lost
        assert 0 < len(state.load_log("a")) < MARKS


@pytest.mark.parametrize("cut", [20 * FRAME, 20 * FRAME + 100], ids=["whole", "torn"])
def test_so_it_is_by_a_run_that_was_killed_after_that(killed, tmp_path, monkeypatch, cut):
    monkeypatch.setattr(state_module, "boot_id", lambda: "a later boot")
    log = log_of(killed)
    os.truncate(log, log.stat().st_size - cut)
    with opened(killed) as state:
        state.started()
        found = len(state.load_log("a"))
        shutil.copytree(killed, tmp_path / "again", symlinks=True)
    assert marks(tmp_path / "again") == found


@pytest.mark.parametrize("at", [3, 17, 32 + 10 * FRAME + 9, 32 + 20 * FRAME + 1000])
def test_a_log_that_was_overwritten_is_refused(killed, at):
    with log_of(killed).open("r+b") as log:
        log.seek(at)
        byte = log.read(1)
        log.seek(at)
        log.write(bytes([byte[0] ^ 1]))
    assert "state.db-wal, is" in refusal(killed)


def test_another_log_is_refused(killed):
    log_of(killed).write_bytes(b"This is a text file.\n" * 5000)
    assert "state.db-wal, is not one" in refusal(killed)


def test_the_state_of_an_earlier_run_is_refused(killed, tmp_path):
    """Put back from a backup, without what came later."""
    with opened(tmp_path / "original") as state:
        state.stopped_cleanly()
    for name in ("state.db", "state.db-wal"):
        (killed / ".replfs" / name).unlink()
    shutil.copy(tmp_path / "original/.replfs/state.db", killed / ".replfs")
    assert "state.db-wal, is missing" in refusal(killed)


@pytest.mark.parametrize("half", [24, FRAME - 1, 0])
def test_a_frame_that_was_half_written_is_none(killed, half):
    """A process is killed between the two writes of a frame, or in the middle of a transaction."""
    log = log_of(killed)
    data = log.read_bytes()
    last = data[-FRAME:]
    torn = bytearray(last[: half or FRAME])
    if half != 24:
        torn = bytearray(last)
        torn[4:8] = bytes(4)  # it commits nothing
        torn[-1] ^= 0xFF
    log.write_bytes(data + torn)
    assert marks(killed) == MARKS


def test_an_end_of_an_earlier_use_of_the_log_is_none(killed):
    log = log_of(killed)
    old = bytearray(log.read_bytes()[-3 * FRAME :])
    for at in range(0, len(old), FRAME):
        old[at + 8 : at + 16] = b"before\0\0"
    with log.open("ab") as file:
        file.write(old)
    fd = os.open(log, os.O_RDONLY)
    assert wal.problem(fd) == ""
    os.close(fd)
    assert marks(killed) == MARKS


# Other kinds --------------------------------------------------------------------------------------


def make_link(path):
    path.symlink_to("/etc/hostname")


def make_socket(path):
    # The name may be longer than a socket's.
    here = os.getcwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(here)


KINDS = {
    "a directory": os.mkdir,
    "a symlink": make_link,
    "a fifo": os.mkfifo,
    "a socket": make_socket,
    "a file": lambda path: path.write_bytes(b""),
}
FILES = ("state.db", "state.db-wal", "state.db-journal", "lock", "reserve")
DIRECTORIES = ("limbo", "kept")


@pytest.fixture
def impatient():
    """A fifo that is opened would be waited for."""
    signal.alarm(20)
    yield
    signal.alarm(0)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in FILES for kind in KINDS if kind != "a file"]
    + [(name, kind) for name in DIRECTORIES for kind in KINDS if kind != "a directory"],
)
def test_another_kind_of_object_is_refused(killed, impatient, name, kind):
    path = killed / ".replfs" / name
    if path.is_dir():
        path.rmdir()
    else:
        path.unlink(missing_ok=True)
    KINDS[kind](path)
    before = path.lstat()
    sentence = refusal(killed)
    assert f"{path} is {kind}, and should be a " in sentence
    after = path.lstat()
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)


@pytest.mark.parametrize("name", ["reserve", "limbo", "kept"])
def test_what_can_be_made_anew_is(killed, name):
    path = killed / ".replfs" / name
    if path.is_dir():
        path.rmdir()
    else:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
    assert marks(killed) == MARKS


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"12345\n", b"\n\n\n"])
def test_a_lock_that_says_nothing_costs_a_check_and_nothing_else(killed, data):
    (killed / ".replfs/lock").write_bytes(data)
    assert marks(killed) == MARKS


# The end of a run ---------------------------------------------------------------------------------


def test_the_lock_never_says_that_a_run_goes_on_which_has_ended(killed, tmp_path):
    copy = tmp_path / "copy"
    with opened(killed) as state:
        state.started()
        assert state._lock.is_unended
        state.stopped_cleanly()
        assert not state._lock.is_unended
        shutil.copytree(killed, copy, symlinks=True)
    for store in (killed, copy):
        with opened(store) as state:
            assert not state.unclean
            assert not state._lock.is_unended


def test_where_it_goes_on_saying_so_the_log_that_it_tells_of_stays(killed, tmp_path, monkeypatch):
    """A full disk need not take even what replaces something as long."""
    left = tmp_path / "left"

    def full(_lock):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "end", full)
        with opened(killed) as state:
            state.started()
            state.load_log("a").mark_data(b"i" * 16, 0, 1)
    # As its files are when the process ends, which does not take the log away.
    shutil.copytree(killed, left, symlinks=True)
    while database._ABANDONED:
        database._ABANDONED.pop().close()
    assert marks(left) == MARKS + 1


def test_a_store_that_was_only_looked_at_is_as_it_was(killed):
    for _ in range(2):
        with opened(killed) as state:
            assert state.unclean
            assert len(state.load_log("a")) == MARKS
