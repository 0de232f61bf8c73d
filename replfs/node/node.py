"""One node: what runs where, in which order it starts and stops.

`mount` and `agent` start the same program; the role stands in STORE, and may change while it runs
(`node.roles.roles`). A primary has a volume, a read-write mount and links to its peers; a secondary
follows the primary that its listener let in, and has a read-only mount if asked. The control socket
is served by a thread of its own, so that a hung event loop is seen from outside.

Start: descriptor of STORE, state (which locks it), tree, role, peers, mount, control, ready.
Stop: no new callers, what is in flight drains, a checkpoint on both sides, the state is clean.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import os
import resource
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, Final

import trio
import zmq

from replfs.errors import NotInSync, ReplfsError, StoreError, UsageError
from replfs.front import mounting
from replfs.node.asking.probe import probe
from replfs.node.failover.promotion import Promotion
from replfs.node.failover.splitbrain import SplitBrain
from replfs.node.failover.switchover import Switchover
from replfs.node.mounted.frontend import FrontEnd
from replfs.node.operating import service
from replfs.node.operating.control import ControlServer
from replfs.node.operating.ending import DRAIN_S, Ending, EndOfPrimary, EndOfSecondary
from replfs.node.operating.events import Events
from replfs.node.operating.hook import Hook, check_program
from replfs.node.operating.metrics import render
from replfs.node.operating.scrape import Scrape
from replfs.node.operating.status import StatusBoard
from replfs.node.recovery.fetch import Fetch, link_maker
from replfs.node.roles.primary import Primary, configured
from replfs.node.roles.roles import Roles
from replfs.node.roles.secondary import Secondary
from replfs.node.settings.config import Settings
from replfs.node.settings.rundir import default_rundir, make_rundir
from replfs.store import cached
from replfs.store.permitted import WITHOUT_ROOT, check_owner
from replfs.store.record import PRIVILEGED
from replfs.store.state import State
from replfs.store.tree import Tree
from replfs.transport.security import AllowList, Curve, load_keypair, require_curve

log = logging.getLogger(__name__)

_HEARTBEAT_S: Final = 0.25
_GENERATION_SIZE: Final = 16

Ready = Callable[[str], None]


def run(settings: Settings, ready: Ready) -> int:
    """Be a node until it is stopped; the exit code.

    *ready* is called once, with the endpoint that is listened on (or an empty text), when the
    mount is usable and the listener listens.

    Raises:
        ReplfsError, OSError: it could not start; one sentence.
    """
    _raise_limits()
    node = Node(settings, ready)
    try:
        trio.run(node.main, restrict_keyboard_interrupt_to_checkpoints=True)
    except BaseExceptionGroup as group:
        # What nurseries wrap: the first sentence a person can do something about.
        for error in _leaves(group):
            if isinstance(error, ReplfsError | OSError):
                raise error from None
        raise
    return node.exit_code


def _leaves(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    for error in group.exceptions:
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error


def _raise_limits() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class Node:
    """The process."""

    def __init__(self, settings: Settings, ready: Ready) -> None:
        self.settings = settings
        self.exit_code = 0
        self._ready = ready
        self._ending = Ending()
        self._failure: ReplfsError | None = None
        self._beat = time.monotonic_ns()
        self._began = time.time()
        self.events = Events()
        self.listening = ""
        self.metrics = ""
        self._roles: Roles | None = None

    @property
    def roles(self) -> Roles:
        """The role it has, and how it takes the other."""
        if self._roles is None:
            raise RuntimeError("the node was not started")
        return self._roles

    @property
    def primary(self) -> Primary | None:
        """What the node has while it is a primary."""
        return self.roles.primary

    @property
    def secondary(self) -> Secondary | None:
        """What the node has while it is a secondary."""
        return self.roles.secondary

    @property
    def front(self) -> FrontEnd | None:
        """The mount, while there is one."""
        front = self.roles.front
        return None if front is None or front.over.is_set() else front

    # Start and stop ----------------------------------------------------------------------------

    async def main(self) -> None:
        """Start, serve, stop."""
        settings = self.settings
        with contextlib.ExitStack() as cleanup:
            # What is refused for these leaves a new store what it was: a directory.
            curve = self._security()
            if settings.hook is not None:
                check_program(settings.hook)
            rundir = make_rundir(settings.rundir or default_rundir())
            store_fd = self._open_store(cleanup)
            self.state = State(store_fd)
            cleanup.callback(self._close_state)
            self._take_role()
            self.tree = Tree(store_fd)
            cleanup.callback(self.tree.close_all)
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            cleanup.callback(context.destroy, 0)
            for warning in mounting.become_io_flusher():
                log.info("%s", warning)
            if settings.hook is not None:
                hook = Hook(settings.hook, self._facts())
                cleanup.callback(hook.close)
                self.events.listener = hook.tell
            self._roles = Roles(
                settings,
                self.state,
                self.tree,
                context,
                curve,
                rundir,
                event=self.events.add,
                status=self._status,
                fail=self._fail,
                on_unmounted=self._unmounted,
            )
            cleanup.callback(lambda: self.roles.close(clean=self._ending.is_clean))
            if self.state.identity().disk_failed:
                # What is to be compared is what it has, not what it should have.
                await trio.to_thread.run_sync(cached.forget_all, store_fd)
            await self._fetch(context, curve)
            self.roles.build()
            self.board = StatusBoard(self)
            scrape = None
            if settings.metrics is not None:
                scrape = Scrape(settings.metrics, lambda: render([control.status()]))
                cleanup.callback(scrape.close)
                self.metrics = scrape.address
            self.state.started()
            control = ControlServer(
                rundir,
                settings.store,
                settings.mountpoint,
                snapshot=self.board.snapshot,
                commands=self._commands(),
                beat=lambda: self._beat,
                scrape=scrape,
            )
            self.roles.on_mounting = control.also
            await self._serve(control)
        if self._failure is not None:
            raise self._failure

    async def _fetch(self, context: zmq.Context[zmq.Socket[bytes]], curve: Curve | None) -> None:
        """A primary that lost power has its peers' memory before it does anything else."""
        if self.state.identity().role != "primary" or not self.state.memory_lost:
            return
        fetch = Fetch(
            self.settings,
            self.state,
            self.tree,
            configured(self.settings, self.state, curve),
            link_maker(context, self.settings, curve),
            partial(probe, self.roles),
            event=self.events.add,
        )
        self.roles.fetched = await fetch.run()
        if fetch.winner is not None:
            self.roles.be_fenced(fetch.winner)

    def _facts(self) -> dict[str, str]:
        """What a hook is told of the node."""
        return {
            "REPLFS_NAME": self.settings.name,
            "REPLFS_STORE": self.settings.store,
            "REPLFS_MOUNTPOINT": self.settings.mountpoint or "",
            "REPLFS_ROLE": self.state.identity().role,
        }

    def _open_store(self, cleanup: contextlib.ExitStack) -> int:
        store_fd = os.open(self.settings.store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        cleanup.callback(os.close, store_fd)
        check_owner(self.settings.store, store_fd)
        if not PRIVILEGED:
            log.warning("%s", WITHOUT_ROOT)
        return store_fd

    def _close_state(self) -> None:
        front = self._roles.front if self._roles is not None else None
        self.state.close(covered=front is not None and front.is_covering)

    def _take_role(self) -> None:
        """A new store takes its role from the command; an older one keeps its own."""
        settings = self.settings
        identity = self.state.identity()
        if not self.state.is_in_place():
            raise StoreError(
                f"{settings.store} is a copy of a store, or was moved: say which with "
                f"'replfs adopt {settings.store} --move' or '--new'"
            )
        wanted = "primary" if settings.command == "mount" else "secondary"
        if identity.role == "unset":
            changes: dict[str, Any] = {"role": wanted, "name": settings.name}
            if wanted == "primary":
                changes |= {
                    "volume": os.urandom(_GENERATION_SIZE),
                    "generation": os.urandom(_GENERATION_SIZE),
                    "uninitialized": False,
                }
            identity = self.state.update(**changes)
        elif identity.role != wanted and not identity.role_changed:
            if identity.role == "secondary":
                raise UsageError(
                    f"{settings.store} is a secondary: serve it with 'replfs agent' and mount its "
                    "replica read-only with --mount, or make it the primary with 'replfs promote'"
                )
            raise UsageError(f"{settings.store} is a primary: mount it with 'replfs mount'")
        elif identity.name != settings.name:
            self.state.update(name=settings.name)
        if identity.role == "secondary" and settings.listen is None and identity.role_changed:
            raise UsageError(
                f"{settings.store} is a secondary now, since another store is the primary: start "
                "it with --listen, so that it can follow"
            )

    def _security(self) -> Curve | None:
        settings = self.settings
        curve = None
        if settings.key_file is not None:
            if settings.peer_keys is None:
                raise UsageError("key-file needs peer-keys: the file that names allowed peers")
            curve = Curve(
                load_keypair(settings.key_file), AllowList(settings.peer_keys), settings.key_file
            )
        endpoints = [peer.endpoint for peer in settings.peers]
        if settings.listen:
            endpoints.append(settings.listen)
        for endpoint in endpoints:
            require_curve(endpoint, settings.insecure, curve)
            if curve is None and settings.insecure:
                log.warning("%s is neither encrypted nor authenticated (insecure)", endpoint)
        return curve

    async def _serve(self, control: ControlServer) -> None:
        try:
            async with trio.open_nursery() as nursery:
                await self._start(nursery, control)
                await self._ending.wanted.wait()
                with trio.CancelScope(shield=True):
                    await self._end()
                nursery.cancel_scope.cancel()
        finally:
            if self.roles.front is not None:
                self.roles.front.unmount()
            self._ending.note(self._stopped_cleanly)
            with trio.CancelScope(shield=True):
                await self._ending.tell()
            control.stop()

    def _stopped_cleanly(self) -> None:
        self.roles.keep_unstable()
        self.state.stopped_cleanly(self.roles.progress)

    async def _start(self, nursery: trio.Nursery, control: ControlServer) -> None:
        nursery.start_soon(self._watch_signals)
        nursery.start_soon(self._heartbeat)
        nursery.start_soon(self._checkpoints)
        self.listening = await self.roles.start(nursery)
        if self._failure is not None:
            raise self._failure
        if self.settings.mountpoint is not None:
            # Only now: what another node's promotion made of this one is known.
            self.roles.mount(self.settings.mountpoint)
        control.start(trio.lowlevel.current_trio_token())
        gc.collect()
        gc.freeze()
        self._ready(self.listening)

    def _fail(self, error: ReplfsError) -> None:
        """End the node for a reason that whoever started it shall see."""
        log.error("%s", error)
        self._failure = error
        self._ending.wanted.set()

    def _unmounted(self) -> None:
        # A plain umount(8) ends a primary, which has nothing else to do.
        if self.primary is not None:
            self._ending.wanted.set()

    async def _watch_signals(self) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as received:
            async for number in received:
                if number != signal.SIGHUP:
                    log.info("stopping (signal %d)", number)
                    self._ending.wanted.set()

    async def _heartbeat(self) -> None:
        while True:
            self._beat = time.monotonic_ns()
            await trio.sleep(_HEARTBEAT_S)

    async def _checkpoints(self) -> None:
        """At times: save lazily kept clears, keep room for marks on a full disk."""
        while True:
            await trio.sleep(self.settings.checkpoint_interval_s)
            try:
                self.state.flush()
                self.state.reserve_space()
            except OSError as error:
                log.warning("the state cannot be saved: %s", error.strerror)

    async def _end(self) -> None:
        """Nobody new; what is in flight drains; both sides flush; the state is clean."""
        began = time.monotonic()
        service.notify("STOPPING=1")
        self.events.listener = None  # that peers are lost now is no news
        if self.primary is not None:
            self.primary.pipeline.release_suspended()
            self.primary.verifier.stop()
        front = self.front
        if front is not None and front.session is not None:
            await trio.to_thread.run_sync(front.session.detach)
            with trio.move_on_after(min(5.0, self._ending.drain_s)):
                await front.over.wait()
            if not front.over.is_set():
                front.session.stop()
                patience = 2 * self.settings.peer_timeout_s
                with trio.move_on_after(min(patience, self._ending.drain_s)):
                    await front.over.wait()
        if self.primary is not None:
            await self._ending.drain(EndOfPrimary(self.primary), began)
        else:
            flush = partial(self.roles.unwritten.flush, self.tree.root_fd)
            await self._ending.drain(EndOfSecondary(flush), began)
        if not self._ending.is_clean:
            self.exit_code = NotInSync.exit_code

    def _status(self) -> dict[str, Any]:
        return self.board.snapshot()

    # Commands ----------------------------------------------------------------------------------

    def _commands(
        self,
    ) -> dict[str, Callable[[dict[str, Any]], Awaitable[dict[str, Any]] | dict[str, Any]]]:
        return {
            "umount": self._command_umount,
            "stop": self._command_stop,
            "sync": self._command_sync,
            "pause": self._command_pause,
            "resume": self._command_resume,
            "resync": self._command_resync,
            "verify": self._command_verify,
            "peer-add": self._command_peer_add,
            "peer-remove": self._command_peer_remove,
            "peer-replace": self._command_peer_replace,
            "freeze": self._command_freeze,
            "thaw": self._command_thaw,
            "promote": Promotion(self.roles).command,
            "switchover": Switchover(self.roles).command,
            "split-brain": SplitBrain(self.roles).command,
            "events": self.events.answer,
        }

    async def _command_umount(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Unmount where nobody is using it; a primary then ends, a secondary goes on."""
        front = self.front
        if front is None:
            raise UsageError("nothing is mounted by this node")
        mountpoint = front.mountpoint
        lazy = bool(arguments.get("lazy"))
        # The session is over, and a primary ends, while the kernel is still at it: it forgets each
        # inode that it knew before umount(2) returns.
        with self._ending.asking():
            try:
                await trio.to_thread.run_sync(_unmount, mountpoint, lazy)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    raise UsageError(
                        f"{mountpoint} is in use: close what is open there, or use --lazy"
                    ) from None
                raise
            drain_s = float(arguments.get("timeout_s", DRAIN_S))
            with trio.move_on_after(drain_s):
                await front.over.wait()
            if self.primary is not None:
                return await self._ending.ask(drain_s)
        return {"stopping": False, "message": f"{mountpoint} is unmounted, the node goes on"}

    async def _command_stop(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """End the node: drain, checkpoint, exit."""
        return await self._ending.ask(float(arguments.get("timeout_s", DRAIN_S)))

    def _must_be_secondary(self) -> Secondary:
        if self.secondary is None:
            raise UsageError(
                "this node is a primary: freeze one of its replicas, where nobody waits for it"
            )
        return self.secondary

    async def _command_freeze(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._must_be_secondary().freezer.freeze(arguments)

    def _command_thaw(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return self._must_be_secondary().freezer.thaw(arguments)

    def _must_be_primary(self) -> Primary:
        if self.primary is None:
            raise UsageError("this node is a secondary: ask its primary")
        return self.primary

    async def _command_sync(self, _arguments: dict[str, Any]) -> dict[str, Any]:
        """Everything acknowledged is on stable storage on both sides."""
        await self._must_be_primary().checkpoint()
        return {"message": "stable on this node and on every peer that is in sync"}

    def _peers(self, arguments: dict[str, Any]) -> list[Any]:
        peers = self._must_be_primary().pipeline.peers
        name = arguments.get("peer")
        chosen = [peer for peer in peers if not name or peer.name == name]
        if not chosen:
            raise UsageError(f"there is no peer named {name}" if name else "there are no peers")
        return chosen

    def _command_pause(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Nothing is sent until `resume`; changes are recorded."""
        peers = self._peers(arguments)
        for peer in peers:
            peer.pause(str(arguments.get("reason") or "by an operator"))
        return {"message": f"paused: {', '.join(peer.name for peer in peers)}"}

    def _command_resume(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Go on: what was recorded is carried; strict changes wait no longer."""
        peers = self._peers(arguments)
        self._must_be_primary().pipeline.release_suspended()
        for peer in peers:
            peer.resume()
        return {"message": f"resumed: {', '.join(peer.name for peer in peers)}"}

    async def _command_verify(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._must_be_primary().verifier.command(arguments)

    async def _command_peer_add(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._must_be_primary().command_add(arguments)

    async def _command_peer_remove(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._must_be_primary().command_remove(arguments)

    async def _command_peer_replace(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return await self._must_be_primary().command_replace(arguments)

    async def _command_resync(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Compare everything again; `tentative`: only say what would be done."""
        peers = self._peers(arguments)
        if arguments.get("tentative"):
            lines = [
                f"{peer.name}: this node -> {peer.name}, {len(peer.log)} objects, "
                f"{peer.log.dirty_names} names, {peer.log.dirty_bytes} bytes at most"
                for peer in peers
            ]
            return {"message": "\n".join(lines)}
        # While everything is compared, a loss of power here fetches nothing of a file that is
        # changed meanwhile: what was acknowledged before is to be on this disk.
        try:
            await self._must_be_primary().checkpoint()
        except OSError as error:
            raise UsageError(
                f"this node's disk cannot be flushed ({error.strerror}): see its log"
            ) from error
        for peer in peers:
            peer.compare_all()
        return {"message": f"comparing everything with {', '.join(peer.name for peer in peers)}"}


def _unmount(mountpoint: str, lazy: bool) -> None:  # noqa: FBT001 - called in a thread
    if lazy:
        mounting.unmount_lazily(mountpoint)
    else:
        mounting.unmount(mountpoint)
