"""What must hold of two stores and what is recorded of their difference.

`Snapshot` reads a store as a person would, with the hidden records. `not_covered` lists every
difference between two of them that no mark stands for: there must be none, ever. `differences`
lists every one: there must be none in sync.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from helpers.compare import compare_trees, read_xattrs

from replfs.core.dirty import DirtyLog
from replfs.core.policy import Policy
from replfs.core.regions import REGION_SHIFT, REGION_SIZE
from replfs.store import record
from replfs.store.activity import KIND_ATTRS, KIND_DATA, KIND_FILE, KIND_NAMES
from replfs.store.record import INCOMPLETE, ROOT_ID

ACTIVITY_SHIFT = 20
Slots = set[tuple[bytes, int, int]]
"""(object, kind, region): what is in flight."""


@dataclass(eq=False)
class Seen:
    """One object of a store."""

    path: bytes
    status: os.stat_result
    identity: bytes
    flags: int
    policy: int
    ack: int
    xattrs: dict[str, bytes]
    target: str = ""
    names: dict[bytes, Seen] = field(default_factory=dict)
    data: bytes = b""
    links: list[bytes] = field(default_factory=list)
    """All paths that are the same object, and replicated."""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.status.st_mode)

    @property
    def is_complete(self) -> bool:
        return not self.flags & INCOMPLETE

    def attributes(self) -> dict[str, object]:
        """All that is promised to be equal, besides names and data."""
        status = self.status
        found: dict[str, object] = {
            "type": stat.S_IFMT(status.st_mode),
            "owner": (status.st_uid, status.st_gid),
            "mtime": status.st_mtime_ns,
            "xattrs": self.xattrs,
            "target": self.target,
            "policy": (self.policy, self.ack),
        }
        if not stat.S_ISLNK(status.st_mode):
            found["mode"] = stat.S_IMODE(status.st_mode)
        if stat.S_ISREG(status.st_mode):
            found["size"] = status.st_size
        if stat.S_ISBLK(status.st_mode) or stat.S_ISCHR(status.st_mode):
            found["device"] = status.st_rdev
        return found


class Snapshot:
    """A store at one moment, without what has policy `none` if it is a primary's."""

    def __init__(self, root: bytes, *, primary: bool, root_counts: bool = True) -> None:
        """*root_counts*: where the root has policy `none`, so has everything."""
        self.by_id: dict[bytes, Seen] = {}
        self.by_path: dict[bytes, Seen] = {}
        self.unreplicated: set[bytes] = set()
        """Paths left out because of policy `none`."""
        self.twice: list[str] = []
        """Objects that claim an id which another has."""
        self._by_ino: dict[int, Seen] = {}
        self._primary = primary
        self.root = self._see(root, b"")
        self.root.identity = ROOT_ID
        self.by_id[ROOT_ID] = self.root
        own = self.root.policy
        self._walk(root, self.root, none=primary and root_counts and own == Policy.NONE)

    def of_replica(self, root: bytes, *, was_primary: bool) -> Snapshot:
        """The store of a replica of this primary, without what is that node's own.

        What has policy `none` belongs to its node, and stays when that is a primary no more. The
        root is one on all stores: it is what the primary says.
        """
        is_all_none = self.root.policy == Policy.NONE
        return Snapshot(root, primary=was_primary, root_counts=is_all_none)

    def _see(self, full: bytes, path: bytes) -> Seen:
        status = os.lstat(full)
        try:
            value = os.getxattr(full, record.XATTR, follow_symlinks=False)
        except OSError:
            value = b""
        own = record.unpack(value, status.st_ino) or record.Record(b"", 0, 0, 0)
        seen = Seen(path, status, own.object, own.flags, own.policy, own.ack, read_xattrs(full))
        if stat.S_ISLNK(status.st_mode):
            seen.target = os.readlink(os.fsdecode(full))
        elif stat.S_ISREG(status.st_mode):
            with open(full, "rb") as file:
                seen.data = file.read()
        return seen

    def _walk(self, full: bytes, directory: Seen, *, none: bool) -> None:
        for name in sorted(map(os.fsencode, os.listdir(full))):
            if not directory.path and name == b".replfs":
                continue
            path = directory.path + b"/" + name
            below = full + b"/" + name
            seen = self._by_ino.get(os.lstat(below).st_ino) or self._see(below, path)
            hidden = none or (self._primary and seen.policy == Policy.NONE)
            if hidden:
                self.unreplicated.add(path)
            else:
                self._by_ino[seen.status.st_ino] = seen
                seen.links.append(path)
                directory.names[name] = seen
                self.by_path[path] = seen
                if seen.identity:
                    if self.by_id.setdefault(seen.identity, seen) is not seen:
                        self.twice.append(
                            f"{path!r} has the id of {self.by_id[seen.identity].path!r}"
                        )
            if seen.is_directory:
                self._walk(below, seen, none=hidden)


def differences(left: Snapshot, right: Snapshot) -> list[str]:
    """Everything in which a replica differs from its primary."""
    found = [f"{path!r} is not there" for path in left.by_path.keys() - right.by_path.keys()]
    found += [f"{path!r} is there" for path in right.by_path.keys() - left.by_path.keys()]
    pairs = [] if left.root.policy == Policy.NONE else [(b"/", left.root, right.root)]
    pairs += [(path, left.by_path[path], right.by_path[path]) for path in left.by_path.keys()
              & right.by_path.keys()]  # fmt: skip
    for path, one, other in sorted(pairs, key=lambda pair: pair[0]):
        ours, theirs = one.attributes(), other.attributes()
        found += [
            f"{path!r}: {key}: {ours.get(key)!r} != {theirs.get(key)!r}"
            for key in ours.keys() | theirs.keys()
            if ours.get(key) != theirs.get(key)
        ]
        if one.data != other.data:
            found.append(f"{path!r}: data differs from byte {_first(one.data, other.data)}")
        if one.links != other.links:
            found.append(f"{path!r}: names {one.links} != {other.links}")
        if not other.is_complete:
            found.append(f"{path!r} is incomplete")
        if one.identity and one.identity != other.identity:
            found.append(f"{path!r}: id {one.identity.hex()} != {other.identity.hex()}")
    return found + right.twice


