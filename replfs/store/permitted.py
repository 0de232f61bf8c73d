"""Doing to an object of one's own what its mode forbids: without root, the owner is refused, too.

A file of mode 0444 is written by whoever made it, through the descriptor of its making, and what is
written must reach a replica that has no such descriptor. Its owner may change the mode: so it is
changed for a moment, and back. Root is never refused, and this does nothing then.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat as _stat
from collections.abc import Callable
from typing import Final, TypeVar

from replfs.errors import StoreError
from replfs.store.record import PRIVILEGED

Result = TypeVar("Result")

WITHOUT_ROOT: Final = (
    "without root only your own files are replicated, to a peer with the same user number; no "
    "devices, nobody else sees the mount, and each call takes longer"
)
"""Said once, at the start."""


def check_owner(store: str, store_fd: int) -> None:
    """Refuse a store that another user's node has made: its records are where that one finds them.

    Raises:
        StoreError: it is another user's.
    """
    try:
        owner = os.stat(".replfs", dir_fd=store_fd, follow_symlinks=False).st_uid
    except OSError:
        return  # a new one, or one that cannot be used: that is found out in a moment
    if owner != os.geteuid():
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"user {owner}"
        raise StoreError(f"{store} is a store of {name}'s: serve it as {name}, as before")


def permitted(
    path: bytes | int, bits: int, work: Callable[[], Result], *, follow: bool = True
) -> Result:
    """What *work* returns; where it is refused, with *bits* (of the owner's) given for a moment.

    *path* is the object's, by way of /proc, or a descriptor of it; *follow*: it is a link in /proc
    to the object itself.

    Raises:
        OSError: as *work*, the second time.
    """
    try:
        return work()
    except PermissionError:
        if PRIVILEGED:
            raise
        found = os.stat(path, follow_symlinks=follow or isinstance(path, int))
        is_ours = found.st_uid == os.geteuid() and not _stat.S_ISLNK(found.st_mode)
        if not is_ours or not bits & ~found.st_mode:
            raise
    mode = _stat.S_IMODE(found.st_mode)
    os.chmod(path, mode | bits)
    try:
        return work()
    finally:
        with contextlib.suppress(OSError):
            os.chmod(path, mode)
