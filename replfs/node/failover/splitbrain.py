"""`split-brain`: two stores were changed apart, and an operator decides which of them wins.

Both know what they changed since they were last equal: it is in the log that each kept for the
other. `list` compares that, name by name. The decision is one of generations: the winner takes the
loser's into its history, so that the loser is outdated, steps down like any primary whose place was
taken, and is resynchronised; what it had alone is kept beside in its store. `keep-both` first
brings the loser's versions of what differs into the volume, under names that say where they are
from.
"""

from __future__ import annotations

import os
import stat as _stat
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import trio

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.generation import Action
from replfs.core.messages import Identity, Welcome
from replfs.core.regions import REGION_SIZE
from replfs.errors import NotInSync, Refused, UsageError
from replfs.node.asking import attributes, suspects
from replfs.node.asking.inspector import Inspector
from replfs.node.asking.probe import probe, yield_to
from replfs.node.failover.copies import Copies
from replfs.node.replication.peer import Peer
from replfs.node.roles import reign
from replfs.node.roles.primary import Primary
from replfs.node.roles.roles import Roles
from replfs.store import locators
from replfs.store.contents import digest_regions
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree

_REGIONS_AT_ONCE: Final = 256


class SplitBrain:
    """Lists and decides, on a primary."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles

    async def command(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`action` on `peer`, or on the only one that was changed apart.

        Raises:
            UsageError, NotInSync: why not; nothing has changed.
        """
        action = str(arguments.get("action"))
        primary = self._roles.primary
        if primary is None:
            raise UsageError("this node is a secondary: decide on a primary")
        peer = self._choose(primary, arguments.get("peer"))
        theirs = await self._look(peer)
        if action == "list":
            found = await self._differences(peer)
            return {
                "paths": [f"{path}: {what}" for path, what in _shown(found)],
                "message": f"{len(found)} names differ between this node and {peer.name}",
            }
        if arguments.get("tentative"):
            return {"message": _would(action, peer, theirs)}
        if action == "keep-theirs":
            return {"message": await self._keep_theirs(peer, theirs)}
        copied = 0
        if action == "keep-both":
            copied = await self._copy(primary, peer)
        elif action != "keep-mine":
            raise UsageError(f"there is no action {action}")
        primary.supersede(peer, theirs)
        await trio.to_thread.run_sync(self._roles.state.harden)
        peer.link.retry()
        both = f"{copied} of its versions are beside them; " if action == "keep-both" else ""
        return {
            "message": f"this node's versions are kept; {both}{peer.name} steps down when it is "
            "reached, and keeps what it had alone in its .replfs/kept"
        }

    @staticmethod
    def _choose(primary: Primary, name: object) -> Peer:
        peers = primary.pipeline.peers
        chosen = [peer for peer in peers if peer.name == name or (not name and peer.is_apart)]
        if name and not chosen:
            raise UsageError(f"there is no peer named {name}")
        if not chosen:
            raise UsageError("no peer is known to have been changed apart from this node")
        if len(chosen) > 1:
            names = ", ".join(peer.name for peer in chosen)
            raise UsageError(f"several were changed apart, {names}: say which with --peer")
        return chosen[0]

    async def _look(self, peer: Peer) -> Welcome:
        theirs = await probe(self._roles, peer.name, peer.endpoint)
        if theirs is None:
            raise NotInSync(f"{peer.name} is not reachable")
        decision = reign.decide(self._roles.state, theirs)
        if decision.action is not Action.SPLIT_BRAIN:
            raise UsageError(f"there is no split brain with {peer.name}: {decision.sentence}")
        return theirs

    # The list ------------------------------------------------------------------------------------

    async def _differences(self, peer: Peer) -> dict[bytes, str]:
        """What differs, by path, in words."""
        inspector = Inspector(self._roles, peer.name, peer.endpoint)

        async def work() -> dict[bytes, str]:
            comparison = Comparison(self._roles.tree, inspector, peer.name)
            return await comparison.differences(peer.log)

        return await inspector.run(work)

    # Decisions -----------------------------------------------------------------------------------

    async def _keep_theirs(self, peer: Peer, theirs: Identity) -> str:
        roles = self._roles
        if theirs.role != "primary":
            raise UsageError(
                f"{peer.name} is a secondary: promote it there first, or keep this node's versions"
            )
        if roles.settings.listen is None:
            raise UsageError(
                "this node does not listen, so it could not follow: start it with --listen"
            )
        try:
            await yield_to(roles, peer.name, peer.endpoint)
        except Refused as refusal:
            if refusal.args[1:] != (Action.OUTDATED.value,):
                raise NotInSync(f"{peer.name} does not take it: {refusal.args[0]}") from None
        winner = await probe(roles, peer.name, peer.endpoint)
        if winner is None:
            raise NotInSync(f"{peer.name} was lost; this node steps down when it meets it again")
        await roles.step_down(winner)
        if roles.primary is not None:
            raise NotInSync("this node did not step down; its log says why")
        return (
            f"{peer.name}'s versions are kept: this node is a secondary now, and keeps what it had "
            "alone in its .replfs/kept"
        )

    async def _copy(self, primary: Primary, peer: Peer) -> int:
        """Bring the peer's versions of what differs into the volume; how many there are."""
        inspector = Inspector(self._roles, peer.name, peer.endpoint)

        async def work() -> int:
            comparison = Comparison(self._roles.tree, inspector, peer.name)
            found = await comparison.differences(peer.log)
            suffix = f".{peer.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            copies = Copies(primary.volume, inspector, suffix.encode())
            try:
                for path in found:
                    await copies.copy(path)
            finally:
                copies.close()
            front = self._roles.front
            if front is not None and front.session is not None and not front.over.is_set():
                await trio.to_thread.run_sync(front.session.forget, copies.made)
            return copies.count

        return await inspector.run(work)


