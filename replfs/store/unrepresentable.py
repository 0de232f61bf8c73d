"""What a peer's store cannot hold: a device without privilege, a name it refuses, beyond a quota.

Such an object is listed, and keeps no other out of sync. It is tried again with every session, for
a quota is raised and an agent restarted with other rights; so the list outlives the process.
"""

from __future__ import annotations

import stat as _stat
from collections.abc import Iterator
from typing import Final

import msgspec

from replfs.core.dirty import DirtyLog
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

SAVED_MAX: Final = 1000
"""Of a longer list everything is compared after a restart."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """Where the object is, and why the peer does not have it as it is."""

    object: bytes
    type: int
    """As in st_mode."""
    locator: bytes
    directory: bytes
    directory_locator: bytes
    name: bytes
    reason: str
    """With its path."""


class Unrepresentable:
    """The list of one peer."""

    def __init__(self) -> None:
        self._items: dict[bytes, Item] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, object_id: bytes) -> bool:
        return object_id in self._items

    def reasons(self) -> Iterator[str]:
        """Each object's path and reason."""
        for item in list(self._items.values()):
            yield item.reason

    def add(self, tree: Tree, inode: Inode, reason: str) -> None:
        """The peer said that it cannot hold the object."""
        parent = inode.parent
        if parent is None:
            return
        self._items[inode.id] = Item(
            inode.id,
            inode.type,
            locators.of(tree, inode),
            tree.ensure_id(parent),
            locators.of(tree, parent),
            inode.name,
            reason,
        )

    def discard(self, object_id: bytes) -> None:
        """The peer has it after all, or it is no more."""
        if self._items:
            self._items.pop(object_id, None)

    def try_again(self, log: DirtyLog) -> None:
        """Mark all of them: what the peer still cannot hold is listed anew.

        Raises:
            OSError: the marks cannot be saved (ENOSPC); the list is as it was.
        """
        for item in self._items.values():
            log.mark_name(item.directory, item.name, handle=item.directory_locator)
            if item.type in {_stat.S_IFDIR, _stat.S_IFREG}:
                log.mark_unknown(
                    item.object, directory=item.type == _stat.S_IFDIR, handle=item.locator
                )
            else:
                log.mark_attrs(item.object, handle=item.locator)
        self._items.clear()

    def saved(self) -> list[Item]:
        """What is kept between runs: at most one more than `SAVED_MAX`."""
        return list(self._items.values())[: SAVED_MAX + 1]

    def restore(self, saved: list[Item], log: DirtyLog) -> None:
        """Take in what an earlier run has saved. Raises as `try_again`."""
        if len(saved) > SAVED_MAX:
            log.mark_unknown(ROOT_ID, directory=True, deep=True)
        self._items = {one.object: one for one in saved}
