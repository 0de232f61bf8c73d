"""What is answered on the spot is answered as by the handlers that pyfuse3 has."""

from __future__ import annotations

import errno
import os
import socket
import stat
from types import SimpleNamespace
from typing import Any, cast

import pytest

from replfs.front import protocol
from replfs.front.dispatch import Dispatcher, Prompt
from replfs.front.operations import Operations
from replfs.front.protocol import BODY, HEADER, PAIR
from replfs.node.mounted.view import ReadOnlyView

ROOT = 1
UNKNOWN = 4711
HEAD = protocol._REPLY


class HandlersOnly:
    """The same operations, without the plain calls."""

    def __init__(self, operations: Operations) -> None:
        self._operations = operations

    def __getattr__(self, name: str) -> Any:
        if name in {"look_up", "take_back", "attributes", "target", "xattr", "xattrs"}:
            raise AttributeError(name)
        return getattr(self._operations, name)


@pytest.fixture
def device():
    """Both ends of what stands for /dev/fuse."""
    ours, kernels = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    kernels.setblocking(False)
    with ours, kernels:
        yield ours, kernels


@pytest.fixture
def operations(tree, tmp_path):
    store = tmp_path / "store"
    (store / "file").write_bytes(b"abc")
    os.setxattr(store / "file", "user.one", b"1")
    (store / "link").symlink_to("file")
    (store / "directory").mkdir()
    made = Operations(ReadOnlyView(tree))
    made.served_by(cast(Any, SimpleNamespace()), directly=True)
    return made


def request(operation: int, nodeid: int, body: bytes = b"", *, uid: int = 0) -> bytes:
    return HEADER.pack(BODY + len(body), operation, 99, nodeid, uid, 0, 5, 0, 0) + body


def nodeid_of(operations: Operations, name: bytes) -> int:
    return int(operations.mounted.lookup(ROOT, name)[0].nodeid)


def asked(operation: int, nodeid: int, name: bytes, *, room: int = 100, uid: int = 0) -> bytes:
    return request(operation, nodeid, PAIR.pack(room, 0) + name, uid=uid)


def questions(operations: Operations) -> dict[str, bytes]:
    file, link, directory = (
        nodeid_of(operations, name) for name in (b"file", b"link", b"directory")
    )
    return {
        "a name": request(protocol.LOOKUP, ROOT, b"file\0"),
        "no name": request(protocol.LOOKUP, ROOT, b"nothing\0"),
        "a name below a file": request(protocol.LOOKUP, file, b"x\0"),
        "a name nowhere": request(protocol.LOOKUP, UNKNOWN, b"x\0"),
        "attributes": request(protocol.GETATTR, directory, bytes(16)),
        "of what is not known": request(protocol.GETATTR, UNKNOWN, bytes(16)),
        "a target": request(protocol.READLINK, link),
        "no target": request(protocol.READLINK, file),
        "an attribute": asked(protocol.GETXATTR, file, b"user.one\0"),
        "its length": asked(protocol.GETXATTR, file, b"user.one\0", room=0),
        "in too little room": asked(protocol.GETXATTR, file, b"user.four\0", room=1),
        "no attribute": asked(protocol.GETXATTR, file, b"security.capability\0"),
        "one of root's": asked(protocol.GETXATTR, file, b"trusted.x\0", uid=1000),
        "all attributes": asked(protocol.LISTXATTR, file, b""),
        "all, in too little room": asked(protocol.LISTXATTR, file, b"", room=1),
    }


async def replied(dispatcher: Dispatcher, kernels: socket.socket, question: bytes) -> bytes:
    waiting = dispatcher.answer(question)
    if waiting is not None:
        await waiting
    return kernels.recv(1 << 16)


async def test_on_the_spot_and_by_a_handler_the_reply_is_the_same(operations, device):
    ours, kernels = device
    prompt = Dispatcher(operations, ours.fileno())
    assert not isinstance(HandlersOnly(operations), Prompt)
    awaited = Dispatcher(HandlersOnly(operations), ours.fileno())
    outcomes = set()
    for what, question in questions(operations).items():
        assert prompt.answer(question) is None, what
        reply = kernels.recv(1 << 16)
        assert reply == await replied(awaited, kernels, question), what
        length, number, unique = HEAD.unpack_from(reply)
        assert (length, unique) == (len(reply), 99), what
        outcomes.add(-number)
    assert outcomes == {
        0, errno.ESTALE, errno.ENOTDIR, errno.EINVAL, errno.ENODATA, errno.ERANGE
    }  # fmt: skip


@pytest.mark.parametrize("kind", [protocol.FORGET, protocol.BATCH_FORGET])
def test_references_are_given_back_without_a_reply(operations, device, kind):
    ours, kernels = device
    file = nodeid_of(operations, b"file")
    known = operations.mounted.table.by_nodeid
    assert file in known
    one = file.to_bytes(8, "little") + (1).to_bytes(8, "little")
    if kind == protocol.FORGET:
        question = request(kind, file, one[8:])
    else:
        question = request(kind, 0, PAIR.pack(1, 0) + one)
    assert Dispatcher(operations, ours.fileno()).answer(question) is None
    assert file not in known
    with pytest.raises(BlockingIOError):
        kernels.recv(1 << 16)


def test_whatever_goes_wrong_is_an_errno(operations, device, monkeypatch, caplog):
    def fails(_nodeid: int) -> None:
        raise ValueError("unforeseen")

    ours, kernels = device
    monkeypatch.setattr(operations.mounted, "getattr", fails)
    assert Dispatcher(operations, ours.fileno()).answer(request(protocol.GETATTR, ROOT)) is None
    assert HEAD.unpack_from(kernels.recv(1 << 16))[1] == -errno.EIO
    assert "unforeseen" in caplog.text


async def test_what_may_wait_is_awaited(operations, device):
    ours, kernels = device
    waiting = Dispatcher(operations, ours.fileno()).answer(
        request(protocol.OPEN, nodeid_of(operations, b"file"), PAIR.pack(os.O_RDONLY, 0))
    )
    assert waiting is not None
    await waiting
    assert HEAD.unpack_from(kernels.recv(1 << 16))[1] == 0
    (handle,) = operations.mounted.table.handles
    assert stat.S_ISREG(os.fstat(operations.mounted.handle(handle).fd).st_mode)
    await operations.release(handle)
    assert not operations.mounted.table.handles
