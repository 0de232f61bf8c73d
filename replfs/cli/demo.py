"""`replfs demo`: all of it in a temporary directory, in well under a minute, and checked.

Two stores, a node on each, a mount. A real tree is copied in; both stores must be equal. The peer
is killed; the mount goes on, and much is changed. The peer comes back, catches up, and both stores
must be equal again. It exits with 0 only if every check held.

The main thread starts and ends processes, shows progress and watches for signals. All that touches
the mount is done in a thread of its own, which can be left behind should the mount ever hang.
Nothing is left: not on success, not on failure, not on Ctrl-C at any moment.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Final, TypeVar

from replfs.cli import spawn, text, trees
from replfs.cli.exit_codes import ExitCode
from replfs.cli.interrupts import Interrupted, Interrupts, start_thread
from replfs.cli.parse import Command
from replfs.cli.progress import describe_progress
from replfs.errors import ReplfsError
from replfs.front import mounting
from replfs.node.operating import client
from replfs.node.settings.rundir import replfs_mounts

FILES: Final = 1500
START_S: Final = 60.0
SYNC_S: Final = 120.0
WORK_S: Final = 300.0
END_S: Final = 15.0
EQUAL_S: Final = 10.0
"""How long a modification time may be on its way after the last change."""
POLL_S: Final = 0.1

Result = TypeVar("Result")


class DemoFailed(ReplfsError):
    """A step did not do what it should."""


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dir", metavar="DIR", help="make the temporary directory in this one")
    parser.add_argument("--files", metavar="N", type=int, default=FILES,
                        help=f"how many files to copy in (default {FILES})")  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    with Interrupts() as interrupts:
        demo = Demo(args.files, interrupts)
        code: int = ExitCode.ERROR
        try:
            demo.make_directory(args.dir)
            demo.run()
            code = ExitCode.OK
        except Interrupted:
            pass
        except (ReplfsError, OSError) as error:
            demo.report_failure(error)
        finally:
            interrupts.is_shielded = True
            if not demo.clean_up():
                code = ExitCode.ERROR
        number = interrupts.settle()
        if number is not None:
            print(f"interrupted by {signal.Signals(number).name}; everything is cleaned up")
            return 128 + number
        if code == ExitCode.OK:
            print("Everything was verified.")
        return code


class Demo:
    """One run. Every process, the mount and the directory are noted here before they exist."""

    def __init__(self, files: int, interrupts: Interrupts) -> None:
        self._files = files
        self._interrupts = interrupts
        self._progress = text.Progress(sys.stdout)
        self._nodes: dict[str, spawn.NodeProcess] = {}
        self._work = trees.Work()
        self._worker_alive: Callable[[], bool] = lambda: False
        self._steps: list[tuple[str, str, str]] = []
        self.directory = ""

    def make_directory(self, parent: str | None) -> None:
        """Make the temporary directory, where extended attributes can be used.

        Raises:
            DemoFailed: there is no such place.
        """
        if parent and not os.path.isdir(parent):
            raise DemoFailed(f"{parent} is not a directory; choose another with --dir")
        candidates = [parent] if parent else [tempfile.gettempdir(), "/var/tmp"]  # noqa: S108
        for candidate in candidates:
            if _has_xattrs(candidate):
                self.directory = tempfile.mkdtemp(prefix="replfs-demo-", dir=candidate)
                return
        raise DemoFailed(
            f"{' and '.join(candidates)} cannot carry extended attributes; choose with --dir"
        )

    def _path(self, name: str) -> str:
        return os.path.join(self.directory, name)

    # The story

    def run(self) -> None:
        """All steps, in order.

        Raises:
            DemoFailed: a step failed. StartFailed: a node did not start.
            Interrupted: a signal arrived.
        """
        for name in ("primary", "peer", "mount", "run"):
            os.mkdir(self._path(name))
        steps: list[tuple[str, Callable[[], str]]] = [
            ("Starting a peer", self._start_peer),
            ("Mounting a store that replicates to it", self._start_mount),
            (f"Copying {self._files} files in through the mount", self._copy_in),
            ("Comparing both stores", self._compare_equal),
            ("Killing the peer, and changing much meanwhile", self._cut_off),
            ("Looking at both stores: they must differ now", self._compare_different),
            ("Starting the peer again, until it is in sync", self._heal),
            ("Comparing both stores and the mount", self._compare_all),
            ("Unmounting and ending both", self._end),
            ("Comparing both stores once more", self._compare_equal),
        ]
        print(f"replfs demo in {self.directory}", flush=True)
        for number, (title, step) in enumerate(steps, 1):
            print(f"[{number}/{len(steps)}] {title}", flush=True)
            started = time.monotonic()
            self._interrupts.check()
            outcome = step()
            self._interrupts.check()
            took = text.duration(time.monotonic() - started)
            self._progress.clear()
            print(f"       {outcome} ({took})", flush=True)
            self._steps.append((title, outcome, took))
        rows = [("STEP", "RESULT", "TIME"), *self._steps]
        print(f"\n{text.table(rows)}\n", flush=True)

    def _start_peer(self) -> str:
        self._endpoint = self._start_node(
            "peer", "agent", self._path("peer"), "--listen", "tcp://127.0.0.1:0", "--name", "peer"
        )
        return f"it listens on {self._endpoint}"

    def _start_mount(self) -> str:
        self._start_node(
            "primary", "mount", self._path("primary"), self._path("mount"),
            "--peer", f"peer={self._endpoint}", "--name", "primary",
        )  # fmt: skip
        self._wait_in_sync()
        return f"{self._path('mount')} is in sync"

    def _copy_in(self) -> str:
        paths = trees.sample(self._files)
        started = time.monotonic()
        self._do(lambda work: trees.copy_in(self._path("mount"), paths, work))
        work = self._work
        rate = work.bytes / max(time.monotonic() - started, 1e-9)
        return f"{work.files} files, {text.size(work.bytes)}, {text.size(rate)}/s, on both stores"

    def _compare_equal(self) -> str:
        count = self._compare("primary", "peer")
        return f"{count} objects are equal, byte for byte"

    def _compare_all(self) -> str:
        count = self._compare("primary", "peer")
        self._compare("mount", "peer")
        return f"{count} objects are equal in both stores and on the mount"

    def _cut_off(self) -> str:
        peer = self._nodes["peer"]
        peer.process.kill()
        self._wait_end(peer)
        paths = trees.sample(self._files)
        self._do(lambda work: trees.change(self._path("mount"), paths, work))
        status = client.request(self._path("primary"), "status", {}, 10.0, self._path("run"))
        peers = status.get("peers") or [{}]
        dirty = (
            f"{peers[0].get('dirty_files', '?')} files, {peers[0].get('dirty_names', '?')} names"
        )
        return f"{self._work.files} changes, no error; the log holds {dirty}"

    def _compare_different(self) -> str:
        lines = self._differences("primary", "peer")
        if not lines:
            raise DemoFailed("both stores are equal although the peer was away: the check is blind")
        return f"{len(lines)} objects differ, as they must"

    def _heal(self) -> str:
        # The port is the one it had: the primary has been dialling it all the time.
        self._start_node(
            "peer", "agent", self._path("peer"), "--listen", self._endpoint, "--name", "peer"
        )
        self._wait_in_sync()
        return "in sync again"

    def _end(self) -> str:
        self._do(self._unmount_by_command)
        self._wait_end(self._nodes["primary"])
        if self._path("mount") in replfs_mounts():
            raise DemoFailed("the node has ended, but its mount is still there")
        peer = self._nodes["peer"]
        peer.process.terminate()
        self._wait_end(peer)
        codes = [self._nodes[name].process.returncode for name in ("primary", "peer")]
        if codes != [0, 0]:
            raise DemoFailed(f"the nodes ended with {codes}, not 0")
        return "drained, checkpointed, unmounted"

    # Parts of it

    def _start_node(self, name: str, *argv: str) -> str:
        """Start a node and wait until it is ready; returns its endpoint."""
        options = ["--rundir", self._path("run"), "--config", os.devnull]
        node = spawn.NodeProcess([*argv, *options], self._path(f"{name}.log"))
        self._nodes[name] = node
        deadline = time.monotonic() + START_S
        while (endpoint := node.poll_ready()) is None:
            if time.monotonic() > deadline:
                raise DemoFailed(f"the {name} is not ready after {START_S:.0f} s")
            self._interrupts.wait([node.ready_fd], POLL_S)
        return endpoint

    def _wait_end(self, node: spawn.NodeProcess) -> None:
        """Wait until a node's process has ended."""
        pidfd = os.pidfd_open(node.process.pid)
        try:
            deadline = time.monotonic() + END_S
            while not self._interrupts.wait([pidfd], POLL_S):
                if time.monotonic() > deadline:
                    raise DemoFailed(f"'replfs {node.argv[0]}' does not end")
        finally:
            os.close(pidfd)
        node.process.wait()

    def _wait_in_sync(self) -> None:
        deadline = time.monotonic() + SYNC_S
        while True:
            status = client.request(self._path("primary"), "status", {}, 10.0, self._path("run"))
            if status.get("state") == "in-sync":
                return
            self._check_nodes()
            peer = (status.get("peers") or [{}])[0]
            progress = {**(peer.get("progress") or {}), "phase": ""}  # it is the state
            where = f"{peer.get('state', '?')} {describe_progress(progress)}"
            if time.monotonic() > deadline:
                raise DemoFailed(f"not in sync after {SYNC_S:.0f} s: {where}")
            self._progress.update(f"       {where}")
            self._interrupts.wait([], POLL_S)

    def _check_nodes(self) -> None:
        for name, node in self._nodes.items():
            if node.process.poll() is not None:
                raise DemoFailed(f"the {name} has ended unexpectedly: {node.last_words()}")

    def _unmount_by_command(self, _: trees.Work) -> None:
        fields = {"lazy": False, "timeout_s": END_S}
        client.request(self._path("primary"), "umount", fields, END_S, self._path("run"))

    def _compare(self, ours: str, theirs: str) -> int:
        """The number of objects, all equal on both sides."""
        deadline = time.monotonic() + EQUAL_S
        while True:
            lines = self._differences(ours, theirs)
            if not lines:
                return self._objects
            if time.monotonic() > deadline:
                shown = "".join(f"\n       {line}" for line in lines[:10])
                raise DemoFailed(f"{len(lines)} objects differ between {ours} and {theirs}:{shown}")
            self._interrupts.wait([], POLL_S)

    def _differences(self, ours: str, theirs: str) -> list[str]:
        def describe_both(
            work: trees.Work,
        ) -> tuple[dict[str, trees.Description], dict[str, trees.Description]]:
            mine = trees.describe(self._path(ours), work)
            return mine, trees.describe(self._path(theirs), work)

        mine, other = self._do(describe_both)
        self._objects = len(mine)
        return trees.differences(mine, other)

    def _do(self, work: Callable[[trees.Work], Result]) -> Result:
        """Do *work* in a thread, showing progress; its result or its error becomes ours."""
        results: list[Result] = []
        errors: list[Exception] = []
        state = self._work = trees.Work()
        done_read, done_write = os.pipe2(os.O_CLOEXEC)

        def run() -> None:
            try:
                results.append(work(state))
            except Exception as error:  # noqa: BLE001  # it is raised where the result is awaited
                errors.append(error)
            finally:
                os.close(done_write)

        try:
            thread = start_thread(run, "demo work")
            self._worker_alive = thread.is_alive
            started = time.monotonic()
            while not self._interrupts.wait([done_read], POLL_S):
                took = time.monotonic() - started
                if took > WORK_S:
                    raise DemoFailed(f"the work is not done after {WORK_S:.0f} s")
                self._progress.update(f"       {_describe(state, took)}")
        finally:
            os.close(done_read)
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    # The end of it

    def report_failure(self, error: Exception) -> None:
        """Say what went wrong, with the nodes' last log lines."""
        self._progress.clear()
        where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
        print(f"replfs: demo failed: {error}{where}", file=sys.stderr)
        for name, node in self._nodes.items():
            with contextlib.suppress(OSError), open(node.log_path, errors="replace") as log:
                for line in log.read().splitlines()[-15:]:
                    print(f"  {name}: {line}", file=sys.stderr)

    def clean_up(self) -> bool:
        """End everything and remove everything; True if nothing is left."""
        self._progress.clear()
        self._work.stop.set()
        # A worker that waits for a hung mount is freed when the mount's daemon is gone.
        for name in ("primary", "peer"):
            if name in self._nodes:
                self._end_node(self._nodes[name])
        if not self.directory:
            return True
        for path in replfs_mounts():
            if path.startswith(self.directory + "/"):
                mounting.unmount_quietly(path)
        deadline = time.monotonic() + END_S
        while self._worker_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        if any(path.startswith(self.directory + "/") for path in replfs_mounts()):
            print(f"replfs: demo: {self.directory} is still mounted", file=sys.stderr)
            return False
        try:
            shutil.rmtree(self.directory)
        except OSError as error:
            print(f"replfs: demo: {error.filename}: {error.strerror}", file=sys.stderr)
            return False
        return True

    def _end_node(self, node: spawn.NodeProcess) -> None:
        node.close()
        process = node.process
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def _has_xattrs(directory: str) -> bool:
    try:
        fd = os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError:
        return False
    try:
        name = "trusted.replfs.try" if os.geteuid() == 0 else "user.replfs.try"
        os.setxattr(f"/proc/self/fd/{fd}", "user.replfs.try", b"x")
        os.setxattr(f"/proc/self/fd/{fd}", name, b"x")
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _describe(work: trees.Work, took_s: float) -> str:
    total = f" of {work.files_total}" if work.files_total else ""
    rate = f", {text.size(work.bytes / took_s)}/s" if work.bytes and took_s > 0 else ""
    return f"{work.files}{total} objects, {text.size(work.bytes)}{rate}"


COMMANDS: Final = {"demo": Command(_declare, _run)}
