"""Writing all of what is there, in pieces, and with it the time."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

import pytest

from replfs.core import ops
from replfs.store import syscalls
from replfs.store.contents import PIECE, put, resize, write_all

DATA = os.urandom(3 * PIECE + 5)


@pytest.fixture
def fd(tmp_path):
    opened = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    yield opened
    os.close(opened)


@pytest.fixture
def calls(monkeypatch) -> list[int]:
    """The size of each write; appended to by a disk that can be made to take less."""
    return limited(monkeypatch, lambda _number, size: size)


def limited(monkeypatch, taken: Callable[[int, int], int]) -> list[int]:
    """*taken*: how much of the write with this number and size; a negative one is an errno."""
    pwrite = os.pwrite
    made: list[int] = []

    def write(fd: int, data: bytes, offset: int) -> int:
        size = taken(len(made), len(data))
        made.append(len(data))
        if size < 0:
            raise OSError(-size, os.strerror(-size))
        return pwrite(fd, memoryview(data)[:size], offset)

    monkeypatch.setattr(os, "pwrite", write)
    return made


@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_a_large_one_takes_several_calls(fd, calls, kind):
    assert write_all(fd, kind(DATA), 7) == len(DATA)
    assert calls == [PIECE, PIECE, PIECE, 5]
    assert os.pread(fd, len(DATA) + 1, 7) == DATA


@pytest.mark.parametrize("size", [0, 1, PIECE])
def test_a_small_one_takes_one(fd, calls, size):
    assert write_all(fd, DATA[:size], 0) == size
    assert calls == [size]


def test_what_was_not_taken_is_written_again(fd, monkeypatch):
    limited(monkeypatch, lambda number, size: size if number else 100)
    assert write_all(fd, DATA, 0) == len(DATA)
    assert os.pread(fd, len(DATA), 0) == DATA


@pytest.mark.parametrize("end", [0, -errno.ENOSPC])
def test_a_full_disk_is_no_error_where_something_was_written(fd, monkeypatch, end):
    limited(monkeypatch, lambda number, size: size if number < 2 else end)
    assert write_all(fd, DATA, 0) == 2 * PIECE


def test_it_is_one_where_nothing_was(fd, monkeypatch):
    limited(monkeypatch, lambda _number, _size: -errno.ENOSPC)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        write_all(fd, DATA, 0)


@pytest.mark.parametrize(
    ("end", "outcome"), [(PIECE, ops.Done(0, len(DATA))), (-errno.ENOSPC, ops.Done(errno.ENOSPC))]
)
def test_the_time_is_set_whatever_became_of_a_write(fd, monkeypatch, end, outcome):
    """A kernel changes it, to its own, before it looks for room; a peer's does so, too."""
    limited(monkeypatch, lambda _number, size: min(size, end))
    assert put(fd, DATA, 0, 12345) == outcome
    assert os.fstat(fd).st_mtime_ns == 12345


def test_the_time_is_set_whatever_became_of_a_truncation(fd, monkeypatch):
    assert resize(fd, 10, 12345) == ops.Done(0)
    assert (os.fstat(fd).st_size, os.fstat(fd).st_mtime_ns) == (10, 12345)

    def refuse(*_: object) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setattr(os, "ftruncate", refuse)
    assert resize(fd, 20, 23456) == ops.Done(errno.EFBIG)
    assert os.fstat(fd).st_mtime_ns == 23456


@pytest.mark.parametrize("end", [PIECE, -errno.ENOSPC])
def test_where_it_cannot_be_set_nobody_knows_what_was_done(fd, monkeypatch, end):
    limited(monkeypatch, lambda _number, size: min(size, end))

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(syscalls, "utimens", fail)
    assert put(fd, DATA, 0, 12345) == ops.Done(errno.EIO, len(DATA) if end > 0 else 0)
    assert resize(fd, 10, 12345) == ops.Done(errno.EIO)
