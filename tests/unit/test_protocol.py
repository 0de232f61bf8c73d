"""The bytes of FUSE: what the kernel asks, and what it is told."""

import os
import socket
import struct
from types import SimpleNamespace

import msgspec
import pyfuse3
import pytest

from replfs.front import dispatch, protocol
from replfs.front.protocol import Changes, Entry, Listing, Opened

OFFERED = protocol.HANDLE_KILLPRIV_V2 | protocol.AUTO_INVAL_DATA | 1 << 30 | 1


def request(operation: int, body: bytes, *, nodeid: int = 5, unique: int = 2) -> bytes:
    size = 40 + len(body)
    return struct.pack("=IIQQIIIHH", size, operation, unique, nodeid, 1000, 100, 77, 0, 0) + body


def init_request(*, operation=26, major=7, minor=45, flags=OFFERED, size=104):
    head = struct.pack("=IIQQIIII", size, operation, 2, 0, 0, 0, 0, 0)
    return (head + struct.pack("=IIII", major, minor, 1 << 17, flags)).ljust(104, b"\0")


FOUND = SimpleNamespace(
    st_size=10,
    st_blocks=8,
    st_atime_ns=-1,
    st_mtime_ns=1_500_000_000,
    st_ctime_ns=2,
    st_mode=0o100644,
    st_nlink=1,
    st_uid=3,
    st_gid=4,
    st_rdev=0,
    st_blksize=4096,
)


# INIT --------------------------------------------------------------------------------------------


def test_of_the_flags_wanted_those_are_asked_for_that_the_kernel_offers():
    reply = protocol.init_reply(init_request(), protocol.ALWAYS | protocol.AUTO_INVAL_DATA, 33)
    assert len(reply) == 80
    assert struct.unpack_from("=IiQ", reply) == (80, 0, 2)
    major, minor, read_ahead, flags = struct.unpack_from("=IIII", reply, 16)
    assert (major, minor, read_ahead) == (7, 38, 1 << 17)
    assert flags == protocol.HANDLE_KILLPRIV_V2 | protocol.AUTO_INVAL_DATA | 1
    assert struct.unpack_from("=HHIIH", reply, 32) == (33, 24, 1 << 20, 1, 256)


def test_an_older_kernel_is_answered_in_its_protocol():
    reply = protocol.init_reply(init_request(minor=31), 0, 12)
    assert struct.unpack_from("=II", reply, 16) == (7, 31)


@pytest.mark.parametrize(
    "other",
    [
        b"",
        init_request()[:50],
        init_request(operation=1),
        init_request(major=8),
        init_request(minor=22),
        init_request(size=105),
    ],
)
def test_other_requests_are_not_taken_for_an_init(other):
    assert protocol.is_init(init_request())
    assert not protocol.is_init(other)


# Replies -----------------------------------------------------------------------------------------


def test_an_entry_tells_attributes_and_how_long_they_hold():
    packed = protocol.entry(Entry(7, FOUND, 1.5, 0.25, 6))
    assert len(packed) == 128
    assert struct.unpack_from("=QQQQII", packed) == (7, 6, 1, 0, 500_000_000, 250_000_000)
    assert struct.unpack_from("=QQQqqq", packed, 40) == (7, 10, 8, -1, 1, 0)
    assert struct.unpack_from("=III", packed, 88) == (999_999_999, 500_000_000, 2)
    assert struct.unpack_from("=IIIIIII", packed, 100) == (0o100644, 1, 3, 4, 0, 4096, 0)
    assert protocol.attributes(Entry(7, FOUND, 1.5, 0.25))[16:] == packed[40:]


def test_what_is_not_there_holds_as_long_as_what_is():
    packed = protocol.entry(Entry(0, None, 5, 0))
    assert len(packed) == 128
    assert struct.unpack_from("=QQQ", packed) == (0, 0, 5)


def test_pyfuse3s_own_types_are_understood():
    one = pyfuse3.EntryAttributes()
    one.st_ino, one.st_mode, one.st_size = 9, 0o100600, 12
    one.attr_timeout = 2
    entry = dispatch._entry(one)
    assert (entry.nodeid, entry.attr_timeout) == (9, 2)
    assert struct.unpack_from("=QQ", protocol.attributes(entry), 16) == (9, 12)
    info = pyfuse3.FileInfo(fh=4, keep_cache=True, direct_io=True)
    assert dispatch._opened(info) == Opened(4, protocol.OPEN_KEEP_CACHE | protocol.OPEN_DIRECT_IO)
    assert dispatch._opened(6) == Opened(6, 0)


