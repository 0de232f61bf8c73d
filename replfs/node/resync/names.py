"""Steps 2 and 3 of a resync: names.

They need each other: a directory can be listed there once its own place is there, which may first
have to be found by listing the one above it.
"""

from __future__ import annotations

import stat as _stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Final

from replfs.core import footprint, ops
from replfs.core.relationship import State
from replfs.core.scheduler import Claim, Ticket
from replfs.node.asking.attributes import read as read_attributes
from replfs.node.pacing.courtesy import Slice
from replfs.node.pacing.crew import each
from replfs.node.pacing.rate import Rate
from replfs.node.replication.places import BULK
from replfs.node.resync import whole
from replfs.node.resync.expand import Expansion
from replfs.node.resync.work import UNREPRESENTABLE, Work
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID

_FEW_NAMES: Final = 64
"""Gathered with one message while applications are at work."""
_GATHERED_AT_ONCE: Final = 16
"""Directories asked about at a time while something is claimed: one after the other takes 60 ms."""
_TOGETHER_MIN: Final = 32
"""Names that are claimed at once, so that no rename among them makes work for ever."""
_HINTS_MAX: Final = 16


class Names:
    """Which object stands under which name."""

    def __init__(self, work: Work, rate: Rate, can_fill: Callable[[], bool]) -> None:
        """*can_fill* as in `Expansion`."""
        self._work = work
        self._tree = work.tree
        self._policies = work.policies
        self._peer = work.peer
        self._log = work.log
        self._applications = work.pipeline.applications
        self._rate = rate
        self._absent: set[tuple[bytes, bytes]] = set()
        """Dirty names, (id of the directory, name), of which the peer had nothing when listed."""
        self.expansion = Expansion(work, self.is_placed, self._absent, can_fill)
        """Step 1."""
        self._hints: dict[bytes, list[tuple[bytes, bytes]]] = {}
        """Of an object with several names, those that were placed in this resync."""
        self._together = _TOGETHER_MIN
        self._left = 0
        """Names that the last pass left to be placed together."""
        self.outpaced = 0
        """Passes in a row in which applications marked half the names again, or more."""

    def forget(self) -> None:
        """The resync is over: what was found on the way is not needed any more."""
        self._absent.clear()
        self.expansion.forget()
        self._hints.clear()
        self._together = _TOGETHER_MIN
        self._left = self.outpaced = 0
        self._work.links.forget()

    # 2. Gather ---------------------------------------------------------------------------------

    async def gather(self, *, at_once: bool = False) -> None:
        """Passes over all names not gathered yet, until one brings nothing new.

        A directory that the peer has elsewhere is known to it only once it was itself gathered.
        Names that are marked meanwhile wait for the next time: a rename marks both of its names at
        once, so that what stands under one of those gathered here is not wanted under a later one
        without having been gathered. *at_once*: giving way to nobody, for something is claimed.
        """
        version = self._log.mark_version(ROOT_ID)
        waiting: dict[bytes, list[bytes]] = {}
        share = Slice()
        for directory, name in self._log.ungathered():
            await share.breathe()
            waiting.setdefault(directory, []).append(name)
        while waiting:
            left = await self._gather_each(waiting, version, at_once=at_once)
            if len(left) == len(waiting):
                for directory, names in left.items():
                    for name in names:
                        self._log.set_gathered(directory, name, version=version)
                return
            waiting = left

    async def _gather_each(
        self, waiting: dict[bytes, list[bytes]], version: int, *, at_once: bool
    ) -> dict[bytes, list[bytes]]:
        """One pass: those of *waiting* in whose directory nothing could be gathered."""
        left = dict(waiting)

        async def gather_in(directory: bytes) -> None:
            if await self._gather_one(directory, waiting[directory], version, at_once=at_once):
                del left[directory]

        await each(waiting, gather_in, tasks=_GATHERED_AT_ONCE if at_once else 1)
        return left

    async def _gather_one(
        self,
        directory_id: bytes,
        names: list[bytes],
        version: int | None = None,
        *,
        at_once: bool = False,
    ) -> bool:
        """None that was marked since *version* is gathered by it; None: since its turn."""
        inode = self._work.find(directory_id)
        if inode is None:
            return False
        with self._tree.held(inode):
            return await self._gather_in(inode, names, version, at_once=at_once)

    async def _gather_in(
        self, inode: Inode, names: list[bytes], since: int | None, *, at_once: bool
    ) -> bool:
        directory_id = inode.id
        gathered = False
        start = 0
        share = Slice()
        while start < len(names):
            count = ops.NAMES_PER_MESSAGE
            if not at_once:
                await self._applications.give_way()
            if self._applications.are_busy:
                count = min(count, _FEW_NAMES)
            part = names[start : start + count]
            start += count
            version = self._log.mark_version(directory_id) if since is None else since
            wanted = []
            for name in list(part):
                await share.breathe()
                try:
                    child = self._work.child(inode, name)
                except OSError as error:
                    self._failed_to_read(inode, name, error)
                    part.remove(name)
                    continue
                wanted.append(child.id if child is not None else ops.NO_OBJECT)
                if child is not None:
                    self._tree.drop_unused(child)
            if not part:
                continue
            await self._peer.fence()
            self._peer.locate(directory_id, BULK)
            answer = await self._peer.ask(ops.Gather(directory_id, part, wanted))
            if isinstance(answer, ops.Done) and not answer.errno:
                gathered = True
                for name in part:
                    self._log.set_gathered(directory_id, name, version=version)
            else:
                self._peer.located[BULK].discard(directory_id)
        return gathered

    # 3. Place ----------------------------------------------------------------------------------

    async def place(self, item: tuple[bytes, bytes]) -> None:
        """Give the peer under one dirty name, (id of the directory, name), what is there here."""
        directory_id, name = item
        if self._log.name_is_clean(directory_id, name):
            return
        inode = self._work.find(directory_id)
        if inode is None:
            return
        with self._tree.held(inode):
            if await self.is_placed(inode):
                await self._place(inode, name)

    async def _place(self, directory: Inode, name: bytes) -> None:
        key = ("name", directory.id, name)
        if self._work.is_waiting(key) or not self._log.is_gathered(directory.id, name):
            return
        try:
            while not await self._place_once(key, directory, name):
                pass
        except OSError as error:
            self._failed_to_read(directory, name, error)

    async def _place_once(self, key: object, directory: Inode, name: bytes) -> bool:
        """False: what stood there when it was this operation's turn was at work."""
        child = self._work.child(directory, name)
        with ExitStack() as holds:
            claims = footprint.entry(directory, name)
            if child is not None:
                holds.enter_context(self._tree.held(child))
                claims = footprint.entry_of(directory, name, child)
                if self._rate.limit and self._goes_whole(child, directory, name):
                    await self._rate.spend(child.size)
                if not await self._work.links.learn_names(child):
                    self._await_walk(key, child)
                    return True
                if not await self._are_hints_placed(child):
                    return True
            async with self._work.claim(claims) as ticket:
                if not self._log.is_gathered(directory.id, name):
                    return True
                return await self._place_now(directory, name, child, ticket)

    async def _place_now(
        self, directory: Inode, name: bytes, foreseen: Inode | None, ticket: Ticket
    ) -> bool:
        """Place what stands under a name that is claimed, with the object *foreseen* there.

        An operation that was before this one may have put another object there, and every one that
        does so finds the next waiting: what is there now is claimed, too. False: it cannot be.
        """
        child = self._work.child(directory, name)
        with ExitStack() as holds:
            if child is not None and child is not foreseen:
                holds.enter_context(self._tree.held(child))
                if not (
                    self._work.links.are_known(child)
                    and self._work.pipeline.scheduler.extend(ticket, (child,))
                ):
                    return False
            if child is None or self._have_hints_place(child):
                await self._place_claimed(directory, name, child)
            return True

    def _have_hints_place(self, child: Inode) -> bool:
        """As `_are_hints_placed`, as far as it is known."""
        return all(map(self._has_place, self._hinted(child)))

    async def _place_claimed(self, directory: Inode, name: bytes, child: Inode | None) -> None:
        key = ("name", directory.id, name)
        version = self._log.mark_version(directory.id)
        self._peer.locate(directory.id, BULK)
        self.expansion.is_placed_in(directory.id)
        if child is None:
            answer = await self._peer.ask(ops.Clear(directory.id, name))
        else:
            answer = await self._ask_to_place(child, directory, name)
            if isinstance(answer, ops.Placed):
                self._peer.located[BULK].add(child.id)
                if not answer.complete:
                    self.mark_contents(child, created=answer.created)
        if isinstance(answer, ops.Done) and answer.errno:
            if child is None or answer.errno not in UNREPRESENTABLE:
                self._work.refused(key, directory, answer)
                return
            self._work.unrepresentable(child, answer.errno)
            self._log.clear_name(directory.id, name, version=version)
            return
        self.was_placed(directory, name, version)

    async def _ask_to_place(self, child: Inode, directory: Inode, name: bytes) -> ops.AnyAnswer:
        version = self._log.mark_version(child.id)
        goes_whole = self._goes_whole(child, directory, name)
        contents = await whole.read(self._tree, child) if goes_whole else b""
        attributes = read_attributes(self._tree, child)
        hints = self._hints_of(child, directory, name)
        op = ops.Place(child.id, directory.id, name, attributes, hints, goes_whole)
        answer = await self._peer.ask(op, contents or None)
        if whole.placed(op, answer):
            self._log.clear_tail(child.id, None, version=version)
            self._log.clear_regions(child.id, 0, None, version=version)
            self._log.clear_attrs(child.id, version=version)
            self._work.progress.files += 1
            self._work.progress.bytes += len(contents)
        self._absent.discard((directory.id, name))
        return answer

    def _goes_whole(self, child: Inode, directory: Inode, name: bytes) -> bool:
        """Whether an object is sent with its place: it is small, and the peer cannot have it.

        That is so of all of a baseline to a peer that has nothing under the name, and of what was
        made since the peer was last in sync, all of whose data was marked then.
        """
        if not whole.fits(self._tree.stat(child)):
            return False
        if child.type != _stat.S_IFREG:
            return True
        return self._is_absent(directory.id, name) and self.is_all_new(child)

    def may_go_whole(self, directory: bytes, name: bytes) -> bool:
        """Whether the peer may lack all there is to what stands at a name, and now is the time."""
        return (
            self._log.is_gathered(directory, name)
            and self._is_absent(directory, name)
            and not self._work.is_waiting(("name", directory, name))
        )

    def _is_absent(self, directory: bytes, name: bytes) -> bool:
        """In a baseline, whether the peer has nothing there; later only the object tells."""
        return self._peer.state is not State.BASELINE or (directory, name) in self._absent

    def is_all_new(self, child: Inode) -> bool:
        """Whether the peer lacks all the data of a file, if it has nothing at its name."""
        if self._peer.state is State.BASELINE:
            return True
        marks = self._log.marks(child.id)
        return marks is not None and marks.tail == 0 and not marks.compare

    def was_placed(self, directory: Inode, name: bytes, version: int) -> None:
        """The peer has the right object at a name, as of *version* of the directory's marks."""
        self._log.clear_name(directory.id, name, version=version)
        self._absent.discard((directory.id, name))
        self._work.progress.names += 1
        self._work.succeeded(("name", directory.id, name))

    def mark_contents(self, child: Inode, *, created: bool) -> None:
        """The peer has the object, but not (certainly) what is in it."""
        handle = locators.of(self._tree, child)
        if child.is_directory:
            self._log.mark_names_all(child.id, handle=handle)
            if created:
                self.expansion.was_made(child)
        elif child.type == _stat.S_IFREG:
            self._log.mark_tail(child.id, 0, size=child.size, handle=handle, compare=not created)
        else:
            self._log.mark_attrs(child.id, handle=handle)

    async def _are_hints_placed(self, child: Inode) -> bool:
        """Whether the peer can look for an object under its other names: their directories first.

        Where it could not, it would get the object a second time.
        """
        for parent in self._hinted(child):
            with self._tree.held(parent):
                if not await self.is_placed(parent):
                    return False
        return True

    def _hinted(self, child: Inode) -> Iterator[Inode]:
        """The directories on the peers of an object that has several names."""
        if child.is_directory or not child.more:
            return
        for parent, _ in child.names():
            if self._work.is_on_peers(parent):
                yield parent

    def _hints_of(self, child: Inode, directory: Inode, name: bytes) -> list[tuple[bytes, bytes]]:
        """Other names the peer may have the object under, where it has several."""
        if child.is_directory or self._tree.stat(child).st_nlink < 2:
            return []
        known = self._hints.setdefault(child.id, [])
        here = (directory.id, name)
        hints = [(self._tree.ensure_id(parent), other) for parent, other in child.names()]
        hints += [place for place in known if place not in hints]
        known.append(here)
        # Where the peer certainly has it comes first.
        hints.sort(key=lambda place: not self._log.name_is_clean(*place))
        hints = [place for place in hints if place != here]
        hints = hints[:_HINTS_MAX]
        for parent_id, _ in hints:
            self._peer.locate(parent_id, BULK)
        return hints

    async def place_together(self) -> None:
        """Place what applications marked again between its gathering and its turn.

        A rename between two dirty names marks both, so names that are renamed all the time, faster
        than a pass goes, would stay dirty for ever. Claimed together they come clean together. Few
        at a time, since an application waits for all of them; twice as many after each pass that
        left no fewer, so that an end is certain.
        """
        left = [
            item for item in self._log.names_pending() if not self._work.is_waiting(("name", *item))
        ]
        self._together = self._together * 2 if len(left) >= self._left > 0 else _TOGETHER_MIN
        is_outpaced = len(left) > _TOGETHER_MIN and self._left < 2 * len(left)
        self.outpaced = self.outpaced + 1 if is_outpaced else 0
        self._left = len(left)
        if left:
            await self.gather()  # so that there is less to be gathered under the claims below
        for start in range(0, len(left), self._together):
            await self._applications.give_way()
            with ExitStack() as holds:
                await self._place_all(left[start : start + self._together], holds)

    async def _place_all(self, items: list[tuple[bytes, bytes]], holds: ExitStack) -> None:
        claims: list[Claim] = []
        found: list[tuple[Inode, bytes, Inode | None]] = []
        for directory_id, name in items:
            directory = self._work.find(directory_id)
            if directory is None or self._log.name_is_clean(directory_id, name):
                continue
            holds.enter_context(self._tree.held(directory))
            try:
                child = self._work.child(directory, name)
            except OSError as error:
                self._failed_to_read(directory, name, error)
                continue
            if child is None:
                claims += footprint.entry(directory, name)
            else:
                holds.enter_context(self._tree.held(child))
                if self._rate.limit and self._goes_whole(child, directory, name):
                    await self._rate.spend(child.size)
                if not await self._work.links.learn_names(child):
                    self._await_walk(("name", directory_id, name), child)
                    continue
                claims += footprint.entry_of(directory, name, child)
            found.append((directory, name, child))
        if not found:
            return
        found.sort(key=lambda item: _depth(item[0]))
        async with self._work.claim(footprint.together(claims)) as ticket:
            # All that is not gathered: the peer may have there what is wanted here.
            await self.gather(at_once=True)
            for directory, name, child in found:
                if self._has_place(directory) and self._log.is_gathered(directory.id, name):
                    try:
                        await self._place_now(directory, name, child, ticket)
                    except OSError as error:
                        self._failed_to_read(directory, name, error)

    def _failed_to_read(self, directory: Inode, name: bytes, error: OSError) -> None:
        reason = error.strerror or "cannot be read"
        self._work.failed(("name", directory.id, name), directory, reason)

    def _has_place(self, inode: Inode) -> bool:
        """Whether the object's place is on the peer, as far as it is known; nothing is done."""
        one = inode
        while one.parent is not None:
            if not self._log.name_is_clean(one.parent.id, one.name):
                return False
            one = one.parent
        return one.id == ROOT_ID

    # Whether a place is there ------------------------------------------------------------------

    async def is_placed(self, inode: Inode, *, now: bool = False) -> bool:
        """Whether the object's place is on the peer, after placing its parents first.

        *now*: before everything else that must be looked at or moved aside there.
        """
        if not await self._is_decided(inode):
            return False
        chain: list[tuple[Inode, bytes]] = []
        one = inode
        while one.parent is not None:
            chain.append((one.parent, one.name))
            one = one.parent
        if one.id != ROOT_ID:
            return False
        with ExitStack() as holds:
            for parent, _ in chain:
                holds.enter_context(self._tree.held(parent))
            for parent, name in reversed(chain):
                self._tree.ensure_id(parent)
                if self._log.name_is_clean(parent.id, name):
                    continue
                await self.expansion.expand(("list", parent.id))
                if self._log.name_is_clean(parent.id, name):
                    continue
                if self._is_unknown(parent.id, name):
                    return False
                if now and not self._log.is_gathered(parent.id, name):
                    await self._gather_one(parent.id, [name])
                await self._place(parent, name)
                if not (
                    self._log.name_is_clean(parent.id, name) or self._is_unknown(parent.id, name)
                ):
                    return False
        return True

    async def _is_decided(self, inode: Inode) -> bool:
        """Whether a name of the object that the peers have is known; if it has none, forget it."""
        policies = self._policies
        if not policies.is_undecided(inode):
            return True
        if not await self._work.links.learn_names(inode):
            self._await_walk(("decide", inode.id), inode)
            return False
        self._work.succeeded(("decide", inode.id))
        if policies.is_undecided(inode) or not self._work.is_on_peers(inode):
            self._log.forget(inode.id)
            return False
        return True

    def _await_walk(self, key: object, inode: Inode) -> None:
        reason = "its other names are still being looked for"
        self._work.postponed(key, inode, reason, self._work.links.may_walk_at)

    def _is_unknown(self, directory: bytes, name: bytes) -> bool:
        """Whether nothing is known of a name but that its whole directory is to be looked at."""
        marks = self._log.marks(directory)
        return marks is not None and marks.names_all and name not in (marks.names or {})

    async def carry_now(self, inode: Inode) -> None:
        """All names in a directory that is placed, before everything else."""
        await self.expansion.expand(("list", inode.id))
        marks = self._log.marks(inode.id)
        names = [name for name in marks.names if name] if marks and marks.names else []
        aside = [name for name in names if not self._log.is_gathered(inode.id, name)]
        if aside:
            await self._gather_one(inode.id, aside)
        for name in names:
            await self._place(inode, name)


def _depth(inode: Inode) -> int:
    count = 0
    while inode.parent is not None:
        inode = inode.parent
        count += 1
    return count
