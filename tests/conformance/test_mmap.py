"""Mappings of files, shared and private, alone and beside read and write. Source: mmap(2)."""

from __future__ import annotations

import errno
import mmap
import os
import signal

import pytest
from helpers.cases import BOTH_CACHES, fails, fd_of, make_owned, mode_of, read, stamps, write
from helpers.children import GROUP, OTHER_USER, USER, ChildDied, as_user, run, together

pytestmark = BOTH_CACHES

PAGE = mmap.PAGESIZE


@pytest.fixture
def mapped(tree):
    """A file of five pages of `x` and a shared mapping of it."""
    write(tree / "file", b"x" * 5 * PAGE)
    with fd_of(tree / "file", os.O_RDWR) as fd:
        mapping = mmap.mmap(fd, 5 * PAGE)
    yield mapping
    mapping.close()


def test_what_is_stored_is_in_the_file(tree, mapped):
    mapped[PAGE - 2 : PAGE + 2] = b"over"
    mapped[-1:] = b"!"
    assert read(tree / "file")[PAGE - 2 : PAGE + 2] == b"over"
    mapped.flush()
    assert read(tree / "file") == b"x" * (PAGE - 2) + b"over" + b"x" * (4 * PAGE - 3) + b"!"
    if tree.mounted:
        for store in tree.stores():
            assert read(store / "file") == read(tree / "file")


def test_what_is_written_is_in_the_mapping(tree, mapped):
    with fd_of(tree / "file", os.O_RDWR) as fd:
        os.pwrite(fd, b"written", 2 * PAGE - 3)
    assert mapped[2 * PAGE - 3 : 2 * PAGE + 4] == b"written"


def test_a_store_without_msync_arrives_when_the_mapping_ends(tree, mapped):
    mapped[3 * PAGE] = ord("y")
    mapped.close()
    assert read(tree / "file")[3 * PAGE : 3 * PAGE + 2] == b"yx"


def test_fsync_carries_what_a_mapping_stored(tree, mapped):
    mapped[0:4] = b"data"
    with fd_of(tree / "file", os.O_RDWR) as fd:
        os.fsync(fd)
    for store in tree.stores():
        assert read(store / "file")[:5] == b"datax"
    assert read(tree / "file")[:5] == b"datax"


def test_overlapping_stores_and_writes(tree, mapped):
    with fd_of(tree / "file", os.O_RDWR) as fd:
        for number in range(1, 100):
            mapped[number * 100 : number * 100 + 4] = b"%04d" % number
            os.pwrite(fd, b"%04d" % (number + 5000), number * 100 + 2)
            if number % 9 == 0:
                mapped.flush(0, PAGE)
    data = read(tree / "file")
    for number in range(1, 100):
        start = number * 100
        assert data[start : start + 6] == b"%02d" % (number // 100) + b"%04d" % (number + 5000)


def test_private_stores_stay_private(tree):
    write(tree / "file", b"x" * PAGE)
    with fd_of(tree / "file", os.O_RDONLY) as fd:
        mapping = mmap.mmap(fd, PAGE, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    mapping[0:4] = b"mine"
    assert mapping[0:5] == b"minex"
    mapping.close()
    assert read(tree / "file") == b"x" * PAGE


def test_two_processes_share(tree):
    write(tree / "file", bytes(PAGE))
    reader, writer = os.pipe()

    def tell():
        with fd_of(tree / "file", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as mapping:
            mapping[100:105] = b"hello"
            os.write(writer, b"1")

    def listen():
        with fd_of(tree / "file", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as mapping:
            os.read(reader, 1)
            return mapping[100:105]

    try:
        assert together(tell, listen)[1] == b"hello"
    finally:
        os.close(reader)
        os.close(writer)
    assert read(tree / "file")[100:105] == b"hello"


def test_the_tail_of_the_last_page_is_not_written(tree):
    write(tree / "file", b"short")
    with fd_of(tree / "file", os.O_RDWR) as fd:
        with mmap.mmap(fd, 5) as mapping:
            mapping[0:5] = b"SHORT"
        os.ftruncate(fd, 100)
    assert read(tree / "file") == b"SHORT" + bytes(95)


def test_a_mapping_sees_its_file_grow(tree):
    write(tree / "file", b"x" * 10)
    with fd_of(tree / "file", os.O_RDWR) as fd:
        os.ftruncate(fd, 3 * PAGE)
        with mmap.mmap(fd, 3 * PAGE) as mapping:
            assert mapping[PAGE] == 0
            mapping[2 * PAGE :] = b"y" * PAGE
    assert read(tree / "file") == b"x" * 10 + bytes(2 * PAGE - 10) + b"y" * PAGE


def test_beyond_the_end_is_a_bus_error(tree):
    write(tree / "file", b"x" * 2 * PAGE)

    def attempt():
        with fd_of(tree / "file", os.O_RDWR) as fd:
            mapping = mmap.mmap(fd, 2 * PAGE)
        os.truncate(tree / "file", PAGE)
        mapping[PAGE] = 1

    with pytest.raises(ChildDied) as died:
        run(attempt)
    assert died.value.signal == signal.SIGBUS


def test_what_access_a_mapping_needs(tree):
    write(tree / "file", b"x" * PAGE)
    with fd_of(tree / "file", os.O_RDONLY) as fd:
        with fails(errno.EACCES):
            mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ).close()
    with fd_of(tree / "file", os.O_WRONLY) as fd, fails(errno.EACCES):
        mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_READ)


def test_time_stamps(tree):
    write(tree / "file", b"x" * PAGE)
    with (
        stamps({tree / "file": "mc"}),
        fd_of(tree / "file", os.O_RDWR) as fd,
        mmap.mmap(fd, PAGE) as mapping,
    ):
        mapping[0] = 1
        mapping.flush()


def test_stores_of_a_user(tree):
    make_owned("file", tree / "file", OTHER_USER, GROUP, 0o666)
    os.truncate(tree / "file", PAGE)

    def store():
        with fd_of(tree / "file", os.O_RDWR) as fd, mmap.mmap(fd, PAGE) as mapping:
            mapping[0:4] = b"user"
            mapping.flush()

    as_user(store, uid=USER)
    assert read(tree / "file")[:4] == b"user"
    assert mode_of(tree / "file") == 0o666


def test_a_mapping_of_a_large_sparse_file(tree):
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, (6 << 30) + PAGE)
        with mmap.mmap(fd, PAGE, offset=6 << 30) as mapping:
            mapping[5:9] = b"deep"
        assert os.pread(fd, 4, (6 << 30) + 5) == b"deep"
