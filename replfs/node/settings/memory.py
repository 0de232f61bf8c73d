"""What a node keeps in memory of its STORE, beyond its process: files on tmpfs, and whose they are.

They survive a kill, and no fault of STORE can touch them. Their names are made from what binds
STORE to this machine, which tells nobody where it is; a file `store-PLACE` beside them therefore
holds its path, and is locked as long as a node runs on it. Those of a node that was killed and
never started again stay until somebody takes them away (`replfs doctor --fix`).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from typing import Final, NamedTuple

from replfs.errors import UsageError
from replfs.front import mountinfo
from replfs.node.settings.rundir import check_file, make_rundir

_OWNER: Final = "store-"
_KINDS: Final = ("activity-", "progress-")


class Memory:
    """The files of one STORE."""

    def __init__(self, rundir: str, store: str) -> None:
        self._rundir = rundir
        self._store = store
        self._owner: int | None = None
        self._owner_path = ""

    def path(self, what: str, binding: bytes) -> str:
        """Where a file of this store is that is to survive the process, and no more.

        Raises:
            UsageError: something else stands there.
        """
        place = hashlib.sha256(binding).hexdigest()[:16]
        directory = memory_directory(self._rundir)
        if self._owner is None:
            self._claim(check_file(f"{directory}/{_OWNER}{place}"))
        return check_file(f"{directory}/{what}-{place}")

    def _claim(self, path: str) -> None:
        """Say whose the files are; without room for that nobody can take them away."""
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            self._owner, self._owner_path = fd, path
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.write(fd, os.fsencode(self._store))

    def close(self, *, clean: bool) -> None:
        """The node ends; *clean*: its files are gone already."""
        owner, self._owner = self._owner, None
        if owner is None:
            return
        if clean:
            with contextlib.suppress(OSError):
                os.unlink(self._owner_path)
        os.close(owner)


class Leftover(NamedTuple):
    """The files of a store that is not there, and that no node has."""

    store: str
    paths: list[str]

    def remove(self) -> None:
        """Take them away. Raises OSError."""
        for path in self.paths:
            os.unlink(path)


def leftovers(rundir: str) -> Iterator[Leftover]:
    """Of each store that is not where it was when its node was killed."""
    directory = memory_directory(rundir)
    for name in sorted(os.listdir(directory)):
        if not name.startswith(_OWNER):
            continue
        path = f"{directory}/{name}"
        with contextlib.suppress(OSError), open(path, "rb") as owner:
            fcntl.flock(owner, fcntl.LOCK_SH | fcntl.LOCK_NB)
            store = os.fsdecode(owner.read())
            if store and _is_gone(store):
                place = name.removeprefix(_OWNER)
                files = [f"{directory}/{kind}{place}" for kind in _KINDS]
                yield Leftover(store, [one for one in files if os.path.exists(one)] + [path])


def _is_gone(store: str) -> bool:
    """Not of one that cannot be looked at, beneath the dead mount that covers it say."""
    try:
        os.stat(f"{store}/.replfs")
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def memory_directory(rundir: str) -> str:
    """Where such files are: on tmpfs, in the run directory if that is, else in one's own."""
    # Anybody can make files in /dev/shm, under any name: one's own are in a directory of one's own.
    for candidate in (rundir, f"/dev/shm/replfs-{os.geteuid()}"):  # noqa: S108 - it is wanted
        with contextlib.suppress(OSError, UsageError):
            above = candidate if candidate == rundir else os.path.dirname(candidate)
            mount = mountinfo.find_mount(os.path.realpath(above))
            if mount is not None and mount.fstype == "tmpfs":
                return make_rundir(candidate)
    return rundir
