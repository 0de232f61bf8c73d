"""What is measured: each target is a directory on a fresh loop-mounted ext4 image.

A long-used disk changes create rates twentyfold; so every target's stores lie on images of one
kind, made for this run.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

_IMAGE_BYTES: Final = 2 << 30
_START_S: Final = 30.0


@contextlib.contextmanager
def fresh_image(base: Path, name: str) -> Iterator[Path]:
    """A new ext4 of 2 GiB (sparse), mounted."""
    image = base / f"{name}.img"
    with image.open("wb") as file:
        file.truncate(_IMAGE_BYTES)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    place = base / name
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", str(image), str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)
        image.unlink()


@contextlib.contextmanager
def ext4(base: Path) -> Iterator[Path]:
    """The file system beneath, no replica."""
    with fresh_image(base, "ext4") as place:
        yield place


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def _node(arguments: list[str], base: Path, name: str) -> Iterator[None]:
    with (base / f"{name}.log").open("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "replfs", *arguments, "-f", "--rundir", str(base / "run")],
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            until = time.monotonic() + _START_S
            while " is ready" not in (base / f"{name}.log").read_text():
                if process.poll() is not None or time.monotonic() > until:
                    raise RuntimeError((base / f"{name}.log").read_text())
                time.sleep(0.05)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def replfs(base: Path, *options: str, peers: int = 1) -> Iterator[Path]:
    """A mount with *peers* peers over loopback, all stores on one disk each of its own image."""
    with contextlib.ExitStack() as stack:
        mount = base / "mount"
        mount.mkdir()
        store = stack.enter_context(fresh_image(base, "primary")) / "store"
        store.mkdir()
        dial = []
        for index in range(peers):
            image = stack.enter_context(fresh_image(base, f"secondary{index}")) / "store"
            image.mkdir()
            endpoint = f"tcp://127.0.0.1:{_free_port()}"
            stack.enter_context(
                _node(["agent", str(image), "--listen", endpoint], base, f"agent{index}")
            )
            dial += ["--peer", f"p{index}={endpoint}"]
        stack.enter_context(
            _node(["mount", str(store), str(mount), *dial, *options], base, "mounted")
        )
        yield mount


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A directory for one target, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="replfs-bench-") as name:
        os.chmod(name, 0o755)
        yield Path(name)
