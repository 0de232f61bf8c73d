"""Emptying a peer's dirty region log, while applications go on.

Everything a peer may lack is in its log: a baseline is the mark "every name in the root is
unknown", a changed region a mark on that region. So there is one machine for the first time and
for every interruption:

1. *expand*: a directory of which everything is unknown is listed on both sides, and each name that
   may differ is marked. A few directories at a time, so that memory is bounded by them.
2. *gather*: what stands under a dirty name on the peer and is not wanted there goes to limbo.
3. *place*: under each dirty name the peer gets the object that is there here: out of limbo, by a
   link, adopted as it stands, or new. Parents first. This moves a renamed tree in one step.
4. *data*: dirty regions are sent; where the peer may have them already, only those whose digests
   differ.
5. *finish*: attributes, extended attributes and size, exactly.

Names are compared, never replayed: the steps converge from any state of the peer, and can be
interrupted anywhere. What a step works on it claims like any other operation, so an application
waits for at most one region's transfer; and a mark is cleared only after the peer's answer, and
only if nothing marked it again meanwhile.
"""

from __future__ import annotations

import errno
import logging
import os
import stat as _stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from typing import Final, TypeVar

import trio
import xxhash

from replfs.core import footprint, ops
from replfs.core.policy import Policy
from replfs.core.regions import REGION_SHIFT, REGION_SIZE
from replfs.core.relationship import Event, State
from replfs.core.scheduler import Claim
from replfs.errors import PeerLost, ProtocolError
from replfs.node.attributes import read as read_attributes
from replfs.node.flight import describe
from replfs.node.peer import BULK, Peer
from replfs.node.pipeline import Pipeline
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.links import Links
from replfs.store.record import ROOT_ID

log = logging.getLogger(__name__)

_REGIONS_AT_ONCE: Final = ops.PAYLOAD_MAX // REGION_SIZE
_NAMES_AHEAD: Final = 2000
"""Unknown directories are expanded only while fewer dirty names than this are waiting."""
_TASKS: Final = 8
_YIELD_EVERY: Final = 64
_RETRY_MIN_S: Final = 0.5
_RETRY_MAX_S: Final = 30.0
_REST_S: Final = 0.02
_HINTS_MAX: Final = 16
_URGENT_RETRY_S: Final = 0.02
_UNREPRESENTABLE: Final = frozenset({
    errno.EPERM, errno.EINVAL, errno.ENAMETOOLONG, errno.EOPNOTSUPP, errno.EILSEQ, errno.EDQUOT,
})  # fmt: skip
"""The peer's store cannot hold the object; trying again would not help."""

T = TypeVar("T")


class _Stuck:
    """An item that failed: why, and when it is tried again."""

    __slots__ = ("delay_s", "path", "reason", "retry_at")

    def __init__(self, path: str, reason: str) -> None:
        self.path = path
        self.reason = reason
        self.delay_s = _RETRY_MIN_S
        self.retry_at = time.monotonic() + self.delay_s

    def again(self, reason: str) -> None:
        """It failed once more."""
        self.reason = reason
        self.delay_s = min(self.delay_s * 2, _RETRY_MAX_S)
        self.retry_at = time.monotonic() + self.delay_s


