"""Processes: run, start, end; what they have used.

Everything a target starts is started in a network namespace of its own, in which there is nothing
but loopback. So no port can be taken already, no packet can leave, and the processes of a target
are exactly those in its namespace, however they made themselves daemons.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from benchmarks.errors import BenchmarkError

PREFIX: Final = "replfs-bench-"
NAMESPACES: Final = Path("/run/netns")
_CLOCK_TICKS: Final = os.sysconf("SC_CLK_TCK")
_END_S: Final = 15.0
# `python -m replfs` must be the one that is installed, not a directory of that name.
_NEUTRAL: Final = "/"


def run(*command: str | Path, **settings: str) -> str:
    """Run it to its end and return what it printed; *settings* are added to the environment.

    Raises:
        BenchmarkError: it cannot be run or failed; holds the end of what it said.
    """
    try:
        done = subprocess.run(
            list(map(str, command)),
            env=os.environ | settings,
            cwd=_NEUTRAL,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    except FileNotFoundError as error:
        raise BenchmarkError(f"{command[0]} is not installed") from error
    if done.returncode != 0:
        shown = " ".join(map(str, command))
        raise BenchmarkError(f"`{shown}` ended with {done.returncode}: {done.stdout[-500:]}")
    return done.stdout


def own_name(what: str) -> str:
    """A name from which it can be seen that this process has made it."""
    return f"{PREFIX}{os.getpid()}-{what}"


class Namespace:
    """A network with only loopback in it, and the processes inside."""

    def __init__(self, name: str) -> None:
        """*name*: the whole of it, as `own_name` makes it."""
        self.name = name
        self._path = NAMESPACES / name
        self._children: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        run("ip", "netns", "add", self.name)
        run("ip", "-n", self.name, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        self._end()
        run("ip", "netns", "delete", self.name)

    def command(self, *words: str | Path) -> list[str]:
        """What runs *words* inside, with nothing but the network changed.

        `ip netns exec` would hide the mounts made inside from everybody else.
        """
        return ["nsenter", f"--net={self._path}", "--", *map(str, words)]

    def run(self, *words: str | Path, **settings: str) -> str:
        """As `run`, inside."""
        return run(*self.command(*words), **settings)

    def start(self, *words: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """Start it in the background; a Ctrl-C on the terminal does not reach it."""
        with log.open("ab") as output:
            child = subprocess.Popen(
                self.command(*words),
                cwd=_NEUTRAL,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                process_group=0,
            )
        self._children.append(child)
        return child

    def pids(self) -> list[int]:
        """Every process inside."""
        ours = os.stat(self._path)
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit():
                with contextlib.suppress(OSError):
                    theirs = os.stat(f"/proc/{entry}/ns/net")
                    if (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino):
                        found.append(int(entry))
        return found

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send this signal to every process inside."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _end(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            until = time.monotonic() + _END_S
            self.kill(number)
            while self._alive() and time.monotonic() < until:
                time.sleep(0.05)

    def _alive(self) -> bool:
        self._children = [child for child in self._children if child.poll() is None]
        return bool(self.pids())


def end(child: subprocess.Popen[bytes]) -> None:
    """With SIGTERM, and if that does not help with SIGKILL."""
    child.terminate()
    try:
        child.wait(_END_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def wait_for_log(child: subprocess.Popen[bytes], log: Path, words: str, seconds: float) -> None:
    """Until *words* stand in *log*.

    Raises:
        BenchmarkError: the process ended, or they do not appear in time.
    """
    until = time.monotonic() + seconds
    while words not in log.read_text(errors="replace"):
        if child.poll() is not None or time.monotonic() > until:
            tail = log.read_text(errors="replace")[-500:]
            raise BenchmarkError(f"{log.stem} is not ready after {seconds:.0f} s: {tail}")
        time.sleep(0.02)


def cpu_s(pids: list[int]) -> float:
    """Processor time used so far, user and system, in seconds."""
    ticks = 0
    for fields in _read(pids, "stat"):
        values = fields.rpartition(")")[2].split()
        ticks += int(values[11]) + int(values[12])
    return ticks / _CLOCK_TICKS


def resident_mib(pids: list[int]) -> list[float]:
    """Resident memory of each process, in MiB."""
    found = []
    for text in _read(pids, "status"):
        lines = [line for line in text.splitlines() if line.startswith("VmRSS:")]
        found += [int(line.split()[1]) / 1024 for line in lines]
    return found


def _read(pids: list[int], file: str) -> Iterator[str]:
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            yield Path(f"/proc/{pid}/{file}").read_text()
