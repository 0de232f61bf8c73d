"""One FUSE session: mount, serve, stop. The only module that knows pyfuse3's and libfuse's insides.

A session of root speaks with the kernel itself: it mounts /dev/fuse, answers FUSE_INIT, and its
workers read requests and answer them (`front.dispatch`). pyfuse3 and libfuse cannot ask for what
is needed (HANDLE_KILLPRIV_V2, else the kernel asks for `security.capability` before every write;
DONT_MASK, else default ACLs come out wrong), nor say of an open directory that the kernel may keep
its names, nor of a file that nobody has to be told when it is closed. With HANDLE_KILLPRIV_V2 it
is the handlers' duty to clear setuid and setgid bits; else the kernel does by a setattr.

Where that cannot be had, above all for users other than root, libfuse mounts (by fusermount3) and
pyfuse3 receives (`tuned`, `reason`). In both cases *the wait* is ours: pyfuse3's workers queue on
a lock and go through epoll for each request. Ours poll the descriptor first, spin a little while
requests keep coming (waking an idle core is the largest cost of a request), and enter epoll, one
worker of them, only when it is quiet.

What happens when:

- *A handler waits* (awaits something that is not ready): another worker takes over the
  descriptor, a new one if all are busy, up to `workers`. A handler that does not wait costs no
  task switch. Everything else in the loop runs at least once every 64 requests, and every 8
  while handlers are waiting, for what they wait for may be handled by the same loop.
- *A request is withdrawn* (its caller was killed) between poll and read: the descriptor does not
  block, so the read says EAGAIN and the worker starts over. pyfuse3 loses the worker's receive
  buffer then (1 MiB of address space, of which what was touched is memory); the window is a few
  microseconds.
- *The caller is killed later*: FUSE_INTERRUPT is ignored; the caller stays until the handler
  replies. Handlers bound their waits.
- *A handler raises* something else than FUSEError or returns a wrong type: the request is not
  answered. Nothing more is received, the other handlers finish, and `run` raises it; `unmount`
  then frees the callers with an error. So handlers must not let that happen: `front.operations`
  turns every exception into an errno.
- *Unmounted from outside* (ENODEV), or aborted through /sys/fs/fuse/connections (ECONNABORTED):
  handlers finish, their replies go nowhere, `run` returns. `unmount` takes an aborted mount off
  its mountpoint; with libfuse's own mount it cannot be told from an unmounted one, and stays.
- *stop*: nothing more is received, handlers in flight finish and reply, `run` returns. Requests
  that were not received stay in the kernel, unacknowledged, until `unmount` ends them with an
  error. For a stop that fails nobody, `detach` first (in a thread) and go on serving: no new
  caller gets in, and `run` ends by itself when the last open file is closed.
- *run is cancelled*: waiting workers end; handlers get Cancelled at their next checkpoint and
  their requests are never answered, so callers see an error after `unmount`, and what they asked
  may or may not have been done. A stop with a deadline is `stop`, then cancel.

pyfuse3 has one session per process, and so have we: a second one mounted at the same time is
refused; one after another is fine, except that `pyfuse3.invalidate_entry_async` ends for good with
the first session served by the stock loop.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import os
import select
import threading
import time
import types
from collections import deque
from typing import TYPE_CHECKING, Any, Final, cast

import pyfuse3
import trio

from replfs.errors import UsageError
from replfs.front import mountinfo, mounting, protocol
from replfs.front.chores import Chores
from replfs.front.dispatch import Dispatcher
from replfs.front.mounting import MountOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator, Sequence

__all__ = ["FuseSession", "MountOptions", "Tuning"]

TUNING_VARIABLE: Final = "REPLFS_FUSE_TUNING"
"""Environment variable that overrides `FuseSession`'s *tuning*: all, loop or none."""

_KNOWN_VERSIONS: Final = ("3.5.",)
_INIT_TIMEOUT_S: Final = 10.0
_UNMOUNT_TIMEOUT_S: Final = 5.0

