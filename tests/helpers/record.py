"""The record of a writer: what it began and what was acknowledged, and the tree that follows.

One file per writer, append-only, on another filesystem than the stores; a line is a JSON list:

    ["b", number, ns, kind, argument...]  begun
    ["e", number, ns]                     acknowledged
    ["y", number, ns]                     cut off by the end of the mount, and found done later
    ["n", number, ns]                     the same, and found not done
    ["x", number, ns]                     the same, may be half done; the next line repeats it
    ["m", number, ns]                     the same, and can never be told

`ns` is CLOCK_MONOTONIC, which is one clock for all processes. A writer does one thing after the
other, so at any moment what must be there is the state after all that was acknowledged, and at
most one operation more may be.

Paths are relative to the mount and in text. A writer `n` owns everything in its directory `w<n>`,
the names that begin with `w<n>-` in the directory `shared`, the 4 KiB blocks of `common/slots`
whose number modulo the number of writers is n, and its lines in `common/log`.
"""

from __future__ import annotations

import json
import os
import random
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

Op = tuple[Any, ...]
"""(kind, argument...), see `State.apply`."""

BLOCK: Final = 4096
BLOCKS: Final = 512
"""In the file that all writers share."""
HISTORY: Final = 16
LENGTH_MAX: Final = 64 << 20
"""Bytes of a record before it begins anew."""


def payload(seed: int, length: int) -> bytes:
    """What a writer writes: `length` bytes that follow from `seed`."""
    return random.Random(seed).randbytes(length)


class Thing:
    """A file, directory or symlink as it must be."""

    __slots__ = (
        "data", "entries", "history", "kind", "links", "mode", "mtime", "target", "xattrs"
    )  # fmt: skip

    def __init__(self, kind: str, mode: int, target: str = "") -> None:
        self.kind = kind
        """`file`, `directory` or `symlink`."""
        self.mode = mode
        self.target = target
        self.links = 1
        self.data = bytearray()
        self.entries: dict[str, Thing] = {}
        self.xattrs: dict[str, bytes] = {}
        self.mtime: int | None = None
        """None where it is whenever the last change was."""
        self.history: deque[str] = deque(maxlen=HISTORY)
        """What was done to it last, for failure messages."""


class State:
    """All that one writer owns, after the operations applied so far."""

    def __init__(self, writer: int) -> None:
        self.writer = writer
        self.own = f"w{writer}"
        self.root = Thing("directory", 0o755)
        self.root.entries = {
            self.own: Thing("directory", 0o755),
            "shared": Thing("directory", 0o755),
        }
        self.slots: dict[int, int] = {}
        """Block number in `common/slots` -> seed of what is in it."""
        self.log: set[int] = set()
        self.log_maybe: set[int] = set()

    def find(self, path: str) -> Thing:
        """The thing at a path; KeyError if there is none."""
        thing = self.root
        for name in path.split("/"):
            thing = thing.entries[name]
        return thing

    def _above(self, path: str) -> tuple[Thing, str]:
        above, _, name = path.rpartition("/")
        return self.find(above), name

    def apply(self, number: int, op: Op) -> None:
        """Make what *op* makes."""
        kind, *arguments = op
        getattr(self, f"_{kind}")(number, *arguments)

    @staticmethod
    def _note(number: int, text: str, *things: Thing) -> None:
        for thing in things:
            thing.history.append(f"{number} {text}")

    def _add(self, number: int, kind: str, path: str, thing: Thing) -> None:
        above, name = self._above(path)
        if name in above.entries:
            raise AssertionError(f"{number} {kind}: {path} is there already")
        above.entries[name] = thing
        above.mtime = None
        self._note(number, f"{kind} {path}", above, thing)

    def _create(self, number: int, path: str, mode: int) -> None:
        self._add(number, "create", path, Thing("file", mode))

    def _mkdir(self, number: int, path: str, mode: int) -> None:
        self._add(number, "mkdir", path, Thing("directory", mode))

    def _symlink(self, number: int, path: str, target: str) -> None:
        self._add(number, "symlink", path, Thing("symlink", 0o777, target))

    def _link(self, number: int, old: str, new: str) -> None:
        thing = self.find(old)
        self._add(number, f"link {old}", new, thing)
        thing.links += 1

    def _unlink(self, number: int, path: str) -> None:
        above, name = self._above(path)
        thing = above.entries.pop(name)
        thing.links -= 1
        above.mtime = None
        self._note(number, f"unlink {path}", above, thing)

    _rmdir = _unlink

    def _rename(self, number: int, old: str, new: str) -> None:
        above, name = self._above(old)
        new_above, new_name = self._above(new)
        thing = above.entries.pop(name)
        replaced = new_above.entries.get(new_name)
        if replaced is not None:
            replaced.links -= 1
        new_above.entries[new_name] = thing
        above.mtime = new_above.mtime = None
        self._note(number, f"rename {old} to {new}", above, new_above, thing)

    def _exchange(self, number: int, old: str, new: str) -> None:
        above, name = self._above(old)
        new_above, new_name = self._above(new)
        one, other = above.entries[name], new_above.entries[new_name]
        above.entries[name], new_above.entries[new_name] = other, one
        above.mtime = new_above.mtime = None
        self._note(number, f"exchange {old} and {new}", above, new_above, one, other)

    def _write(self, number: int, path: str, offset: int, length: int, seed: int) -> None:
        thing = self.find(path)
        if len(thing.data) < offset:
            thing.data.extend(bytes(offset - len(thing.data)))
        thing.data[offset : offset + length] = payload(seed, length)
        thing.mtime = None
        self._note(number, f"write {offset} to {offset + length} (seed {seed}) at {path}", thing)

    def _append(self, number: int, path: str, length: int, seed: int) -> None:
        self._write(number, path, len(self.find(path).data), length, seed)

    def _truncate(self, number: int, path: str, size: int) -> None:
        thing = self.find(path)
        if size < len(thing.data):
            del thing.data[size:]
        else:
            thing.data.extend(bytes(size - len(thing.data)))
        thing.mtime = None
        self._note(number, f"truncate to {size} at {path}", thing)

    def _chmod(self, number: int, path: str, mode: int) -> None:
        thing = self.find(path)
        thing.mode = mode
        self._note(number, f"chmod {mode:o} {path}", thing)

    def _utime(self, number: int, path: str, ns: int) -> None:
        thing = self.find(path)
        thing.mtime = ns
        self._note(number, f"utime {ns} {path}", thing)

    def _setxattr(self, number: int, path: str, name: str, seed: int, length: int) -> None:
        thing = self.find(path)
        thing.xattrs[name] = payload(seed, length)
        self._note(number, f"setxattr {name} (seed {seed}) {path}", thing)

    def _removexattr(self, number: int, path: str, name: str) -> None:
        thing = self.find(path)
        thing.xattrs.pop(name, None)
        self._note(number, f"removexattr {name} {path}", thing)

    def _fsync(self, number: int, path: str) -> None:
        pass

    def _slot(self, number: int, block: int, seed: int) -> None:
        del number
        self.slots[block] = seed

    def _log(self, number: int, entry: int) -> None:
        del number
        self.log.add(entry)

    def cut_off(self, op: Op) -> None:
        """What *op* would change may be changed; it is repeated next."""
        if op[0] in {"write", "append", "truncate", "utime"}:
            self.find(op[1]).mtime = None