@pytest.mark.parametrize("plus", [False, True])
def test_a_listing_takes_what_there_is_room_for(plus):
    one = Entry(7, FOUND, 1, 1)
    each = 24 + 8 + 128 * plus
    listing = Listing(2 * each + each - 1, plus=plus)
    assert [listing.add(b"name%d" % n, one, n + 1) for n in range(3)] == [True, True, False]
    packed = listing.packed()
    assert len(packed) == 2 * each
    second = packed[each + 128 * plus :]
    assert struct.unpack_from("=QQII", second) == (7, 2, 5, 8)
    assert second[24:] == b"name1\0\0\0"
    assert packed[: 128 * plus] == (protocol.entry(one) if plus else b"")


def test_statfs():
    found = os.statvfs("/")
    packed = protocol.statfs(found)
    assert len(packed) == 80
    assert struct.unpack_from("=QQQQQIII", packed) == (
        found.f_blocks, found.f_bfree, found.f_bavail, found.f_files, found.f_ffree,
        found.f_bsize, found.f_namemax, found.f_frsize,
    )  # fmt: skip


def test_what_is_told_by_the_daemon_has_the_id_of_no_request():
    told = protocol.invalidate_inode(7, attr_only=True)
    assert struct.unpack("=IiQQqq", told) == (40, 2, 0, 7, -1, 0)
    assert struct.unpack("=IiQQqq", protocol.invalidate_inode(7)) == (40, 2, 0, 7, 0, 0)
    told = protocol.invalidate_entry(7, b"name")
    assert struct.unpack_from("=IiQQII", told) == (37, 3, 0, 7, 4, 0)
    assert told[32:] == b"name\0"


# Requests ----------------------------------------------------------------------------------------


def setattr_request(valid, *, size=0, atime=(0, 0), mtime=(0, 0), mode=0, uid=0, gid=0, handle=0):
    fields = (valid, 0, handle, size, 0, atime[0], mtime[0], 0, atime[1], mtime[1], 0)
    return request(4, struct.pack("=IIQQQqqqIIIIIIII", *fields, mode, 0, uid, gid, 0))


def test_of_a_setattr_only_what_is_marked_counts():
    everything = {"size": 9, "atime": (1, 2), "mtime": (-2, 5), "mode": 0o600, "uid": 1, "gid": 2}
    asked = protocol.changes(setattr_request(0, **everything), 100)
    assert asked == Changes(None, None, None, None, None, None, None)
    asked = protocol.changes(setattr_request(0b111_1111, handle=3, **everything), 100)
    assert asked == Changes(3, 9, 0o600, 1, 2, 1_000_000_002, -1_999_999_995)
    assert asked.update_size and asked.update_mode and asked.update_uid and asked.update_gid
    assert asked.update_atime and asked.update_mtime


def test_now_is_the_time_the_daemon_takes_it_for():
    now = 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8
    asked = protocol.changes(setattr_request(now, atime=(1, 1), mtime=(1, 1)), 100)
    assert (asked.st_atime_ns, asked.st_mtime_ns) == (100, 100)
    assert not asked.update_size


def test_names():
    assert protocol.name_at(b"12345a name\0rest", 5) == b"a name"
    assert protocol.names_at(b"12345one\0two\0", 5) == (b"one", b"two")


def test_forgotten():
    assert protocol.forgotten(request(2, struct.pack("=Q", 3), nodeid=9)) == [(9, 3)]
    body = struct.pack("=IIQQQQ", 2, 0, 4, 1, 5, 2)
    assert protocol.forgotten(request(42, body)) == [(4, 1), (5, 2)]


# Dispatching -------------------------------------------------------------------------------------


class Handlers:
    """Says how it was called; what it does not know of, it fails with."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        async def handler(*arguments):
            self.calls.append((name, *arguments))
            if name == "getxattr":
                if arguments[1] == b"user.there":
                    return b"value"
                raise pyfuse3.FUSEError(61)
            if name == "listxattr":
                return [b"user.a", b"user.b"]
            if name == "write":
                return len(arguments[2])
            if name == "read":
                return b"r" * arguments[2]
            return Entry(7, FOUND, 1, 1)

        return handler


@pytest.fixture
def kernel():
    """Both ends of a pair that keeps the bounds of what is sent, as /dev/fuse does."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        ours.settimeout(5)
        handlers = Handlers()
        yield SimpleNamespace(
            handlers=handlers,
            dispatcher=dispatch.Dispatcher(handlers, theirs.fileno()),
            ours=ours,
        )


async def ask(kernel, operation, body):
    """(errno, body of the reply, what was called)"""
    kernel.handlers.calls.clear()
    await kernel.dispatcher.answer(request(operation, body))
    reply = kernel.ours.recv(1 << 20)
    size, number, unique = struct.unpack_from("=IiQ", reply)
    assert (size, unique) == (len(reply), 2)
    return -number, reply[16:], kernel.handlers.calls


