"""What each operation touches, and so which others it must not overtake.

| class    | operation                    | claims                                                |
| -------- | ---------------------------- | ----------------------------------------------------- |
| DATA     | write                        | bytes: from the offset (or the old end, if earlier, of a file it extends) to the end of the write |
| DATA     | truncate (setattr, O_TRUNC)  | bytes: from the smaller of old and new size to the end |
| METADATA | create, mkdir, mknod, symlink| the entry; the parent, shared                          |
| METADATA | link                         | the entry; the parent, shared; the object              |
| METADATA | unlink, rmdir                | the entry; the parent, shared; the object              |
| METADATA | rename                       | both entries; both parents, shared; the object; what it replaces |
| METADATA | setattr (mode, owner, times) | the object                                             |
| METADATA | setxattr, removexattr        | the object                                             |
| BARRIER  | fsync, fdatasync, policy     | the object                                             |
| LOCAL    | lookup, getattr, read, readdir, readlink, statfs, getxattr, listxattr, access; anything on an object without names | nothing |

"The object" is claimed exclusively: such an operation is *dependent* when something on the same
object is in flight (it waits until that has drained), and *independent*, waiting for nothing, when
not. Whether it is the one or the other is therefore not written anywhere: the scheduler finds out.
A parent is claimed shared, so that operations on different names of one directory run together,
and none of them overtakes a chmod, an rmdir or a rename of the directory itself.
"""  # noqa: E501 - the table's rows

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable
from typing import Final

from replfs.core.scheduler import END, EXCLUSIVE, RANGE, SHARED, Claim


class OpClass(enum.Enum):
    """The classes of operation."""

    DATA = "data"
    METADATA = "metadata"
    BARRIER = "barrier"
    LOCAL = "local"


CLASSES: Final[dict[str, OpClass]] = {
    "write": OpClass.DATA,
    "truncate": OpClass.DATA,
    "create": OpClass.METADATA,
    "mkdir": OpClass.METADATA,
    "mknod": OpClass.METADATA,
    "symlink": OpClass.METADATA,
    "link": OpClass.METADATA,
    "unlink": OpClass.METADATA,
    "rmdir": OpClass.METADATA,
    "rename": OpClass.METADATA,
    "setattr": OpClass.METADATA,
    "setxattr": OpClass.METADATA,
    "removexattr": OpClass.METADATA,
    "fsync": OpClass.BARRIER,
    "fsyncdir": OpClass.BARRIER,
    "policy": OpClass.BARRIER,
    "lookup": OpClass.LOCAL,
    "getattr": OpClass.LOCAL,
    "read": OpClass.LOCAL,
    "readdir": OpClass.LOCAL,
    "readlink": OpClass.LOCAL,
    "statfs": OpClass.LOCAL,
    "getxattr": OpClass.LOCAL,
    "listxattr": OpClass.LOCAL,
    "access": OpClass.LOCAL,
}


def data(obj: Hashable, start: int, stop: int = END) -> tuple[Claim, ...]:
    """Bytes [start, stop) of *obj*."""
    return ((obj, RANGE, start, stop),)


def whole(obj: Hashable) -> tuple[Claim, ...]:
    """*obj* itself: attributes, xattrs, barriers."""
    return ((obj, EXCLUSIVE, 0, 0),)


def entry(parent: Hashable, name: bytes) -> tuple[Claim, ...]:
    """A directory entry that is made, with no object there yet."""
    return (((parent, name), EXCLUSIVE, 0, 0), (parent, SHARED, 0, 0))


def entry_of(parent: Hashable, name: bytes, obj: Hashable) -> tuple[Claim, ...]:
    """A directory entry and the object it names: link, unlink, rmdir."""
    return (((parent, name), EXCLUSIVE, 0, 0), (parent, SHARED, 0, 0), (obj, EXCLUSIVE, 0, 0))


def rename(
    parent: Hashable,
    name: bytes,
    new_parent: Hashable,
    new_name: bytes,
    obj: Hashable,
    replaced: Hashable | None,
) -> tuple[Claim, ...]:
    """Both entries, both parents, the object, and what it replaces or is exchanged with.

    A key is claimed once, at its strongest: renaming a directory into its own parent's place
    claims that parent exclusively, not twice.
    """
    exclusive: list[Hashable] = [(parent, name), (new_parent, new_name), obj]
    if replaced is not None:
        exclusive.append(replaced)
    claims = [(key, EXCLUSIVE, 0, 0) for key in exclusive]
    return together([*claims, (parent, SHARED, 0, 0), (new_parent, SHARED, 0, 0)])


def together(claims: Iterable[Claim]) -> tuple[Claim, ...]:
    """What is claimed of whole objects and entries: each key once, at its strongest."""
    strongest: dict[Hashable, Claim] = {}
    for claim in claims:
        if claim[1] > strongest.setdefault(claim[0], claim)[1]:
            strongest[claim[0]] = claim
    return tuple(strongest.values())
