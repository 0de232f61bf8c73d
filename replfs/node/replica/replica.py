"""The secondary's side: applies what the primary sends to the local tree, in order, exactly.

One method per operation, in `live` (what applications do), `repair` (what a resync puts right) and
`looking` (what is only asked). Every object is addressed by id and must have been located in this
session (or placed by it, see `objects`); what is not known answers ESTALE, and the primary records
it dirty. Nothing here decides anything about replication: that is the primary's.
"""

from __future__ import annotations

import errno
import stat as _stat
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, Final

import trio

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.policy import NO_PATTERNS, NamePatterns
from replfs.core.unstable import Unstable
from replfs.node.asking.suspects import Pages
from replfs.node.pacing import flush
from replfs.node.pacing.unwritten import Unwritten
from replfs.node.replica.beside import Beside
from replfs.node.replica.later import Later, Reply
from replfs.node.replica.live import Live
from replfs.node.replica.looking import Looking
from replfs.node.replica.objects import Objects
from replfs.node.replica.own import Own
from replfs.node.replica.repair import Repair
from replfs.store.tree import Tree

_OK: Final = ops.Done(0)

_CHANGES: Final = ops.CHANGES | {ops.Gather, ops.Place, ops.Clear, ops.Data, ops.Finish}
"""What changes the store."""


class Replica:
    """Applies operations to *tree*."""

    def __init__(
        self,
        tree: Tree,
        on_phase: Callable[[ops.Phase], None],
        kept_names: NamePatterns = NO_PATTERNS,
        prepare: Callable[[], Awaitable[None]] | None = None,
        on_kept: Callable[[str], None] = lambda _: None,
        unwritten: Unwritten | None = None,
    ) -> None:
        """*on_phase* records durably that the data became inconsistent or consistent again.

        *kept_names* and *on_kept*: what is this node's own by its name, and who hears where it went
        (`Own`). *prepare* is awaited before the data becomes inconsistent.
        """
        self.tree = tree
        self.unwritten = unwritten or Unwritten()
        """What this node's disk could not write."""
        self.applied = 0
        """Operations applied since the process started."""
        self.unstable = Unstable()
        """What was applied and may not be on both disks yet."""
        self.suspects = Pages(tree, self._unstable_marks)
        """What this replica may have and its primary lack."""
        self._later = Later()
        self.own = Own(tree, kept_names, on_kept)
        """What of the store is this node's own."""
        self._objects = Objects(tree, self.own)
        self._locator = self._objects.locator
        self._live = Live(tree, self._objects, self.unstable)
        self._write = self._live.write
        self._repair = Repair(
            tree,
            self._objects,
            self.unstable,
            self._later,
            self.own,
            self.unwritten,
            on_phase,
            prepare,
        )
        self._looking = Looking(tree, self._objects, self._later, self.unwritten)
        self.handlers: dict[type, Callable[[Any], ops.AnyAnswer]] = {
            **self._live.handlers,
            **self._repair.handlers,
            **self._looking.handlers,
            ops.Suspects: self.suspects.answer,
            ops.Stable: self._stable,
        }
        self._slow: dict[type, Callable[[Any, Reply], ops.AnyAnswer | None]] = {
            **self._looking.slow,
            ops.Sync: self._flush,
            ops.Checkpoint: self._flush,
            ops.Phase: self._repair.phase,
            ops.EmptyLimbo: self._repair.empty_limbo,
        }

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve what takes long, until cancelled."""
        await self._later.run(task_status=task_status)

    def run_in(self, nursery: trio.Nursery) -> None:
        """Serve what takes long in a nursery that is there already, instead of `run`."""
        self._later.run_in(nursery)

    async def idle(self) -> None:
        """Wait until nothing that takes long is going on."""
        await self._later.idle()

    def keep_beside(self, beside: Beside | None) -> None:
        """What this store may have on its own, and the primary not, is kept there from here on."""
        self._live.beside = self._objects.beside = beside
        self._repair.keep_beside(beside)

    def spare(self, objects: Iterable[bytes]) -> None:
        """These are not removed with what no name wanted, but kept beside."""
        self._repair.spare(objects)

    def forget_all(self) -> None:
        """A new session: the primary has located nothing yet."""
        self._later.begin_session()
        self._repair.begin_session()
        self._looking.begin_session()
        self._objects.forget_all()

    def apply(
        self, stream: int, op: ops.AnyOp, payload: bytes | memoryview | None, reply: Reply
    ) -> ops.AnyAnswer | None:
        """Apply one operation now. None: the answer comes later, through *reply*."""
        self.catch_up()
        self.applied += 1
        try:
            if type(op) is ops.Write:
                return self._write(op, payload or b"")
            if type(op) is ops.Locate:
                self._objects.locate(op, 1 << stream)
                return _OK
            if type(op) is ops.Forget:
                self._objects.forget(op, 1 << stream)
                return _OK
            if type(op) is ops.Data or type(op) is ops.Finish:
                return self._repair.fill(op, payload or b"", reply)
            if type(op) is ops.PlaceMany:
                return self._repair.place_many(op, payload or b"", 1 << stream, reply)
            if type(op) is ops.Place:
                return self._repair.place(op, payload or b"", 1 << stream, reply)
            if type(op) in self._slow:
                return self._slow[type(op)](op, reply)
            answer = self.handlers[type(op)](op)
            if type(op) is ops.Make:
                self._objects.pin(op.object, 1 << stream)
            return answer
        except OSError as error:
            return ops.Done(error.errno or errno.EIO)
        finally:
            # Also where it failed: part of it may have been done.
            if type(op) in _CHANGES:
                self.unstable.note_soon(op, self._locator, length=len(payload) if payload else 0)

    def catch_up(self) -> None:
        """What was applied has been answered: do what nobody had to wait for."""
        self._live.catch_up()
        self.unstable.catch_up()

    # Barriers ----------------------------------------------------------------------------------

    def _flush(self, op: ops.Sync | ops.Checkpoint, reply: Reply) -> ops.AnyAnswer | None:
        if isinstance(op, ops.Checkpoint):
            self.unstable.begin()
            return self._later.do(self._flush_all, reply)
        inode = self._objects.known(op.object)
        if inode.is_directory:
            fd = self.tree.directory_fd(inode)
        elif inode.type == _stat.S_IFREG:
            fd = self.tree.data_fd(inode)
        else:
            return _OK
        # Now, for the caller waits: what is done later is done when nothing else comes.
        begun = flush.begin(fd, data_only=op.data_only, threads=self._later.flushes)
        return self._later.do(partial(self._flushed, begun, inode.id), reply)

    async def _flushed(self, begun: flush.Flush, object_id: bytes) -> ops.AnyAnswer:
        try:
            await begun.wait()
        except OSError as error:
            self.unwritten.failed_for(object_id, error)
            raise
        return _OK

    async def _flush_all(self) -> ops.AnyAnswer:
        await self.unwritten.flush(self.tree.root_fd, self._later.flushes)
        return _OK

    def _stable(self, op: ops.Stable) -> ops.AnyAnswer:
        self.unstable.settle(everywhere=op.everywhere)
        return _OK

    def _unstable_marks(self, everywhere: bool) -> DirtyLog | None:  # noqa: FBT001 - a callback
        return self.unstable.snapshot(everywhere=everywhere)
