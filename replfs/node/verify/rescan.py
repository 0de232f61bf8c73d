"""After a start: finding what was changed in STORE while nothing was mounted.

Whoever changes an object behind the mount cannot help changing its ctime, and what was made there
has no valid record. The walk compares each ctime with the time until which all changes are known
to have gone through a node (`Identity.stopped_ns`), and marks what is newer in the log of every
peer; the resync then compares it. The clock is a hint only: what is marked for nothing costs a
comparison. A clock that was set back in between makes the times worthless: all is compared then.

It has low priority: the store is read in a thread, and for every moment of that the walk rests
another. What an application moves out of a directory that was not looked at yet into one that was
is missed. Mounts inside STORE are not crossed.
"""

from __future__ import annotations

import itertools
import logging
import os
import stat as _stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Final, NamedTuple

import trio

from replfs.core.relationship import State
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.verify.walk import Below, walk
from replfs.store import locators, record
from replfs.store.inode import Inode, proc_path
from replfs.store.reach import RESERVED
from replfs.store.record import ROOT_ID

log = logging.getLogger(__name__)

MARGIN_NS: Final = 2_000_000_000
"""How much earlier than the time that is known a change still counts."""
_AT_ONCE: Final = 200
"""Directory entries looked at between two rests."""


class _Seen(NamedTuple):
    """A directory entry that is worth a look: a directory, or something changed or new."""

    name: bytes
    is_directory: bool
    is_changed: bool
    is_new: bool


class Rescan:
    """One walk over the store."""

    def __init__(
        self,
        pipeline: Pipeline,
        stopped_ns: int,
        *,
        batch: Callable[[], AbstractContextManager[None]],
        event: Callable[..., None],
    ) -> None:
        """*stopped_ns*: until when all changes went through a node; 0: not known, no rescan.

        *batch*: marks made inside are saved together.
        """
        self._pipeline = pipeline
        self._tree = pipeline.tree
        self._stopped_ns = stopped_ns
        self._batch = batch
        self._event = event
        self.is_running = False
        self.is_over = trio.Event()
        self.files = 0
        self.marked = 0

    def status(self) -> dict[str, Any] | None:
        """How far it has come; None while it does not run."""
        if not self.is_running:
            return None
        return {"phase": "rescan", "files": self.files, "marked": self.marked}

    def _peers(self) -> list[Peer]:
        """Those for which something may be missing; a first copy takes all as it is."""
        return [peer for peer in self._pipeline.peers if peer.state is not State.UNINITIALIZED]

    async def run(self) -> None:
        """Walk once; marks go to the logs."""
        try:
            await self._run()
        finally:
            self.is_over.set()

    async def _run(self) -> None:
        if not self._stopped_ns or not self._peers():
            return
        if self._stopped_ns > time.time_ns() + MARGIN_NS:
            log.warning("the clock was set back since the last run: everything is compared")
            for peer in self._peers():
                peer.compare_all()
            return
        self.is_running = True
        began = time.monotonic()
        try:
            await self._walk(self._stopped_ns - MARGIN_NS)
        finally:
            self.is_running = False
        if self.marked:
            log.info(
                "changed behind the mount, or just before the last stop: %d of %d objects, "
                "found in %.1f s", self.marked, self.files, time.monotonic() - began,
            )  # fmt: skip
        self._event("rescan", files=self.files, marked=self.marked)

    async def _walk(self, since: int) -> None:
        tree = self._tree
        root = tree.root
        found = os.fstat(tree.root_fd)
        is_marked = max(found.st_ctime_ns, found.st_mtime_ns) >= since
        if is_marked:
            self._mark([(root, root, b"", False)])

        async def enter(directory: Inode, is_marked: bool) -> Below[bool]:  # noqa: FBT001
            return await self._directory(directory, since, is_marked=is_marked)

        await walk(tree, self._pipeline.policies, root, is_marked, enter)

    async def _directory(self, inode: Inode, since: int, *, is_marked: bool) -> Below[bool]:
        """Mark what is changed in a directory; (name, its names are marked) of those below.

        *is_marked*: all its names are, so that what is new in it need not be.
        """
        below: Below[bool] = []
        try:
            fd = os.dup(self._tree.directory_fd(inode))
        except OSError:
            return below
        try:
            with os.scandir(fd) as entries:
                while True:
                    began = time.monotonic()
                    seen, count = await trio.to_thread.run_sync(
                        _look, entries, fd, since, self._tree.device
                    )
                    self.files += count
                    self._take(inode, seen, below, is_marked=is_marked)
                    if count < _AT_ONCE:
                        return below
                    await trio.sleep(time.monotonic() - began)
        except OSError:
            return below
        finally:
            os.close(fd)

    def _take(
        self,
        directory: Inode,
        seen: list[_Seen],
        below: Below[bool],
        *,
        is_marked: bool,
    ) -> None:
        changed: list[tuple[Inode, Inode, bytes, bool]] = []
        for one in seen:
            if directory is self._tree.root and one.name == RESERVED:
                continue
            if one.is_directory:
                below.append((one.name, one.is_changed or one.is_new))
            if not (one.is_changed or one.is_new) or (one.is_new and is_marked):
                continue
            child = self._pipeline.policies.readable_child(directory, one.name)
            if child is not None:
                self._tree.hold(child)
                changed.append((child, directory, one.name, one.is_new))
        if changed:
            self._mark(changed)
            for child, *_ in changed:
                if child is not self._tree.root:
                    self._tree.release(child)

    def _mark(self, changed: list[tuple[Inode, Inode, bytes, bool]]) -> None:
        """Mark (object, directory, name, it has no record) in every log."""
        tree = self._tree
        peers = self._peers()
        with self._batch():
            for inode, directory, name, is_new in changed:
                self.marked += 1
                if is_new:
                    # Whatever is in it goes with it.
                    parent = tree.ensure_id(directory)
                    handle = locators.of(tree, directory)
                    for peer in peers:
                        peer.log.mark_name(parent, name, handle=handle)
                    continue
                object_id = tree.ensure_id(inode)
                handle = locators.of(tree, inode) if object_id != ROOT_ID else b""
                for peer in peers:
                    if inode.is_directory:
                        peer.log.mark_names_all(object_id, handle=handle)
                    elif inode.type == _stat.S_IFREG:
                        peer.log.mark_unknown(
                            object_id, directory=False, size=inode.size, handle=handle
                        )
                    else:
                        peer.log.mark_attrs(object_id, handle=handle)
        for peer in peers:
            peer.doubt("changes made behind the mount are looked at")


def _look(
    entries: Iterator[os.DirEntry[Any]], fd: int, since: int, device: int
) -> tuple[list[_Seen], int]:
    """The next entries of the directory *fd*: those worth a look, and how many there were."""
    seen: list[_Seen] = []
    count = 0
    for entry in itertools.islice(entries, _AT_ONCE):
        count += 1
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            continue
        if found.st_dev != device:
            continue
        name = os.fsencode(entry.name)
        is_directory = _stat.S_ISDIR(found.st_mode)
        is_changed = found.st_ctime_ns >= since
        is_new = not _has_record(proc_path(fd, name), found.st_ino, _stat.S_IFMT(found.st_mode))
        if is_directory or is_changed or is_new:
            seen.append(_Seen(name, is_directory, is_changed, is_new))
    return seen, count


def _has_record(path: bytes, ino: int, file_type: int) -> bool:
    if not record.can_carry(file_type):
        return True  # its ctime alone must do
    try:
        value = os.getxattr(path, record.XATTR, follow_symlinks=False)
    except OSError:
        return False
    return record.unpack(value, ino) is not None
