"""Starting a node as a process of its own, and hearing from it that it is ready, or why not.

The child gets one end of a pipe. It writes one line of JSON, `{"ready": ENDPOINT}` (empty if it
does not listen) or `{"error": SENTENCE, "code": EXIT_CODE}`, and closes it. If the pipe closes
without a line, the child died; its log says why.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import site
import subprocess
import sys
from collections.abc import Sequence

import replfs
from replfs.cli import logs
from replfs.errors import ReplfsError
from replfs.node.settings.rundir import check_file


class StartFailed(ReplfsError):
    """The node said why it cannot start; `exit_code` is what it would have exited with."""

    def __init__(self, sentence: str, exit_code: int = 1) -> None:
        super().__init__(sentence)
        self.exit_code = exit_code


class Announcement:
    """The child's end of the pipe."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def ready(self, listening: str) -> None:
        """The node serves; *listening* is its endpoint, or empty."""
        self._write({"ready": listening})

    def failed(self, sentence: str, exit_code: int) -> bool:
        """The node cannot start; False if it was announced ready before."""
        return self._write({"error": sentence, "code": exit_code})

    def _write(self, message: dict[str, object]) -> bool:
        fd, self._fd = self._fd, -1
        if fd < 0:
            return False
        with contextlib.suppress(OSError):
            os.write(fd, json.dumps(message).encode() + b"\n")
        os.close(fd)
        return True


class NodeProcess:
    """A node started by us: a session of its own, so that a terminal's Ctrl-C does not reach it."""

    def __init__(self, argv: Sequence[str], log_path: str) -> None:
        """Start `replfs ARGV... --foreground`; its output is appended to *log_path*."""
        self.log_path = log_path
        self.argv = list(argv)
        self._received = b""
        logs.rotate(check_file(log_path))
        self.ready_fd, child_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self.ready_fd, False)
        internal = ("--log-file", log_path, "--ready-fd", str(child_fd))
        try:
            with open(log_path, "ab") as log:
                self._log_start = log.tell()
                self.process = subprocess.Popen(
                    [*python(), *argv, "--foreground", *internal],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=[child_fd],
                    start_new_session=True,
                    env=environment(),
                )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(child_fd)

    def poll_ready(self, timeout_s: float = 0.0) -> str | None:
        """The endpoint (or an empty text) once the node is ready; None if it is not yet.

        Raises:
            StartFailed: it said that it cannot start, or it died.
        """
        if not select.select([self.ready_fd], [], [], timeout_s)[0]:
            return None
        chunk = os.read(self.ready_fd, 65536)
        self._received += chunk
        if b"\n" not in self._received and chunk:
            return None
        self.close()
        if b"\n" not in self._received:
            code = self.process.wait()
            how = f"was killed by signal {-code}" if code < 0 else f"ended with status {code}"
            raise StartFailed(
                f"the node {how} before it was ready: {self.last_words()} (log: {self.log_path})"
            )
        message = json.loads(self._received)
        if "ready" in message:
            return str(message["ready"])
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5.0)
        raise StartFailed(str(message["error"]), int(message["code"]))

    def last_words(self) -> str:
        """The last line that this process logged."""
        try:
            with open(self.log_path, "rb") as log:
                log.seek(max(self._log_start, log.seek(0, os.SEEK_END) - 4096))
                lines = [line for line in log.read().decode(errors="replace").splitlines() if line]
        except OSError:
            lines = []
        return lines[-1].strip() if lines else "it logged nothing"

    def close(self) -> None:
        """Close our end of the pipe; the node goes on."""
        if self.ready_fd >= 0:
            os.close(self.ready_fd)
            self.ready_fd = -1


def python() -> list[str]:
    """How to run `replfs` again with this interpreter. The current directory is not searched."""
    return [sys.executable, "-P", "-m", "replfs"]


def environment() -> dict[str, str]:
    """The environment in which `python()` finds this very package, installed or not."""
    env = dict(os.environ)
    root = os.path.dirname(os.path.dirname(os.path.abspath(replfs.__file__)))
    if root not in site.getsitepackages():
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [root, env.get("PYTHONPATH")]))
    return env
