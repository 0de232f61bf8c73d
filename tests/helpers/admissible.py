"""Hold a tree against a writer's record: all that was acknowledged is there, and nothing else.

What was begun and not acknowledged may be there or not; of a write, any of its bytes may.
"""

from __future__ import annotations

import contextlib
import copy
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from helpers.compare import read_xattrs
from helpers.record import BLOCK, Op, Record, Recorded, State, Thing, log_line, payload

_SHOWN_MAX: Final = 8
_CANDIDATES_MAX: Final = 40
_KINDS: Final = {"file": stat.S_IFREG, "directory": stat.S_IFDIR, "symlink": stat.S_IFLNK}
_NEW: Final = {"create", "mkdir"}


def inadmissible(
    top: Path, record: Record, *, acknowledged_ns: int, begun_ns: int, check_log: bool = True
) -> str:
    """What a tree may not be like after what one writer did; empty if it is as it may be.

    Args:
        top: the root of the tree: a store or a mount.
        record: the writer's.
        acknowledged_ns: what was acknowledged until then must be there.
        begun_ns: what was begun later must not be there.
        check_log: the common log, too.
    """
    beyond = [one for one in record.advance(acknowledged_ns) if one.begun <= begun_ns]
    return compare(top, record.state, beyond, check_log=check_log)


def compare(
    top: Path, state: State, beyond: Sequence[Recorded] = (), *, check_log: bool = True
) -> str:
    """As `inadmissible`, with what may be there beyond *state* in its order."""
    if beyond:
        state = copy.deepcopy(state)
    best: list[str] = []
    fresh: Thing | None = None
    for index in range(min(len(beyond), _CANDIDATES_MAX) + 1):
        pending = beyond[index] if index < len(beyond) else None
        comparison = _Comparison(top, state, pending.op if pending else None, fresh)
        found = comparison.run(beyond, check_log=check_log)
        if not found:
            return ""
        if not best or len(found) < len(best):
            best = found
        if pending is not None:
            if pending.outcome == "n":
                continue
            if pending.outcome == "x":
                state.cut_off(pending.op)
                continue
            if pending.op[0] != "log":
                state.apply(pending.number, pending.op)
            fresh = state.find(pending.op[1]) if pending.op[0] in _NEW else None
    head = f"{top} is not what writer {state.writer} was told:"
    also = [f"(in flight: {[(one.number, *one.op) for one in beyond[:4]]})"] if beyond else []
    return "\n  ".join([head, *best[:_SHOWN_MAX], *also])


