"""The activity log: what is in flight, so that a killed process leaves no doubt behind.

A preallocated file on tmpfs, mapped into memory: writing to it is a memory copy, it survives the
process, and no fault of STORE can touch it. A slot says which object, which region of it, and how
to find it again. It is written before an operation is issued and released lazily: repeated writes
to a hot region find their slot and write nothing. After a kill every slot is compared with the
peers, so the number of slots bounds that work.

Layout, little-endian: a header slot (magic, version, node id), then slots of `SLOT_SIZE` bytes:
checksum u32, kind u8, handle length u8, 2 bytes unused, region u64, object id 16, handle. A slot
whose checksum does not fit was being written when the process died: what it was for had not been
issued.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

from replfs.errors import StoreError

KIND_DATA: Final = 1
"""One region of `1 << 20` bytes of a file, and its attributes."""
KIND_FILE: Final = 2
"""All of a file's data, its size and its attributes."""
KIND_NAMES: Final = 3
"""The names in a directory, and its attributes."""
KIND_ATTRS: Final = 4
"""Attributes and extended attributes of any object."""

_KINDS: Final = frozenset({KIND_DATA, KIND_FILE, KIND_NAMES, KIND_ATTRS})

SLOTS: Final = 2048
_CROWDED: Final = SLOTS - 32
SLOT_SIZE: Final = 128
HANDLE_MAX: Final = 96

_MAGIC: Final = b"replfs-activity\0"
_VERSION: Final = 1
_HEADER: Final = struct.Struct("<16sI16s")
_SLOT: Final = struct.Struct("<IBBHQ16s")
_BODY: Final = struct.Struct("<BBHQ16s")
_NOTHING: Final = b"\0" * SLOT_SIZE


class Slot:
    """A place in the log; `refs` operations in flight need it."""

    __slots__ = ("key", "offset", "refs")

    def __init__(self, offset: int) -> None:
        self.offset = offset
        self.refs = 0
        self.key: tuple[bytes, int, int] | None = None


class Recovered(NamedTuple):
    """What an earlier process had in flight."""

    object: bytes
    kind: int
    region: int
    handle: bytes


class ActivityLog:
    """The log of one primary."""

    def __init__(self, path: str, node: bytes) -> None:
        """Make the file anew; `recover` an old one first."""
        size = (SLOTS + 1) * SLOT_SIZE
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            kept = os.fstat(fd).st_size == size
            if not kept:
                os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, size)
            self._map = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._map[: _HEADER.size] = _HEADER.pack(_MAGIC, _VERSION, node)
        self._slots = [Slot((index + 1) * SLOT_SIZE) for index in range(SLOTS)]
        self._free = list(reversed(self._slots))
        self._by_key: OrderedDict[tuple[bytes, int, int], Slot] = OrderedDict()
        self._busy = 0

    def begin(
        self, object_id: bytes, kind: int, region: int, locator: Callable[[], bytes]
    ) -> Slot | None:
        """Note that an operation on it is about to be issued; None while every slot is in use.

        *locator* is asked only where a slot has to be written.
        """
        key = (object_id, kind, region)
        slot = self._by_key.get(key)
        if slot is not None:
            if not slot.refs:
                self._busy += 1
            slot.refs += 1
            return slot
        handle = locator()
        if len(handle) > HANDLE_MAX:
            # Half a handle finds nothing, or another object.
            handle = b""
        slot = self._take()
        if slot is None:
            return None
        body = _BODY.pack(kind, len(handle), 0, region, object_id) + handle
        at = slot.offset
        self._map[at : at + 4 + len(body)] = zlib.crc32(body).to_bytes(4, "little") + body
        slot.key = key
        slot.refs = 1
        self._busy += 1
        self._by_key[key] = slot
        return slot

    def _take(self) -> Slot | None:
        """A free slot, or of the idle ones the one that was written first."""
        if self._free:
            return self._free.pop()
        for key, slot in self._by_key.items():
            if not slot.refs:
                del self._by_key[key]
                return slot
        return None

    def end(self, slot: Slot) -> None:
        """An operation is acknowledged by all, or recorded dirty; the slot stays for the next."""
        slot.refs -= 1
        if not slot.refs:
            self._busy -= 1

    @property
    def is_crowded(self) -> bool:
        """Too few slots are idle for one more operation: wait until some are."""
        return self._busy > _CROWDED

    @property
    def in_use(self) -> int:
        """Slots that would be compared after a kill now."""
        return len(self._by_key)

    def clear(self) -> None:
        """Nothing is in flight, and nothing is left to compare: forget all idle slots."""
        for key, slot in list(self._by_key.items()):
            if not slot.refs:
                del self._by_key[key]
                self._map[slot.offset : slot.offset + SLOT_SIZE] = _NOTHING
                self._free.append(slot)
        if not self._by_key:
            self._map[SLOT_SIZE:] = b"\0" * (SLOTS * SLOT_SIZE)

    def close(self) -> None:
        """Unmap; the file stays for `recover`."""
        self._map.close()


def is_lost(path: str, node: bytes) -> bool:
    """Whether *path* cannot tell what a killed run of *node* had in flight.

    True where it was removed, or is another store's, or of another size or version: after a run
    that did not end cleanly everything is to be compared then, as after a loss of memory.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER.size)
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return True
    if size != (SLOTS + 1) * SLOT_SIZE:
        return True
    return _HEADER.unpack(head) != (_MAGIC, _VERSION, node)


def recover(path: str) -> list[Recovered]:
    """What the process that last used *path* had in flight; nothing where there is no file.

    Raises:
        StoreError: the file is not an activity log of this version.
    """
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return []
    if len(data) != (SLOTS + 1) * SLOT_SIZE:
        return []
    magic, version, _ = _HEADER.unpack_from(data)
    if (magic, version) == (b"\0" * 16, 0):
        return []
    if magic != _MAGIC or version != _VERSION:
        raise StoreError(f"{path} is not an activity log of this version; remove it")
    found = []
    for at in range(SLOT_SIZE, len(data), SLOT_SIZE):
        checksum, kind, length, _, region, object_id = _SLOT.unpack_from(data, at)
        if kind not in _KINDS or length > HANDLE_MAX:
            continue
        body = data[at + 4 : at + _SLOT.size + length]
        if zlib.crc32(body) != checksum:
            continue
        handle = data[at + _SLOT.size : at + _SLOT.size + length]
        found.append(Recovered(object_id, kind, region, handle))
    return found