ANY = protocol.Context(1000, 100, 77)


async def test_arguments_come_as_pyfuse3_gives_them(kernel):
    async def called(operation, body):
        return (await ask(kernel, operation, body))[2]

    masked = msgspec.structs.replace(ANY, umask=0o22)
    assert await called(1, b"a\0") == [("lookup", 5, b"a", ANY)]
    assert await called(3, bytes(16)) == [("getattr", 5, ANY)]
    assert await called(6, b"a\0to\0") == [("symlink", 5, b"a", b"to", ANY)]
    mknod = struct.pack("=IIII", 0o10600, 3, 0o22, 0) + b"a\0"
    assert await called(8, mknod) == [("mknod", 5, b"a", 0o10600, 3, masked)]
    mkdir = struct.pack("=II", 0o755, 0o22) + b"a\0"
    assert await called(9, mkdir) == [("mkdir", 5, b"a", 0o40755, masked)]
    assert await called(10, b"a\0") == [("unlink", 5, b"a", ANY)]
    assert await called(11, b"a\0") == [("rmdir", 5, b"a", ANY)]
    assert await called(12, struct.pack("=Q", 6) + b"a\0b\0") == [
        ("rename", 5, b"a", 6, b"b", 0, ANY)
    ]
    assert await called(45, struct.pack("=QII", 6, 2, 0) + b"a\0b\0") == [
        ("rename", 5, b"a", 6, b"b", 2, ANY)
    ]
    assert await called(13, struct.pack("=Q", 6) + b"a\0") == [("link", 6, 5, b"a", ANY)]
    assert await called(20, struct.pack("=QII", 8, 1, 0)) == [("fsync", 8, True)]
    assert await called(30, struct.pack("=QII", 8, 0, 0)) == [("fsyncdir", 8, False)]
    assert await called(25, struct.pack("=QIIQ", 8, 0, 0, 0)) == [("flush", 8)]
    assert await called(18, struct.pack("=QIIQ", 8, 0, 0, 0)) == [("release", 8)]
    assert await called(29, struct.pack("=QIIQ", 8, 0, 0, 0)) == [("releasedir", 8)]
    assert await called(24, b"user.a\0") == [("removexattr", 5, b"user.a", ANY)]


@pytest.mark.parametrize("size", [1, 4096, 1 << 17])
async def test_data(kernel, size):
    head = struct.pack("=QQIIQII", 8, 99, size, 0, 0, 0, 0)
    number, body, calls = await ask(kernel, 16, head + b"w" * size)
    assert (number, struct.unpack("=II", body)) == (0, (size, 0))
    assert calls == [("write", 8, 99, b"w" * size)]
    number, body, calls = await ask(kernel, 15, struct.pack("=QQIIQII", 8, 99, size, 0, 0, 0, 0))
    assert (number, body, calls) == (0, b"r" * size, [("read", 8, 99, size)])


async def test_xattrs_have_to_fit(kernel):
    async def get(room, name=b"user.there"):
        return (await ask(kernel, 22, struct.pack("=II", room, 0) + name + b"\0"))[:2]

    assert await get(0) == (0, struct.pack("=II", 5, 0))
    assert await get(5) == (0, b"value")
    assert await get(4) == (34, b"")
    assert await get(0, b"user.not") == (61, b"")
    names = b"user.a\0user.b\0"
    assert (await ask(kernel, 23, struct.pack("=II", 100, 0)))[:2] == (0, names)
    assert (await ask(kernel, 23, struct.pack("=II", 0, 0)))[1] == struct.pack("=II", 14, 0)


async def test_flags_of_setxattr(kernel):
    async def put(name, flags):
        body = struct.pack("=II", 3, flags) + name + b"\0" + b"a\0b"
        number, _, calls = await ask(kernel, 21, body)
        return number, ("setxattr", 5, name, b"a\0b", ANY) in calls

    assert await put(b"user.there", 0) == (0, True)
    assert await put(b"user.there", os.XATTR_CREATE) == (17, False)
    assert await put(b"user.not", os.XATTR_CREATE) == (0, True)
    assert await put(b"user.there", os.XATTR_REPLACE) == (0, True)
    assert await put(b"user.not", os.XATTR_REPLACE) == (61, False)


async def test_what_there_is_no_handler_for_the_kernel_does_itself(kernel):
    for operation in (31, 34, 39, 43, 46, 47, 51, 4096):
        assert await ask(kernel, operation, bytes(32)) == (38, b"", [])


async def test_what_has_no_reply(kernel):
    await kernel.dispatcher.answer(request(2, struct.pack("=Q", 1)))
    await kernel.dispatcher.answer(request(36, struct.pack("=Q", 1)))
    assert kernel.handlers.calls == [("forget", [(5, 1)])]
