"""What applications were told: a record beside everything that replfs has.

The simulated kernel notes every operation when it begins and when it has returned success. From
that the ledger knows what must stand in any store that lost nothing (`missing`), and what must
have survived a loss of power because an fsync returned (`broken`). What was in flight when a
process died, and what failed, may have happened or not.

It knows types, names, hard links, contents and sizes; not attributes.
"""

from __future__ import annotations

import copy
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from simulation.harness.check import Seen, Snapshot

from replfs.core.policy import Policy
from replfs.store import record
from replfs.store.record import ROOT_ID

END = 1 << 62
COPY = re.compile(rb"\.[a-d]-\d{8}T\d{6}Z(\.~\d+)?$")
"""Behind the name of a version that an operator had brought beside another: no application's."""
Range = tuple[int, int]
InSync = tuple[str, int]
"""A node, and the session in which it is in sync."""


@dataclass(eq=False)
class Promise:
    """What an fsync has promised of one thing: what it was when the fsync began."""

    identity: bytes
    """Empty: it had no id, or none that was known. One that it got later may be lost."""
    data: bytes
    names: dict[bytes, Thing]
    unsure: list[Range]
    """What may be otherwise, because it was in flight or was changed later."""
    unsure_names: set[bytes]
    is_unnamed: bool = False
    """A name of it may have been taken away since."""


@dataclass(eq=False)
class Thing:
    """An object, as applications know it."""

    kind: int
    identity: bytes = b""
    names: dict[bytes, Thing] = field(default_factory=dict)
    unsure_names: set[bytes] = field(default_factory=set)
    data: bytearray = field(default_factory=bytearray)
    unsure: list[Range] = field(default_factory=list)
    flying: list[Range] = field(default_factory=list)
    promises: dict[str, Promise] = field(default_factory=dict)
    """By the name of the node that made it."""
    flushing: list[Promise] = field(default_factory=list)
    """What will be promised."""
    is_unknown: bool = False
    """It stood where something was in flight: neither names nor contents are known."""

    def _promises(self) -> Iterator[Promise]:
        yield from self.promises.values()
        yield from self.flushing

    def unnamed(self) -> None:
        for one in self._promises():
            one.is_unnamed = True

    def touch(self, change: Range) -> None:
        for one in self._promises():
            one.unsure.append(change)

    def touch_name(self, name: bytes) -> None:
        for one in self._promises():
            one.unsure_names.add(name)