def log_line(writer: int, entry: int) -> bytes:
    """An entry of `common/log`: 32 bytes."""
    return b"%-31s\n" % (b"w%d %d" % (writer, entry))


class Recorded:
    """One operation in a record."""

    __slots__ = ("begun", "ended", "number", "op", "outcome")

    def __init__(self, number: int, begun: int, op: Op) -> None:
        self.number = number
        self.begun = begun
        self.op = op
        self.ended = 0
        self.outcome = ""
        """One of the letters `e`, `y`, `n`, `x`, `m`, or none yet."""


class Record:
    """A record being read, and the state that it has led to so far.

    Args:
        path: of the file.
        writer: whose it is.
    """

    def __init__(self, path: Path, writer: int) -> None:
        self.path = path
        self.state = State(writer)
        self._waiting: deque[Recorded] = deque()
        self._by_number: dict[int, Recorded] = {}
        self._read_to = 0
        self.applied = 0

    def advance(self, until_ns: int) -> list[Recorded]:
        """Take the state to what was acknowledged until then; what may have happened beyond.

        Returns:
            The operations begun and not acknowledged until then, in their order: none of them, or
            the first few may be there, too. Those begun later are the caller's to leave out.
        """
        self._read()
        while self._waiting:
            one = self._waiting[0]
            if not one.outcome or one.ended > until_ns:
                break
            self._waiting.popleft()
            del self._by_number[one.number]
            self._settle(one)
        return list(self._waiting)

    def _settle(self, one: Recorded) -> None:
        match one.outcome:
            case "e" | "y":
                self.state.apply(one.number, one.op)
            case "x":
                self.state.cut_off(one.op)
            case "m":
                self.state.log_maybe.add(one.op[1])
            case _:
                pass
        self.applied += 1

    def _read(self) -> None:
        for line in self._lines():
            letter, number, ns, *rest = json.loads(line)
            if letter == "b":
                one = Recorded(number, ns, tuple(rest))
                self._waiting.append(one)
                self._by_number[number] = one
            else:
                self._by_number[number].outcome = letter
                self._by_number[number].ended = ns

    def _lines(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            file.seek(self._read_to)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._read_to += end
        yield from data[:end].splitlines()

    @property
    def is_long(self) -> bool:
        """Whether it should be shortened."""
        return self._read_to > LENGTH_MAX

    def shorten(self) -> None:
        """Start the file anew, keeping the old one beside it; the writer must be held."""
        self._read()
        os.replace(self.path, self.path.with_suffix(".old"))
        self.path.touch()
        self._read_to = 0


class RecordFile:
    """A record being written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = -1
        self.open()

    def open(self) -> None:
        """Open the file; again where it may have been replaced."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)

    def write(self, *entries: tuple[Any, ...]) -> None:
        """Append these lines in one write."""
        os.write(self._fd, b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
