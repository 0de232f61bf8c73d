"""The run directory: where control sockets and logs are, and how STORE and MOUNTPOINT name them.

A file name is made from the path *as text*. Nothing here stats or resolves a mountpoint, because
a mount that hangs would hang the one who asks why.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import stat
from typing import Final

from replfs.errors import UsageError

StrPath = str | os.PathLike[str]

SYSTEM_RUNDIR: Final = "/run/replfs"


def default_rundir() -> str:
    """`$REPLFS_RUNDIR`, else /run/replfs for root, else the user's own run directory."""
    chosen = os.environ.get("REPLFS_RUNDIR")
    if chosen:
        return os.path.abspath(chosen)
    if os.geteuid() == 0:
        return SYSTEM_RUNDIR
    base = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    return f"{base}/replfs" if os.path.isdir(base) else f"/tmp/replfs-{os.geteuid()}"  # noqa: S108


def make_rundir(rundir: StrPath) -> str:
    """Create the run directory, mode 0700, and refuse one that somebody else owns.

    Raises:
        UsageError: it cannot be made, or is another user's.
    """
    path = os.path.abspath(rundir)
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        status = os.lstat(path)
    except OSError as error:
        raise UsageError(
            f"run directory {path}: {error.strerror}; choose another with --rundir"
        ) from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise UsageError(f"run directory {path} is not yours; choose another with --rundir")
    return path


def check_file(path: str) -> str:
    """*path*, where replfs makes a file or has one: nothing else may be there.

    Raises:
        UsageError: something is, which a node would wait for, or fail at.
    """
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UsageError(f"{path} is no file; move it away, it is made anew")
    return path


def file_stem(path: str) -> str:
    """The name, without its ending, of the files that belong to a STORE or a MOUNTPOINT."""
    path = os.path.abspath(path)
    words = re.sub(r"[^A-Za-z0-9._-]+", "-", path).strip("-.")[-40:].lstrip("-.") or "root"
    return f"{words}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def names_of(store: str, mountpoint: str | None) -> list[str]:
    """The socket's name, and the names that shall lead to it. Called before anything is mounted."""
    paths = [os.path.abspath(store), os.path.realpath(store)]
    if mountpoint is not None:
        parent, last = os.path.split(os.path.abspath(mountpoint))
        paths += [os.path.join(parent, last), os.path.join(os.path.realpath(parent), last)]
    return [f"{file_stem(path)}.sock" for path in dict.fromkeys(paths)]


def replfs_mounts() -> list[str]:
    """Where replfs is mounted, by mountinfo alone; the latest mount stands last."""
    # Imported only when it is needed: `replfs status` is to be quick.
    from replfs.front import mountinfo

    return [mount.path for mount in mountinfo.mount_points() if mount.fstype == mountinfo.FSTYPE]