class Progress:
    """How far a resync has come."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.files = 0
        self.bytes = 0
        self.names = 0
        self.compared = 0


class Resync:
    """The resync of one peer."""

    def __init__(self, pipeline: Pipeline, peer: Peer, rate_bytes: int = 0) -> None:
        """*rate_bytes*: payload bytes a second at most; 0: as fast as it goes."""
        self._pipeline = pipeline
        self._tree = pipeline.tree
        self._peer = peer
        self._log = peer.log
        self.rate_bytes = rate_bytes
        self.progress = Progress()
        self.stuck: dict[object, _Stuck] = {}
        self._hints: dict[bytes, list[tuple[bytes, bytes]]] = {}
        self._links = Links(self._tree)
        self._paid = 0.0
        self._passing = False
        """The peer knows that a resync is going on, so that it may be sent anything of it."""
        self._hurried: set[Inode] = set()

    # The loop ----------------------------------------------------------------------------------

    async def run(self) -> None:
        """Resync whenever there is something to, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_urgent)
            await self._serve()

    async def _serve(self) -> None:
        peer = self._peer
        while True:
            await peer.wait_work()
            while peer.live and not (self._log.is_empty and peer.state is State.IN_SYNC):
                try:
                    await self._resync()
                except PeerLost:
                    # Or the peer is there, but could not do something: once more.
                    await trio.lowlevel.checkpoint()
                except OSError as error:
                    log.warning("peer %s: the resync starts again: %s", peer.name, error)
                    await trio.sleep(_RETRY_MIN_S)

    async def _resync(self) -> None:
        """One run, from the first mark to in sync."""
        peer = self._peer
        self.progress = Progress()
        self.stuck.clear()
        peer.advance(Event.STARTED)
        generation, history = self._generation()
        await self._tell(ops.Phase(inconsistent=True, generation=generation, history=history))
        while True:
            if peer.unrecorded:
                self._log.mark_unknown(ROOT_ID, directory=True, deep=True)
                peer.unrecorded = False
            self._passing = True
            try:
                while not self._log.is_empty:
                    peer.wake_urgent()
                    await self._pass()
            finally:
                self._passing = False
            while not await self._tell(ops.EmptyLimbo(), again=errno.EAGAIN):
                pass
            generation, history = self._generation()
            await self._tell(ops.Phase(inconsistent=False, generation=generation, history=history))
            if not (len(self._log) or peer.unrecorded):
                break
        self._hints.clear()
        self._links.forget()
        peer.peer_generation = generation
        peer.diverged = generation != self._generation()[0]
        peer.advance(Event.LOG_EMPTY_CONFIRMED)
        peer.progressed()

    def _generation(self) -> tuple[bytes, list[bytes]]:
        hello = self._peer.hello()
        return hello.generation, hello.history

    async def _tell(self, op: ops.AnyOp, *, again: int = 0) -> bool:
        """Have the peer do *op*. False: it answers *again*, there is more to do."""
        answer = await self._peer.ask(op)
        if again and isinstance(answer, ops.Done) and answer.errno == again:
            return False
        if not isinstance(answer, ops.Done) or answer.errno:
            number = answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
            self._peer.note_error(op, describe(number))
            await trio.sleep(_RETRY_MIN_S)
            raise PeerLost(f"the peer could not {type(op).__name__}: {describe(number)}")
        return True

    async def _pass(self) -> None:
        before = (self.progress.files, self.progress.names, self.progress.compared, len(self._log))
        await self._expand()
        await self._gather()
        await self._each(self._log.names_pending(), self._place_item)
        await self._each(self._log.objects_with_data(), self._data_item)
        await self._each(self._log.objects_with_attrs(), self._finish_item)
        self._peer.progressed()
        if not self._log.is_empty and before == (
            self.progress.files, self.progress.names, self.progress.compared, len(self._log)
        ):  # fmt: skip
            await self._pause()

    async def _pause(self) -> None:
        """Nothing moved: what is left is stuck. Wait until something may be tried again."""
        now = time.monotonic()
        due = min((one.retry_at for one in self.stuck.values()), default=now + _RETRY_MIN_S)
        # Whoever waits for progress asks again after each pass: without a rest, a busy loop.
        await trio.sleep(_REST_S)
        with trio.move_on_after(max(0.0, min(due - now, _RETRY_MAX_S) - _REST_S)):
            await self._peer.wait_work()
        if not self._peer.live:
            raise PeerLost("the session ended")

    async def _each(self, items: Iterable[T], work: Callable[[T], Awaitable[None]]) -> None:
        """Work on all *items*, a few at a time; a lost peer ends it."""
        limit = trio.Semaphore(_TASKS)
        lost: list[PeerLost] = []

        async def one(item: T) -> None:
            try:
                if not self._is_waiting(item):
                    await work(item)
            except PeerLost as error:
                lost.append(error)
            except (OSError, ProtocolError) as error:
                # One item that cannot be read, recorded or sent does not stop the others.
                self._failed(item, None, str(error))
            finally:
                limit.release()

        async with trio.open_nursery() as nursery:
            for item in items:
                await limit.acquire()
                if lost or not self._peer.live:
                    limit.release()
                    break
                nursery.start_soon(one, item)
        if lost or not self._peer.live:
            raise lost[0] if lost else PeerLost("the session ended")

    @asynccontextmanager
    async def _claim(self, claims: tuple[Claim, ...]) -> AsyncIterator[None]:
        ticket = await self._pipeline.claim(claims, "resync")
        try:
            await self._peer.fence()
            if not self._peer.live:
                raise PeerLost("the session ended")
            yield
        finally:
            self._pipeline.release_claim(ticket)

    # Failures ----------------------------------------------------------------------------------

    def _is_waiting(self, key: object) -> bool:
        found = self.stuck.get(key)
        return found is not None and found.retry_at > time.monotonic()

    def _failed(self, key: object, inode: Inode | None, reason: str) -> None:
        path = "/" + inode.path().decode(errors="backslashreplace") if inode is not None else ""
        found = self.stuck.get(key)
        if found is None:
            self.stuck[key] = _Stuck(path, reason)
            log.warning("peer %s: %s cannot be brought in sync: %s", self._peer.name, path, reason)
        else:
            found.again(reason)

    def _succeeded(self, key: object) -> None:
        if self.stuck:
            self.stuck.pop(key, None)

    # Finding things ----------------------------------------------------------------------------

    def _find(self, object_id: bytes) -> Inode | None:
        """The object here. One that cannot be found is compared with everything else."""
        marks = self._log.marks(object_id)
        if marks is None:
            return None
        inode = locators.find(self._tree, marks.handle, object_id)
        if inode is None and locators.is_gone(self._tree, marks.handle):
            # Its names are marked where they were; there is nothing to carry.
            self._log.forget(object_id)
            return None
        if inode is None:
            log.warning(
                "peer %s: a changed object is not where it was: comparing everything",
                self._peer.name,
            )
            self._log.mark_unknown(ROOT_ID, directory=True, deep=True)
            self._log.forget(object_id)
            return None
        if inode.parent is not None and not self._is_on_peers(inode):
            self._log.forget(object_id)
            return None
        return inode

    def _is_on_peers(self, inode: Inode) -> bool:
        return self._pipeline.policies.effective(inode) != Policy.NONE

    @contextmanager
    def _held(self, inode: Inode) -> Iterator[None]:
        """Keep *inode* known over awaits: most here are known to nobody else."""
        self._tree.hold(inode)
        try:
            yield
        finally:
            self._tree.release(inode)

    def _child(self, directory: Inode, name: bytes) -> Inode | None:
        """What the peer shall have under a name, with its id; None: nothing."""
        try:
            inode, _ = self._tree.lookup(directory, name)
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                return None
            raise
        self._tree.read_record(inode)
        if inode.foreign or not self._pipeline.policies.is_replicated_name(directory, name, inode):
            self._tree.drop_unused(inode)
            return None
        self._tree.ensure_id(inode)
        return inode

    async def _is_decided(self, inode: Inode) -> bool:
        """Whether a name of the object that the peers have is known; if it has none, forget it."""
        policies = self._pipeline.policies
        if not policies.is_undecided(inode):
            return True
        if not await self._links.learn_names(inode):
            return False
        if policies.is_undecided(inode) or not self._is_on_peers(inode):
            self._log.forget(inode.id)
            return False
        return True

    async def _is_placed(self, inode: Inode, *, now: bool = False) -> bool:
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
                holds.enter_context(self._held(parent))
            for parent, name in reversed(chain):
                self._tree.ensure_id(parent)
                if self._log.name_is_clean(parent.id, name):
                    continue
                await self._expand_one(parent.id)
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

    def _is_unknown(self, directory: bytes, name: bytes) -> bool:
        """Whether nothing is known of a name but that its whole directory is to be looked at."""
        marks = self._log.marks(directory)
        return marks is not None and marks.names_all and name not in (marks.names or {})

    async def _serve_urgent(self) -> None:
        """Carry what strict changes wait for, beside the passes over everything else."""
        peer = self._peer
        while True:
            await peer.wait_urgent()
            while peer.urgent and peer.live and self._passing:
                inode = peer.urgent.popleft()
                self._hurried.add(inode)
                try:
                    with self._held(inode):
                        await self._urgent(inode)
                except PeerLost:
                    break
                except OSError as error:
                    self._failed(("urgent", inode.id), inode, error.strerror or "error")
                finally:
                    self._hurried.discard(inode)
                if not peer.is_clean(inode):
                    await trio.sleep(_URGENT_RETRY_S)
                peer.progressed()

    async def _urgent(self, inode: Inode) -> None:
        """A strict change waits for this object."""
        if inode.gone or not inode.id or not await self._is_placed(inode, now=True):
            return
        if inode.is_directory:
            await self._expand_one(inode.id)
            names = self._dirty_names(inode.id)
            aside = [name for name in names if not self._log.is_gathered(inode.id, name)]
            if aside:
                await self._gather_one(inode.id, aside)
            for name in names:
                await self._place(inode, name)
        else:
            await self._data_item(inode.id)
        await self._finish_item(inode.id)

    def _dirty_names(self, directory: bytes) -> list[bytes]:
        marks = self._log.marks(directory)
        return [name for name in marks.names if name] if marks and marks.names else []

    # 1. Expand ---------------------------------------------------------------------------------

    async def _expand(self) -> None:
        for directory in self._log.directories_unknown():
            if self._log.dirty_names - len(self.stuck) >= _NAMES_AHEAD:
                return
            await self._expand_one(directory)

    async def _expand_one(self, directory_id: bytes) -> None:
        """List a directory on both sides, and mark each name that may differ."""
        marks = self._log.marks(directory_id)
        if marks is None or not marks.names_all or self._is_waiting(("list", directory_id)):
            return
        inode = self._find(directory_id)
        if inode is None:
            return
        with self._held(inode):
            if await self._is_placed(inode):
                await self._list_both(inode, deep=marks.deep)

    async def _list_both(self, inode: Inode, *, deep: bool) -> None:
        directory_id = inode.id
        version = self._log.mark_version(directory_id)
        await self._peer.fence()
        theirs = await self._list(inode)
        if theirs is None:
            return
        for count, name in enumerate(self._tree.names(inode)):
            if count % _YIELD_EVERY == 0:
                await trio.lowlevel.checkpoint()
            try:
                child = self._child(inode, name)
            except OSError as error:
                self._failed(("list", directory_id), inode, error.strerror or "error")
                return
            entry = theirs.pop(name, None)
            if child is None:
                if entry is not None:
                    self._log.mark_name(directory_id, name)
                continue
            if entry is None or entry.object != child.id or not entry.complete or child.more:
                self._log.mark_name(directory_id, name)
            if deep:
                handle = locators.of(self._tree, child)
                if child.is_directory or child.type == _stat.S_IFREG:
                    self._log.mark_unknown(
                        child.id, directory=child.is_directory, deep=True, handle=handle
                    )
                else:
                    self._log.mark_attrs(child.id, handle=handle)
            self._tree.drop_unused(child)
        for name in theirs:
            self._log.mark_name(directory_id, name)
        self._log.clear_names_all(directory_id, version=version)
        self.progress.compared += 1
        self._succeeded(("list", directory_id))

    async def _list(self, inode: Inode) -> dict[bytes, ops.Entry] | None:
        """The peer's names in a directory; None where it cannot say."""
        found: dict[bytes, ops.Entry] = {}
        after = b""
        while True:
            self._peer.locate(inode.id, BULK)
            answer = await self._peer.ask(ops.List(inode.id, after))
            if not isinstance(answer, ops.Listing):
                self._refused(("list", inode.id), inode, answer)
                return None
            for entry in answer.entries:
                found[entry.name] = entry
            if not answer.more:
                return found
            after = answer.entries[-1].name if answer.entries else after

    def _refused(self, key: object, inode: Inode, answer: ops.AnyAnswer) -> int:
        """The peer could not do something for *inode*; the errno.

        ESTALE means that it does not have the object where we think: its place is looked at again.
        """
        number = answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
        if number == errno.ESTALE and inode.parent is not None:
            self._peer.located[BULK].discard(inode.id)
            self._log.mark_name(
                self._tree.ensure_id(inode.parent),
                inode.name,
                handle=locators.of(self._tree, inode.parent),
            )
        self._failed(key, inode, describe(number))
        return number

    # 2. Gather ---------------------------------------------------------------------------------

    async def _gather(self) -> None:
        """Passes over all names not gathered yet, until one brings nothing new.

        A directory that the peer has elsewhere is known to it only once it was itself gathered.
        """
        while True:
            by_directory: dict[bytes, list[bytes]] = {}
            for directory, name in self._log.ungathered():
                by_directory.setdefault(directory, []).append(name)
            if not by_directory:
                return
            moved = False
            for directory, names in by_directory.items():
                moved = await self._gather_one(directory, names) or moved
            if not moved:
                for directory, names in by_directory.items():
                    for name in names:
                        self._log.set_gathered(directory, name)
                return

    async def _gather_one(self, directory_id: bytes, names: list[bytes]) -> bool:
        inode = self._find(directory_id)
        if inode is None:
            return False
        with self._held(inode):
            return await self._gather_in(inode, names)

    async def _gather_in(self, inode: Inode, names: list[bytes]) -> bool:
        directory_id = inode.id
        gathered = False
        for start in range(0, len(names), ops.NAMES_PER_MESSAGE):
            part = names[start : start + ops.NAMES_PER_MESSAGE]
            version = self._log.mark_version(directory_id)
            wanted = []
            for name in list(part):
                try:
                    child = self._child(inode, name)
                except OSError as error:
                    self._failed(("name", directory_id, name), inode, error.strerror or "error")
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

    async def _place_item(self, item: tuple[bytes, bytes]) -> None:
        directory_id, name = item
        if self._log.name_is_clean(directory_id, name):
            return
        inode = self._find(directory_id)
        if inode is None:
            return
        with self._held(inode):
            if await self._is_placed(inode):
                await self._place(inode, name)

    async def _place(self, directory: Inode, name: bytes) -> None:
        """Give the peer under one name what is there here."""
        key = ("name", directory.id, name)
        if self._is_waiting(key) or not self._log.is_gathered(directory.id, name):
            return
        try:
            while not await self._place_once(key, directory, name):
                pass
        except OSError as error:
            self._failed(key, directory, error.strerror or "cannot be read")

    async def _place_once(self, key: object, directory: Inode, name: bytes) -> bool:
        """False: something else stood there when it was this operation's turn."""
        child = self._child(directory, name)
        with ExitStack() as holds:
            claims = footprint.entry(directory, name)
            if child is not None:
                holds.enter_context(self._held(child))
                claims = footprint.entry_of(directory, name, child)
                if not await self._links.learn_names(child):
                    self._failed(key, child, "its other names are still being looked for")
                    return True
                if not await self._are_hints_placed(child):
                    return True
            async with self._claim(claims):
                if self._child(directory, name) is not child:
                    return False
                if self._log.is_gathered(directory.id, name):
                    await self._place_claimed(key, directory, name, child)
                return True

    async def _place_claimed(
        self, key: object, directory: Inode, name: bytes, child: Inode | None
    ) -> None:
        version = self._log.mark_version(directory.id)
        self._peer.locate(directory.id, BULK)
        if child is None:
            answer = await self._peer.ask(ops.Clear(directory.id, name))
        else:
            attributes = read_attributes(self._tree, child)
            hints = self._hints_of(child, directory, name)
            answer = await self._peer.ask(
                ops.Place(child.id, directory.id, name, attributes, hints)
            )
            if isinstance(answer, ops.Placed):
                self._peer.located[BULK].add(child.id)
                if not answer.complete:
                    self._mark_contents(child, created=answer.created)
        if isinstance(answer, ops.Done) and answer.errno:
            if answer.errno in _UNREPRESENTABLE and child is not None:
                self._unrepresentable(directory, name, child, answer.errno, version)
            else:
                self._refused(key, directory, answer)
            return
        self._log.clear_name(directory.id, name, version=version)
        self.progress.names += 1
        self._succeeded(key)

    def _unrepresentable(
        self, directory: Inode, name: bytes, child: Inode, number: int, version: int
    ) -> None:
        """The peer's store cannot hold it: listed, and no longer in the way of the others."""
        path = child.path().decode(errors="backslashreplace")
        self._peer.unrepresentable[child.id] = f"/{path}: {describe(number)}"
        log.warning("peer %s cannot hold /%s: %s", self._peer.name, path, describe(number))
        self._log.forget(child.id)
        self._log.clear_name(directory.id, name, version=version)

    def _mark_contents(self, child: Inode, *, created: bool) -> None:
        """The peer has the object, but not (certainly) what is in it."""
        handle = locators.of(self._tree, child)
        if child.is_directory:
            self._log.mark_names_all(child.id, handle=handle)
        elif child.type == _stat.S_IFREG:
            self._log.mark_tail(child.id, 0, size=child.size, handle=handle, compare=not created)
        else:
            self._log.mark_attrs(child.id, handle=handle)

    async def _are_hints_placed(self, child: Inode) -> bool:
        """Whether the peer can look for an object under its other names: their directories first.

        Where it could not, it would get the object a second time.
        """
        if child.is_directory or not child.more:
            return True
        for parent, _ in child.names():
            if not self._is_on_peers(parent):
                continue
            with self._held(parent):
                if not await self._is_placed(parent):
                    return False
        return True

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

    # 4. Data -----------------------------------------------------------------------------------

    async def _data_item(self, object_id: bytes) -> None:
        key = ("data", object_id)
        marks = self._log.marks(object_id)
        if marks is None or not marks.data or self._is_waiting(key):
            return
        inode = self._find(object_id)
        if inode is None:
            return
        with self._held(inode):
            if await self._is_placed(inode):
                await self._send_data(key, inode)

    async def _send_data(self, key: object, inode: Inode) -> None:
        if inode.type != _stat.S_IFREG:
            self._log.clear_tail(inode.id, None)
            self._log.clear_regions(inode.id, 0, None)
            return
        try:
            fd = self._tree.open(inode, os.O_RDONLY)
        except OSError as error:
            self._failed(key, inode, error.strerror or "cannot be read")
            return
        try:
            if os.fstat(fd).st_size <= ops.PAYLOAD_MAX:
                await self._send_small(key, inode, fd)
            else:
                await self._send_regions(key, inode, fd)
        except OSError as error:
            self._failed(key, inode, error.strerror or "cannot be read")
        finally:
            os.close(fd)

    async def _send_small(self, key: object, inode: Inode, fd: int) -> None:
        """A small file in one claim: its dirty regions, then all its attributes."""
        async with self._claim(footprint.whole(inode)):
            version = self._log.mark_version(inode.id)
            end = (os.fstat(fd).st_size + REGION_SIZE - 1) >> REGION_SHIFT
            first = 0
            while (run := self._log.next_run(inode.id, first, end, _REGIONS_AT_ONCE)) is not None:
                if not await self._send_run(key, inode, fd, run):
                    return
                self._log.clear_regions(inode.id, *run, version=version)
                first = run[1]
            await self._finish_claimed(("attrs", inode.id), inode, version)
            self._succeeded(key)

    async def _send_regions(self, key: object, inode: Inode, fd: int) -> None:
        first = 0
        while True:
            end = (os.fstat(fd).st_size + REGION_SIZE - 1) >> REGION_SHIFT
            run = self._log.next_run(inode.id, first, end, _REGIONS_AT_ONCE)
            if run is None:
                break
            claims = footprint.data(inode, run[0] << REGION_SHIFT, run[1] << REGION_SHIFT)
            async with self._claim(claims):
                version = self._log.mark_version(inode.id)
                if not await self._send_run(key, inode, fd, run):
                    return
                self._log.clear_regions(inode.id, *run, version=version)
                marks = self._log.marks(inode.id)
                # A tail that begins before the run came while its turn was awaited.
                if marks is not None and run[0] <= marks.tail < run[1]:
                    self._log.clear_tail(inode.id, run[1], version=version)
            first = run[1]
            self._peer.progressed()
        self._succeeded(key)
        await self._finish_item(inode.id)

    async def _send_run(self, key: object, inode: Inode, fd: int, run: tuple[int, int]) -> bool:
        """Send a run of regions, or those of them that differ; the claim is the caller's."""
        start = run[0] << REGION_SHIFT
        count = run[1] - run[0]
        data = await trio.to_thread.run_sync(os.pread, fd, count << REGION_SHIFT, start)
        parts = [(0, len(data))]
        marks = self._log.marks(inode.id)
        self._peer.locate(inode.id, BULK)
        if marks is not None and marks.compare:
            answer = await self._peer.ask(ops.Digest(inode.id, start, count, REGION_SIZE))
            if not isinstance(answer, ops.Digests):
                self._refused(key, inode, answer)
                return False
            parts = _differing(data, answer.digests)
        for left, right, is_hole in _pieces(_segments(fd, start, start + len(data)), parts, start):
            length = right - left
            if is_hole:
                op, payload = ops.Data(inode.id, left, length), None
            else:
                op = ops.Data(inode.id, left)
                payload = data[left - start : right - start]
                if inode not in self._hurried:
                    await self._throttle(length)
            answer = await self._peer.ask(op, payload)
            written = 0 if is_hole else length
            if not isinstance(answer, ops.Done) or answer.errno or answer.written != written:
                number = self._refused(key, inode, answer)
                self._peer.note_error(op, describe(number or errno.ENOSPC))
                return False
            self.progress.bytes += written
        return True

    async def _throttle(self, count: int) -> None:
        """Keep to `rate_bytes` a second."""
        if not self.rate_bytes:
            return
        now = time.monotonic()
        self._paid = max(self._paid, now - 0.1) + count / self.rate_bytes
        if self._paid > now:
            await trio.sleep(self._paid - now)

    # 5. Finish ---------------------------------------------------------------------------------

    async def _finish_item(self, object_id: bytes) -> None:
        key = ("attrs", object_id)
        if not self._may_finish(object_id) or self._is_waiting(key):
            return
        inode = self._find(object_id)
        if inode is None:
            return
        with self._held(inode):
            if not await self._is_placed(inode):
                return
            async with self._claim(footprint.whole(inode)):
                if not self._may_finish(object_id):
                    return
                try:
                    await self._finish_claimed(key, inode, self._log.mark_version(object_id))
                except OSError as error:
                    self._failed(key, inode, error.strerror or "cannot be read")

    def _may_finish(self, object_id: bytes) -> bool:
        """Attributes come last: after the data, and after the names in a directory."""
        marks = self._log.marks(object_id)
        if marks is None or not marks.attrs or marks.names is not None:
            return False
        if not marks.data:
            return True
        inode = self._tree.table.by_id.get(object_id)
        size = inode.size if inode is not None else 0
        end = (size + REGION_SIZE - 1) >> REGION_SHIFT
        return inode is not None and self._log.next_run(object_id, 0, end) is None

    async def _finish_claimed(self, key: object, inode: Inode, version: int) -> None:
        attributes = read_attributes(self._tree, inode)
        self._peer.locate(inode.id, BULK)
        answer = await self._peer.ask(ops.Finish(inode.id, attributes))
        if not isinstance(answer, ops.Done) or answer.errno:
            number = self._refused(key, inode, answer)
            if number in _UNREPRESENTABLE:
                self._peer.unrepresentable[inode.id] = f"/{inode.path()!r}: {describe(number)}"
                self._log.forget(inode.id)
            return
        self._log.clear_tail(inode.id, None, version=version)
        self._log.clear_regions(
            inode.id, (attributes.size + REGION_SIZE - 1) >> REGION_SHIFT, None, version=version
        )
        self._log.clear_attrs(inode.id, version=version)
        self.progress.files += 1
        self._succeeded(key)
        if not inode.is_directory:
            self._peer.forget([inode.id], BULK)
        self._peer.progressed()


