"""Where objects are, as a peer is told before they are first used.

On the live stream nothing is told of a place that the peer may not have yet; the resync, which
knows what it has placed, tells on its own.
"""

from __future__ import annotations

from typing import Final

from replfs.core import ops
from replfs.errors import PeerLost
from replfs.node.replication.lacks import Lacks
from replfs.transport.link import Link

LIVE: Final = 0
BULK: Final = 1


class Places(Lacks):
    """One peer, as far as it is told of places; `Peer` adds the rest."""

    link: Link

    def locate_for(self, op: ops.AnyOp) -> bool:
        """Tell the peer where everything is that *op* needs; False where it is not there yet."""
        known = self.located[LIVE]
        match op:
            case ops.Make():
                if op.parent not in known and not self.locate(op.parent, LIVE):
                    return False
                known.add(op.object)
                return True
            case ops.Link():
                return self.locate(op.object, LIVE) and self.locate(op.parent, LIVE)
            case ops.Unlink():
                return self.locate(op.parent, LIVE)
            case ops.Rename():
                return self.locate(op.parent, LIVE) and self.locate(op.new_parent, LIVE)
            case ops.Checkpoint():
                return True
            case _:
                object_id: bytes = op.object  # type: ignore[union-attr]
                return object_id in known or self.locate(object_id, LIVE)

    def locate(self, object_id: bytes, stream: int) -> bool:
        """Tell the peer where an object is, once a session, parents first.

        False, and nothing is told, on the live stream: a name on the way to it is not the peer's
        yet, so that it could not find it there. The resync knows what it has placed.
        """
        known = self.located[stream]
        unsure = stream == LIVE and not (self.log.is_empty and self.settling.is_empty)
        chain: list[tuple[bytes, bytes, bytes]] = []
        while object_id not in known:
            inode = self._tree.table.by_id.get(object_id)
            if inode is None or inode.parent is None:
                break
            above = self._tree.ensure_id(inode.parent)
            if unsure and not (
                self.log.name_is_clean(above, inode.name)
                and self.settling.name_is_settled(above, inode.name)
            ):
                return False
            chain.append((object_id, above, inode.name))
            object_id = above
        for one, parent, name in reversed(chain):
            self.link.send(ops.Locate(one, parent, name), None, None, stream)
            known.add(one)
        return True

    def forget(self, object_ids: list[bytes], stream: int) -> None:
        """The peer need not know where these are any more."""
        known = self.located[stream]
        gone = [one for one in object_ids if one in known]
        if not gone or not self.live:
            return
        known.difference_update(gone)
        try:
            self.link.send(ops.Forget(gone), None, None, stream)
        except PeerLost:
            return
