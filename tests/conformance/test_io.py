"""read, write and their kin: offsets, appending, sparse and large files, direct I/O, copies.

Source: read(2), write(2), lseek(2), open(2) O_APPEND and O_DIRECT, copy_file_range(2).
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import random

import pytest
from helpers.cases import BOTH_CACHES, fails, fd_of, outcome, read, write
from helpers.children import together
from helpers.libc import sync_file_range

pytestmark = BOTH_CACHES

GIB = 1 << 30
SIZES = (0, 1, 511, 4095, 4096, 4097, 65_535, 65_536, 131_072, 1_048_575, 1_048_577, 3_000_001)


def pattern(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


@pytest.mark.parametrize("size", SIZES)
def test_one_write_of_any_size(tree, size):
    data = pattern(size)
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        assert os.write(fd, data) == size
        assert os.lseek(fd, 0, os.SEEK_CUR) == size
        assert os.pread(fd, size + 10, 0) == data
    assert os.stat(tree / "file").st_size == size
    assert read(tree / "file") == data


def test_writes_at_odd_offsets(tree):
    expected = bytearray(300_000)
    chosen = random.Random(7)
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.ftruncate(fd, len(expected))
        for number in range(150):
            start = chosen.randrange(len(expected))
            data = pattern(chosen.randrange(1, min(20_000, len(expected) - start) + 1), number)
            assert os.pwrite(fd, data, start) == len(data)
            expected[start : start + len(data)] = data
        assert os.pread(fd, len(expected), 0) == expected
    assert read(tree / "file") == expected


def test_reads_at_odd_offsets(tree):
    data = pattern(200_000)
    write(tree / "file", data)
    chosen = random.Random(8)
    with fd_of(tree / "file") as fd:
        for _ in range(100):
            start, length = chosen.randrange(210_000), chosen.randrange(30_000)
            assert os.pread(fd, length, start) == data[start : start + length]
        assert os.pread(fd, 10, 1 << 40) == b""
        assert os.pread(fd, 0, 0) == b""


def test_vectors(tree):
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        assert os.writev(fd, [b"one", b"", b"two", b"x" * 5000]) == 5006
        assert os.pwritev(fd, [b"O", b"NE"], 0) == 3
        buffers = [bytearray(2), bytearray(4), bytearray(9_000)]
        assert os.preadv(fd, buffers, 0) == 5006
    assert b"".join(buffers)[:5006] == b"ONEtwo" + b"x" * 5000


def test_each_open_has_its_own_offset_and_a_duplicate_shares_it(tree):
    write(tree / "file", b"0123456789")
    with fd_of(tree / "file") as one, fd_of(tree / "file") as two:
        duplicate = os.dup(one)
        assert (os.read(one, 3), os.read(two, 2), os.read(duplicate, 2)) == (b"012", b"01", b"34")
        os.close(duplicate)


def test_seek(tree):
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"0123456789")
        assert os.lseek(fd, -3, os.SEEK_END) == 7
        assert os.lseek(fd, -2, os.SEEK_CUR) == 5
        assert os.read(fd, 2) == b"56"
        assert os.lseek(fd, 100, os.SEEK_SET) == 100
        assert os.read(fd, 2) == b""
        with fails(errno.EINVAL):
            os.lseek(fd, -1, os.SEEK_SET)
        os.write(fd, b"end")
    assert read(tree / "file") == b"0123456789" + bytes(90) + b"end"


def test_appending(tree):
    write(tree / "file", b"start ")
    with fd_of(tree / "file", os.O_RDWR | os.O_APPEND) as fd, fd_of(tree / "file", os.O_RDWR) as o:
        os.write(fd, b"one ")
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"two ")
        os.pwrite(o, b"elsewhere ", 14)
        os.write(fd, b"three ")
        os.ftruncate(o, 6)
        os.write(fd, b"four")
        # pwrite(2), BUGS: with O_APPEND Linux appends, whatever the offset.
        os.pwrite(fd, b" five", 0)
    assert read(tree / "file") == b"start four five"


def test_appending_by_several_processes_loses_nothing(tree):
    write(tree / "log", b"")

    def append(who):
        with fd_of(tree / "log", os.O_WRONLY | os.O_APPEND) as fd:
            for number in range(60):
                line = b"%d %d " % (who, number) + b"x" * (who * 100 + number) + b"\n"
                assert os.write(fd, line) == len(line)

    together(*[lambda who=who: append(who) for who in range(4)])
    lines = read(tree / "log").splitlines()
    assert len(lines) == 240
    for who in range(4):
        own = [line.split() for line in lines if line.startswith(b"%d " % who)]
        assert [int(line[1]) for line in own] == list(range(60))
        assert all(b"x" * (who * 100 + n) in (b"", *own[n][2:]) for n in range(60))


def test_processes_that_write_parts_of_one_file(tree):
    size, parts = 16_384, 32
    write(tree / "file", bytes(size * parts))

    def fill(who):
        with fd_of(tree / "file", os.O_RDWR) as fd:
            for part in range(who, parts, 4):
                os.pwrite(fd, bytes([part + 1]) * size, part * size)

    together(*[lambda who=who: fill(who) for who in range(4)])
    assert read(tree / "file") == b"".join(bytes([part + 1]) * size for part in range(parts))


@pytest.mark.parametrize("offset", [2 * GIB - 3, 4 * GIB - 3, 5 * GIB + 12_345, 1 << 42])
def test_beyond_four_gibibytes(tree, offset):
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"far out", offset)
        os.pwrite(fd, b"start", 0)
        assert os.fstat(fd).st_size == offset + 7
        assert os.pread(fd, 100, offset - 3) == b"\0\0\0far out"
        assert os.lseek(fd, -4, os.SEEK_END) == offset + 3
        assert os.read(fd, 4) == b" out"
        os.ftruncate(fd, offset + 3)
        os.pwrite(fd, b"!", offset + 4)
        assert os.pread(fd, 100, offset) == b"far\0!"
    assert os.stat(tree / "file").st_blocks * 512 < 1 << 20


def test_offsets_that_cannot_be(tree, cache):
    if cache == "write-back":
        pytest.skip("the error comes at close: tests/mounted/test_writeback.py")
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        assert outcome(os.pwrite, fd, b"x", (1 << 63) - 1) in ("EFBIG", "EINVAL")
        assert outcome(os.pwrite, fd, b"x", 1 << 60) == "EFBIG"
        assert outcome(os.pwrite, fd, b"x", -1) == "EINVAL"
        assert os.fstat(fd).st_size == 0


def test_holes_read_as_zeros(tree):
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        for megabyte in range(0, 40, 10):
            os.pwrite(fd, b"x", megabyte << 20)
        os.ftruncate(fd, 45 << 20)
    data = read(tree / "file")
    assert len(data) == 45 << 20
    assert data.count(b"x") == 4
    assert data.count(b"\0") == len(data) - 4
    assert os.stat(tree / "file").st_blocks * 512 < 1 << 20


def test_posix_fallocate(tree):
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"data")
        os.posix_fallocate(fd, 0, 20_000)
        assert os.fstat(fd).st_size == 20_000
        assert os.pread(fd, 99_999, 0) == b"data" + bytes(19_996)
        os.posix_fallocate(fd, 100, 50)
        assert os.fstat(fd).st_size == 20_000
        os.posix_fallocate(fd, 30_000, 5_000)
        assert os.fstat(fd).st_size == 35_000
        assert os.pread(fd, 4, 0) == b"data"
        with fails(errno.EINVAL):
            os.posix_fallocate(fd, 0, 0)
        with fails(errno.EINVAL):
            os.posix_fallocate(fd, -1, 10)
    with fd_of(tree / "file") as fd, fails(errno.EBADF):
        os.posix_fallocate(fd, 0, 10)


def test_direct_io(tree):
    block = 4096
    data = pattern(64 * block)
    buffer = mmap.mmap(-1, len(data))  # page aligned
    buffer.write(data)
    with fd_of(tree / "file", os.O_CREAT | os.O_RDWR | os.O_DIRECT) as fd:
        assert os.pwritev(fd, [buffer], 0) == len(data)
        assert os.pwritev(fd, [memoryview(buffer)[:block]], 80 * block) == block
        back = mmap.mmap(-1, 32 * block)
        assert os.preadv(fd, [back], 16 * block) == 32 * block
        assert back[:] == data[16 * block : 48 * block]
        with fd_of(tree / "file", os.O_RDWR) as cached:
            os.pwrite(cached, b"through the cache", 0)
            assert os.preadv(fd, [back], 0) == 32 * block
            assert back[:17] == b"through the cache"
            assert os.pwritev(fd, [memoryview(buffer)[:block]], 0) == block
            assert os.pread(cached, block, 0) == data[:block]
        back.close()
    assert os.stat(tree / "file").st_size == 81 * block
    assert read(tree / "file")[: 64 * block] == data


def test_copies_within_the_kernel(tree):
    data = pattern(700_001)
    write(tree / "file", data)
    with fd_of(tree / "file") as source:
        with fd_of(tree / "sendfile", os.O_CREAT | os.O_WRONLY) as target:
            done = 0
            while done < len(data):
                done += os.sendfile(target, source, done, len(data) - done)
        with fd_of(tree / "range", os.O_CREAT | os.O_WRONLY) as target:
            done = 0
            while done < len(data):
                done += os.copy_file_range(source, target, len(data) - done, done, done)
        reader, writer = os.pipe()
        with fd_of(tree / "splice", os.O_CREAT | os.O_WRONLY) as target:
            done = 0
            while done < len(data):
                moved = os.splice(source, writer, 65_536, offset_src=done)
                done += moved
                while moved:
                    moved -= os.splice(reader, target, moved)
        os.close(reader)
        os.close(writer)
    for name in ("sendfile", "range", "splice"):
        assert hashlib.sha256(read(tree / name)).digest() == hashlib.sha256(data).digest()


def test_copy_file_range_within_a_file(tree):
    write(tree / "file", pattern(10_000))
    before = read(tree / "file")
    with fd_of(tree / "file", os.O_RDWR) as fd:
        assert os.copy_file_range(fd, fd, 3_000, 1_000, 20_000) == 3_000
    assert read(tree / "file") == before + bytes(10_000) + before[1_000:4_000]


def test_flushing(tree):
    os.mkdir(tree / "dir")
    with fd_of(tree / "dir/file", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, pattern(100_000))
        os.fdatasync(fd)
        os.write(fd, b"more")
        os.fsync(fd)
        sync_file_range(fd, 0, 0, 7)
        os.fchmod(fd, 0o600)
        os.fsync(fd)
        os.unlink(tree / "dir/file")
        os.fsync(fd)
    write(tree / "file", b"")
    for path in (tree.path, tree / "dir", tree / "file"):
        with fd_of(path, os.O_RDONLY) as fd:
            os.fsync(fd)
            os.fdatasync(fd)
    os.mkfifo(tree / "fifo")
    with fd_of(tree / "fifo", os.O_RDWR) as fd, fails(errno.EINVAL):
        os.fsync(fd)


def test_flushing_by_several_processes(tree):
    def work(who):
        for number in range(5):
            with fd_of(tree / f"{who}-{number}", os.O_CREAT | os.O_RDWR) as fd:
                os.write(fd, pattern(5_000, who))
                os.fsync(fd)

    together(*[lambda who=who: work(who) for who in range(4)])
    assert len(os.listdir(tree)) == 20


def test_a_file_read_while_it_grows(tree):
    write(tree / "file", b"")

    def grow():
        with fd_of(tree / "file", os.O_WRONLY) as fd:
            for number in range(200):
                os.write(fd, b"%08d" % number * 64)

    def follow():
        seen = b""
        with fd_of(tree / "file") as fd:
            while len(seen) < 200 * 512:
                part = os.read(fd, 10_000)
                seen += part
        return seen

    assert together(grow, follow)[1] == b"".join(b"%08d" % number * 64 for number in range(200))


def test_numbers_about_the_filesystem(tree):
    found = os.statvfs(tree)
    assert found.f_namemax == 255
    assert found.f_bsize > 0
    assert 0 <= found.f_bavail <= found.f_bfree <= found.f_blocks
    assert 0 <= found.f_ffree <= found.f_files
    with fd_of(tree) as fd:
        assert os.fstatvfs(fd).f_blocks == found.f_blocks
    assert os.pathconf(tree, "PC_NAME_MAX") == 255


def test_sizes_and_blocks(tree):
    write(tree / "file", b"x" * 100_000)
    with fd_of(tree / "file", os.O_RDWR) as fd:
        os.fsync(fd)
    status = os.stat(tree / "file")
    assert 100_000 <= status.st_blocks * 512 < 400_000
    assert status.st_blksize >= 512
    assert status.st_dev == os.stat(tree).st_dev
