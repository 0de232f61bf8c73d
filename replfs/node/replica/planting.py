"""Placing many objects that a primary sends with one message.

Most of them are files that are made anew, with all there is to them; whatever stands in their way,
or is here somewhere else, is for the single `Place` to decide. Others have their turn all the time.
"""

from __future__ import annotations

import errno
import stat as _stat
from collections.abc import Callable
from typing import Final

from replfs.core import ops
from replfs.core.unstable import Unstable
from replfs.node.pacing.courtesy import Slice
from replfs.node.replica.limbo import Limbo
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.plant import plant
from replfs.store.record import PRIVILEGED
from replfs.store.tree import Tree

_NEW: Final = ops.Placed(complete=True, created=True)

PlaceOne = Callable[[ops.Place, memoryview], ops.Done | ops.Placed]
Note = Callable[[ops.Place], None]


class Planting:
    """Plants in *tree*, noted in *unstable* before the answer.

    *place* does one as `Place` would; what it does is told to *note*.
    """

    def __init__(
        self, tree: Tree, limbo: Limbo, unstable: Unstable, place: PlaceOne, note: Note
    ) -> None:
        self._tree = tree
        self._limbo = limbo
        self._unstable = unstable
        self._place = place
        self._note = note

    async def place_many(
        self, op: ops.PlaceMany, contents: bytes, is_wanted: Callable[[], bool]
    ) -> ops.AnyAnswer:
        """Place all that *op* lists, while that *is_wanted*. Limbo is indexed."""
        parent = self._tree.table.by_id.get(op.parent)
        if parent is None or not parent.named:
            return ops.Done(errno.ESTALE)
        results: list[ops.Done | ops.Placed] = []
        view = memoryview(contents)
        start = 0
        share = Slice()
        with self._tree.held(parent):
            for item in op.items:
                await share.breathe()
                if not is_wanted():
                    return ops.Done(errno.EINTR)
                data = view[start : start + item.attributes.size]
                start += len(data)
                if self._plant(parent, item, data):
                    results.append(_NEW)
                else:
                    results.append(self._place_singly(op.parent, item, data))
        return ops.PlacedMany(results)

    def _place_singly(
        self, parent: ops.ObjectId, item: ops.Item, data: memoryview
    ) -> ops.Done | ops.Placed:
        is_whole = not _stat.S_ISDIR(item.attributes.mode)
        one = ops.Place(item.object, parent, item.name, item.attributes, [], whole=is_whole)
        result = self._place(one, data)
        self._note(one)
        made = self._tree.table.by_id.get(item.object)
        if made is not None:
            self._tree.drop_unused(made)
        return result

    def _plant(self, parent: Inode, item: ops.Item, contents: memoryview) -> bool:
        """Whether it is a file that has to be made new, and was."""
        if not PRIVILEGED or not _stat.S_ISREG(item.attributes.mode):
            return False
        if item.object in self._tree.table.by_id or self._limbo.may_hold(item.object):
            return False
        unstable = self._unstable
        try:
            self._tree.check_name(parent, item.name)
            locator = plant(
                self._tree,
                parent,
                item.name,
                item.object,
                item.attributes,
                contents,
                locate=unstable.is_known,
            )
        except OSError:
            return False  # what is wrong is found out again, and told, where it is placed singly
        if unstable.is_known:
            above = b"" if unstable.is_noted(parent.id) else locators.of(self._tree, parent)
            unstable.note_file(parent.id, above, item.name, item.object, locator)
        return True