_TURN: Final = 64
"""Requests handled before the rest of the event loop gets a turn."""
_TURN_WHILE_WAITING: Final = 8
"""The same while handlers wait."""
_HOT: Final = 2
"""Requests in quick succession after which spinning starts."""
_HOTTEST: Final = 16

_RECEIVE: Final = "fuse_session_receive_buf"
"""How pyfuse3 begins to say that it could not receive."""

_NEVER_END: Final = 1 << 30
_NEVER_START: Final = -(1 << 31)
"""min_tasks and max_tasks with which pyfuse3's loop neither ends nor starts workers."""

_active: FuseSession | None = None


class Tuning(enum.StrEnum):
    """How much is done differently from pyfuse3."""

    ALL = "all"
    """The kernel is spoken with directly."""
    LOOP = "loop"
    """Our wait, but libfuse mounts: the fall-back for users other than root."""
    NONE = "none"
    """pyfuse3 as it is."""


_ASKED_FOR: Final = {
    Tuning.LOOP: "libfuse's own mount was asked for",
    Tuning.NONE: "the stock loop was asked for",
}


class _State(enum.Enum):
    NEW = enum.auto()
    MOUNTED = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()
    CLOSED = enum.auto()


class _Unusable(Exception):
    """The self-test's verdict: why a tuning cannot be had here."""


def _always() -> bool:
    return True