def compared(left: bytes, right: bytes, primary: Snapshot, other: Snapshot) -> list[str]:
    """The same by the other tests' comparison, less what policy leaves out."""
    found = []
    hidden = {path[1:] for path in primary.unreplicated | other.unreplicated}
    kept = _inodes(left + b"/.replfs/kept") | _inodes(right + b"/.replfs/kept")
    # What a promotion by force found there, in the middle of a resync, has a link more.
    kept |= _inodes(left + b"/.replfs/limbo")
    inodes = {os.lstat(left + path).st_ino for path in primary.unreplicated}
    inodes |= {os.lstat(right + path).st_ino for path in other.unreplicated}
    whole = primary.root.policy != Policy.NONE
    for one in compare_trees(left, right, root_attributes=whole):
        if one.path in hidden:
            continue
        if one.kind == "nlink":
            ends = {os.lstat(store + b"/" + one.path).st_ino for store in (left, right)}
            if not ends.isdisjoint(inodes | kept):
                continue
        found.append(str(one))
    return found


def _inodes(path: bytes) -> set[int]:
    """Of all that is in a directory of what is kept beside."""
    found = set()
    for directory, _, names in os.walk(path):
        found |= {os.lstat(directory + b"/" + name).st_ino for name in names}
    return found


def not_covered(
    left: Snapshot,
    right: Snapshot,
    log: DirtyLog,
    slots: Slots = frozenset(),  # type: ignore[assignment]
) -> list[str]:
    """Every difference of a replica that neither its log nor an operation in flight stands for."""
    return list(_Coverage(left, right, log, slots).directory(left.root, right.root))


class _Coverage:
    def __init__(self, left: Snapshot, right: Snapshot, log: DirtyLog, slots: Slots) -> None:
        self.left = left
        self.right = right
        self.log = log
        self.slots = slots
        self.seen: set[Seen] = set()

    def directory(self, ours: Seen, theirs: Seen) -> Iterator[str]:
        """Differences in and below a directory that is on both sides."""
        marks = self.log.marks(ours.identity) if ours.identity else None
        if marks is not None and marks.names_all and marks.deep:
            return
        unknown = (ours.identity, KIND_NAMES, 0) in self.slots
        for name in sorted(ours.names.keys() | theirs.names.keys()):
            mine, other = ours.names.get(name), theirs.names.get(name)
            marked = unknown or not self.log.name_is_clean(ours.identity, name)
            both = mine is not None and other is not None
            equal = both and mine.identity == other.identity != b""
            if not equal and not marked:
                yield f"{ours.path!r}/{name!r}: {_who(mine)} here, {_who(other)} there, no mark"
            if mine is not None:
                # Where one was made anew before its old self was found, it is the one that counts.
                yield from self.object(mine, other if equal else None, placed_again=marked)
        if ours.policy != Policy.NONE:  # the root can be: it is on both sides all the same
            yield from self.attributes(ours, theirs)

    def object(self, mine: Seen, there: Seen | None, *, placed_again: bool) -> Iterator[str]:
        """Differences of one object that is somewhere on both sides; *there*: at the same name."""
        theirs = there or (self.right.by_id.get(mine.identity) if mine.identity else None)
        if theirs is None or (placed_again and not theirs.is_complete):
            return
        if mine in self.seen:
            return
        self.seen.add(mine)
        if mine.is_directory:
            yield from self.directory(mine, theirs)
            return
        yield from self.attributes(mine, theirs)
        if stat.S_ISREG(mine.status.st_mode):
            yield from self.data(mine, theirs)

    def _in_flight(self, seen: Seen, kinds: Iterable[int]) -> bool:
        return any(one[0] == seen.identity and one[1] in kinds for one in self.slots)

    def attributes(self, mine: Seen, theirs: Seen) -> Iterator[str]:
        if not self.log.attrs_are_clean(mine.identity) or self._in_flight(
            mine, (KIND_ATTRS, KIND_DATA, KIND_FILE, KIND_NAMES)
        ):
            return
        ours, others = mine.attributes(), theirs.attributes()
        for key in ours:
            if ours[key] != others.get(key):
                yield f"{mine.path!r}: {key} {ours[key]!r} != {others.get(key)!r}, no mark"
        if not theirs.is_complete:
            yield f"{mine.path!r} is incomplete, no mark"

    def data(self, mine: Seen, theirs: Seen) -> Iterator[str]:
        if (mine.identity, KIND_FILE, 0) in self.slots:
            return
        size = len(mine.data)
        other = theirs.data[:size].ljust(size, b"\0")
        for start in range(0, size, REGION_SIZE):
            stop = min(start + REGION_SIZE, size)
            if mine.data[start:stop] == other[start:stop]:
                continue
            if not self.log.data_is_clean(mine.identity, start, stop):
                continue
            if (mine.identity, KIND_DATA, start >> ACTIVITY_SHIFT) in self.slots:
                continue
            yield f"{mine.path!r}: region {start >> REGION_SHIFT} differs, no mark"


def _who(seen: Seen | None) -> str:
    return "nothing" if seen is None else f"{seen.identity.hex() or 'an object without id'}"


def _first(one: bytes, other: bytes) -> int:
    return next(
        (index for index, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]),
        min(len(one), len(other)),
    )