class Ledger:
    """The record of one volume."""

    def __init__(self, store: bytes) -> None:
        self.root = Thing(stat.S_IFDIR, ROOT_ID)
        self.noted = 0
        """Acknowledged changes."""
        self.flushed = 0
        """Acknowledged fsyncs."""
        self._by_id: dict[bytes, Thing] = {}
        self.read(store, everything=True)

    def copy(self) -> Ledger:
        """What was told so far, of a volume that becomes two."""
        return copy.deepcopy(self)

    # What is right from now on -------------------------------------------------------------------

    def lost(self, store: bytes, node: str) -> None:
        """Everything is as it stands in the store of *node*, which others will follow.

        What they promised of a later state does not count any more.
        """
        for thing in self.things():
            thing.promises = {name: one for name, one in thing.promises.items() if name == node}
        self.read(store, everything=True)

    def follow(self, node: str) -> None:
        """*node* is the primary now, and had all that was acknowledged: its promises are kept.

        What the others promised may have been of what was never acknowledged.
        """
        for thing in self.things():
            thing.promises = {name: one for name, one in thing.promises.items() if name == node}

    def replaced(self, node: str) -> None:
        """The disk of *node* is another one: what the old one promised is void."""
        for thing in self.things():
            thing.promises.pop(node, None)

    def read(self, store: bytes, *, everything: bool = False) -> None:
        """What the record does not know (or *everything*) is as it stands in the store."""
        known: dict[int, Thing] = {}
        self._store = store
        if everything:
            by_id = {thing.identity: thing for thing in self.things() if thing.identity}
            # What is a node's own may have, on its disk, the id of the object that it was.
            for wants_own in (False, True):
                found: dict[int, Thing] = {}
                self._recognise(store, by_id, found, own=False, wants_own=wants_own)
                for ino, thing in found.items():
                    if thing not in known.values() or ino in known:
                        known.setdefault(ino, thing)
        else:
            self._recognise_certain(store, self.root, known)
        self._read(store, self.root, known, everything=everything)
        self._by_id = {thing.identity: thing for thing in self.things() if thing.identity}

    def things(self) -> Iterable[Thing]:
        """All that have a name."""
        seen: dict[Thing, None] = {self.root: None}
        pending = [self.root]
        while pending:
            for below in pending.pop().names.values():
                if below not in seen:
                    seen[below] = None
                    pending.append(below)
        return seen

    def _recognise(
        self,
        path: bytes,
        by_id: dict[bytes, Thing],
        known: dict[int, Thing],
        *,
        own: bool,
        wants_own: bool,
    ) -> None:
        for name in _names(path, is_root=path == self._store):
            full = path + b"/" + name
            status = os.lstat(full)
            found = _record(full, status.st_ino)
            is_own = own or (found is not None and found.policy == Policy.NONE)
            thing = by_id.get(found.object) if found is not None else None
            if thing is not None and is_own == wants_own:
                known.setdefault(status.st_ino, thing)
            if stat.S_ISDIR(status.st_mode):
                self._recognise(full, by_id, known, own=is_own, wants_own=wants_own)

    def _recognise_certain(self, path: bytes, thing: Thing, known: dict[int, Thing]) -> None:
        for name, below in thing.names.items():
            if name not in thing.unsure_names:
                full = path + b"/" + name
                known[os.lstat(full).st_ino] = below
                if below.kind == stat.S_IFDIR:
                    self._recognise_certain(full, below, known)

    def _read(
        self, path: bytes, thing: Thing, known: dict[int, Thing], *, everything: bool
    ) -> None:
        before, thing.names = thing.names, {}
        thing.unsure_names.clear()
        thing.is_unknown = False
        for name in _names(path, is_root=thing is self.root):
            full = path + b"/" + name
            status = os.lstat(full)
            below = known.get(status.st_ino)
            if below is None or below.kind != stat.S_IFMT(status.st_mode):
                below = known[status.st_ino] = Thing(stat.S_IFMT(status.st_mode))
                below.unsure.append((0, END))
            thing.names[name] = below
            below.identity = _identity(full, status.st_ino)
            if below.kind == stat.S_IFDIR:
                self._read(full, below, known, everything=everything)
            elif below.kind == stat.S_IFREG and (everything or below.unsure or below.flying):
                with open(full, "rb") as file:
                    below.data[:] = file.read()
                below.unsure.clear()
                below.flying.clear()
                below.flushing.clear()
        for name in before.keys() ^ thing.names.keys():
            thing.touch_name(name)

    def _path_of(self, wanted: Thing) -> str:
        pending = [(b"", self.root)]
        while pending:
            path, thing = pending.pop()
            if thing is wanted:
                return f"{path!r} <{thing.identity.hex()}>"
            pending += [(path + b"/" + name, below) for name, below in thing.names.items()]
        return "?"

    # What applications do ----------------------------------------------------------------------

    def made(self, kind: int, identity: bytes) -> Thing:
        """A new object."""
        thing = Thing(kind, identity)
        if identity:
            self._by_id[identity] = thing
        return thing

    def looked_up(self, directory: Thing, name: bytes, kind: int, identity: bytes) -> Thing | None:
        """What stands at a name that was found; None if nothing can."""
        thing = directory.names.get(name)
        if name not in directory.unsure_names and not directory.is_unknown:
            return thing if thing is not None and thing.kind == kind else None
        thing = self._by_id.get(identity) if identity else None
        if thing is None:
            thing = self.made(kind, identity)
            thing.is_unknown = True
            thing.unsure.append((0, END))
        directory.names[name] = thing
        return thing

    def met_again(self, known: Thing, found: Thing) -> Thing | None:
        """Two names are one object, which is *known* by one; what it is, None if it cannot be."""
        if known is found or found.is_unknown:
            return known
        if not known.is_unknown:
            return None
        found.unsure.append((0, END))
        found.is_unknown = found.kind == stat.S_IFDIR
        return found

    def name_changes(self, directory: Thing, name: bytes) -> None:
        """A name is about to be made, taken away or given to another."""
        directory.unsure_names.add(name)
        directory.touch_name(name)
        old = directory.names.get(name)
        if old is not None:
            old.unnamed()

    def named(self, directory: Thing, name: bytes, thing: Thing | None) -> None:
        """It was done: now the name is *thing*, or nothing."""
        self.noted += 1
        directory.unsure_names.discard(name)
        if thing is None:
            directory.names.pop(name, None)
        else:
            directory.names[name] = thing

    def data_changes(self, thing: Thing, start: int, stop: int) -> Range:
        """Bytes are about to be changed."""
        change = (start, stop)
        if any(one[0] < stop and start < one[1] for one in thing.flying):
            thing.unsure.append(change)  # nobody knows which is the later
        thing.flying.append(change)
        thing.touch(change)
        return change

    def written(self, thing: Thing, change: Range, start: int, data: bytes) -> None:
        """They were, with *data* from *start*."""
        self.noted += 1
        thing.flying.remove(change)
        if len(thing.data) < start:
            thing.data.extend(bytes(start - len(thing.data)))
        thing.data[start : start + len(data)] = data

    def truncated(self, thing: Thing, change: Range, size: int) -> None:
        """They were, by setting the size."""
        self.noted += 1
        thing.flying.remove(change)
        del thing.data[size:]
        thing.data.extend(bytes(size - len(thing.data)))

    def failed(self, thing: Thing, change: Range) -> None:
        """It is not known whether they were."""
        thing.flying.remove(change)
        thing.unsure.append(change)

    # What fsync promises -----------------------------------------------------------------------

    def flush_begins(self, things: Iterable[Thing]) -> Callable[[Iterable[InSync]], None]:
        """An fsync of *things*; to be called when it ended, with the nodes that took part."""
        made = []
        for thing in things:
            unsure = [*thing.unsure, *thing.flying]
            names = dict(thing.names)
            unsure_names = set(thing.unsure_names)
            one = Promise(thing.identity, bytes(thing.data), names, unsure, unsure_names)
            if thing.is_unknown:
                continue
            thing.flushing.append(one)
            made.append((thing, one))

        def ended(nodes: Iterable[InSync]) -> None:
            self.flushed += 1
            for thing, promise in made:
                if promise in thing.flushing:
                    thing.flushing.remove(promise)
                    thing.promises |= dict.fromkeys((name for name, _ in nodes), promise)

        return ended

    # Held against a store ----------------------------------------------------------------------

    def missing(self, store: Snapshot) -> list[str]:
        """Acknowledged changes that a store does not have."""
        found: list[str] = []
        pairs: dict[Thing, Seen] = {}
        self._missing_in(self.root, store.root, b"", pairs, found)
        return found

    def _missing_in(
        self, thing: Thing, seen: Seen, path: bytes, pairs: dict[Thing, Seen], found: list[str]
    ) -> None:
        if thing.is_unknown:
            return
        for name in sorted(thing.names.keys() | seen.names.keys()):
            if name in thing.unsure_names:
                continue
            below, there = thing.names.get(name), seen.names.get(name)
            full = path + b"/" + name
            if below is None:
                found.append(f"{full!r} is there")
            elif there is None:
                found.append(f"{full!r} is not there")
            elif stat.S_IFMT(there.status.st_mode) != below.kind:
                found.append(f"{full!r} is of another type")
            elif pairs.setdefault(below, there) is not there:
                found.append(f"{full!r} is not the same object as {pairs[below].path!r}")
            elif below.kind == stat.S_IFDIR:
                self._missing_in(below, there, full, pairs, found)
            else:
                found += _other_data(full, below.data, there.data, below.unsure + below.flying)

    def broken(self, store: Snapshot, node: str, brought: Snapshot | None = None) -> list[str]:
        """What *node* promised to be stable and its store does not hold.

        *brought*: what another one had, of which copies may have been brought here meanwhile.
        """
        found: list[str] = []
        for thing in self.things():
            promise = thing.promises.get(node)
            if promise is None or not thing.identity:
                continue
            seen = store.by_id.get(thing.identity)
            if seen is None:
                if promise.identity and not promise.is_unnamed:
                    found.append(f"{self._path_of(thing)} is not there")
                continue
            self._broken_there(promise, seen, node, brought, found)
        return found

    def _broken_there(
        self,
        promise: Promise,
        seen: Seen,
        node: str,
        brought: Snapshot | None,
        found: list[str],
    ) -> None:
        """The same of one thing, and of what stands in it without an id to be found by."""
        found += _other_data(seen.path, promise.data, seen.data, promise.unsure)
        for name in promise.names.keys() | seen.names.keys():
            if name in promise.unsure_names or COPY.search(name):
                continue
            below, there = promise.names.get(name), seen.names.get(name)
            if there is not None and is_made_for_copies(there, brought):
                continue
            # The id is written after the object is made, and may be lost with the rest.
            if (
                below is None
                or there is None
                or (below.identity and there.identity not in {below.identity, b""})
            ):
                found.append(f"{seen.path!r}/{name!r} is not what it was at an fsync")
                continue
            promised = below.promises.get(node)
            if promised is not None and not there.identity:
                self._broken_there(promised, there, node, brought, found)


def is_made_for_copies(seen: Seen, brought: Snapshot | None) -> bool:
    """Whether it may be a directory in which copies of what is in *brought* are to stand."""
    there = brought.by_path.get(seen.path) if brought is not None else None
    return there is not None and there.is_directory and seen.is_directory


def _names(path: bytes, *, is_root: bool) -> list[bytes]:
    found = sorted(map(os.fsencode, os.listdir(path)))
    return [name for name in found if not is_root or name != b".replfs"]


def _identity(path: bytes, ino: int) -> bytes:
    found = _record(path, ino)
    return found.object if found is not None else b""


def _record(path: bytes, ino: int) -> record.Record | None:
    try:
        value = os.getxattr(path, record.XATTR, follow_symlinks=False)
    except OSError:
        return None
    return record.unpack(value, ino)


def _other_data(
    path: bytes, wanted: bytes | bytearray, found: bytes, unsure: list[Range]
) -> Iterator[str]:
    end = max(len(wanted), len(found))
    at = 0
    for start, stop in [*sorted(unsure), (end, end)]:
        if at < start and wanted[at:start] != found[at:start]:
            yield f"{path!r}: other data from byte {at} to {start}"
        at = max(at, stop)
