"""POSIX ACLs in the form of the `system.posix_acl_*` xattrs (acl(5), linux/posix_acl_xattr.h)."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping

ACCESS = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"
VERSION = 2
USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
NO_ID = 0xFFFFFFFF

Entries = dict[tuple[int, int], int]


def pack(
    owner: int,
    group: int,
    other: int,
    *,
    users: Mapping[int, int] | None = None,
    groups: Mapping[int, int] | None = None,
    mask: int | None = None,
) -> bytes:
    """An ACL; each permission is a digit 0 to 7.

    Where a mask is needed and none is given it is the union of what it limits.
    """
    users, groups = users or {}, groups or {}
    if mask is None and (users or groups):
        mask = group
        for permissions in (*users.values(), *groups.values()):
            mask |= permissions
    entries = [(USER_OBJ, owner, NO_ID)]
    entries += [(USER, permissions, uid) for uid, permissions in sorted(users.items())]
    entries += [(GROUP_OBJ, group, NO_ID)]
    entries += [(GROUP, permissions, gid) for gid, permissions in sorted(groups.items())]
    if mask is not None:
        entries += [(MASK, mask, NO_ID)]
    entries += [(OTHER, other, NO_ID)]
    return struct.pack("<I", VERSION) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def unpack(value: bytes) -> Entries:
    """(tag, id) -> permissions."""
    entries = struct.iter_unpack("<HHI", value[4:])
    return {(tag, identity): permissions for tag, permissions, identity in entries}


def get(path: str | os.PathLike[str], name: str = ACCESS) -> Entries:
    """The ACL of `path` as (tag, id) -> permissions."""
    return unpack(os.getxattr(path, name))


def has(path: str | os.PathLike[str], name: str = ACCESS) -> bool:
    """Whether `path` has this ACL."""
    return name in os.listxattr(path)
