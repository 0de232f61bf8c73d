"""Filling directories that are empty on the peer, in a baseline: without a mark for each name.

Everything in such a directory is to be placed, so listing it and marking name by name would only
say again what the one mark on all its names says. Small files go from here, many with one message;
what cannot go so (a directory, a large file, one with several names) is marked for the steps that
carry objects one by one.

The names of a message are claimed while it is on its way: no object leaves a name, or comes to it,
meanwhile. What is in an object, and its policy, is not. Until all names are done, every change of
an object here is marked and not sent, and nothing here clears such a mark; and once an object has a
policy of its own, nothing is placed any more.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Final

import trio

from replfs.core import footprint, ops
from replfs.core.relationship import State
from replfs.node.pacing.ahead import ahead
from replfs.node.pacing.rate import Rate
from replfs.node.replication.places import BULK
from replfs.node.resync.names import Names
from replfs.node.resync.whole import WHOLE_MAX
from replfs.node.resync.work import Work
from replfs.store.fresh import Fresh, file_names, read_fresh
from replfs.store.inode import Inode
from replfs.store.look import SMALL_DIRECTORY
from replfs.store.reach import RESERVED
from replfs.store.record import PRIVILEGED, ROOT_ID

_MANY: Final = 64
_FEW: Final = 8
"""Placed with one message while applications are at work."""
_AT_ONCE: Final = 2
"""Messages of one directory on their way: one is read while the other is written over there."""


class Filling:
    """Step 3 of a baseline, for directories in which the peer has nothing."""

    def __init__(
        self,
        work: Work,
        names: Names,
        rate: Rate,
        finish: Callable[[Inode], Awaitable[None]],
    ) -> None:
        """*finish*: step 5 of a directory that is held, where nothing in it is left to be done."""
        self._finish = finish
        self._work = work
        self._names = names
        self._expansion = names.expansion
        self._rate = rate
        self._tree = work.tree
        self._peer = work.peer
        self._log = work.log
        self._applications = work.pipeline.applications

    def pending(self) -> Iterator[bytes]:
        """Ids of the directories that can be filled now."""
        if self._peer.state is State.BASELINE:
            yield from self._expansion.empty()

    async def fill(self, directory_id: bytes) -> None:
        """Place what is in a directory, or mark it."""
        directory = self._work.find(directory_id)
        if directory is None:
            return
        with self._tree.held(directory):
            with self._expansion.attended(directory_id) as is_free:
                if not is_free or not await self._names.is_placed(directory):
                    return
                await self._fill(directory)
            # Now, for later it has to be found again.
            await self._finish(directory)

    async def _fill(self, directory: Inode) -> None:
        version = self._log.mark_version(directory.id)
        # If this ends half-way, the peer is asked what there is.
        self._expansion.is_placed_in(directory.id)
        await self._peer.fence()
        fd = os.dup(self._tree.directory_fd(directory))
        try:
            hidden = RESERVED if directory is self._tree.root else b""
            if os.fstat(fd).st_size <= SMALL_DIRECTORY:
                files, others = file_names(fd, hidden)
            else:
                files, others = await trio.to_thread.run_sync(file_names, fd, hidden)
            await self._expansion.mark_absent(directory, others)
            await self._carry_all(directory, fd, files)
        finally:
            os.close(fd)
        self._log.clear_names_all(directory.id, version=version)
        self._work.progress.compared += 1
        self._work.succeeded(("list", directory.id))

    async def _carry_all(self, directory: Inode, fd: int, names: list[bytes]) -> None:
        """Raises OSError, PeerLost or ProtocolError, with part of it done."""
        tasks = _AT_ONCE if len(names) > _MANY else 1
        carry = partial(self._carry, directory, fd)
        await ahead(self._parts(names), carry, self._applications, tasks=tasks)

    def _parts(self, names: list[bytes]) -> Iterator[list[bytes]]:
        start = 0
        while start < len(names):
            stop = start + (_FEW if self._applications.are_busy else _MANY)
            yield names[start:stop]
            start = stop

    async def _carry(self, directory: Inode, fd: int, names: Sequence[bytes]) -> bool:
        while names:
            if self._rate.limit:
                await self._rate.spend(_bytes_of(fd, names))
            claims = footprint.together(
                claim for name in names for claim in footprint.entry(directory, name)
            )
            async with self._work.claim(claims):
                read, count = await trio.to_thread.run_sync(
                    read_fresh, fd, names, WHOLE_MAX, ops.PAYLOAD_MAX, self._tree.new_id
                )
                sent = [one for one in read if self._is_alone(one)]
                if not can_fill(self._work):
                    sent = []  # a policy was set: each object is asked what becomes of it there
                if sent:
                    await self._place(directory, sent)
            carried = {one.name for one in sent}
            left = [name for name in names[:count] if name not in carried]
            await self._expansion.mark_absent(directory, left)
            names = names[count:]
            self._peer.progressed()
        return True

    def _is_alone(self, one: Fresh) -> bool:
        """Whether nobody knows another object by the inode number or the id."""
        table = self._tree.table
        known = table.find(one.found.st_ino)
        if known is None:
            return one.record.object not in table.by_id
        # One that was looked up before it had an id is given one again by whoever needs it.
        return known.id == one.record.object and not known.gone

    async def _place(self, directory: Inode, sent: list[Fresh]) -> None:
        items = [ops.Item(one.record.object, one.name, _attributes(one)) for one in sent]
        payload = b"".join([one.contents for one in sent])
        self._peer.locate(directory.id, BULK)
        answer = await self._peer.ask(ops.PlaceMany(directory.id, items), payload or None)
        # What finds each of them again is worth a call, and of a baseline soon there are too many.
        self._peer.unstable.lose_track()
        if not isinstance(answer, ops.PlacedMany) or len(answer.results) != len(items):
            # Most likely the directory is not where it was: it is looked for from the top.
            self._peer.located[BULK].intersection_update({ROOT_ID})
            self._mark(directory, [item.name for item in items])
            return
        there = {
            item.name: item.attributes.size
            for item, result in zip(items, answer.results, strict=True)
            if isinstance(result, ops.Placed) and result.created and result.complete
        }
        self._mark(directory, [item.name for item in items if item.name not in there])
        progress = self._work.progress
        progress.files += len(there)
        progress.names += len(there)
        progress.bytes += sum(there.values())

    def _mark(self, directory: Inode, names: list[bytes]) -> None:
        """Names of which it is not known what the peer has there. Raises OSError."""
        if not names:
            return  # else what was cleared until now would be saved, which can wait
        with self._log.together():
            for name in names:
                self._log.mark_name(directory.id, name)


def can_fill(work: Work) -> bool:
    """Whether the peer understands it, and nothing is kept from it."""
    return (
        PRIVILEGED
        and work.peer.state is State.BASELINE
        and work.peer.understands(ops.PlaceMany)
        and work.policies.replicates_all
    )


def _bytes_of(fd: int, names: Iterable[bytes]) -> int:
    """About how much data goes with them."""
    total = 0
    for name in names:
        try:
            size = os.stat(name, dir_fd=fd, follow_symlinks=False).st_size
        except OSError:
            continue
        total += size if size <= WHOLE_MAX else 0
    return total


def _attributes(one: Fresh) -> ops.Attributes:
    found, record = one.found, one.record
    return ops.Attributes(
        mode=found.st_mode,
        uid=found.st_uid,
        gid=found.st_gid,
        rdev=0,
        size=len(one.contents),
        mtime=found.st_mtime_ns,
        target=b"",
        policy=record.policy,
        ack=record.ack,
        xattrs=one.xattrs,
    )
