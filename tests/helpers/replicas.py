"""Stores that operations are applied to without a network: one replica each. Needs root."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import trio

from replfs.core import ops
from replfs.core.policy import NamePatterns
from replfs.node.replica.replica import Replica
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

FILE = stat.S_IFREG | 0o644
DIRECTORY = stat.S_IFDIR | 0o755


def object_id(number: int) -> bytes:
    """The id that is this number."""
    return number.to_bytes(16, "big")


class Store:
    """One store with a replica that applies operations to it."""

    def __init__(self, path: Path, *own_names: str) -> None:
        """*own_names*: patterns of names that are the node's own."""
        path.mkdir(exist_ok=True)
        self.path = path
        self.fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        self.tree = Tree(self.fd)
        self.kept: list[str] = []
        """What was told to be kept beside."""
        patterns = NamePatterns(own_names)
        self.replica = Replica(self.tree, lambda _: None, patterns, on_kept=self.kept.append)

    def try_to(self, op: ops.AnyOp, payload: bytes | None = None, stream: int = 0) -> int:
        """Apply an operation that is answered at once; its errno."""
        answer = self.replica.apply(stream, op, payload, lambda _: None)
        return answer.errno if isinstance(answer, ops.Done) else 0

    def apply(self, op: ops.AnyOp, payload: bytes | None = None, stream: int = 0) -> None:
        """Apply an operation, which must succeed."""
        number = self.try_to(op, payload, stream)
        assert not number, (op, os.strerror(number))

    def make(self, number: int, name: bytes, parent: bytes = ROOT_ID, mode: int = FILE) -> None:
        """Make the object with this number."""
        self.apply(ops.Make(object_id(number), parent, name, mode, 0, 0, 0, b"", 7, 7))

    def write(self, number: int, offset: int, data: bytes) -> None:
        """Write to the object with this number."""
        self.apply(ops.Write(object_id(number), offset, 7), data)

    def checkpoint(self, *, everywhere: bool = True) -> None:
        """All that was applied is stable, here and on the primary."""
        self.replica.unstable.begin()
        self.apply(ops.Stable(everywhere))

    async def asked(self, op: ops.AnyOp, payload: bytes | None = None) -> ops.AnyAnswer:
        """The answer to an operation of the bulk stream, also where it comes later."""
        send, receive = trio.open_memory_channel[ops.AnyAnswer](1)
        answer = self.replica.apply(1, op, payload, send.send_nowait)
        return await receive.receive() if answer is None else answer

    async def ask(self, op: ops.AnyOp) -> ops.AnyAnswer | None:
        """Apply an operation of the bulk stream; None if the answer comes later."""
        return self.replica.apply(1, op, None, lambda _: None)

    def close(self) -> None:
        """Close all descriptors."""
        self.replica.catch_up()
        self.tree.close_all()
        os.close(self.fd)
