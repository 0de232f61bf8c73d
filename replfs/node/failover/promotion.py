"""`promote`: whether this node may become the primary, what may be lost by it, and the act itself.

What speaks against it is said in a sentence each. Most of that an operator may overrule
(`--force`), but not a primary that is connected, since it would go on acknowledging.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import trio

from replfs.core.generation import Side, is_ahead
from replfs.core.messages import Welcome
from replfs.errors import NotInSync, UsageError
from replfs.front import mounting
from replfs.node.asking.identity import side_of, side_of_message
from replfs.node.asking.probe import probe
from replfs.node.roles import reign
from replfs.node.roles.roles import UNFLUSHED, Roles
from replfs.node.settings.config import check_nesting
from replfs.node.settings.values import PeerSetting
from replfs.store import locators, syscalls
from replfs.store.state import State
from replfs.store.twins import UNPARTED, part_stopped
from replfs.transport.listener import Session

_SIGN_S: Final = 0.05
"""How often a silent primary is listened for."""


class Objection(NamedTuple):
    """Something that speaks against a promotion, and what is lost if it is overruled."""

    sentence: str
    loss: str


class Seen(NamedTuple):
    """A configured peer, and what it said of itself; None: it is not reachable."""

    name: str
    welcome: Welcome | None


class Promotion:
    """Promotes a running node."""

    def __init__(self, roles: Roles) -> None:
        self._roles = roles

    async def command(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Become the primary, in place; `force`, `tentative` and `mount` as on the command line.

        Raises:
            UsageError, NotInSync: why not.
        """
        roles = self._roles
        if roles.primary is not None:
            raise UsageError("this node is the primary already")
        async with roles.changing:
            if roles.secondary is None:
                raise UsageError("this node just became the primary")
            if roles.front is not None and roles.front.is_fixed:
                raise UsageError(
                    f"without root {roles.front.mountpoint} cannot be made read-write: unmount it "
                    "with 'replfs umount', then promote with --mount"
                )
            mountpoint = self._mountpoint(arguments.get("mount"))
            tentative = bool(arguments.get("tentative"))
            try:
                await self._check_silence()
            except UsageError as error:
                if tentative:
                    return {"message": f"it would be refused: {error}"}
                raise
            seen = await self._look_around()
            before = roles.secondary.keeper.place
            objections = [*of_state(roles.state, before), *self._of_others(seen)]
            lines = self._removals() + [
                f"{one.name} is not reachable" for one in seen if one.welcome is None
            ]
            if tentative:
                return {"message": "\n".join([*_would(objections), *lines])}
            refuse(objections, force=bool(arguments.get("force")))
            was_unwritten = roles.unwritten.number
            silent = await self._check_silence()
            if silent is not None:
                silent.close("silent, and another node is promoted")
            await roles.take_over(roles.begin_reign, by_force=bool(arguments.get("force")))
            if mountpoint is not None:
                roles.mount(mountpoint)
        if roles.unwritten.number and not was_unwritten:
            lines.insert(0, UNFLUSHED)
        lines = [one.loss for one in objections] + lines
        return {"message": "\n".join(["this node is the primary now", *lines])}

    def _removals(self) -> list[str]:
        """What was `none` where this node was the primary, and is on other nodes still."""
        suspects = reign.suspects_of(self._roles.state)
        if suspects is None:
            return []
        tree = self._roles.tree
        found = []
        for directory, name in suspects.log.removals():
            marks = suspects.log.marks(directory)
            inode = locators.find(tree, marks.handle, directory) if marks is not None else None
            if inode is not None:
                path = b"/".join(part for part in (inode.path(), name) if part)
                shown = path.decode(errors="backslashreplace")
                found.append(f"/{shown} is removal-pending: other nodes have it still")
        return found

    def _mountpoint(self, wanted: object) -> str | None:
        """Where to mount besides, checked."""
        if not wanted:
            return None
        roles = self._roles
        if roles.front is not None and not roles.front.over.is_set():
            raise UsageError(f"this node is mounted already, on {roles.front.mountpoint}")
        mountpoint = mounting.check_mountpoint(str(wanted))
        check_nesting(os.path.realpath(roles.settings.store), mountpoint)
        return mountpoint

    async def _check_silence(self) -> Session | None:
        """A primary that is still there gives a sign several times within the peer timeout.

        The session of one that gives none, which is still open.

        Raises:
            UsageError: it is there.
        """
        secondary = self._roles.secondary
        session = secondary.session if secondary is not None else None
        if session is None:
            return None
        heard = session.heard_ns
        with trio.move_on_after(self._roles.settings.peer_timeout_s):
            while session.is_open and session.heard_ns == heard:
                await trio.sleep(_SIGN_S)
        if session.is_open and session.heard_ns != heard:
            raise UsageError(
                f"the primary {session.name} is connected: use 'replfs switchover' there, "
                "or stop it first"
            )
        return session

    async def _look_around(self) -> list[Seen]:
        """Ask all configured peers who they are, at the same time."""
        found: list[Seen] = []

        async def ask(peer: PeerSetting) -> None:
            found.append(Seen(peer.name, await probe(self._roles, peer.name, peer.endpoint)))

        async with trio.open_nursery() as nursery:
            for peer in self._roles.peers():
                nursery.start_soon(ask, peer)
        return sorted(found)

    def _of_others(self, seen: Sequence[Seen]) -> list[Objection]:
        mine = side_of(self._roles.state, self._roles.progress)
        found = []
        for name, welcome in seen:
            if welcome is None or welcome.volume != mine.volume:
                continue
            theirs = side_of_message(welcome)
            if theirs.role == "primary":
                found.append(
                    Objection(
                        f"{name} is a primary and runs: use 'replfs switchover' there, or stop it",
                        f"what {name} acknowledged alone is not here: it is kept beside there, or "
                        "a split brain has to be decided",
                    )
                )
            elif is_ahead(theirs, mine):
                found.append(_ahead(name, mine, theirs))
        return found


