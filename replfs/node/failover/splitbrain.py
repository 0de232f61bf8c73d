"""`split-brain`: two stores were changed apart, and an operator decides which of them wins.

`list` compares them (`comparison`). The decision is one of generations: the winner takes the
loser's into its history, so that the loser is outdated, steps down like any primary whose place was
taken, and is resynchronised; what it had alone is kept beside in its store. `keep-both` first
brings the loser's versions of what differs into the volume, under names that say where they are
from.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Final

import trio

from replfs.core.generation import Action
from replfs.core.messages import Identity, Welcome
from replfs.errors import NotInSync, Refused, UsageError
from replfs.node.asking.inspector import Inspector
from replfs.node.asking.probe import probe, yield_to
from replfs.node.failover.comparison import Comparison
from replfs.node.failover.copies import Copies
from replfs.node.replication.peer import Peer
from replfs.node.roles import reign
from replfs.node.roles.primary import Primary
from replfs.node.roles.roles import Roles

_MIRRORED: Final = {"keep-theirs": "keep-mine"}
"""What a secondary is told to have decided on the primary, to the same effect."""


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
            raise UsageError(await self._where(action))
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
            # A decision that outlives a loss of power must not outlive what it was made for.
            await primary.checkpoint()
        elif action != "keep-mine":
            raise UsageError(f"there is no action {action}")
        primary.supersede(peer, theirs)
        peer.link.retry()
        both = f"{copied} of its versions are beside them; " if action == "keep-both" else ""
        return {
            "message": f"this node's versions are kept; {both}{peer.name} steps down when it is "
            "reached, and keeps what it had alone in its .replfs/kept"
        }

    async def _where(self, action: str) -> str:
        """This node is a secondary, and only a primary can decide: which one, and how."""
        mine = self._roles.settings.name
        for peer in self._roles.peers():
            theirs = await probe(self._roles, peer.name, peer.endpoint)
            if theirs is None or theirs.role != "primary":
                continue
            if reign.decide(self._roles.state, theirs).action is not Action.SPLIT_BRAIN:
                continue
            if action == "keep-mine":
                return (
                    f"this node is a secondary, which cannot win over {peer.name}: make it a "
                    "primary with 'replfs promote --force', then give this command again"
                )
            there = _MIRRORED.get(action, action)
            return (
                "this node is a secondary, and a primary decides: give 'replfs split-brain TARGET "
                f"{there} --peer {mine}' on {peer.name}"
            )
        return (
            "this node is a secondary, and no primary that was changed apart from it is reachable: "
            "give the command on that primary"
        )

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
