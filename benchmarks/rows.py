"""The benchmark rows: what is done in a directory, and in what unit it is counted.

Each row is a function of a fresh directory; it returns (amount, seconds) and leaves nothing that
the next row could trip over. Amounts are operations, or MB (10**6 bytes) where the unit says so.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

Outcome = tuple[float, float]
Row = Callable[[Path], Outcome]

_FILES: Final = 1000
_BLOCK: Final = os.urandom(4096)
_MB: Final = os.urandom(1 << 20)


def _timed(work: Callable[[], None], amount: float) -> Outcome:
    began = time.perf_counter()
    work()
    return amount, time.perf_counter() - began


def _make_files(place: Path, count: int) -> None:
    for index in range(count):
        (place / f"f{index}").write_bytes(_BLOCK[:1024])


def create(place: Path) -> Outcome:
    """create + write 1 KiB + close, files/s."""
    return _timed(lambda: _make_files(place, _FILES), _FILES)


def rename(place: Path) -> Outcome:
    """rename within a directory, ops/s."""
    _make_files(place, _FILES)

    def work() -> None:
        for index in range(_FILES):
            os.rename(place / f"f{index}", place / f"g{index}")

    return _timed(work, _FILES)


def chmod(place: Path) -> Outcome:
    """chmod, ops/s."""
    _make_files(place, _FILES)

    def work() -> None:
        for index in range(_FILES):
            os.chmod(place / f"f{index}", 0o640)

    return _timed(work, _FILES)


def unlink(place: Path) -> Outcome:
    """unlink, ops/s."""
    _make_files(place, _FILES)

    def work() -> None:
        for index in range(_FILES):
            os.unlink(place / f"f{index}")

    return _timed(work, _FILES)


def _random_writes(path: Path, count: int, seed: int, *, sync: bool = False) -> None:
    offsets = random.Random(seed)  # noqa: S311 - repeatable, not secret
    fd = os.open(path, os.O_RDWR)
    try:
        for _ in range(count):
            os.pwrite(fd, _BLOCK, offsets.randrange(8192) * 4096)
            if sync:
                os.fsync(fd)
    finally:
        os.close(fd)


def _big_file(place: Path) -> Path:
    path = place / "big"
    with path.open("wb") as file:
        for _ in range(32):
            file.write(_MB)
    return path


def write_4k(place: Path) -> Outcome:
    """4 KiB random pwrite, one writer, ops/s."""
    path = _big_file(place)
    return _timed(lambda: _random_writes(path, 5000, 1), 5000)


def write_4k_fsync(place: Path) -> Outcome:
    """4 KiB random pwrite + fsync each, ops/s."""
    path = _big_file(place)
    return _timed(lambda: _random_writes(path, 300, 2, sync=True), 300)


def write_4k_x4(place: Path) -> Outcome:
    """4 KiB random pwrite, four writers on four files, ops/s."""
    paths = []
    for index in range(4):
        (place / str(index)).mkdir()
        paths.append(_big_file(place / str(index)))

    def work() -> None:
        threads = [
            threading.Thread(target=_random_writes, args=(path, 2000, index))
            for index, path in enumerate(paths)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return _timed(work, 8000)


def append_1k(place: Path) -> Outcome:
    """append 1 KiB, ops/s."""

    def work() -> None:
        fd = os.open(place / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for _ in range(3000):
            os.write(fd, _BLOCK[:1024])
        os.close(fd)

    return _timed(work, 3000)


def _sequential(place: Path, size: int) -> Outcome:
    count = (128 << 20) // size

    def work() -> None:
        fd = os.open(place / "seq", os.O_WRONLY | os.O_CREAT, 0o644)
        for _ in range(count):
            os.write(fd, _MB[:size])
        os.close(fd)

    return _timed(work, count * size / 1e6)


def write_seq_1m(place: Path) -> Outcome:
    """sequential write in 1 MiB, MB/s."""
    return _sequential(place, 1 << 20)


def write_seq_128k(place: Path) -> Outcome:
    """sequential write in 128 KiB, MB/s."""
    return _sequential(place, 128 << 10)


def stat_cached(place: Path) -> Outcome:
    """stat of known files, ops/s."""
    _make_files(place, _FILES)

    def work() -> None:
        for _ in range(5):
            for index in range(_FILES):
                os.stat(place / f"f{index}")

    return _timed(work, 5 * _FILES)


def read_small(place: Path) -> Outcome:
    """open + read + close of small cached files, ops/s."""
    _make_files(place, _FILES)

    def work() -> None:
        for _ in range(2):
            for index in range(_FILES):
                with open(place / f"f{index}", "rb", buffering=0) as file:
                    file.read()

    return _timed(work, 2 * _FILES)


def _tree() -> Path:
    import json  # any package of the standard library knows where the library is

    return Path(json.__file__).parent.parent


def copy_tree(place: Path) -> Outcome:
    """cp -a of parts of Python's library, files/s."""
    library = _tree()
    parts = [library / name for name in ("json", "email", "asyncio", "unittest", "idlelib")]
    count = sum(len(files) for part in parts for _, _, files in os.walk(part))
    return _timed(
        lambda: void(subprocess.run(["cp", "-a", *map(str, parts), str(place)], check=True)), count
    )


def remove_tree(place: Path) -> Outcome:
    """rm -rf of the same, files/s."""
    amount, _ = copy_tree(place)
    return _timed(lambda: [shutil.rmtree(child) for child in place.iterdir()] and None, amount)


def void(_: object) -> None:
    """For expressions whose value does not matter."""


ROWS: Final[dict[str, Row]] = {
    "create": create,
    "rename": rename,
    "chmod": chmod,
    "unlink": unlink,
    "write_4k": write_4k,
    "write_4k_x4": write_4k_x4,
    "write_4k_fsync": write_4k_fsync,
    "append_1k": append_1k,
    "write_seq_1m": write_seq_1m,
    "write_seq_128k": write_seq_128k,
    "stat_cached": stat_cached,
    "read_small": read_small,
    "copy_tree": copy_tree,
    "remove_tree": remove_tree,
}