class FuseSession:
    """A mount and the workers that serve it.

    Args:
        operations: the handlers. Its `enable_writeback_cache` and `enable_acl` are set from
            *options*; `init()` may be called in another thread.
        mountpoint: an existing directory.
        options: see `MountOptions`.
        chores: work that is put off; done when no request has come for a while.
        may_spin: asked before each spin; False while somebody else needs the core or the loop.
        spin_ns: nanoseconds to spin for the next request after a reply; 0 disables it.
        workers: handlers at work at the same time, 1 to 1000. Each keeps a 1 MiB receive buffer.
        tuning: what to try; less is taken if it cannot be had.
    """

    tuned: bool
    """After `mount`: everything in the module's head is in effect."""
    reason: str
    """After `mount`: if not tuned, why, in one sentence; else empty."""

    def __init__(
        self,
        operations: pyfuse3.Operations,
        mountpoint: str,
        options: MountOptions,
        *,
        chores: Chores | None = None,
        may_spin: Callable[[], bool] = _always,
        spin_ns: int = 60_000,
        workers: int = 32,
        tuning: Tuning = Tuning.ALL,
    ) -> None:
        self.tuned = False
        self.reason = ""
        self._operations = operations
        self._mountpoint = os.path.abspath(mountpoint)
        self._options = options
        try:
            self._tuning = Tuning(os.environ.get(TUNING_VARIABLE) or tuning)
        except ValueError as error:
            raise UsageError(f"{TUNING_VARIABLE} must be all, loop or none") from error
        self._state = _State.NEW
        self._device = ""
        self._fd = -1
        self._dispatcher: Dispatcher | None = None
        self._our_wait = False
        self._workers_max = workers
        self._workers = 0
        self._nursery: trio.Nursery | None = None
        self._failure: BaseException | None = None
        # The wait. All of it is touched by the event loop's thread only.
        self._poll: Callable[[int], object] = lambda _timeout: []
        self._chores = Chores() if chores is None else chores
        self._may_spin = may_spin
        self._spin_ns = spin_ns
        self._quick_ns = 2 * spin_ns
        self._closing = False
        self._parked: deque[trio.lowlevel.Task] = deque()
        self._watched = False
        self._waiting = False
        self._suspended = 0
        self._turn = _TURN
        self._heat = 0
        self._received = 0
        self._withdrawn = 0
        self._spun = 0
        self._spin_hits = 0
        self._slept = 0

    # ------------------------------------------------------------------- what it is

    @property
    def fd(self) -> int:
        """Number of the /dev/fuse descriptor; -1 unless mounted. Poll it; never read it."""
        return self._fd

    @property
    def in_flight(self) -> int:
        """Handlers that are waiting for something. Always 0 on pyfuse3's own loop."""
        return self._suspended

    def statistics(self) -> dict[str, int]:
        """Counters since `mount`; all 0 on pyfuse3's own loop."""
        return {
            "received": self._received,
            "withdrawn": self._withdrawn,
            "spun": self._spun,
            "spin_hits": self._spin_hits,
            "slept": self._slept,
            "workers": self._workers,
            "in_flight": self._suspended,
        }

    # ------------------------------------------------------------------- mount

    def mount(self) -> None:
        """Mount. From now on the kernel takes calls; they wait until `run`.

        Blocks for some milliseconds; may be called inside or outside an event loop.

        Raises:
            UsageError: the mountpoint, or another session of this process, stands in the way.
            OSError: the kernel or fusermount3 refused.
        """
        global _active  # noqa: PLW0603 - pyfuse3 has one session per process, and so do we
        if self._state is not _State.NEW:
            raise RuntimeError("a session is mounted once")
        if _active is not None:
            raise UsageError("this process has a FUSE mount already: one process, one mount")
        path = mounting.check_mountpoint(self._mountpoint)
        self._mountpoint = path
        self._operations.enable_writeback_cache = self._options.writeback
        self._operations.enable_acl = self._options.acl
        _active = self
        try:
            self._mount_as_tuned_as_possible()
        except BaseException:
            _active = None
            raise
        # mountinfo, not stat: the mount does not answer yet, and never to ourselves.
        mount = mountinfo.find_mount(path)
        self._device = mount.device if mount is not None else ""
        self._state = _State.MOUNTED

    def _mount_as_tuned_as_possible(self) -> None:
        reasons = []
        if self._tuning is Tuning.ALL:
            try:
                self._mount_directly()
                self._our_wait = True
            except _Unusable as why:
                reasons.append(str(why))
        else:
            reasons.append(_ASKED_FOR[self._tuning])
        if self._dispatcher is None:
            if self._tuning is not Tuning.NONE:
                try:
                    _check_names()
                    self._our_wait = True
                except _Unusable as why:
                    reasons.append(str(why))
            self._mount_by_libfuse()
        if self._fd < 0 and self._our_wait:
            self._our_wait = False
            reasons.append("libfuse's descriptor was not found")
        if self._our_wait:
            # Relies on: fuse_session_receive_buf blocks in read(2) unless the descriptor is
            # non-blocking; poll said "readable" of a request that may since be withdrawn.
            os.set_blocking(self._fd, False)
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            self._poll = poll.poll
        self.tuned = self._dispatcher is not None
        self.reason = "; ".join(reasons)

    def _mount_by_libfuse(self) -> None:
        before = mounting.fuse_descriptors()
        if not _init_pyfuse3(
            self._operations, self._mountpoint, mounting.libfuse_options(self._options)
        ):
            raise OSError(
                errno.EPERM,
                f"cannot mount on {self._mountpoint}: libfuse said why on standard error",
            )
        opened = sorted(mounting.fuse_descriptors() - before)
        self._fd = opened[0] if len(opened) == 1 else -1

    def _mount_directly(self) -> None:
        """mount(2), and answer FUSE_INIT.

        Raises:
            _Unusable: nothing is mounted and nothing left over; libfuse's way may still work.
            OSError: libfuse's way would fail just so.
        """
        with contextlib.ExitStack() as undo:
            try:
                device, request = mounting.mount_up_to_init(self._mountpoint, self._options)
            except mounting.InitError as error:
                raise _Unusable(str(error)) from error
            undo.callback(os.close, device)
            undo.callback(mounting.unmount_quietly, self._mountpoint)
            try:
                os.write(device, self._init_reply(request))
            except OSError as error:
                raise _Unusable(f"FUSE_INIT failed: {error}") from error
            undo.pop_all()
        mounting.keep_freed_memory()
        self._operations.init()
        self._fd = device
        self._dispatcher = Dispatcher(self._operations, device)

    def _init_reply(self, request: bytes) -> bytes:
        options = self._options
        wanted = protocol.ALWAYS
        if not options.exclusive:
            wanted |= protocol.AUTO_INVAL_DATA
        if options.writeback:
            wanted |= protocol.WRITEBACK_CACHE
        if options.acl:
            wanted |= protocol.POSIX_ACL
        if self._operations.supports_dot_lookup:
            wanted |= protocol.EXPORT_SUPPORT
        return protocol.init_reply(request, wanted, options.max_background)

    # ------------------------------------------------------------------- serve

    async def run(self) -> None:
        """Serve until unmounted, aborted or stopped. Once per session.

        Raises:
            Exception: what a handler let escape (see the module's head); from pyfuse3's own
                loop, in an ExceptionGroup.

        Cancellation: handlers in flight are cancelled, their requests never answered.
        Checkpoints: always.
        """
        if self._state is not _State.MOUNTED:
            raise RuntimeError("only a mounted session can run, and only once")
        self._state = _State.RUNNING
        try:
            if self._closing:
                await trio.lowlevel.checkpoint()
            elif self._our_wait:
                await self._run_our_wait()
            else:
                await pyfuse3.main(min_tasks=self._workers_max, max_tasks=self._workers_max)
        finally:
            self._state = _State.ENDED

    def stop(self) -> None:
        """Receive nothing more; let handlers in flight finish. `run` then returns.

        Call it in the event loop's thread. Idempotent, and allowed before `run`.
        """
        if self._closing:
            return
        self._closing = True
        if self._state is not _State.RUNNING:
            return
        if self._our_wait:
            self._wake_all()
        else:
            pyfuse3.terminate()

    async def _run_our_wait(self) -> None:
        insides: Any = pyfuse3
        pyfuse3_wait = getattr(insides, "_wait_fuse_readable", None)
        insides._wait_fuse_readable = self._wait  # noqa: SLF001
        self._chores.begin()
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._start_worker()
        finally:
            self._nursery = None
            self._parked.clear()
            self._chores.end()
            insides._wait_fuse_readable = pyfuse3_wait  # noqa: SLF001
        if self._failure is not None:
            raise self._failure

    def _start_worker(self) -> None:
        if self._nursery is None:
            raise RuntimeError("not running")
        self._workers += 1
        self._nursery.start_soon(self._worker, name=f"fuse-{self._workers:02}")

    async def _worker(self) -> None:
        """Serve; started over when it stumbles on a withdrawn request."""
        while not self._closing:
            try:
                await self._drive(self._loop())
            except OSError as error:
                verdict = _receive_error(error)
                if verdict == errno.EAGAIN:
                    self._withdrawn += 1
                    continue
                if verdict not in {errno.ENODEV, errno.ECONNABORTED}:
                    self._failure = self._failure or error
            except Exception as error:  # noqa: BLE001 - raised by run(), when the others are done
                self._failure = self._failure or error
            # The loop ended: by stop(), or because the kernel said that the mount is gone.
            self._closing = True
            self._wake_all()

    def _loop(self) -> Coroutine[Any, Any, None]:
        """Receive and answer, until there is nothing more: ours, or pyfuse3's."""
        if self._dispatcher is not None:
            return self._serve(self._dispatcher)
        insides: Any = pyfuse3
        loop: Coroutine[Any, Any, None]
        loop = insides._session_loop(None, _NEVER_END, _NEVER_START)  # noqa: SLF001
        return loop

    async def _serve(self, dispatcher: Dispatcher) -> None:
        fd = self._fd
        answer = dispatcher.answer
        space = memoryview(bytearray(protocol.RECEIVE_BYTES))
        spaces = (space,)
        while await self._wait():
            try:
                request = bytes(space[: os.readv(fd, spaces)])
            except OSError as error:
                # ENOENT: it was withdrawn while it was being read.
                number = errno.EAGAIN if error.errno == errno.ENOENT else error.errno
                raise OSError(number, f"{_RECEIVE} failed") from error
            waiting = answer(request)
            if waiting is not None:
                await waiting

    @types.coroutine
    def _drive(self, loop: Coroutine[Any, Any, None]) -> Generator[Any, Any, None]:
        """Await *loop*, and see each time it is suspended: by our wait, or by a handler."""
        step: Callable[[Any], Any] = loop.send
        argument: Any = None
        while True:
            try:
                trap = step(argument)
            except StopIteration:
                return
            in_handler = not self._waiting
            self._waiting = False
            if in_handler:
                self._suspended += 1
                if not self._watched and not self._closing:
                    self._hand_over()
            try:
                argument = yield trap
                step = loop.send
            except BaseException as error:  # noqa: BLE001 - handed on
                argument = error
                step = loop.throw
            if in_handler:
                self._suspended -= 1
            self._turn = _TURN

    def _hand_over(self) -> None:
        """The worker at the descriptor is about to be suspended in a handler: send another."""
        if self._parked:
            trio.lowlevel.reschedule(self._parked.pop())
        elif self._workers < self._workers_max:
            self._start_worker()
        # Else all are in handlers, and the first to finish finds nobody watching.

    def _wake_all(self) -> None:
        for task in self._parked:
            trio.lowlevel.reschedule(task)
        self._parked.clear()
        if self._fd >= 0:
            trio.lowlevel.notify_closing(self._fd)

    async def _wait(self) -> bool:
        """Return True when a request is (very probably) there, False when the worker should end.

        Each suspension is announced to `_drive` by `_waiting`.
        """
        self._turn -= 1
        if self._turn <= (_TURN - _TURN_WHILE_WAITING if self._suspended else 0):
            self._chores.finish()
            self._waiting = True
            await trio.lowlevel.checkpoint()
        while not self._closing:
            if self._poll(0):
                self._received += 1
                return True
            if self._heat >= _HOT and not self._suspended and self._may_spin() and self._spin():
                self._received += 1
                return True
            if self._do_chores():
                self._received += 1
                return True
            if self._watched:
                await self._park()
                continue
            quiet_since = time.monotonic_ns()
            self._slept += 1
            self._watched = True
            self._waiting = True
            try:
                await trio.lowlevel.wait_readable(self._fd)
            except trio.ClosedResourceError:
                return False
            finally:
                self._watched = False
            if time.monotonic_ns() - quiet_since > self._quick_ns:
                self._heat = 0
            elif self._heat < _HOTTEST:
                self._heat += 1
        return False

    def _do_chores(self) -> bool:
        """Before sleeping: all that was put off. True where a request comes first."""
        while self._chores.do_one():
            if self._poll(0):
                return True
        return False

    def _spin(self) -> bool:
        """Poll until a request comes or the time is up.

        It yields between looks: the caller, or a peer on this machine, may need the core. With
        two cores, 4 KiB writes with a peer beside it are 1.4 times as fast as without.
        """
        self._spun += 1
        poll = self._poll
        now = time.monotonic_ns
        relax = os.sched_yield
        end = now() + self._spin_ns
        while now() < end:
            relax()
            if poll(0):
                self._spin_hits += 1
                if self._heat < _HOTTEST:
                    self._heat += 1
                return True
        self._heat >>= 1
        return False

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()

        def leave(_raise_cancel: object) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        self._parked.append(task)
        self._waiting = True
        await trio.lowlevel.wait_task_rescheduled(leave)

    # ------------------------------------------------------------------- other roles

    def remount(self, read_only: bool) -> None:  # noqa: FBT001 - called in a thread
        """Make the mount read-only or read-write. To be called in a thread, while `run` serves.

        Raises:
            OSError: EBUSY while files are open for writing; ENOENT if it is not there any more,
                or something else is mounted over it.
        """
        mount = mountinfo.find_mount(self._mountpoint)
        if mount is None or mount.device != self._device:
            raise OSError(errno.ENOENT, f"{self._mountpoint} is not our mount any more")
        mounting.remount(mount, read_only=read_only)

    def forget(self, known: Sequence[tuple[int, Sequence[tuple[int, bytes]]]]) -> None:
        """The kernel asks again for these inodes, by node id, and their (parent, name)s.

        To be called in a thread, while `run` serves: it waits for requests on the same objects.
        """
        for nodeid, names in known:
            for parent, name in names:
                with contextlib.suppress(OSError):
                    self.invalidate_entry(parent, name)
            with contextlib.suppress(OSError):
                self.invalidate_inode(nodeid, attr_only=False)

    def invalidate_inode(self, nodeid: int, *, attr_only: bool) -> None:
        """The kernel asks again for attributes, and unless *attr_only* for contents, too.

        Where it is for contents, to be called in a thread.

        Raises:
            OSError: ENOENT, the kernel does not know it.
        """
        if self._dispatcher is not None:
            os.write(self._fd, protocol.invalidate_inode(nodeid, attr_only=attr_only))
        else:
            pyfuse3.invalidate_inode(cast(Any, nodeid), attr_only=attr_only)

    def invalidate_entry(self, parent: int, name: bytes) -> None:
        """The kernel asks again for a name. To be called in a thread.

        Raises:
            OSError: ENOENT, the kernel does not know it.
        """
        if self._dispatcher is not None:
            os.write(self._fd, protocol.invalidate_entry(parent, name))
        else:
            pyfuse3.invalidate_entry(cast(Any, parent), cast(Any, name))

    # ------------------------------------------------------------------- unmount

    def detach(self) -> None:
        """Take the mount off its mountpoint; open files go on being served until closed.

        Blocks, possibly until the kernel has written dirty pages through this session: in a
        running event loop call it in a thread. Does nothing if somebody else was faster, or has
        mounted something else over it.
        """
        if self._device and self._fd >= 0 and not mounting.is_unmounted(self._fd):
            mount = mountinfo.find_mount(self._mountpoint)
            if mount is not None and mount.device == self._device:
                mounting.unmount_lazily(self._mountpoint)

    def unmount(self) -> None:
        """Unmount, fail what is still waiting in the kernel, and free everything. Idempotent.

        Raises:
            RuntimeError: `run` has not returned; its workers would use freed memory.
        """
        global _active  # noqa: PLW0603
        if self._state is _State.RUNNING:
            raise RuntimeError("stop(), and let run() return, before unmount()")
        if self._state in {_State.NEW, _State.CLOSED}:
            return
        self._state = _State.CLOSED
        by_libfuse = self._dispatcher is None and os.geteuid() != 0
        if not by_libfuse:
            # In a thread, and not waited for beyond reason: the last user of the mount may be
            # this very call, which then waits for dirty pages to be taken, and nobody serves any
            # more. Closing the descriptor fails them, and the thread ends.
            thread = threading.Thread(target=self._detach_quietly, name="unmount", daemon=True)
            thread.start()
            thread.join(_UNMOUNT_TIMEOUT_S)
        fd, self._fd = self._fd, -1
        if self._dispatcher is not None:
            os.close(fd)
        else:
            pyfuse3.close(unmount=by_libfuse)
        _active = None

    def _detach_quietly(self) -> None:
        with contextlib.suppress(OSError):
            self.detach()


# --------------------------------------------------------------------------- self-test and helpers


def _check_names() -> None:
    version = str(pyfuse3.__version__)
    if not version.startswith(_KNOWN_VERSIONS):
        raise _Unusable(f"pyfuse3 {version} is not one whose insides are known")
    for name in ("_wait_fuse_readable", "_session_loop"):
        if not callable(getattr(pyfuse3, name, None)):
            raise _Unusable(f"pyfuse3 {version} has no {name}")


def _init_pyfuse3(operations: pyfuse3.Operations, path: str, options: set[str]) -> bool:
    """pyfuse3.init; False, and nothing left over, if libfuse refused."""
    try:
        pyfuse3.init(operations, path, options)
    except RuntimeError as error:
        # If there is no session at all, close() would crash in C.
        if "fuse_session_new" not in str(error):
            pyfuse3.close(unmount=False)
        return False
    return True


def _receive_error(error: OSError) -> int:
    """The errno, if *error* is pyfuse3's own failed receive and not a handler's; else 0."""
    text = error.args[1] if len(error.args) > 1 else ""
    if isinstance(text, str) and text.startswith(_RECEIVE):
        return error.errno or 0
    return 0
