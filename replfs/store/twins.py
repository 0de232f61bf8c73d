"""Objects of which several have one id, in a store that a resync left half old and half new.

A resync makes an object anew that the store has already, where it does not come by the old one
first; that one is removed at the end. If the resync is cut off, both stay, and nobody in memory
knows any more which is the object: the next resync would compare one and carry the other, and where
the store becomes a primary's as it is, two are one to its peers. So before either each of them but
one gets an id of its own. Which keeps it is a matter of `Tree.read_record`.
"""

from __future__ import annotations

import os
import stat as _stat
from array import array
from collections.abc import Container, Iterator
from itertools import pairwise
from typing import Final

import trio

from replfs.store import record as _record
from replfs.store import syscalls
from replfs.store.everything import everything
from replfs.store.inode import proc_path
from replfs.store.tree import Tree

UNPARTED: Final = "what a resync that was cut off has made anew cannot be told from what it was"
"""Why such a store cannot be a primary's."""


def find_twins(root_fd: int) -> list[list[bytes]]:
    """Paths of objects that claim one id, one of each object; for a thread.

    It reads all records of the store, some 10 us an object, and again if there are any. Memory: 40
    bytes an object for a moment. Passed over are what cannot be read, and mounts inside STORE.
    """
    numbers = array("q", (hash(found) for found, _, _ in _records(root_fd)))
    ordered = sorted(numbers)
    repeated = {one for one, other in pairwise(ordered) if one == other}
    if not repeated:
        return []
    paths: dict[bytes, dict[int, bytes]] = {}
    for found, number, path in _records(root_fd, repeated):
        paths.setdefault(found, {})[number] = path
    return [sorted(one.values()) for _, one in sorted(paths.items()) if len(one) > 1]


async def part_twins(tree: Tree) -> int:
    """Give ids of their own to all but one of the objects that have one, and say to how many.

    Raises:
        OSError: a record cannot be written; some are.
    """
    found = await trio.to_thread.run_sync(find_twins, tree.root_fd)
    for paths in found:
        await trio.lowlevel.checkpoint()
        _part(tree, paths)
    return sum(len(paths) - 1 for paths in found)


def part_stopped(root_fd: int) -> None:
    """As `part_twins`, in a store that no node serves; that is on the disk then. Raises OSError."""
    found = find_twins(root_fd)
    tree = Tree(root_fd)
    try:
        for paths in found:
            _part(tree, paths)
    finally:
        tree.close_all()
    if found:
        syscalls.syncfs(root_fd)


def _part(tree: Tree, paths: list[bytes]) -> None:
    twins = [inode for inode in map(tree.at, paths) if inode is not None]
    try:
        # Nobody holds them for that: what is held keeps its id against what is younger.
        for inode in twins:
            tree.read_record(inode)
        # All are known by now: only one of them has the id, whatever the disk says.
        for inode in twins:
            tree.ensure_id(inode)
    finally:
        for inode in twins:
            tree.drop_unused(inode)


def _records(
    root_fd: int, wanted: Container[int] | None = None
) -> Iterator[tuple[bytes, int, bytes]]:
    """(id, inode number, path) of every object with a record; only of *wanted* hashes of ids."""
    for one in everything(root_fd, reserved=False):
        if not _record.can_carry(_stat.S_IFMT(one.found.st_mode)):
            continue
        path = proc_path(one.directory, one.name)
        try:
            value = os.getxattr(path, _record.XATTR, follow_symlinks=False)
        except OSError:
            continue
        own = _record.unpack(value, one.found.st_ino)
        if own is not None and own.object and (wanted is None or hash(own.object) in wanted):
            yield own.object, one.found.st_ino, os.path.normpath(os.path.join(one.above, one.name))
