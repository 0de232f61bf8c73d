"""Reading many small files at once for a peer that has none of them."""

from __future__ import annotations

import itertools
import os

import pytest

from replfs.store import record as records
from replfs.store.fresh import file_names, read_fresh
from replfs.store.record import Record

pytestmark = pytest.mark.skipif(not records.PRIVILEGED, reason="records are root's")

SIZE_MAX = 10_000


@pytest.fixture
def read(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    count = itertools.count(1)

    def read(names, limit=1 << 20):
        return read_fresh(fd, names, SIZE_MAX, limit, lambda: b"%016d" % next(count))

    yield read
    os.close(fd)


def record_of(path):
    return records.unpack(os.getxattr(path, records.XATTR), path.stat().st_ino)


def test_names_are_parted_into_files_and_the_rest(tmp_path):
    for name in ("b", "a", "c"):
        (tmp_path / name).touch()
    (tmp_path / "directory").mkdir()
    (tmp_path / "link").symlink_to("a")
    (tmp_path / "hidden").mkdir()
    os.mkfifo(tmp_path / "fifo")
    fd = os.open(tmp_path, os.O_RDONLY)
    files, others = file_names(fd, b"hidden")
    os.close(fd)
    by_inode = sorted("abc", key=lambda name: (tmp_path / name).stat().st_ino)
    assert files == [os.fsencode(name) for name in by_inode]
    assert sorted(others) == [b"directory", b"fifo", b"link"]


def test_all_there_is_to_a_file_with_an_id_that_it_keeps(tmp_path, read):
    (tmp_path / "new").write_bytes(b"contents")
    os.setxattr(tmp_path / "new", b"user.name", b"value")
    (tmp_path / "known").touch()
    known = Record(b"k" * 16, 0, 0, 0)
    value = records.pack(known, (tmp_path / "known").stat().st_ino)
    os.setxattr(tmp_path / "known", records.XATTR, value)
    for _ in range(2):
        (new, old), count = read([b"new", b"known"])
        assert count == 2
        assert (new.name, new.contents, new.xattrs) == (
            b"new",
            b"contents",
            {b"user.name": b"value"},
        )
        assert new.record == Record(b"%016d" % 1, 0, 0, 0) == record_of(tmp_path / "new")
        assert (old.name, old.contents, old.record) == (b"known", b"", known)
        assert new.found.st_ino == (tmp_path / "new").stat().st_ino


def test_what_cannot_go_so_is_left_out(tmp_path, read):
    (tmp_path / "large").write_bytes(bytes(SIZE_MAX + 1))
    (tmp_path / "several").touch()
    os.link(tmp_path / "several", tmp_path / "names")
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(SIZE_MAX)
    (tmp_path / "link").symlink_to("good")
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "copied").touch()
    os.setxattr(tmp_path / "copied", records.XATTR, records.pack(Record(b"o" * 16, 0, 0, 0), 1))
    (tmp_path / "incomplete").touch()
    number = (tmp_path / "incomplete").stat().st_ino
    value = records.pack(Record(b"i" * 16, records.INCOMPLETE, 0, 0), number)
    os.setxattr(tmp_path / "incomplete", records.XATTR, value)
    (tmp_path / "good").write_bytes(b"x")
    names = sorted(map(os.fsencode, os.listdir(tmp_path)))
    found, count = read([b"gone", *names])
    assert [one.name for one in found] == [b"good"]
    assert count == len(names) + 1


def test_no_more_than_a_message_holds(tmp_path, read):
    for name in "abc":
        (tmp_path / name).write_bytes(b"x" * 400)
    os.setxattr(tmp_path / "c", b"user.large", b"x" * 900)
    found, count = read([b"a", b"b", b"c"], limit=1300)
    assert ([one.name for one in found], count) == ([b"a", b"b", b"c"], 3)
    found, count = read([b"a", b"b", b"c"], limit=700)
    assert ([one.name for one in found], count) == ([b"a"], 1)
    # What would not be in one alone is left out, not tried for ever.
    found, count = read([b"c"], limit=700)
    assert (found, count) == ([], 1)
    found, count = read([b"c", b"a"], limit=700)
    assert ([one.name for one in found], count) == ([b"a"], 2)