def _ahead(name: str, mine: Side, theirs: Side) -> Objection:
    """Another secondary has what this one lacks."""
    if mine.generation != theirs.generation:
        return Objection(
            f"{name} is ahead of this node: promote that one",
            f"what {name} has and this node lacks is lost",
        )
    more = f"{theirs.progress - mine.progress} changes" if mine.progress else "changes"
    return Objection(
        f"{name} has {more} that this node lacks: promote that one",
        f"{name} has {more} that this node lacks: they are kept beside there",
    )


def of_state(state: State, before_resync: str | None = None) -> list[Objection]:
    """What the store itself says against being made the primary's.

    *before_resync*: where the state before a resync that was cut off is kept.

    Raises:
        UsageError: it cannot be one at all.
    """
    identity = state.identity()
    if identity.role == "primary":
        raise UsageError("this store is the primary's already")
    if not identity.generation and not identity.volume:
        raise UsageError("this store has never had a primary: mount it with 'replfs mount'")
    found = []
    if identity.uninitialized:
        found.append(
            Objection(
                "this store never had a complete copy: wait until its primary has made one",
                "this store never had a complete copy: files are missing, or older than they were",
            )
        )
    elif identity.inconsistent:
        kept = f"; what it was before is in {before_resync}" if before_resync else ""
        found.append(
            Objection(
                "this store is inconsistent, a resync into it was cut off: let its primary end it"
                + kept,
                "a resync into this store was cut off: it is half old and half new",
            )
        )
    if identity.disk_failed:
        found.append(
            Objection(
                "this store's disk failed to write something, and its primary has not sent all of "
                "that again",
                "this store's disk failed to write something: it may be missing, or older",
            )
        )
    elif state.memory_lost:
        found.append(
            Objection(
                "this store lost power since it was last compared with its primary",
                "this store lost power: what was not flushed by then may be missing",
            )
        )
    return found


def refuse(objections: Sequence[Objection], *, force: bool) -> None:
    """Raises NotInSync with what speaks against it, unless it is overruled."""
    if objections and not force:
        reasons = "; ".join(one.sentence for one in objections)
        raise NotInSync(f"{reasons} (--force does it all the same)")


def _would(objections: Sequence[Objection]) -> list[str]:
    if not objections:
        return ["it would be promoted: nothing speaks against it"]
    return [f"it would be refused: {one.sentence}" for one in objections] + [
        f"with --force: {one.loss}" for one in objections
    ]


def promote_stopped(state: State, root_fd: int, *, force: bool, tentative: bool) -> str:
    """Make the store of a stopped node, open on *root_fd*, the primary's; what to tell the person.

    Raises:
        UsageError, NotInSync: why not.
    """
    objections = of_state(state)
    if tentative:
        return "\n".join(_would(objections))
    has_failed = False
    try:
        # As in `Roles.take_over`: a node that was killed left what it had applied in memory.
        syscalls.syncfs(root_fd)
    except OSError as error:
        has_failed = True
        objections.append(Objection(f"{UNFLUSHED} ({error.strerror})", UNFLUSHED))
    refuse(objections, force=force)
    if state.identity().inconsistent:
        try:
            part_stopped(root_fd)
        except OSError as error:
            raise NotInSync(f"{UNPARTED} ({error.strerror})") from error
    if objections or reign.kept_unstable(state) is None:
        # Where something is missing here, what was kept says nothing.
        reign.keep_unstable(state, None)
    for peer in state.peers():
        state.forget_log(peer.name)
    reign.promote(state, progress=0 if state.unclean else state.identity().progress, clean=True)
    if has_failed:
        state.disk_failed()
    state.flush(durable=True)
    lines = ["it is the primary now: mount it with 'replfs mount'", *(o.loss for o in objections)]
    return "\n".join(lines)
