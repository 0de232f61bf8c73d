"""A program of the operator's that is run when a state changes: `hook = "/path"`.

It runs in a process of its own, one at a time and in order, started by a thread that nothing waits
for. What it prints is logged. It has a minute; changes that come faster than it takes them in are
dropped, the oldest first, and counted in the log.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

from replfs.errors import UsageError
from replfs.front import mounting

log = logging.getLogger(__name__)

WAITING_MAX: Final = 100
PATIENCE_S: Final = 60.0
CLOSE_S: Final = 5.0
OUTPUT_MAX: Final = 16 << 10
"""Bytes of a program's output that are logged."""

_PEER: Final = {
    "in_sync": "in-sync",
    "baseline": "resync",
    "incremental": "resync",
    "out_of_sync": "lost",
    "congested": "slow",
    "paused": "paused",
    "split_brain": "split-brain",
    "refused": "refused",
}
_DATA: Final = {"up-to-date": "in-sync", "inconsistent": "inconsistent"}
WORDS: Final = (
    *dict.fromkeys(_PEER.values()),
    "inconsistent",
    "primary",
    "secondary",
    "frozen",
    "thawed",
)
"""Every value of REPLFS_EVENT."""


def word_of(event: Mapping[str, Any]) -> str:
    """What an event of `replfs events` is called to the program; empty: it is not told."""
    match event["event"]:
        case "peer":
            return _PEER.get(str(event.get("state")), "")
        case "data":
            return _DATA.get(str(event.get("state")), "")
        case "primary":
            return "lost" if event.get("link") == "down" else ""
        case "role":
            return str(event.get("role"))
        case "role":
            return str(event.get("role"))
        case "frozen" | "thawed" as word:
            return str(word)
        case _:
            return ""


def check_program(path: str) -> None:
    """Refuse what cannot be run.

    Raises:
        UsageError: why.
    """
    if not os.path.isfile(path) or not os.access(path, os.X_OK):
        raise UsageError(f"hook {path} is not a program that can be run: chmod +x it")


class Hook:
    """Runs *program* for each change; *facts* go into its environment.

    Raises:
        UsageError: it cannot be run.
    """

    def __init__(self, program: str, facts: Mapping[str, str]) -> None:
        check_program(program)
        self._program = program
        self._facts = dict(facts)
        self._told: dict[str, str] = {}
        self._waiting: deque[dict[str, str]] = deque()
        self._news = threading.Condition()
        self._dropped = 0
        self._closed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._thread = threading.Thread(target=self._serve, name="hook", daemon=True)
        self._thread.start()

    def tell(self, event: Mapping[str, Any]) -> None:
        """Something happened; returns at once. What is as it was is not told again."""
        word = word_of(event)
        about = str(event.get("peer") or event.get("name") or "")
        if not word or self._told.get(about) == word:
            return
        if event["event"] == "role":
            self._facts = self._facts | {"REPLFS_ROLE": word}
        if event["event"] == "role":
            self._facts["REPLFS_ROLE"] = word
        facts = {
            "REPLFS_ROLE": self._facts.get("REPLFS_ROLE", ""),
            "REPLFS_EVENT": word,
            "REPLFS_PREVIOUS": self._told.get(about, ""),
            "REPLFS_PEER": about,
            "REPLFS_REASON": str(event.get("reason") or ""),
            "REPLFS_TIME": f"{event.get('time', time.time()):.3f}",
        }
        self._told[about] = word
        with self._news:
            if self._closed:
                return
            if len(self._waiting) >= WAITING_MAX:
                self._waiting.popleft()
                self._dropped += 1
            self._waiting.append(facts)
            self._news.notify()

    def close(self) -> None:
        """Nothing more is told; a program that still runs has a moment to end. Idempotent."""
        with self._news:
            self._closed = True
            self._waiting.clear()
            self._news.notify()
        self._thread.join(CLOSE_S)
        self._kill()

    # In the thread

    def _serve(self) -> None:
        mounting.stay_no_io_flusher()
        while True:
            with self._news:
                while not self._waiting and not self._closed:
                    self._news.wait()
                if self._closed:
                    return
                facts = self._waiting.popleft()
                dropped, self._dropped = self._dropped, 0
            if dropped:
                log.warning("the hook is too slow: %d changes were not told", dropped)
            try:
                self._run(facts)
            except OSError as error:
                log.warning("the hook cannot be run: %s", error.strerror)

    def _run(self, facts: Mapping[str, str]) -> None:
        private = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        env = {name: value for name, value in os.environ.items() if name not in private}
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        with open(read_fd, "rb", buffering=0) as output:
            try:
                self._process = process = subprocess.Popen(
                    [self._program, facts["REPLFS_EVENT"]],
                    stdin=subprocess.DEVNULL,
                    stdout=write_fd,
                    stderr=write_fd,
                    cwd="/",
                    env=env | self._facts | dict(facts),
                    start_new_session=True,
                )
            finally:
                os.close(write_fd)
            with (
                contextlib.suppress(OSError),
                open(f"/proc/{process.pid}/oom_score_adj", "w", encoding="ascii") as score,
            ):
                score.write("0")
            reader = threading.Thread(target=_log_output, args=[output.fileno()], daemon=True)
            reader.start()
            try:
                code = process.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                log.warning("the hook did not end within %.0f s, and is killed", PATIENCE_S)
                self._kill()
                code = process.wait()
            # Something it left running may hold the pipe.
            reader.join(1.0)
        self._process = None
        if code:
            log.warning("the hook ended with %d for %s", code, facts["REPLFS_EVENT"])

    def _kill(self) -> None:
        process = self._process
        if process is not None and process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _log_output(fd: int) -> None:
    left = OUTPUT_MAX
    rest = b""
    with contextlib.suppress(OSError):
        while chunk := os.read(fd, 4096):
            *lines, rest = (rest + chunk[:left]).split(b"\n")
            left = max(0, left - len(chunk))
            for line in lines:
                log.info("hook: %s", line.decode(errors="backslashreplace"))
    if rest:
        log.info("hook: %s", rest.decode(errors="backslashreplace"))
