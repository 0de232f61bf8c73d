"""Comparing a peer's copy with this store, while both are in use.

A walk over the local tree. Each name is claimed like an operation of its own: what it stands for
here is compared with what stands there (object, type, attributes, extended attributes, and the
contents of a small file); a large file is then compared by ranges, each under its own claim. So an
application waits for one round trip or one range, and nothing that is compared is in flight.
Whatever differs is looked at once more under an exclusive claim before it is told. What the dirty
region log knows already is skipped.

A repair is a mark in the log, which the resync then mends. A directory that is renamed meanwhile
may be missed, or seen twice; what is renamed into a place that was compared already is not seen.
"""

from __future__ import annotations

import errno
import os
import stat as _stat
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import Final, TypeVar

import trio
import xxhash

from replfs.core import footprint, ops
from replfs.core.regions import REGION_SIZE
from replfs.core.scheduler import Claim
from replfs.errors import NotInSync, PeerLost, UsageError
from replfs.node.asking import attributes
from replfs.node.asking.question import list_all
from replfs.node.pacing.crew import each
from replfs.node.pacing.rate import Rate
from replfs.node.replication.flight import describe
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.replication.places import BULK
from replfs.node.verify.walk import Below, walk
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.reach import RESERVED
from replfs.store.record import can_carry

CHUNK: Final = 1 << 20
"""Bytes compared under one claim."""
_TASKS: Final = 4
_REST_S: Final = 0.002
"""After each name, where applications wait for something."""
_ATTEMPTS: Final = 3
"""How often the peer is told anew where a directory is, if it was renamed just then."""
_TOLD_MAX: Final = 10_000
"""Differences that are told; further ones are counted."""
_DIGEST: Final = 16

T = TypeVar("T")
Place = tuple[bytes, ...]
"""Where a directory is, by the names from where the walk began."""


class Course:
    """How far a verification has come; outlives an interruption, not the process."""

    def __init__(self) -> None:
        self.reached: Place | None = None
        """The directory that was begun last; all before it, in byte order, is done."""
        self.told: dict[str, None] = {}
        self.differences = 0
        self.files = 0
        self.bytes = 0
        self.skipped = 0

    def differ(self, text: str) -> None:
        """Something differs; the same thing counts once."""
        if text in self.told:
            return
        self.differences += 1
        if len(self.told) < _TOLD_MAX:
            self.told[text] = None


