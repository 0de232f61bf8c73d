"""`switchover`: the primary hands its role to a peer that is in sync, and follows it.

In this order, so that a crash at any moment leaves one primary or none, never two:

1. what was changed behind the mount is known, and the peer is asked whether it could: it is
   consistent, and a peer of its leads back here;
2. the mount becomes read-only, which the kernel refuses while a file is open for writing;
3. what is in flight drains, and both sides flush;
4. this store is a secondary, durably;
5. the peer is asked to take over; it is the primary, durably, before it answers;
6. this node exchanges its role, the peer connects to it.

Until step 4 everything can be taken back, and is, where something fails. After it, a peer that
refuses gives the role back; a peer of which nothing is heard leaves two secondaries of which either
may be promoted, or a primary that will connect.
"""

from __future__ import annotations

import contextlib
import errno
import logging
from typing import Any, Final

import trio

from replfs.core import ops
from replfs.core.relationship import State as Replication
from replfs.errors import NotInSync, PeerLost, UsageError
from replfs.node.mounted.frontend import FrontEnd
from replfs.node.replication.peer import Peer
from replfs.node.roles.primary import Primary
from replfs.node.roles.roles import Roles
from replfs.store.identity import Identity

log = logging.getLogger(__name__)

_DRAIN_S: Final = 60.0
"""How long what is in flight may take."""
_RESCAN_S: Final = 5.0
"""How long a look for what was changed behind the mount is waited for."""
_LOOK_S: Final = 0.05
_NAMES_SHOWN: Final = 3
_REFUSALS: Final = {
    errno.EHOSTUNREACH: "no --peer of its leads back to this node, so that it could not replicate "
    "to it: start it with one",
    errno.EPERM: "it has no root, so its mount cannot be made read-write: unmount it there first",
    errno.EBUSY: "it is frozen, or inconsistent, or its role is being changed: try again",
    errno.EIO: "its disk fails, or failed to write something that it has not been sent again since",
    errno.EINVAL: "it is not at this node's generation",
}


