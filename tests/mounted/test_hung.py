"""A node whose event loop waits for its own STORE: seen from outside as hung, and only then.

The store's filesystem is frozen (fsfreeze(8)), as by a snapshot or a dead disk, so the next write
to it stops the loop. The service manager is a socket of ours.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.disks import disk
from helpers.nodes import Pair, wait_for

from replfs.cli.exit_codes import ExitCode

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(shutil.which("fsfreeze") is None, reason="no fsfreeze(8)"),
]


class Manager:
    """The service manager's end of sd_notify(3)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.told: list[tuple[float, str]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(0.1)
        self._stop = False
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        while not self._stop:
            with contextlib.suppress(TimeoutError):
                self.told.append((time.monotonic(), self._socket.recv(4096).decode()))

    def close(self) -> None:
        self._stop = True
        self._thread.join(10)
        self._socket.close()

    def count(self, text: str, since: float = 0.0) -> int:
        return sum(1 for when, what in self.told if what == text and when >= since)


@contextlib.contextmanager
def frozen(place: Path) -> Iterator[None]:
    subprocess.run(["fsfreeze", "--freeze", place], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "--unfreeze", place], check=True)


def test_a_hung_loop_starves_the_watchdog_and_says_so_everywhere(tmp_path):
    manager = Manager(tmp_path / "notify")
    with contextlib.ExitStack() as stack:
        stack.callback(manager.close)

        def prepare(pair: Pair) -> None:
            stack.enter_context(disk(tmp_path / "image", pair.primary_store, 64 << 20))

        options = ["--metrics", "127.0.0.1:0"]
        pair = Pair(mount_arguments=options, start=False)
        stack.callback(pair.clean_up)
        prepare(pair)
        pair.mount.environ = {"NOTIFY_SOCKET": str(manager.path), "WATCHDOG_USEC": "400000"}
        pair.start()
        assert manager.count("READY=1") == 1
        wait_for(lambda: manager.count("WATCHDOG=1") >= 3, what="the watchdog to be fed")
        url = f"http://{pair.mount.status()['metrics']}/metrics"

        def write() -> None:
            (pair.mountpoint / "file").write_bytes(b"x")

        writer = threading.Thread(target=write)
        with frozen(pair.primary_store):
            writer.start()
            wait_for(lambda: pair.mount.status()["hung"], 20, "the status to say that it hangs")
            done = pair.mount.replfs("status", pair.mount.target, check=False)
            assert done.returncode == ExitCode.DOWN
            assert "event loop      has not moved for " in done.stdout
            done = pair.mount.replfs("sync", pair.mount.target, check=False)
            assert done.returncode == ExitCode.DOWN
            assert "the node hangs: its event loop has not moved" in done.stderr
            with urllib.request.urlopen(url, timeout=10) as answer:
                assert f'replfs_hung{{store="{pair.primary_store}"}} 1\n' in answer.read().decode()
            since = time.monotonic()
            time.sleep(1.0)  # five times as long as between two of its meals
            assert manager.count("WATCHDOG=1", since) == 0
        writer.join(30)
        since = time.monotonic()
        wait_for(lambda: manager.count("WATCHDOG=1", since), what="the watchdog to be fed again")
        assert pair.mount.status()["hung"] is False
        pair.assert_equal()
        assert manager.count("STOPPING=1") == 0
        assert pair.mount.stop() == 0
        assert manager.count("STOPPING=1") == 1
        os.stat(pair.primary_store / "file")
