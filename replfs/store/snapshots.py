"""Snapshots of STORE, where its file system can make them.

Two providers behind one interface: `btrfs`, where STORE is a subvolume, and `live`, which has
none to give. A snapshot is a read-only subvolume in STORE/.replfs/snapshots; making and removing
one takes no time that depends on how much is in it, but may wait for the disk: call it in a thread.

Source: btrfs-ioctl(2) (BTRFS_IOC_SNAP_CREATE_V2, BTRFS_IOC_SNAP_DESTROY), linux/btrfs.h.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
from typing import Final, Protocol

from replfs.store.state import RESERVED

BEFORE_RESYNC: Final = "before-resync"
"""A replica's state before the resync that is going on."""
BASELINE: Final = "baseline"
"""A primary's state when the baseline that is going on began."""

_DIRECTORY: Final = "snapshots"
_SUBVOLUME_INO: Final = 256
"""Relies on: so is the root of every btrfs subvolume numbered (BTRFS_FIRST_FREE_OBJECTID)."""
_SNAP_DESTROY: Final = 0x5000940F
_SNAP_CREATE_V2: Final = 0x50009417
_SUBVOL_GETFLAGS: Final = 0x80089419
"""_IOR: answers on btrfs alone."""
_READ_ONLY: Final = 2
_ARGS: Final = struct.Struct("=q4088s")
_ARGS_V2: Final = struct.Struct("=qQQ32x4040s")


class Snapshots(Protocol):
    """What STORE's file system offers."""

    provider: str
    """`btrfs` or `live`, for people."""

    def take(self, name: str) -> bool:
        """Make the snapshot *name* unless there is one; False: this store has none to give.

        Raises:
            OSError: it could not be made (ENOSPC, EDQUOT).
        """

    def drop(self, name: str) -> None:
        """Remove the snapshot *name*, if there is one. Raises OSError."""

    def open(self, name: str) -> int | None:
        """A descriptor of the snapshot's root, the caller's to close; None: there is none."""

    def place(self, name: str) -> str | None:
        """Where the snapshot is, as a path below STORE; None: there is none."""


class Live:
    """A store without snapshots."""

    provider = "live"

    def take(self, name: str) -> bool:
        """None is to be had."""
        del name
        return False

    def drop(self, name: str) -> None:
        """There is none."""

    def open(self, name: str) -> int | None:
        """There is none."""
        del name
        return None

    def place(self, name: str) -> str | None:
        """Nowhere."""
        del name
        return None


class Btrfs:
    """A store that is a btrfs subvolume."""

    provider = "btrfs"

    def __init__(self, root_fd: int) -> None:
        self._root = root_fd

    def take(self, name: str) -> bool:
        """See `Snapshots.take`."""
        with contextlib.suppress(FileExistsError):
            os.mkdir(f"{RESERVED}/{_DIRECTORY}", 0o700, dir_fd=self._root)
        place = self._directory()
        try:
            with contextlib.suppress(FileExistsError):
                arguments = bytearray(_ARGS_V2.pack(self._root, 0, _READ_ONLY, name.encode()))
                fcntl.ioctl(place, _SNAP_CREATE_V2, arguments)
        finally:
            os.close(place)
        return True

    def drop(self, name: str) -> None:
        """See `Snapshots.drop`."""
        try:
            place = self._directory()
        except FileNotFoundError:
            return
        try:
            with contextlib.suppress(FileNotFoundError):
                fcntl.ioctl(place, _SNAP_DESTROY, bytearray(_ARGS.pack(0, name.encode())))
        finally:
            os.close(place)

    def open(self, name: str) -> int | None:
        """See `Snapshots.open`."""
        with contextlib.suppress(FileNotFoundError):
            return os.open(f"{RESERVED}/{_DIRECTORY}/{name}", _FLAGS, dir_fd=self._root)
        return None

    def place(self, name: str) -> str | None:
        """See `Snapshots.place`."""
        path = f"{RESERVED}/{_DIRECTORY}/{name}"
        try:
            os.stat(path, dir_fd=self._root, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return path

    def _directory(self) -> int:
        return os.open(f"{RESERVED}/{_DIRECTORY}", _FLAGS, dir_fd=self._root)


_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def snapshots_of(root_fd: int) -> Snapshots:
    """The provider for the STORE that *root_fd* is open on."""
    if os.fstat(root_fd).st_ino != _SUBVOLUME_INO:
        return Live()
    try:
        fcntl.ioctl(root_fd, _SUBVOL_GETFLAGS, b"\0" * 8)
    except OSError as error:
        if error.errno in {errno.ENOTTY, errno.EINVAL, errno.EOPNOTSUPP}:
            return Live()
        raise
    return Btrfs(root_fd)