class Switchover:
    """Hands the role of a running primary over."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles

    async def command(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Make `peer`, or the only one, the primary; `tentative`: only say whether that would be.

        Raises:
            UsageError, NotInSync: why not; nothing has changed, or the sentence says what has.
        """
        roles = self._roles
        async with roles.changing:
            primary = roles.primary
            if primary is None:
                raise UsageError("this node is a secondary: ask its primary, or use promote")
            peer = self._choose(primary, arguments.get("peer"))
            front = roles.front if roles.front and not roles.front.over.is_set() else None
            if arguments.get("tentative"):
                return {"message": await self._would(primary, peer, front)}
            await self._check(primary, peer)
            if front is not None and not await front.freeze():
                raise UsageError(self._writers(front))
            try:
                await self._drain(primary, peer)
            except BaseException:
                await self._take_back(primary, front)
                raise
            message = await self._hand_over(primary, peer, front)
            return {"message": message}

    async def _check(self, primary: Primary, peer: Peer) -> None:
        """Whether *peer* could take over, and this node follow it. Changes nothing.

        Raises:
            UsageError, NotInSync: why not.
        """
        roles = self._roles
        if roles.settings.listen is None:
            raise UsageError(
                "this node does not listen, so it could not follow: start it with --listen"
            )
        if roles.front is not None and roles.front.is_fixed:
            raise UsageError(
                f"without root {roles.front.mountpoint} cannot be made read-only: stop this "
                "node, then promote the other"
            )
        await self._check_whole(primary)
        _check_in_sync(peer)
        await self._prepare(peer)

    @staticmethod
    async def _check_whole(primary: Primary) -> None:
        """Whether it is known what this store has. Who hands its role over is asked for nothing.

        Raises:
            NotInSync: what was changed behind the mount is still being looked for.
        """
        with trio.move_on_after(_RESCAN_S):
            await primary.rescan.is_over.wait()
        if not primary.rescan.is_over.is_set():
            raise NotInSync(
                "it is still being looked for what was changed behind the mount before the start, "
                "which the peer would lack: 'replfs status' says how far that is"
            )

    async def _would(self, primary: Primary, peer: Peer, front: FrontEnd | None) -> str:
        try:
            await self._check(primary, peer)
            if front is not None and self._written():
                raise UsageError(self._writers(front))
        except (UsageError, NotInSync) as error:
            return f"it would be refused: {error}"
        return (
            f"{peer.name} would be the primary, and this node follow it: nothing speaks against it"
        )

    @staticmethod
    def _choose(primary: Primary, name: object) -> Peer:
        peers = primary.pipeline.peers
        chosen = [peer for peer in peers if not name or peer.name == name]
        if not chosen:
            raise UsageError(f"there is no peer named {name}" if name else "there are no peers")
        if len(chosen) > 1:
            names = ", ".join(peer.name for peer in chosen)
            raise UsageError(f"there are several peers, {names}: say which with --peer")
        return chosen[0]

    async def _prepare(self, peer: Peer) -> None:
        if not peer.understands(ops.Handover):
            release = f"replfs {peer.release}" if peer.release else "an older release"
            raise UsageError(
                f"{peer.name} runs {release}, which cannot be handed the role: upgrade it first, "
                "or stop this node and promote it there"
            )
        generation = self._roles.state.identity().generation
        number = await _ask(peer, ops.Handover(generation, commit=False))
        if number:
            reason = _REFUSALS.get(number, f"it answers with error {number}")
            raise UsageError(f"{peer.name} cannot take over: {reason}")

    def _written(self) -> list[str]:
        """What is open for writing, as far as this process knows."""
        return [
            "/" + handle.inode.path().decode(errors="backslashreplace")
            for handle in self._roles.tree.table.handles.values()
            if handle.writable
        ]

    def _writers(self, front: FrontEnd) -> str:
        names = self._written()
        shown = ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")
        return (
            f"files on {front.mountpoint} are open for writing ({shown or 'mapped'}): "
            "close them first"
        )

    async def _drain(self, primary: Primary, peer: Peer) -> None:
        primary.pipeline.is_over = True
        primary.pipeline.release_suspended()
        primary.verifier.stop()
        try:
            with trio.fail_after(_DRAIN_S):
                await primary.pipeline.drained()
                await primary.checkpoint()
        except trio.TooSlowError:
            raise NotInSync("what is in flight does not drain; see 'replfs status'") from None
        except OSError as error:
            raise NotInSync(
                f"this node's disk cannot be flushed ({error.strerror}): see its log"
            ) from error
        _check_in_sync(peer)

    async def _take_back(self, primary: Primary, front: FrontEnd | None) -> None:
        with trio.CancelScope(shield=True):
            primary.pipeline.is_over = False
            if front is not None:
                await front.thaw()

    async def _hand_over(self, primary: Primary, peer: Peer, front: FrontEnd | None) -> str:
        roles = self._roles
        identity = roles.state.identity()
        try:
            roles.state.update(role="secondary", role_changed=True)
            await trio.to_thread.run_sync(roles.state.harden)
        except OSError as error:
            await self._keep_role(identity, primary, front)
            raise NotInSync(
                f"that this node gives its role up cannot be saved ({error.strerror}); nothing has "
                "changed"
            ) from error
        try:
            number = await _ask(peer, ops.Handover(identity.generation, commit=True))
        except NotInSync:
            number = -1
        if number > 0:
            # It said no, so it is no primary, and was not made one.
            await self._keep_role(identity, primary, front)
            reason = _REFUSALS.get(number, f"it answers with error {number}")
            raise NotInSync(f"{peer.name} did not take over: {reason}; nothing has changed")
        await roles.follow()
        if number < 0:
            raise NotInSync(
                f"{peer.name} was lost before it said whether it took over: this node is a "
                f"secondary now; if 'replfs status' calls {peer.name} one too, promote either"
            )
        secondary = roles.secondary
        if secondary is None:
            raise NotInSync(f"{peer.name} is the primary now, and this node ends: its log says why")
        with trio.move_on_after(2 * roles.settings.peer_timeout_s):
            while roles.secondary is secondary and secondary.session is None:
                await trio.sleep(_LOOK_S)
            return f"{peer.name} is the primary now, and this node follows it"
        return f"{peer.name} is the primary now, and has not connected to this node yet"

    async def _keep_role(
        self, identity: Identity, primary: Primary, front: FrontEnd | None
    ) -> None:
        """This node is the primary still, as *identity* says.

        Where the disk does not take that, a start after a loss of power finds a secondary.

        Raises:
            OSError: it cannot be saved at all: the mount stays read-only.
        """
        state = self._roles.state
        if state.identity().role != identity.role:
            state.update(role=identity.role, role_changed=identity.role_changed)
        with contextlib.suppress(OSError):
            await trio.to_thread.run_sync(state.harden)
        primary.reign_again()
        await self._take_back(primary, front)


def _check_in_sync(peer: Peer) -> None:
    if not (peer.live and peer.state is Replication.IN_SYNC and peer.log.is_empty):
        raise NotInSync(
            f"{peer.name} is not in sync: wait for it with 'replfs wait', or promote it there "
            "once this node is stopped"
        )


async def _ask(peer: Peer, op: ops.Handover) -> int:
    """The errno that the peer answers with. Raises NotInSync where it is lost."""
    try:
        answer = await peer.ask(op)
    except PeerLost as error:
        raise NotInSync(f"{peer.name} was lost: {error}") from None
    return answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
