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
from replfs.errors import NotInSync, PeerLost, Refused, UsageError
from replfs.node.asking.inspector import Inspector
from replfs.node.asking.probe import probe, yield_to
from replfs.node.failover.comparison import Comparison, Difference
from replfs.node.failover.copies import Copies
from replfs.node.replication.peer import Peer
from replfs.node.roles import reign
from replfs.node.roles.primary import Primary
from replfs.node.roles.roles import Roles
from replfs.node.settings.values import PeerSetting

_TAKEN: Final = frozenset({Action.OUTDATED, Action.QUICK, Action.COMPARE})
"""What this store is to a primary that took its generation into its history."""


class SplitBrain:
    """Lists and decides, on a primary; a secondary can give up what it has alone."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles

    async def command(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """`action` on `peer`, or on the only one that was changed apart.

        Raises:
            UsageError, NotInSync: why not; nothing has changed.
            OSError: it cannot be saved.
        """
        action = str(arguments.get("action"))
        tentative = bool(arguments.get("tentative"))
        primary = self._roles.primary
        if primary is None:
            return {"message": await self._as_secondary(action, arguments.get("peer"), tentative)}
        peer = self._choose(primary, arguments.get("peer"))
        theirs = await self._look(peer)
        if action == "list":
            found = await self._differences(primary, peer)
            return {
                "paths": [f"{path}: {what}" for path, what in _shown(found)],
                "message": f"{len(found)} names differ between this node and {peer.name}",
            }
        if tentative:
            return {"message": self._would(action, peer, theirs)}
        if action == "keep-theirs":
            self._check_yielding(peer, theirs)
            return {"message": await self._keep_theirs(peer)}
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
        does = "steps down" if theirs.role == "primary" else "follows"
        return {
            "message": f"this node's versions are kept; {both}{peer.name} {does} when it is "
            "reached, and keeps what it had alone in its .replfs/kept"
        }

    # On a secondary ------------------------------------------------------------------------------

    async def _as_secondary(self, action: str, name: object, tentative: bool) -> str:  # noqa: FBT001 - as it was typed
        """It can give up what it has alone, and nothing else."""
        found = await self._primaries_apart(name)
        if action != "keep-theirs" or len(found) != 1:
            raise UsageError(self._where(action, [peer.name for peer in found]))
        (peer,) = found
        if tentative:
            return (
                f"{peer.name}'s versions would be kept: this node would follow it, and keep what "
                "it had alone in its .replfs/kept"
            )
        await self._yield_to(peer.name, peer.endpoint)
        winner = await probe(self._roles, peer.name, peer.endpoint)
        if winner is None or reign.decide(self._roles.state, winner).action is Action.SPLIT_BRAIN:
            raise NotInSync(f"{peer.name} did not say that it takes it: see its 'replfs status'")
        return (
            f"{peer.name}'s versions are kept: this node follows it when it connects, and keeps "
            "what it had alone in its .replfs/kept"
        )

    async def _primaries_apart(self, name: object) -> list[PeerSetting]:
        """The primaries that can be reached and were changed apart from this secondary."""
        found = []
        for peer in self._roles.peers():
            if name and peer.name != name:
                continue
            theirs = await probe(self._roles, peer.name, peer.endpoint)
            if theirs is None or theirs.role != "primary":
                continue
            if reign.decide(self._roles.state, theirs).action is Action.SPLIT_BRAIN:
                found.append(peer)
        return found

    def _where(self, action: str, primaries: list[str]) -> str:
        """This secondary cannot do it: who can, and how."""
        mine = self._roles.settings.name
        if not primaries:
            return (
                "this node is a secondary, and no primary that was changed apart from it is "
                "reachable: give the command on that primary"
            )
        names = ", ".join(primaries)
        if action == "keep-theirs":
            return f"this node was changed apart from {names}: say which with --peer"
        if action == "keep-mine":
            return (
                f"this node is a secondary, which cannot win over {names}: make it a "
                "primary with 'replfs promote --force', then give this command again"
            )
        return (
            "this node is a secondary, and a primary does that: give 'replfs split-brain TARGET "
            f"{action} --peer {mine}' on {names}"
        )

    # On a primary --------------------------------------------------------------------------------

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

    async def _differences(self, primary: Primary, peer: Peer) -> dict[bytes, Difference]:
        """What differs, by path."""
        inspector = Inspector(self._roles, peer.name, peer.endpoint)
        return await inspector.run(lambda: self._compare(primary, peer, inspector))

    async def _compare(
        self, primary: Primary, peer: Peer, inspector: Inspector
    ) -> dict[bytes, Difference]:
        policies = primary.pipeline.policies
        comparison = Comparison(self._roles.tree, policies, inspector, peer.name)
        return await comparison.differences(peer.log)

    # Decisions -----------------------------------------------------------------------------------

    def _check_yielding(self, peer: Peer, theirs: Identity) -> None:
        """Whether this primary could give up what it has. Raises UsageError: why not."""
        if theirs.role != "primary":
            raise UsageError(
                f"{peer.name} is a secondary: promote it there first, or keep this node's versions"
            )
        if self._roles.settings.listen is None:
            raise UsageError(
                "this node does not listen, so it could not follow: start it with --listen"
            )

    async def _yield_to(self, name: str, endpoint: str) -> None:
        """Tell the other primary that it wins. Raises NotInSync: it does not take that."""
        try:
            await yield_to(self._roles, name, endpoint)
        except Refused as refusal:
            if not {action.value for action in _TAKEN}.intersection(refusal.args[1:]):
                raise NotInSync(f"{name} does not take it: {refusal.args[0]}") from None
        except PeerLost as error:
            raise NotInSync(f"{name} was lost: {error}") from None

    def _would(self, action: str, peer: Peer, theirs: Identity) -> str:
        """What the decision would do, or why it would be refused."""
        if action == "keep-theirs":
            try:
                self._check_yielding(peer, theirs)
            except UsageError as error:
                return f"it would be refused: {error}"
            return f"this node would step down and be resynchronised from {peer.name}"
        first = (
            f"{peer.name}'s versions of what differs would be copied beside this node's; then "
            if action == "keep-both"
            else ""
        )
        does = "step down" if theirs.role == "primary" else "follow this node"
        return f"{first}{peer.name} would {does} and be resynchronised from it"

    async def _keep_theirs(self, peer: Peer) -> str:
        roles = self._roles
        await self._yield_to(peer.name, peer.endpoint)
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
            found = await self._compare(primary, peer, inspector)
            suffix = f".{peer.name}-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
            copies = Copies(primary.volume, inspector, suffix.encode())
            try:
                for path, difference in found.items():
                    if difference.is_version:
                        await copies.copy(path)
            finally:
                copies.close()
                # Those before the one that failed are there all the same.
                await self._tell_kernel(copies)
            return copies.count

        return await inspector.run(work)

    async def _tell_kernel(self, copies: Copies) -> None:
        front = self._roles.front
        if front is not None and front.session is not None and not front.over.is_set():
            await trio.to_thread.run_sync(front.session.forget, copies.made)


def _shown(found: dict[bytes, Difference]) -> Iterator[tuple[str, str]]:
    for path, difference in found.items():
        yield "/" + path.decode(errors="backslashreplace"), difference.what