class Verification:
    """One peer's copy of what is at or below *top*."""

    def __init__(
        self,
        pipeline: Pipeline,
        peer: Peer,
        top: Place,
        course: Course,
        *,
        repair: bool,
        rate: Rate,
    ) -> None:
        self._pipeline = pipeline
        self._tree = pipeline.tree
        self._policies = pipeline.policies
        self._peer = peer
        self._top = top
        self._repair = repair
        self._rate = rate
        self.course = course
        self.at = "/"
        self.stopped = False
        self._located: set[Inode] = set()
        """Directories that the peer was told of for this, to be forgotten on the way back."""

    async def run(self) -> None:
        """Compare; `course` says what was found.

        Raises:
            PeerLost: the link went down; the same course may go on later.
            UsageError: there is no such path.
            OSError: a repair cannot be recorded.
        """
        inode = self._tree.root
        for name in self._top[:-1]:
            inode = self._below(inode, name)
        if not self._top:
            with self._tree.held(inode):
                await self._root()
                await self._walk(inode)
            return
        name = self._top[-1]
        child = self._below(inode, name)
        with self._tree.held(inode), self._tree.held(child):
            is_there = await self._item(inode, name)
            if is_there and child.is_directory and not child.gone:
                await self._walk(child)

    def _below(self, inode: Inode, name: bytes) -> Inode:
        try:
            found = self._tree.lookup(inode, name)[0]
        except OSError as error:
            path = os.fsdecode(b"/" + b"/".join(self._top))
            raise UsageError(f"{path} cannot be verified: {error.strerror}") from None
        if found.foreign:
            raise UsageError(f"{os.fsdecode(found.path())} is on another file system")
        # It may be known to nobody else, and so be looked at for the first time here.
        self._tree.read_record(found)
        return found

    # The walk ----------------------------------------------------------------------------------

    async def _walk(self, top: Inode) -> None:
        start: Place = ()
        await walk(self._tree, self._policies, top, start, self._enter, self._leave)

    @asynccontextmanager
    async def _claim(self, claims: tuple[Claim, ...]) -> AsyncIterator[None]:
        async with self._pipeline.claimed(claims, "verify", self._peer):
            self._check()
            yield

    async def _enter(self, inode: Inode, place: Place) -> Below[Place]:
        """Compare a directory; what is below it goes on in byte order."""
        if not inode.id:
            return []
        if inode is not self._tree.root and inode.id not in self._peer.located[BULK]:
            self._located.add(inode)
        names = await self._directory(inode, place)
        names.sort(reverse=True)
        below = [(name, (*place, name)) for name in names]
        return [(name, deeper) for name, deeper in below if not self._is_done(deeper)]

    def _leave(self, inode: Inode) -> None:
        if inode in self._located:
            self._located.discard(inode)
            self._peer.forget([inode.id], BULK)

    def _is_done(self, place: Place) -> bool:
        """Whether an earlier part of the course saw the directory and all below it."""
        reached = self.course.reached
        return reached is not None and place < reached and reached[: len(place)] != place

    async def _directory(self, inode: Inode, place: Place) -> list[bytes]:
        """Compare a directory's names and what they stand for; the names of directories in it."""
        self.at = _shown(inode)
        if not self._is_settled(inode):
            self.course.skipped += 1
            return []
        names = await self._names(inode)
        reached = self.course.reached
        if reached is not None and place < reached:
            return [name for name in names if self._is_walked(inode, name)]
        self.course.reached = place
        await self._each(
            await self._extras(inode, set(names)), lambda name: self._extra(inode, name)
        )
        directories: list[bytes] = []

        async def compare(name: bytes) -> None:
            if await self._item(inode, name) and self._is_walked(inode, name):
                directories.append(name)

        await self._each(names, compare)
        return directories

    def _is_walked(self, inode: Inode, name: bytes) -> bool:
        child = self._policies.readable_child(inode, name)
        if child is None:
            return False
        self._tree.drop_unused(child)
        return child.is_directory

    async def _names(self, inode: Inode) -> list[bytes]:
        """The names here, in byte order; a large directory takes long to read."""
        try:
            fd = os.dup(self._tree.directory_fd(inode))
        except OSError:
            return []
        try:
            found = await trio.to_thread.run_sync(os.listdir, fd)
        except OSError:
            return []
        finally:
            os.close(fd)
        names = sorted(map(os.fsencode, found))
        if inode is self._tree.root and RESERVED in names:
            names.remove(RESERVED)
        return names

    async def _extras(self, inode: Inode, names: set[bytes]) -> list[bytes]:
        """Names that the peer has in a directory, and that are not here."""
        theirs = await list_all(partial(self._ask, inode), inode.id, names)
        if not isinstance(theirs, dict):
            if self._is_settled(inode):
                self._tell(_shown(inode), f"cannot be listed there: {_reason(theirs)}")
            return []
        return list(theirs)

    async def _each(self, items: Iterable[T], work: Callable[[T], Awaitable[object]]) -> None:
        """Work on all *items*, with a rest after each while applications are at work."""

        async def one(item: T) -> None:
            await work(item)
            if self._pipeline.flights:
                await trio.sleep(_REST_S)

        await each(items, one, tasks=_TASKS, goes_on=lambda: not self.stopped and self._peer.live)
        self._check()

    def _check(self) -> None:
        if self.stopped:
            raise NotInSync("the verification was stopped")
        if not self._peer.live:
            raise PeerLost(f"{self._peer.name}: the link went down at {self.at}")

    # What is known to differ ---------------------------------------------------------------------

    def _is_settled(self, inode: Inode) -> bool:
        """Whether the peer should have the directory, where it is here, and its names."""
        log = self._peer.log
        if inode.gone:
            return False
        if log.is_empty:
            return True
        marks = log.marks(inode.id)
        if marks is not None and marks.names_all:
            return False
        while inode.parent is not None:
            if not log.name_is_clean(inode.parent.id, inode.name):
                return False
            inode = inode.parent
        return True

    def _is_known(self, directory: Inode, name: bytes, child: Inode | None) -> bool:
        """Whether the log, or the list of what the peer cannot hold, has the item already."""
        log = self._peer.log
        if child is not None and child.id in self._peer.unrepresentable:
            return True
        if log.is_empty:
            return False
        if not log.name_is_clean(directory.id, name) or not self._is_settled(directory):
            return True
        return child is not None and not log.object_is_clean(child.id)

    # One name ------------------------------------------------------------------------------------

    async def _item(self, directory: Inode, name: bytes) -> bool:
        """Compare what stands at a name; whether the peer has the same object there."""
        while True:
            self._check()
            try:
                child = self._policies.child(directory, name)
            except OSError as error:
                self._differ(directory, name, f"cannot be read here: {error.strerror}")
                return False
            if child is None:
                await self._extra(directory, name)
                return False
            with self._tree.held(child):
                claims = footprint.entry_of(directory, name, child)
                if (
                    child.type == _stat.S_IFREG
                    and child.size <= CHUNK
                    and not self._is_known(directory, name, child)
                ):
                    await self._rate.spend(child.size)
                async with self._claim(claims):
                    if self._policies.child(directory, name) is not child:
                        continue
                    is_there = await self._compare(directory, name, child)
                if is_there and child.type == _stat.S_IFREG and child.size > CHUNK:
                    await self._contents(child, self._label(directory, name))
                return is_there

    async def _compare(self, directory: Inode, name: bytes, child: Inode) -> bool:
        """The item, and what is in a small file; the claim is the caller's."""
        if self._is_known(directory, name, child):
            self.course.skipped += 1
            return False
        try:
            mine = attributes.inspect(self._tree, child)
        except OSError as error:
            self._differ(directory, name, f"cannot be read here: {error.strerror}")
            return False
        answer = await self._ask(directory, ops.Inspect(directory.id, name))
        if self._is_known(directory, name, child):
            # The session ended meanwhile, and something was recorded.
            self.course.skipped += 1
            return False
        self.course.files += 1
        if not isinstance(answer, ops.Inspected):
            self._differ(directory, name, f"cannot be looked at there: {_reason(answer)}")
            return False
        theirs = answer.attributes
        problem = ""
        if theirs is None:
            problem = "missing there"
        elif _stat.S_IFMT(mine.mode) != _stat.S_IFMT(theirs.mode):
            problem = attributes.differences(mine, theirs)[0]
        elif can_carry(child.type) and (not child.id or answer.object != child.id):
            problem = "another object there"
        elif not answer.complete:
            problem = "incomplete there"
        if problem:
            self._differ(directory, name, problem)
            self._mark_name(directory, name)
            return False
        if theirs is not None:
            found = attributes.differences(mine, theirs)
            for text in found:
                self._differ(directory, name, text)
            if found:
                self._mark_attrs(child)
        if child.type == _stat.S_IFREG and mine.size <= CHUNK:
            await self._small(child, self._label(directory, name))
        return True

    async def _extra(self, directory: Inode, name: bytes) -> None:
        """A name that is not here, or not replicated, must not be there either."""
        async with self._claim(footprint.entry(directory, name)):
            try:
                child = self._policies.child(directory, name)
                if child is not None or self._is_foreign(directory, name):
                    return
            except OSError:
                return
            if self._is_known(directory, name, None):
                self.course.skipped += 1
                return
            answer = await self._ask(directory, ops.Inspect(directory.id, name))
            if not isinstance(answer, ops.Inspected) or answer.attributes is None:
                return
            if (
                self._policies.is_none_by_itself(
                    name, answer.attributes.policy, directory=_stat.S_ISDIR(answer.attributes.mode)
                )
                and self._tree.lookup_or_none(directory, name) is None
            ):
                return  # the peer's own
            if self._is_known(directory, name, None):
                return
            self._differ(directory, name, "only there")
            self._mark_name(directory, name)

    def _is_foreign(self, directory: Inode, name: bytes) -> bool:
        try:
            return self._tree.lookup(directory, name)[0].foreign
        except FileNotFoundError:
            return False

    async def _root(self) -> None:
        """The root's own attributes: it has no name to be looked at by."""
        root = self._tree.root
        async with self._claim(footprint.whole(root)):
            if not self._peer.log.object_is_clean(root.id):
                self.course.skipped += 1
                return
            mine = attributes.inspect(self._tree, root)
            answer = await self._ask(root, ops.Inspect(root.id, b""))
            if not self._peer.log.object_is_clean(root.id):
                return
            if not isinstance(answer, ops.Inspected) or answer.attributes is None:
                self._tell("/", f"cannot be looked at there: {_reason(answer)}")
                return
            found = attributes.differences(mine, answer.attributes)
            for text in found:
                self._tell("/", text)
            if found:
                self._mark_attrs(root)

    # Contents ------------------------------------------------------------------------------------

    async def _small(self, inode: Inode, label: str) -> None:
        """A file of one chunk, claimed by the caller as a whole."""
        runs = await self._runs(inode, label, 0)
        self._tell_runs(inode, label, runs)

    async def _contents(self, inode: Inode, label: str) -> None:
        """A large file, chunk by chunk."""
        start = 0
        differing: list[tuple[int, int]] = []
        while start < inode.size and not inode.gone:
            self._check()
            await self._rate.spend(min(CHUNK, inode.size - start))
            async with self._claim(footprint.data(inode, start, start + CHUNK)):
                runs = await self._runs(inode, label, start, forget=False)
            if runs:
                await self._rate.spend(min(CHUNK, max(0, inode.size - start)))
                async with self._claim(footprint.whole(inode)):
                    differing += await self._runs(inode, label, start, forget=False)
            start += CHUNK
            if self._pipeline.flights:
                await trio.sleep(_REST_S)
        self._peer.forget([inode.id], BULK)
        self._tell_runs(inode, label, differing)

    async def _runs(
        self, inode: Inode, label: str, start: int, *, forget: bool = True
    ) -> list[tuple[int, int]]:
        """What differs in one chunk, as (start, stop) in bytes; the claim is the caller's."""
        if inode.gone or not self._peer.log.data_is_clean(inode.id, start, start + CHUNK):
            return []
        try:
            fd = self._tree.open(inode, os.O_RDONLY)
        except OSError as error:
            self._tell(label, f"cannot be read here: {error.strerror}")
            return []
        try:
            mine, size = await trio.to_thread.run_sync(_digests, fd, start)
        except OSError as error:
            self._tell(label, f"cannot be read here: {error.strerror}")
            return []
        finally:
            os.close(fd)
        answer = await self._ask(
            inode, ops.Digest(inode.id, start, CHUNK // REGION_SIZE, REGION_SIZE)
        )
        if forget:
            self._peer.forget([inode.id], BULK)
        self.course.bytes += min(CHUNK, max(0, size - start))
        if not self._peer.log.data_is_clean(inode.id, start, start + CHUNK):
            return []
        if not isinstance(answer, ops.Digests):
            self._tell(label, f"cannot be read there: {_reason(answer)}")
            return []
        found: list[tuple[int, int]] = []
        for at in range(0, len(mine), _DIGEST):
            if mine[at : at + _DIGEST] == answer.digests[at : at + _DIGEST]:
                continue
            first = start + at // _DIGEST * REGION_SIZE
            last = min(first + REGION_SIZE, max(size, answer.size))
            if found and found[-1][1] == first:
                found[-1] = (found[-1][0], last)
            else:
                found.append((first, last))
        return [(first, last) for first, last in found if first < last]

    def _tell_runs(self, inode: Inode, label: str, runs: list[tuple[int, int]]) -> None:
        if not runs:
            return
        count = sum(last - first for first, last in runs)
        self._tell(label, f"contents: {count} bytes at {runs[0][0]} or after it differ")
        handle = locators.of(self._tree, inode)

        def mark() -> None:
            for first, last in runs:
                self._peer.log.mark_data(inode.id, first, last, handle=handle, compare=True)

        self._mark(mark)

    # Asking, telling, marking --------------------------------------------------------------------

    async def _ask(self, inode: Inode, op: ops.AnyOp) -> ops.AnyAnswer:
        """Ask about *inode*; what was renamed just then is located anew."""
        answer: ops.AnyAnswer = ops.Done(errno.ESTALE)
        for _ in range(_ATTEMPTS):
            self._check()
            self._peer.locate(inode.id, BULK)
            answer = await self._peer.ask(op)
            if not isinstance(answer, ops.Done) or answer.errno != errno.ESTALE:
                break
            one: Inode | None = inode
            while one is not None and one.parent is not None:
                self._peer.located[BULK].discard(one.id)
                one = one.parent
        return answer

    def _label(self, directory: Inode, name: bytes) -> str:
        return f"{_shown(directory).rstrip('/')}/{_text(name)}"

    def _differ(self, directory: Inode, name: bytes, text: str) -> None:
        self._tell(self._label(directory, name), text)

    def _tell(self, label: str, text: str) -> None:
        self.course.differ(f"{label}: {text}")

    def _mark_name(self, directory: Inode, name: bytes) -> None:
        handle = locators.of(self._tree, directory)
        self._mark(lambda: self._peer.log.mark_name(directory.id, name, handle=handle))

    def _mark_attrs(self, inode: Inode) -> None:
        handle = locators.of(self._tree, inode)
        self._mark(lambda: self._peer.log.mark_attrs(inode.id, handle=handle))

    def _mark(self, mark: Callable[[], None]) -> None:
        if self._repair:
            mark()
            self._peer.doubt("a verification found differences")


def _digests(fd: int, start: int) -> tuple[bytes, int]:
    """The digests of a chunk's regions, and the file's size."""
    data = os.pread(fd, CHUNK, start)
    found = [
        xxhash.xxh3_128_digest(data[at : at + REGION_SIZE]) for at in range(0, CHUNK, REGION_SIZE)
    ]
    return b"".join(found), os.fstat(fd).st_size


def _reason(answer: ops.AnyAnswer) -> str:
    return describe(answer.errno) if isinstance(answer, ops.Done) else "a wrong answer"


def _text(name: bytes) -> str:
    return name.decode(errors="backslashreplace").replace("\n", "\\n")


def _shown(inode: Inode) -> str:
    return "/" + _text(inode.path())
