"""Where a STORE stands: which machine, filesystem and directory, and since when it is mounted.

The first tells a store from a copy of it, which must not pass for the original. The second tells
whether the kernel that had a store's unwritten pages in memory, and the mount, are still the same.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from typing import Final

import msgspec

_FS_IOC_GETFSUUID: Final = 0x80111500
_BTRFS_IOC_INO_LOOKUP: Final = 0xD0009412
_ENOTTY: Final = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL})
_AT_EMPTY_PATH: Final = 0x1000
_STATX_MNT_ID_UNIQUE: Final = 0x4000
_STATX_SIZE: Final = 256
_STATX_MNT_ID_OFFSET: Final = 144


class Binding(msgspec.Struct, frozen=True, kw_only=True):
    """Where a directory is; survives a reboot."""

    machine: str
    """Of /etc/machine-id, or empty."""
    filesystem: str
    """The filesystem's UUID, and the subvolume; empty where the kernel does not tell."""
    fsid: int
    """Of statfs(2)."""
    inode: int
    """Of the directory."""

    @classmethod
    def of(cls, directory: int) -> Binding:
        """The binding of an open directory.

        Raises:
            OSError: it cannot be asked.
        """
        return cls(
            machine=_first_line("/etc/machine-id"),
            filesystem=_filesystem_uuid(directory),
            fsid=os.fstatvfs(directory).f_fsid,
            inode=os.fstat(directory).st_ino,
        )

    def is_same_place(self, other: Binding) -> bool:
        """Whether both are one directory. A UUID counts before the fsid, which may change."""
        if (self.machine, self.inode) != (other.machine, other.inode):
            return False
        if self.filesystem and other.filesystem:
            return self.filesystem == other.filesystem
        return self.fsid == other.fsid

    def digest(self) -> bytes:
        """All of it as bytes, to compare with another node's: equal means the same directory."""
        return msgspec.msgpack.encode((self.machine, self.filesystem, self.fsid, self.inode))


def boot_id() -> str:
    """Names this boot of the kernel."""
    return _first_line("/proc/sys/kernel/random/boot_id")


def mount_id(directory: int) -> str:
    """Names this mount of the filesystem that *directory* is on, as exactly as the kernel can."""
    device = os.fstat(directory).st_dev
    unique = _unique_mount_id(directory)
    if unique:
        return f"{device}:unique:{unique}"
    # Kernels before 6.8 give a number that a later mount may get again.
    return f"{device}:{_mount_number(directory)}"


def _mount_number(directory: int) -> str:
    with open(f"/proc/self/fdinfo/{directory}", encoding="ascii") as lines:
        for line in lines:
            if line.startswith("mnt_id:"):
                return line.split()[1]
    return ""


def _unique_mount_id(directory: int) -> int:
    """STATX_MNT_ID_UNIQUE, or 0 where the kernel or the C library does not know it."""
    statx = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    if statx is None:
        return 0
    answer = ctypes.create_string_buffer(_STATX_SIZE)
    if statx(directory, b"", _AT_EMPTY_PATH, _STATX_MNT_ID_UNIQUE, answer) != 0:
        return 0
    if not int.from_bytes(answer.raw[:4], "little") & _STATX_MNT_ID_UNIQUE:
        return 0
    field = answer.raw[_STATX_MNT_ID_OFFSET : _STATX_MNT_ID_OFFSET + 8]
    return int.from_bytes(field, "little")


def _filesystem_uuid(directory: int) -> str:
    answer = bytearray(17)
    try:
        fcntl.ioctl(directory, _FS_IOC_GETFSUUID, answer)
    except OSError:
        # Before Linux 6.9, and filesystems without one.
        return ""
    uuid = bytes(answer[1 : 1 + answer[0]])
    if not any(uuid):
        return ""
    # A btrfs snapshot has the UUID and the inode numbers of its original.
    lookup = bytearray(4096)
    lookup[8:16] = (256).to_bytes(8, "little")
    try:
        fcntl.ioctl(directory, _BTRFS_IOC_INO_LOOKUP, lookup)
    except OSError as error:
        # Anything else is a btrfs that does not tell the subvolume: its fsid does.
        return uuid.hex() if error.errno in _ENOTTY else ""
    return f"{uuid.hex()}:{int.from_bytes(lookup[:8], 'little')}"


def _first_line(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            return file.readline().strip()
    except FileNotFoundError:
        return ""