class Comparison:
    """What differs between this store and another, among what either of them changed."""

    def __init__(self, tree: Tree, inspector: Inspector, name: str) -> None:
        self._tree = tree
        self._inspector = inspector
        self._name = name

    async def differences(self, mine: DirtyLog) -> dict[bytes, str]:
        """By path, in words; *mine*: what this store changed.

        Raises:
            NotInSync: the other cannot say what it changed.
            PeerLost: it was lost.
        """
        theirs = await suspects.ask(self._inspector.ask, everywhere=False)
        if theirs is None:
            raise NotInSync(
                f"{self._name} cannot say what it changed: all of it will be compared, whoever wins"
            )
        paths = {path for path in self._mine(mine) if path} | {
            path for path in _theirs(theirs) if path
        }
        found = {}
        for path in sorted(paths):
            what = await self._compare(path)
            if what:
                found[path] = what
        return found

    def _mine(self, log: DirtyLog) -> Iterator[bytes]:
        for object_id in log.objects():
            marks = log.marks(object_id)
            inode = None if marks is None else locators.find(self._tree, marks.handle, object_id)
            if marks is None or inode is None:
                continue
            path = inode.path()
            yield path
            for name in marks.names or ():
                if name:
                    yield path + b"/" + name if path else name
                else:
                    for one in self._tree.names(inode):
                        yield path + b"/" + one if path else one

    async def _compare(self, path: bytes) -> str:
        inode = self._tree.at(path)
        there = await self._inspector.at(path)
        theirs = there.attributes if there is not None else None
        if inode is None or there is None or theirs is None:
            if inode is not None:
                return "only here"
            return f"only on {self._name}" if theirs is not None else ""
        mine = attributes.inspect(self._tree, inode)
        words = [
            text for text in attributes.differences(mine, theirs) if not text.startswith("mtime:")
        ]
        is_file = _stat.S_ISREG(mine.mode) and _stat.S_ISREG(theirs.mode)
        if is_file and (mine.size != theirs.size or not await self._is_equal(inode, there.object)):
            words.insert(0, "contents differ")
        return ", ".join(words)

    async def _is_equal(self, inode: Inode, object_id: bytes) -> bool:
        fd = self._tree.open(inode, os.O_RDONLY)
        try:
            size = os.fstat(fd).st_size
            step = _REGIONS_AT_ONCE * REGION_SIZE
            for start in range(0, size, step):
                count = min(_REGIONS_AT_ONCE, -(-(size - start) // REGION_SIZE))
                theirs = await self._inspector.digests(object_id, start, count, REGION_SIZE)
                mine = await trio.to_thread.run_sync(digest_regions, fd, start, count, REGION_SIZE)
                if mine != theirs:
                    return False
            return True
        finally:
            os.close(fd)


def _theirs(suspicion: suspects.Suspicion) -> Iterator[bytes]:
    for object_id in suspicion.marks.objects():
        path = _path_there(suspicion, object_id)
        marks = suspicion.marks.marks(object_id)
        if path is None or marks is None:
            continue
        yield path
        for name in marks.names or ():
            if name:
                yield path + b"/" + name if path else name


def _path_there(suspicion: suspects.Suspicion, object_id: bytes) -> bytes | None:
    parts: list[bytes] = []
    at = object_id
    while at != ROOT_ID:
        place = suspicion.places.get(at)
        if place is None or len(parts) > ops.PATH_MAX:
            return None
        at, name = place
        parts.append(name)
    return b"/".join(reversed(parts))


def _shown(found: dict[bytes, str]) -> Iterator[tuple[str, str]]:
    for path, what in found.items():
        yield "/" + path.decode(errors="backslashreplace"), what


def _would(action: str, peer: Peer, theirs: Identity) -> str:
    loser = "this node" if action == "keep-theirs" else peer.name
    first = (
        f"{peer.name}'s versions of what differs would be copied beside this node's; then "
        if action == "keep-both"
        else ""
    )
    role = "" if theirs.role == "primary" else f" ({peer.name} is a secondary)"
    return f"{first}{loser} would step down and be resynchronised from the other{role}"
