"""Small new files in one message: with their place go their attributes and all their data.

A file of a few KiB otherwise takes three round trips: its place, its data, its attributes.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
from typing import Final

import trio

from replfs.core import ops
from replfs.store.inode import Inode
from replfs.store.tree import Tree

WHOLE_MAX: Final = 256 << 10
"""Bytes: of a larger file single regions are sent, so that it can be gone on with."""
_BLOCK: Final = 512
"""The unit of st_blocks, stat(2)."""


def fits(found: os.stat_result) -> bool:
    """Whether an object is small enough, and has neither holes nor other names."""
    if _stat.S_ISDIR(found.st_mode):
        return False
    if not _stat.S_ISREG(found.st_mode):
        return True
    return (
        found.st_nlink == 1
        and found.st_size <= WHOLE_MAX
        and found.st_blocks * _BLOCK >= found.st_size
    )


async def read(tree: Tree, inode: Inode) -> bytes:
    """All the data of a file that nobody changes meanwhile; empty for what has none.

    Raises:
        OSError: it cannot be read.
    """
    if inode.type != _stat.S_IFREG:
        return b""
    fd = tree.open(inode, os.O_RDONLY)
    try:
        size = os.fstat(fd).st_size
        buffer = bytearray(size)
        try:
            # A switch to a thread costs more than the copy, where nothing has to come from disk.
            if os.preadv(fd, [buffer], 0, os.RWF_NOWAIT) == size:
                return bytes(buffer)
        except OSError as error:
            if error.errno not in {errno.EAGAIN, errno.EOPNOTSUPP}:
                raise
        return await trio.to_thread.run_sync(os.pread, fd, size, 0)
    finally:
        os.close(fd)


def placed(op: ops.Place, answer: ops.AnyAnswer) -> bool:
    """Whether the peer made the object anew, with all there is to it."""
    return op.whole and isinstance(answer, ops.Placed) and answer.created and answer.complete