def _differing(data: bytes, digests: bytes) -> list[tuple[int, int]]:
    """(low, high) of the parts of *data* whose digests differ from the peer's, joined."""
    parts: list[tuple[int, int]] = []
    for index in range(0, len(data), REGION_SIZE):
        piece = data[index : index + REGION_SIZE]
        place = index // REGION_SIZE * 16
        if xxhash.xxh3_128_digest(piece) == digests[place : place + 16]:
            continue
        if parts and parts[-1][1] == index:
            parts[-1] = (parts[-1][0], index + len(piece))
        else:
            parts.append((index, index + len(piece)))
    return parts


def _pieces(
    segments: list[tuple[int, int, bool]], parts: list[tuple[int, int]], start: int
) -> Iterator[tuple[int, int, bool]]:
    """What to send of *segments*: of data what lies in *parts* (relative to *start*).

    Holes all the same: the peer may have zeros there, which have the same digest.
    """
    for left, right, is_hole in segments:
        if is_hole:
            yield left, right, True
            continue
        for low, high in parts:
            first, last = max(left, start + low), min(right, start + high)
            if first < last:
                yield first, last, False


def _segments(fd: int, start: int, stop: int) -> list[tuple[int, int, bool]]:
    """[start, stop) of a file cut into (start, stop, is a hole).

    Source: lseek(2), SEEK_DATA and SEEK_HOLE; where they are not known, all is data.
    """
    segments: list[tuple[int, int, bool]] = []
    at = start
    while at < stop:
        try:
            data = min(os.lseek(fd, at, os.SEEK_DATA), stop)
        except OSError as error:
            if error.errno != errno.ENXIO:
                return [(start, stop, False)]
            data = stop
        if data > at:
            segments.append((at, data, True))
            at = data
            continue
        hole = min(os.lseek(fd, at, os.SEEK_HOLE), stop)
        segments.append((at, hole, False))
        at = hole
    return segments
