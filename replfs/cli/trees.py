"""Comparing two directory trees, and filling one: what `replfs demo` shows and checks.

Two trees are equal if names, types, contents, modes, owners, modification times (in nanoseconds),
link structure, link targets, device numbers and extended attributes are. Access and change times
are each side's own. What belongs to replfs itself is left out: `.replfs` at the top, and the
attributes that carry object ids.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sysconfig
import threading
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

RESERVED: Final = ".replfs"
HIDDEN_XATTRS: Final = ("trusted.replfs", "user.replfs")
CHUNK: Final = 1 << 17
NEW_FILES: Final = 100
"""How many files `change` adds."""


class Stopped(Exception):
    """The work was told to stop."""


class Work:
    """How far a piece of work has come. One thread counts, another shows."""

    def __init__(self) -> None:
        self.files = 0
        self.files_total = 0
        self.bytes = 0
        self.stop = threading.Event()

    def step(self, count: int = 0) -> None:
        """One more object with *count* bytes is done.

        Raises:
            Stopped: it is to stop.
        """
        self.files += 1
        self.bytes += count
        if self.stop.is_set():
            raise Stopped


class Description(NamedTuple):
    """All of an object that both sides have in common; `first_name` tells hard links apart."""

    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    device: int
    links: int
    first_name: str
    content: str
    xattrs: tuple[tuple[str, bytes], ...]


def describe(top: str, work: Work) -> dict[str, Description]:
    """Every object below *top* by its path, and *top* itself as `.`."""
    found: dict[str, Description] = {}
    first_names: dict[tuple[int, int], str] = {}
    for path in _paths(top):
        full = os.path.join(top, path)
        status = os.lstat(full)
        is_directory = stat.S_ISDIR(status.st_mode)
        first = path
        if not is_directory:
            first = first_names.setdefault((status.st_dev, status.st_ino), path)
        found[path] = Description(
            mode=status.st_mode,
            uid=status.st_uid,
            gid=status.st_gid,
            size=0 if is_directory else status.st_size,
            mtime_ns=status.st_mtime_ns,
            device=status.st_rdev,
            # A store's top directory has one more: `.replfs`.
            links=0 if is_directory else status.st_nlink,
            first_name=first,
            content=_content(full, status.st_mode),
            xattrs=_xattrs(full),
        )
        work.step(0 if is_directory else status.st_size)
    return found


def _paths(top: str) -> Iterator[str]:
    yield "."
    for directory, directories, files in os.walk(top):
        if directory == top and RESERVED in directories:
            directories.remove(RESERVED)
        directories.sort()
        base = os.path.relpath(directory, top)
        for name in sorted([*directories, *files]):
            yield name if base == "." else f"{base}/{name}"


def _content(path: str, mode: int) -> str:
    if stat.S_ISLNK(mode):
        return os.readlink(path)
    if not stat.S_ISREG(mode):
        return ""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _xattrs(path: str) -> tuple[tuple[str, bytes], ...]:
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return tuple(
        (name, os.getxattr(path, name, follow_symlinks=False))
        for name in names
        if not name.startswith(HIDDEN_XATTRS)
    )


def differences(ours: dict[str, Description], theirs: dict[str, Description]) -> list[str]:
    """One line for each path that is not the same on both sides."""
    lines = []
    for path in sorted(ours.keys() | theirs.keys()):
        mine, other = ours.get(path), theirs.get(path)
        if mine is None or other is None:
            lines.append(f"{path}: only on the {'peer' if mine is None else 'primary'}")
        elif mine != other:
            fields = [f for f in Description._fields if getattr(mine, f) != getattr(other, f)]
            lines.append(f"{path}: {', '.join(fields)}")
    return lines


# Filling -----------------------------------------------------------------------------------------


def sample(count: int) -> list[str]:
    """*count* files of Python's standard library, as paths relative to `sample_top()`."""
    found: list[str] = []
    top = sample_top()
    for directory, directories, files in os.walk(top):
        directories[:] = sorted(
            d for d in directories if d not in {"site-packages", "dist-packages"}
        )
        for name in sorted(files):
            path = os.path.join(directory, name)
            if os.path.isfile(path) and os.access(path, os.R_OK):
                found.append(os.path.relpath(path, top))
                if len(found) == count:
                    return found
    return found


def sample_top() -> str:
    """Where Python's standard library is."""
    return sysconfig.get_path("stdlib")


def copy_in(target: str, paths: list[str], work: Work) -> None:
    """Copy *paths* of the sample below *target*, as `cp -a` would, and one of each special case."""
    work.files_total = len(paths)
    top = sample_top()
    for path in paths:
        source, destination = os.path.join(top, path), os.path.join(target, path)
        os.makedirs(os.path.dirname(destination), exist_ok=True)
        count = _copy(source, destination)
        work.step(count)
    special = os.path.join(target, "special")
    os.mkdir(special)
    os.chmod(special, 0o2775)
    with open(f"{special}/hole", "wb") as file:
        file.truncate(8 << 20)
        file.seek(5 << 20)
        file.write(b"an island\n")
    with open(f"{special}/two names", "w", encoding="utf-8") as file:
        file.write("one file\n")
    os.link(f"{special}/two names", f"{special}/zwei Namen \u00e4\u00f6\u00fc")
    os.symlink("two names", f"{special}/link")
    os.mkfifo(f"{special}/fifo", 0o640)
    os.setxattr(f"{special}/two names", "user.comment", b"kept as well")
    os.utime(f"{special}/two names", ns=(1, -1_000_000_001))


def _copy(source: str, destination: str) -> int:
    count = 0
    with open(source, "rb") as reader, open(destination, "wb") as writer:
        while chunk := reader.read(CHUNK):
            writer.write(chunk)
            count += len(chunk)
    status = os.stat(source)
    os.chmod(destination, stat.S_IMODE(status.st_mode))
    os.utime(destination, ns=(status.st_atime_ns, status.st_mtime_ns))
    return count


def change(target: str, paths: list[str], work: Work) -> None:
    """Change much of what `copy_in` made: data, names, attributes, and things that come and go."""
    actions: list[Callable[[str], None]] = [_append, _overwrite, _shorten, _chmod, _remove]
    chosen = paths[:: max(1, len(paths) // 300)]
    work.files_total = len(chosen) + NEW_FILES
    for index, path in enumerate(chosen):
        actions[index % len(actions)](os.path.join(target, path))
        work.step()
    os.makedirs(f"{target}/new/and/deep")
    for index in range(NEW_FILES):
        with open(f"{target}/new/and/deep/{index}", "w", encoding="utf-8") as file:
            file.write(f"written while the peer was away: {index}\n" * 100)
        work.step()
    os.rename(f"{target}/special", f"{target}/new/renamed")
    os.unlink(f"{target}/new/renamed/link")
    os.symlink("elsewhere", f"{target}/new/renamed/link")
    os.rename(f"{target}/new/and", f"{target}/and")


def _append(path: str) -> None:
    with open(path, "ab") as file:
        file.write(b"\n# appended\n")


def _overwrite(path: str) -> None:
    with open(path, "r+b") as file:
        file.write(b"overwritten")


def _shorten(path: str) -> None:
    os.truncate(path, os.stat(path).st_size // 2)


def _chmod(path: str) -> None:
    os.chmod(path, 0o600)


def _remove(path: str) -> None:
    os.unlink(path)
