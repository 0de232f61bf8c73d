"""replfs nodes as real processes, for tests that go through the command line and the kernel.

    with Pair() as pair:                      # two stores, an agent, a mount; in sync
        (pair.mountpoint / "f").write_bytes(b"x")
        pair.agent.kill9()
        ...
        pair.agent.start()
        pair.wait_in_sync()
        pair.assert_equal()

Whatever happens in the block, afterwards no process, mount or directory of it is left. Nothing
here sleeps for luck: every wait is for a condition, bounded, and says what it waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from helpers.compare import wait_equal
from helpers.stage import Stage
from replfs.node.settings.memory import memory_directory
from replfs.node.settings.rundir import default_rundir

REPOSITORY = Path(__file__).resolve().parents[2]
REPLFS = (sys.executable, "-m", "replfs")
START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 60.0
SYNC_TIMEOUT_S = 120.0
MNT_DETACH = 2
UMOUNT_NOFOLLOW = 8
PR_SET_PDEATHSIG = 1

_libc = ctypes.CDLL(None, use_errno=True)
Found = TypeVar("Found")

running: dict[int, Node] = {}
"""Nodes started and not yet ended, by process id; must be empty at the end of a test run."""


bases: set[Path] = set()
"""Directories that `make_base` has made and `remove_base` not removed."""


class NodeFailed(Exception):
    """A replfs process ended, or did not do what was waited for; holds the end of its log."""


def wait_for(
    condition: Callable[[], Found],
    timeout_s: float = 30.0,
    what: str = "",
    interval_s: float = 0.01,
) -> Found:
    """Call `condition` until it returns something true, and return that.

    An AssertionError or OSError inside `condition` counts as "not yet"; the last one is shown.

    Raises:
        AssertionError: nothing true within `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            last: object = condition()
        except (AssertionError, OSError) as error:
            last = error
        else:
            if last:
                return last  # type: ignore[return-value]
        if time.monotonic() >= deadline:
            name = what or getattr(condition, "__name__", "a condition")
            raise AssertionError(f"waited {timeout_s:g} s in vain for {name}; last: {last!r}")
        time.sleep(interval_s)
        interval_s = min(interval_s * 1.5, 0.25)


def environment() -> dict[str, str]:
    """The environment for replfs processes: this repository's code, wherever they run."""
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]))
    return os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A TCP port on loopback that nobody listens on.

    It lies outside the range for outgoing connections, so it stays free while an agent is down.
    """
    low, high = 10_000, 60_000
    with open("/proc/sys/net/ipv4/ip_local_port_range", encoding="ascii") as lines:
        first, last = map(int, lines.read().split())
    chosen = random.SystemRandom()
    for _ in range(1000):
        port = chosen.randrange(low, high)
        if first <= port <= last:
            continue
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("no free port")


def mounts_below(directory: Path) -> list[Path]:
    """Mount points at or below `directory`, deepest and latest first.

    Reads /proc/self/mountinfo only: touching a mount point could hang on a dead daemon.
    """
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            field = line.split(" ")[4]
            for code in ("\\040", "\\011", "\\012", "\\134"):
                field = field.replace(code, chr(int(code[1:], 8)))
            path = Path(field)
            if path == directory or directory in path.parents:
                found.append(path)
    return found[::-1]


def unmount_all(directory: Path) -> None:
    """Detach every mount at or below `directory`; asks no daemon and never hangs."""
    for _ in range(64):
        mounts = mounts_below(directory)
        if not mounts:
            return
        for path in mounts:
            _libc.umount2(os.fsencode(path), MNT_DETACH | UMOUNT_NOFOLLOW)
    raise AssertionError(f"cannot unmount {mounts_below(directory)}")


def make_base(prefix: str = "replfs-test-") -> Path:
    """A new directory that other users can traverse (TMPDIR decides on which filesystem)."""
    base = Path(os.path.realpath(tempfile.mkdtemp(prefix=prefix)))
    base.chmod(0o755)
    bases.add(base)
    return base


def forget_killed(base: Path) -> None:
    """What nodes of stores below it, killed and not started again, keep in memory for that."""
    for owner in Path(memory_directory(default_rundir())).glob("store-*"):
        with contextlib.suppress(FileNotFoundError):  # other nodes end at any time
            if owner.read_text(errors="surrogateescape").startswith(f"{base}/"):
                place = owner.name.removeprefix("store-")
                for path in owner.parent.glob(f"*-{place}"):
                    path.unlink()


def remove_base(base: Path) -> None:
    """Remove a directory of `make_base`, never reaching into a mount; REPLFS_KEEP=1 keeps it."""
    unmount_all(base)
    bases.discard(base)
    if os.environ.get("REPLFS_KEEP"):
        return
    # rm(1) walks by descriptors without recursion: trees here may be deeper than PATH_MAX.
    subprocess.run(["rm", "-rf", "--one-file-system", "--", base], check=False)
    forget_killed(base)


class Node:
    """One replfs process in the foreground, with its log; started again with `start()`.

    Args:
        command: the subcommand and its arguments, without `-f` and `--rundir`.
        store: its STORE.
        mountpoint: where it mounts, or None.
        rundir: the directory of its control sockets.
        log: its stdout and stderr go to the end of this file.
        prefix: a command that runs the rest of its arguments in its own place (nsenter(1)).
    """

    def __init__(
        self,
        command: Sequence[str | Path],
        *,
        store: Path,
        mountpoint: Path | None,
        rundir: Path,
        log: Path,
        environ: dict[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.command = [str(part) for part in command]
        self.prefix = prefix
        self.store = store
        self.mountpoint = mountpoint
        self.rundir = rundir
        self.log_path = log
        self.environ = environ or {}
        self.process: subprocess.Popen[bytes] | None = None
        self._log_start = 0

    @property
    def target(self) -> Path:
        """What commands name it by; the STORE, since it is there without a mount, too."""
        return self.store

    @property
    def pid(self) -> int:
        """The process id; it must have been started."""
        if self.process is None:
            raise NodeFailed(f"{self.command} was never started")
        return self.process.pid

    @property
    def is_running(self) -> bool:
        """Whether the process has been started and has not ended (a stopped one counts)."""
        return self.process is not None and self.process.poll() is None

    def start(self, *, wait: bool = True) -> Self:
        """Start the process; with `wait`, return when it answers and has mounted."""
        if self.is_running:
            raise NodeFailed(f"{self.command} is running already")
        command = [*self.prefix, *REPLFS, *self.command, "-f", "--rundir", str(self.rundir)]
        with self.log_path.open("ab") as log:
            log.write(b"--- " + " ".join(command).encode() + b"\n")
            log.flush()
            self._log_start = log.tell()
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=environment() | self.environ,
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )
        running[self.process.pid] = self
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Wait until it has mounted what it shall and answers `status`."""

        def is_ready() -> bool:
            self.check()
            # It says so when it is; asking for its status costs a process each time.
            return b" is ready" in self.log_since_start() and bool(self.status())

        try:
            wait_for(is_ready, timeout_s, f"{self.command[0]} to be ready", 0.05)
        except AssertionError as error:
            raise NodeFailed(f"{error}\n{self.log_tail()}") from None

    def check(self) -> None:
        """Raise NodeFailed if the process has ended."""
        if not self.is_running:
            code = self.process.returncode if self.process else None
            raise NodeFailed(f"{self.command} ended with {code}\n{self.log_tail()}")

    def status(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """What `replfs status --json` says, whatever its exit code."""
        done = self.replfs("status", self.target, "--json", check=False, timeout_s=timeout_s)
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            raise AssertionError(f"status: {done.stdout!r} {done.stderr!r}") from None
        if not isinstance(answer, dict):
            raise AssertionError(f"status: {answer!r}")
        return answer

    def replfs(
        self, *arguments: str | Path, check: bool = True, timeout_s: float = 60.0
    ) -> subprocess.CompletedProcess[str]:
        """Run a command of replfs against this node's run directory."""
        return run_replfs(*arguments, "--rundir", self.rundir, check=check, timeout_s=timeout_s)

    def log_since_start(self) -> bytes:
        """What it has logged since it was started last."""
        with self.log_path.open("rb") as log:
            log.seek(self._log_start)
            return log.read()

    def log_tail(self, lines: int = 60) -> str:
        """The end of the log."""
        if not self.log_path.exists():
            return "(no log)"
        text = self.log_path.read_text(encoding="utf-8", errors="replace")
        return "\n".join(["log:", *text.splitlines()[-lines:]])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def freeze(self) -> None:
        """SIGSTOP: connections stay open and nothing is answered, as on a hung machine."""
        self.signal(signal.SIGSTOP)
        wait_for(lambda: _state(self.pid) in "Tt", what="the process to stop")

    def thaw(self) -> None:
        """SIGCONT."""
        self.signal(signal.SIGCONT)

    def kill9(self) -> None:
        """SIGKILL, as a crash; what it had mounted is detached, so that it can start again."""
        self.signal(signal.SIGKILL)
        self._reap(STOP_TIMEOUT_S)
        if self.mountpoint is not None:
            unmount_all(self.mountpoint)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """SIGTERM, and wait for the clean end; returns the exit code.

        Raises:
            NodeFailed: it did not end in time (it is killed then).
        """
        self.thaw()
        self.signal(signal.SIGTERM)
        return self._reap(timeout_s)

    def wait_ended(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """Wait for the process to end by itself; returns the exit code."""
        return self._reap(timeout_s)

    def restart(self, *, wait: bool = True) -> None:
        """Stop cleanly and start again."""
        self.stop()
        self.start(wait=wait)

    def _reap(self, timeout_s: float) -> int:
        if self.process is None:
            return 0
        try:
            code = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
            running.pop(self.process.pid, None)
            raise NodeFailed(
                f"{self.command} did not end within {timeout_s:g} s\n{self.log_tail()}"
            ) from None
        running.pop(self.process.pid, None)
        return code

    def clean_up(self) -> None:
        """End the process whatever it takes, and detach its mount; never raises for its state."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(STOP_TIMEOUT_S)
        if self.process is not None:
            running.pop(self.process.pid, None)
        if self.mountpoint is not None:
            unmount_all(self.mountpoint)


def agent(
    store: Path,
    endpoint: str,
    *,
    rundir: Path,
    log: Path,
    name: str = "secondary",
    mountpoint: Path | None = None,
    arguments: Sequence[str | Path] = (),
    environ: dict[str, str] | None = None,
) -> Node:
    """An agent that listens on `endpoint`, not yet started."""
    command: list[str | Path] = ["agent", store, "--listen", endpoint, "--name", name, *arguments]
    if mountpoint is not None:
        command += ["--mount", mountpoint]
    return Node(
        command, store=store, mountpoint=mountpoint, rundir=rundir, log=log, environ=environ
    )


def mount(
    store: Path,
    mountpoint: Path,
    endpoints: Sequence[str],
    *,
    rundir: Path,
    log: Path,
    name: str = "primary",
    arguments: Sequence[str | Path] = (),
    environ: dict[str, str] | None = None,
) -> Node:
    """A primary that mounts `store` and dials `endpoints`, not yet started."""
    command: list[str | Path] = ["mount", store, mountpoint, "--name", name]
    for endpoint in endpoints:
        command += ["--peer", endpoint]
    command += arguments
    return Node(
        command, store=store, mountpoint=mountpoint, rundir=rundir, log=log, environ=environ
    )


class Pair(Stage):
    """A primary with a mount and one secondary, each with a store, in a directory of their own.

    `primary_store`, `secondary_store`, `mountpoint` and `replica` are paths; `agent` and `mount`
    are the two nodes. Use it as a context manager.

    Args:
        base: where to put it all; a new temporary directory by default, removed at the end.
        agent_arguments: further arguments of `replfs agent`.
        mount_arguments: further arguments of `replfs mount`.
        prepare: called with the pair when the directories exist and before anything starts:
            seed the stores here.
        replica_mounted: the agent mounts its store, too (read-only, at `replica`).
        over_store: the mount covers its own store; use `primary_store` for both then.
        through: a function from the agent's endpoint to the one to dial (for a proxy between).
        start: start both nodes and wait until they are in sync.
    """

    def __init__(
        self,
        *,
        base: Path | None = None,
        agent_arguments: Sequence[str | Path] = (),
        mount_arguments: Sequence[str | Path] = (),
        prepare: Callable[[Pair], None] | None = None,
        replica_mounted: bool = False,
        over_store: bool = False,
        through: Callable[[str], str] | None = None,
        start: bool = True,
    ) -> None:
        self._own_base = base is None
        self.base = make_base() if base is None else base
        self.primary_store = self.base / "primary"
        self.secondary_store = self.base / "secondary"
        self.mountpoint = self.primary_store if over_store else self.base / "mnt"
        self.replica = self.base / "replica"
        self.rundir = self.base / "run"
        self.prepare = prepare
        self.starts = start
        for directory in (
            self.primary_store, self.secondary_store, self.mountpoint, self.replica, self.rundir
        ):  # fmt: skip
            directory.mkdir(exist_ok=True)
        self.endpoint = f"tcp://127.0.0.1:{free_port()}"
        dialled = through(self.endpoint) if through else self.endpoint
        self.agent = agent(
            self.secondary_store,
            self.endpoint,
            rundir=self.rundir,
            log=self.base / "agent.log",
            mountpoint=self.replica if replica_mounted else None,
            arguments=agent_arguments,
        )
        self.mount = mount(
            self.primary_store,
            self.mountpoint,
            [dialled],
            rundir=self.rundir,
            log=self.base / "mount.log",
            arguments=mount_arguments,
        )

    def start_up(self) -> None:
        """Prepare; start both nodes and wait until they are in sync, unless told otherwise."""
        if self.prepare is not None:
            self.prepare(self)
        if self.starts:
            self.start()

    def notes(self) -> str:
        """The ends of both logs."""
        return f"agent {self.agent.log_tail(40)}\nmount {self.mount.log_tail(40)}"

    def start(self) -> None:
        """Start both nodes and wait until they are in sync."""
        self.agent.start(wait=False)
        self.mount.start()
        self.wait_in_sync()

    def clean_up(self) -> None:
        """End both processes, detach the mounts, remove the directory; whatever state it is in."""
        for node in (self.mount, self.agent):
            node.clean_up()
        if self._own_base:
            remove_base(self.base)

    def check_alive(self) -> None:
        """Raise NodeFailed if either process has ended."""
        self.agent.check()
        self.mount.check()

    def wait_in_sync(self, timeout_s: float = SYNC_TIMEOUT_S) -> None:
        """Wait until the primary says that its peer is in sync.

        Raises:
            NodeFailed: it is not within `timeout_s`; says what the status is.
        """
        self.mount.check()
        done = self.mount.replfs(
            "wait", self.mount.target, "--for", "in-sync", "--timeout", f"{timeout_s:g}",
            check=False, timeout_s=timeout_s + 30,
        )  # fmt: skip
        if done.returncode != 0:
            raise NodeFailed(
                f"not in sync: wait exits with {done.returncode}: {done.stdout}{done.stderr}\n"
                f"{self.mount.log_tail()}\n{self.agent.log_tail()}"
            )

    def peer(self) -> dict[str, Any]:
        """The status of the one peer, as the primary sees it."""
        peers = self.mount.status()["peers"]
        if len(peers) != 1:
            raise AssertionError(f"peers: {peers!r}")
        found: dict[str, Any] = peers[0]
        return found

    def wait_state(self, *states: str, timeout_s: float = 60.0) -> dict[str, Any]:
        """Wait until the peer's replication state is one of `states` (`-` and `_` are one)."""
        wanted = {state.replace("_", "-") for state in states}

        def has_state() -> dict[str, Any] | None:
            peer = self.peer()
            state = str(peer["state"]).replace("_", "-").split("(")[0]
            if state not in wanted:
                raise AssertionError(f"state {peer['state']!r}: {peer!r}")
            return peer

        found = wait_for(has_state, timeout_s, f"state {' or '.join(sorted(wanted))}", 0.05)
        if found is None:
            raise AssertionError("no peer")
        return found

    def assert_equal(
        self, path: str | Path = "", *, holes: int = 0, timeout_s: float = 10.0
    ) -> None:
        """The two stores are equal at and below `path`, at the latest after `timeout_s`."""
        wait_equal(
            self.primary_store / path,
            self.secondary_store / path,
            holes=holes,
            timeout_s=timeout_s,
        )


def run_replfs(
    *arguments: str | Path, check: bool = True, timeout_s: float = 60.0
) -> subprocess.CompletedProcess[str]:
    """Run `replfs` to its end and return its exit code and output.

    Raises:
        AssertionError: `check` and the exit code is not 0.
    """
    done = subprocess.run(
        [*REPLFS, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        cwd="/",
        env=environment(),
        timeout=timeout_s,
        check=False,
    )
    if check and done.returncode != 0:
        raise AssertionError(
            f"replfs {' '.join(map(str, arguments))} exits with {done.returncode}:\n"
            f"{done.stdout}{done.stderr}"
        )
    return done


def has_command(name: str) -> bool:
    """Whether a program is on the path, for cases that need one."""
    return shutil.which(name) is not None


def _die_with_parent() -> None:
    # A killed test run must not leave daemons. Relies on: prctl(2), PR_SET_PDEATHSIG is kept
    # across execve and fires when the thread that forked ends: start nodes in the main thread.
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _state(pid: int) -> str:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as line:
        return line.read().rpartition(")")[2].split()[0]
