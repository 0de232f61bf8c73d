"""The writers and the checker that soak runs rely on: what is lost or changed is noticed."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest
from helpers.record import Record, RecordFile, payload
from helpers.writer import Failed, Writers


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records"
    path.mkdir()
    return path


@pytest.fixture
def top(tmp_path):
    path = tmp_path / "top"
    path.mkdir()
    return path


def files_of(top, writer=0):
    """Files with one name that have something in them."""
    found = []
    for directory, _, names in os.walk(top / f"w{writer}"):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink() and path.stat().st_size and path.stat().st_nlink == 1:
                found.append(path)
    assert found
    return sorted(found)


def flip(path):
    found = path.stat()
    with path.open("r+b") as file:
        file.seek(found.st_size // 2)
        byte = file.read(1)
        file.seek(found.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def cut_a_line(path):
    path.write_bytes(path.read_bytes()[32:])


TAMPERING = {
    "a changed byte": lambda top: flip(files_of(top)[0]),
    "a missing file": lambda top: files_of(top)[0].unlink(),
    "a file too many": lambda top: (top / "w0/extra").touch(),
    "a shorter file": lambda top: os.truncate(files_of(top)[0], 0),
    "another mode": lambda top: os.chmod(files_of(top)[0], 0o7),
    "an attribute too many": lambda top: os.setxattr(files_of(top)[0], "user.x", b"1"),
    "one more link": lambda top: os.link(files_of(top)[0], top / "elsewhere"),
    "a copy in place of a link": lambda top: _unlink_link(top),
    "a lost line of the common log": lambda top: cut_a_line(top / "common/log"),
    "an older state of the common blocks": lambda top: os.truncate(top / "common/slots", 0),
}


def _unlink_link(top):
    for directory, _, names in os.walk(top / "w0"):
        for name in names:
            path = Path(directory, name)
            if not path.is_symlink() and path.stat().st_nlink > 1:
                shutil.copy2(path, f"{path}-copy")
                os.replace(f"{path}-copy", path)
                return
    raise AssertionError("no links")


def test_everything_acknowledged_is_there_and_nothing_else_would_do(top, records):
    with Writers(top, records, count=2) as writers:
        writers.wait_more(300)
        with writers.held():
            writers.check(top)
            for what, tamper in TAMPERING.items():
                other = top.with_name("tampered")
                copy(top, other)
                writers.check(other)
                tamper(other)
                with pytest.raises(AssertionError, match=r"is not what writer . was told"):
                    writers.check(other, timeout_s=0)
                    pytest.fail(f"not noticed: {what}")
                shutil.rmtree(other)
        report = writers.stop()
        writers.check(top)
    assert report.done.total() > 600
    assert report.longest_ns > 0


def copy(source, target):
    """With holes, links, times and attributes."""
    assert os.spawnlp(os.P_WAIT, "cp", "cp", "-a", source, target) == 0


def test_what_was_in_flight_may_be_there_or_not(top, records):
    with Writers(top, records, count=1, rest_s=0.01) as writers:
        writers.wait_more(100)
        with writers.held():
            before = time.monotonic_ns()
            copy(top, top.with_name("older"))
        writers.wait_more(5)
        with writers.held():
            # So many may have been in flight, and the older state is one of theirs.
            writers.check(top.with_name("older"), acknowledged_ns=before)
            writers.check(top, acknowledged_ns=before)
            with pytest.raises(AssertionError, match="is not what"):
                writers.check(top.with_name("older"), timeout_s=0)


def test_half_a_write_may_be_there_while_it_is_in_flight(top, records):
    (top / "w0").mkdir()
    for name in ("shared", "common"):
        (top / name).mkdir()
    for name in ("log", "slots"):
        (top / "common" / name).touch()
    file = RecordFile(records / "w0.record")
    file.write(("b", 1, 1, "create", "w0/f", 0o644), ("e", 1, 2))
    file.write(("b", 2, 3, "write", "w0/f", 0, 1000, 5), ("e", 2, 4))
    file.write(("b", 3, 5, "write", "w0/f", 500, 1000, 6))
    writers = Writers(top, records, count=1)
    old, new = payload(5, 1000), payload(6, 1000)
    for data, allowed in (
        (old, True),
        (old[:500] + new, True),
        (old[:500] + new[:100] + old[600:], True),
        (old[:500] + new[:700], True),
        (old[:500] + bytes(500), False),
        (new + old, False),
        (old[:900], False),
    ):
        (top / "w0/f").write_bytes(data)
        (top / "w0/f").chmod(0o644)
        writers.records = [Record(records / "w0.record", 0)]
        if allowed:
            writers.check(top, timeout_s=0)
        else:
            with pytest.raises(AssertionError, match="w0/f"):
                writers.check(top, timeout_s=0)


def test_an_error_is_a_failure_unless_the_mount_is_down(top, records):
    with pytest.raises(Failed, match="No such file"):
        with Writers(top, records, count=1) as writers:
            writers.wait_more(20)
            os.rename(top / "w0", top / "gone")
            writers.wait_more(1000)


def test_writers_go_on_when_the_mount_is_back(top, records):
    """A tree that vanishes and comes back, as it is with a mount."""
    with Writers(top, records, count=2) as writers:
        for _ in range(5):
            writers.wait_more(40)
            with writers.mount_down():
                os.rename(top, top.with_name("away"))
                os.rename(top.with_name("away"), top)
        writers.wait_more(40)
        with writers.held():
            writers.check(top)
