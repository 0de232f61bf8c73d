"""The hidden record every object carries: its id, its own policy, whether its replica is complete.

One xattr (`trusted.replfs`), written with the object and moved by every rename with it. It counts
only on the inode it was written for: the inode number is part of it, so a copied file (`cp -a` of
a store, a restored backup) does not bring a second object with the same id; it gets a new one.

Without root it is `user.replfs`, which only files and directories can carry. The id of anything
else is then known to the process alone, and it is found by its name.
"""

from __future__ import annotations

import itertools
import os
import stat as _stat
import struct
from typing import Final, NamedTuple

PRIVILEGED: Final = os.geteuid() == 0
XATTR: Final = b"trusted.replfs" if PRIVILEGED else b"user.replfs"
HIDDEN_PREFIXES: Final = (b"trusted.replfs", b"user.replfs")
ROOT_ID: Final = b"\0" * 15 + b"\1"
"""The root of every store: the same on both sides, so that it need not be located."""
LIMBO_ID: Final = b"\0" * 8 + b"\xff" * 8
"""The directory in which a resync keeps what has no place yet: the same on all sides, too."""

INCOMPLETE: Final = 1
"""Flag: a resync made or adopted this replica, and has not finished it."""

_FORMAT: Final = struct.Struct("<B16sQBBB")
_VERSION: Final = 1


class Record(NamedTuple):
    """What the hidden xattr says."""

    object: bytes
    flags: int
    policy: int
    ack: int


def can_carry(file_type: int) -> bool:
    """Whether objects of a type (`S_IF...`) can have a record."""
    return PRIVILEGED or file_type in {_stat.S_IFREG, _stat.S_IFDIR}


def pack(record: Record, ino: int) -> bytes:
    """The xattr's value, bound to inode number *ino*."""
    return _FORMAT.pack(_VERSION, record.object, ino, record.flags, record.policy, record.ack)


def unpack(value: bytes, ino: int) -> Record | None:
    """The record, or None where it is another format's or another inode's."""
    if len(value) != _FORMAT.size:
        return None
    version, obj, bound, flags, policy, ack = _FORMAT.unpack(value)
    if version != _VERSION or bound != ino:
        return None
    return Record(obj, flags, policy, ack)


class IdSource:
    """New object ids: 8 random bytes a process, then a counter. Never the same id twice."""

    def __init__(self) -> None:
        prefix = b"\0" * 8
        while prefix == b"\0" * 8:
            prefix = os.urandom(8)
        self._prefix = prefix
        self._count = itertools.count(1)

    def __call__(self) -> bytes:
        """The next id."""
        return self._prefix + next(self._count).to_bytes(8, "big")
