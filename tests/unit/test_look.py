"""What is told of many objects at once, and that a digest tells any two apart that differ."""

from __future__ import annotations

import os
import time

import pytest

from replfs.store import look as looks
from replfs.store import record as records
from replfs.store.look import (
    CONTENTS_MAX,
    DIGEST_SIZE,
    directory_digest,
    look,
    read_whole,
    sorted_names,
)
from replfs.store.record import INCOMPLETE, Record

ID = bytes(range(16))
NOW = 1_700_000_000_123_456_789

pytestmark = pytest.mark.skipif(not records.PRIVILEGED, reason="only root's are compared so")


def record(path, policy=0, ack=0, flags=0):
    os.setxattr(
        path,
        records.XATTR,
        records.pack(Record(ID, flags, policy, ack), os.lstat(path).st_ino),
        follow_symlinks=False,
    )
    os.utime(path, ns=(NOW, NOW), follow_symlinks=False)


@pytest.fixture
def directory(tmp_path):
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"contents")
    path.chmod(0o640)
    record(path)
    return path


def digest_of(directory, name=b"file"):
    seen, looked = look(directory, [name], digests=True)
    assert looked == 1
    return seen[name].digest


def change_contents(path):
    path.write_bytes(b"CONTENTS")
    os.utime(path, ns=(NOW, NOW))


def cut_off(path):
    os.truncate(path, 7)
    os.utime(path, ns=(NOW, NOW))


CHANGES = {
    "contents": change_contents,
    "size": cut_off,
    "mode": lambda path: path.chmod(0o641),
    "owner": lambda path: os.chown(path, 1, -1),
    "group": lambda path: os.chown(path, -1, 1),
    "mtime": lambda path: os.utime(path, ns=(NOW, NOW + 1)),
    "a time before 1970": lambda path: os.utime(path, ns=(NOW, -1)),
    "a time after 2262": lambda path: os.utime(path, ns=(NOW, (1 << 63) + 1)),
    "xattr": lambda path: os.setxattr(path, "user.a", b"b"),
    "another xattr": lambda path: os.setxattr(path, "user.ab", b""),
    "trusted xattr": lambda path: os.setxattr(path, "trusted.a", b"b"),
    "policy": lambda path: record(path, policy=1),
    "ack": lambda path: record(path, ack=1),
}


def test_each_change_makes_another_digest(directory, file):
    digests = [digest_of(directory)]
    assert len(digests[0]) == DIGEST_SIZE
    for change in CHANGES.values():
        file.unlink()
        file.write_bytes(b"contents")
        file.chmod(0o640)
        record(file)
        # Another inode, and the same digest.
        assert digest_of(directory) == digests[0]
        change(file)
        digests.append(digest_of(directory))
    assert len(set(digests)) == len(CHANGES) + 1
    assert all(digests)


def test_what_does_not_count(directory, file):
    before = digest_of(directory)
    os.utime(file, ns=(1, NOW))
    record(file, flags=INCOMPLETE)
    assert digest_of(directory) == before


def test_looking_leaves_the_time_of_access(directory, file):
    os.utime(file, ns=(NOW - 1, NOW))
    assert digest_of(directory)
    assert file.stat().st_atime_ns == NOW - 1


def with_hole(path):
    os.truncate(path, 1 << 17)


def too_large(path):
    path.write_bytes(bytes(CONTENTS_MAX + 1))


def of_another(path):
    other = path.with_name("other")
    other.write_bytes(b"contents")
    value = os.getxattr(path, records.XATTR)
    os.setxattr(other, records.XATTR, value)
    os.rename(other, path)


@pytest.mark.parametrize("change", [with_hole, too_large, of_another])
def test_what_has_no_digest(directory, file, change):
    change(file)
    assert digest_of(directory) == b""


def test_every_type(directory, tmp_path):
    (tmp_path / "link").symlink_to("target")
    record(tmp_path / "link")
    os.mkfifo(tmp_path / "fifo")
    record(tmp_path / "fifo")
    (tmp_path / "directory").mkdir()
    record(tmp_path / "directory")
    names = sorted_names(directory)
    assert names == [b"directory", b"fifo", b"link"]
    seen, looked = look(directory, [*names, b"not there"], digests=True)
    assert looked == 4
    assert {name: (bool(one.record.object), bool(one.digest)) for name, one in seen.items()} == {
        b"directory": (False, False),  # it may be another file system's
        b"fifo": (True, False),
        b"link": (True, True),
    }
    before = seen[b"link"].digest
    (tmp_path / "link").unlink()
    (tmp_path / "link").symlink_to("Target")
    record(tmp_path / "link")
    assert digest_of(directory, b"link") != before


def test_without_digests_nothing_is_opened(directory, file, monkeypatch):
    monkeypatch.setattr(os, "open", None)
    seen, _ = look(directory, [b"file"], digests=False)
    assert seen[b"file"].record.object == ID
    assert seen[b"file"].digest == b""


def test_what_goes_whole(directory, tmp_path):
    (tmp_path / "file").write_bytes(b"contents")
    os.setxattr(tmp_path / "file", "user.a", b"b")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "directory").mkdir()
    (tmp_path / "two names").write_bytes(b"x")
    os.link(tmp_path / "two names", tmp_path / "other name")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "hole").write_bytes(b"x")
    os.truncate(tmp_path / "hole", 1 << 17)
    (tmp_path / "large").write_bytes(bytes(100))
    (tmp_path / "last").write_bytes(b"last")
    names = [
        b"file", b"link", b"directory", b"two names", b"fifo", b"hole", b"large", b"last",
    ]  # fmt: skip
    wanted = [(name, (tmp_path / os.fsdecode(name)).lstat().st_ino) for name in names]
    found = read_whole(directory, [*wanted, (b"file", 1), (b"gone", 2)], 12)
    assert {name: (one.contents, one.xattrs) for name, one in found.items()} == {
        b"file": (b"contents", {b"user.a": b"b"}),
        b"link": (b"target", {}),
        b"directory": (b"", {}),
        b"last": (b"last", {}),
    }
    # So much of attributes, too.
    assert b"file" not in read_whole(directory, wanted, 5)


def test_a_directory_of_its_own(directory, tmp_path):
    own = Record(ID, 0, 0, 0)
    os.utime(tmp_path, ns=(NOW, NOW))
    before = directory_digest(directory, own)
    assert directory_digest(directory, own) == before
    assert directory_digest(directory, own._replace(policy=2)) != before
    (tmp_path / "new").touch()
    assert directory_digest(directory, own) != before


def test_it_ends_early_and_says_where(directory, tmp_path, monkeypatch):
    names = [b"f%d" % number for number in range(5)]
    for name in names:
        path = tmp_path / name.decode()
        path.write_bytes(b"x" * 100)
        record(path)
    monkeypatch.setattr(looks, "_READ_MAX", 150)
    seen, looked = look(directory, names, digests=True)
    assert (list(seen), looked) == (names[:2], 2)
    seen, looked = look(directory, names[2:], digests=False)
    assert looked == 3
    # However long it takes: one at least.
    monkeypatch.setattr(looks, "_SECONDS_MAX", 0.0)
    monkeypatch.setattr(time, "monotonic", iter(range(100)).__next__)
    seen, looked = look(directory, names, digests=True)
    assert (list(seen), looked) == (names[:1], 1)
