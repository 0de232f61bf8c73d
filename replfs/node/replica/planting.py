"""Placing many objects that a primary sends with one message.

Most of them are files that are made anew, with all there is to them; whatever stands in their way,
or is here somewhere else, is for the single `Place` to decide. Others have their turn all the time.
"""

from __future__ import annotations

import errno
import stat as _stat
from collections.abc import Callable

from replfs.core import ops
from replfs.node.pacing.courtesy import Slice
from replfs.node.replica.limbo import Limbo
from replfs.store.inode import Inode
from replfs.store.plant import plant
from replfs.store.record import PRIVILEGED
from replfs.store.tree import Tree

PlaceOne = Callable[[ops.Place, memoryview], ops.Done | ops.Placed]
Note = Callable[[ops.Place, bytes], None]


class Planting:
    """Plants in *tree*.

    *place* does one as `Place` would. *note* is told of each, before the answer; with a locator, if
    the tree does not know it.
    """

    def __init__(self, tree: Tree, limbo: Limbo, place: PlaceOne, note: Note) -> None:
        self._tree = tree
        self._limbo = limbo
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
                one = ops.Place(
                    item.object,
                    op.parent,
                    item.name,
                    item.attributes,
                    [],
                    whole=not _stat.S_ISDIR(item.attributes.mode),
                )
                locator = self._plant(parent, one, data)
                if locator is None:
                    results.append(self._place(one, data))
                else:
                    results.append(ops.Placed(complete=True, created=True))
                self._note(one, locator or b"")
                made = self._tree.table.by_id.get(item.object)
                if made is not None:
                    self._tree.drop_unused(made)
        return ops.PlacedMany(results)

    def _plant(self, parent: Inode, one: ops.Place, contents: memoryview) -> bytes | None:
        """Its locator, if it is a file that has to be made new, and was."""
        if not PRIVILEGED or not _stat.S_ISREG(one.attributes.mode):
            return None
        if one.object in self._tree.table.by_id or self._limbo.may_hold(one.object):
            return None
        try:
            self._tree.check_name(parent, one.name)
            return plant(self._tree, parent, one.name, one.object, one.attributes, contents)
        except OSError:
            return None  # what is wrong is found out again, and told, where it is placed singly