class _Comparison:
    """One state against one tree; *pending* may be half done, the mode of *fresh* be any."""

    def __init__(self, top: Path, state: State, pending: Op | None, fresh: Thing | None) -> None:
        self._top = os.fspath(top)
        self._state = state
        self._found: list[str] = []
        self._inodes: dict[int, tuple[int, int]] = {}
        self._things: dict[tuple[int, int], int] = {}
        self._half: tuple[Thing, int, bytes] | None = None
        """A file, an offset, and the bytes that may be there instead."""
        self._fresh = fresh
        self._half_block: tuple[int, bytes] | None = None
        if pending is None:
            return
        kind, *arguments = pending
        if kind == "write":
            path, offset, length, seed = arguments
            self._half = state.find(path), offset, payload(seed, length)
        elif kind == "append":
            path, length, seed = arguments
            thing = state.find(path)
            self._half = thing, len(thing.data), payload(seed, length)
        elif kind == "chmod":
            self._fresh = state.find(arguments[0])
        elif kind == "slot":
            self._half_block = arguments[0], payload(arguments[1], BLOCK)

    def run(self, beyond: Sequence[Recorded], *, check_log: bool) -> list[str]:
        """What is wrong."""
        with contextlib.suppress(FileNotFoundError):
            return self._run(beyond, check_log=check_log)
        self._note(self._top, "changes while it is looked at")
        return self._found

    def _run(self, beyond: Sequence[Recorded], *, check_log: bool) -> list[str]:
        state = self._state
        own, shared = state.root.entries[state.own], state.root.entries["shared"]
        self._entries(f"{self._top}/{state.own}", own, os.listdir(f"{self._top}/{state.own}"))
        names = [n for n in os.listdir(f"{self._top}/shared") if n.startswith(f"{state.own}-")]
        self._entries(f"{self._top}/shared", shared, names)
        self._slots()
        if check_log:
            self._log(beyond)
        return self._found

    def _note(self, path: str, text: str, thing: Thing | None = None) -> None:
        history = f"; {list(thing.history)}" if thing is not None else ""
        self._found.append(f"{path[len(self._top) + 1 :]}: {text}{history}")

    def _entries(self, path: str, directory: Thing, there: list[str]) -> None:
        for name in sorted(set(there) - directory.entries.keys()):
            self._note(f"{path}/{name}", "must not be there", directory)
        for name, thing in directory.entries.items():
            if name not in there:
                self._note(f"{path}/{name}", "is missing", thing)
            else:
                self._thing(f"{path}/{name}", thing)

    def _thing(self, path: str, thing: Thing) -> None:
        found = os.lstat(path)
        if stat.S_IFMT(found.st_mode) != _KINDS[thing.kind]:
            self._note(path, f"is {stat.filemode(found.st_mode)}, not a {thing.kind}", thing)
            return
        key = found.st_dev, found.st_ino
        if self._inodes.setdefault(id(thing), key) != key:
            self._note(path, "is another object than under its other name", thing)
            return
        if self._things.setdefault(key, id(thing)) != id(thing):
            self._note(path, "is the same object as another name's", thing)
            return
        half = self._half is not None and self._half[0] is thing
        sure = thing.kind != "symlink" and thing is not self._fresh
        if sure and stat.S_IMODE(found.st_mode) != thing.mode:
            self._note(path, f"mode {found.st_mode & 0o7777:o}, not {thing.mode:o}", thing)
        if thing.mtime not in (None, found.st_mtime_ns) and not half:
            self._note(path, f"mtime {found.st_mtime_ns}, not {thing.mtime}", thing)
        xattrs = read_xattrs(os.fsencode(path))
        if xattrs != thing.xattrs:
            names = sorted(xattrs.keys() | thing.xattrs.keys())
            wrong = [name for name in names if xattrs.get(name) != thing.xattrs.get(name)]
            self._note(path, f"other values of {', '.join(wrong)}", thing)
        if thing.kind == "directory":
            self._entries(path, thing, os.listdir(path))
            return
        if found.st_nlink != thing.links:
            self._note(path, f"{found.st_nlink} links, not {thing.links}", thing)
        if thing.kind == "symlink":
            if os.readlink(path) != thing.target:
                self._note(path, f"points to {os.readlink(path)}, not {thing.target}", thing)
            return
        with open(path, "rb") as file:
            data = file.read()
        if data != thing.data and not (half and self._is_half(data)):
            self._note(path, _difference(data, thing.data), thing)

    def _is_half(self, data: bytes) -> bool:
        """Whether a file is as it may be in the middle of the write to it."""
        if self._half is None:
            return False
        thing, offset, new = self._half
        old = bytes(thing.data)
        if not len(old) <= len(data) <= max(len(old), offset + len(new)):
            return False
        # Beyond its end a file has zeros, as soon as it has anything.
        old = old.ljust(len(data), b"\0")
        written = old[:offset] + new + old[offset + len(new) :]
        return all(
            one in (before, after)
            for one, before, after in zip(data, old, written, strict=False)
            if one != before
        )

    def _slots(self) -> None:
        with open(f"{self._top}/common/slots", "rb") as file:
            for block, seed in self._state.slots.items():
                data = os.pread(file.fileno(), BLOCK, block * BLOCK)
                wanted = payload(seed, BLOCK)
                if data == wanted:
                    continue
                if self._half_block is not None and self._half_block[0] == block:
                    half = self._half_block[1]
                    if len(data) == BLOCK and all(
                        d in (a, b) for d, a, b in zip(data, wanted, half, strict=True)
                    ):
                        continue
                self._note(f"{self._top}/common/slots", f"block {block}: not seed {seed}")

    def _log(self, beyond: Sequence[Recorded]) -> None:
        state = self._state
        mark = b"w%d " % state.writer
        with open(f"{self._top}/common/log", "rb") as file:
            data = file.read()
        lines = [one for one in data.split(b"\n") if one.startswith(mark)]
        there = sorted(int(one.split()[1]) for one in lines)
        maybe = state.log_maybe | {one.op[1] for one in beyond if one.op[0] == "log"}
        path = f"{self._top}/common/log"
        if len(set(there)) != len(there):
            self._note(path, "has an entry twice")
        lost = sorted(state.log - set(there))
        if lost:
            self._note(path, f"lacks {len(lost)} entries: {lost[:9]}")
        strange = sorted(set(there) - state.log - maybe)
        if strange:
            self._note(path, f"has {len(strange)} entries too many: {strange[:9]}")
        if (data and data[-1:] != b"\n") or len(data) % len(log_line(0, 0)):
            self._note(path, "ends in the middle of a line")


def _difference(data: bytes, wanted: bytearray) -> str:
    """In words."""
    if len(data) != len(wanted):
        return f"{len(data)} bytes, not {len(wanted)}"
    differ = [at for at, (a, b) in enumerate(zip(data, wanted, strict=True)) if a != b]
    return f"bytes {differ[0]} to {differ[-1]} differ, {len(differ)} of them"
