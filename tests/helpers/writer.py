"""Programs that never stop changing a mount, and keep a record of what they were told.

    with Writers(mountpoint, record_directory, count=4) as writers:
        ...                                # cut, kill, restart: they go on
        with writers.mount_down():
            pair.mount.kill9()
            pair.mount.start()
        with writers.held():               # between two operations
            writers.check(pair.secondary_store)

Each is a process of its own and does one operation after the other in a part of the tree of its own
(see `helpers.record`), so that what a tree may be like is known at any moment. Everything they do
must succeed; an error is a failure of the mount, unless it is known to be down.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import mmap
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from helpers import admissible
from helpers.children import Child, spawn
from helpers.libc import RENAME_EXCHANGE, renameat2
from helpers.nodes import wait_for
from helpers.record import BLOCK, BLOCKS, Op, Record, RecordFile, State, Thing, log_line, payload

DEPTH_MAX: Final = 4
BIG: Final = 3 << 20
_OPEN_MAX: Final = 4
_POLL_S: Final = 0.002
_PR_SET_PDEATHSIG: Final = 1
_EPOCH, _HOLD, _STOP, _FIRST, _EACH = 0, 1, 2, 8, 4
_IDLE, _DONE, _LONGEST = 0, 1, 2


class Failed(Exception):
    """The mount did something that it must not."""


class MountDown(Exception):
    """What was tried was cut off by the end of the mount."""


@dataclass
class Report:
    """What one writer did, or several together."""

    done: Counter[str] = field(default_factory=Counter)
    longest_ns: int = 0
    """The longest pause between two acknowledged operations while the mount was up."""
    longest: str = ""
    """In which operation."""
    latencies_us: array.array[int] = field(default_factory=lambda: array.array("L"))

    def add(self, other: Report) -> None:
        """Both together."""
        self.done += other.done
        self.latencies_us.extend(other.latencies_us)
        if other.longest_ns > self.longest_ns:
            self.longest_ns, self.longest = other.longest_ns, other.longest

    def quantile_ms(self, share: float) -> float:
        """How long an operation took at most, for that share of them."""
        ordered = sorted(self.latencies_us)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)] / 1000 if ordered else 0.0

    def __str__(self) -> str:
        """One line."""
        return (
            f"{self.done.total()} operations, p50 {self.quantile_ms(0.5):.2f} ms, "
            f"p99 {self.quantile_ms(0.99):.2f} ms, longest pause {self.longest_ns / 1e6:.0f} ms "
            f"({self.longest})"
        )


class Writer:
    """One of them, in its own process."""

    def __init__(
        self, top: Path, record: Path, number: int, count: int, seed: int, page: memoryview,
        rest_s: float, files: int,
    ) -> None:  # fmt: skip
        self._top = os.fspath(top)
        self._number = number
        self._count = count
        self._random = random.Random(seed * 1000 + number)
        self._page = page
        self._base = _FIRST + _EACH * number
        self._rest_s = rest_s
        self._files = files
        self._state = State(number)
        self._record = RecordFile(record)
        self._sequence = 0
        self._names = 0
        self._open: dict[int, tuple[int, Thing]] = {}
        self._opened_in = 0
        """Of which mount: the epoch."""
        self._acknowledged = 0
        self.report = Report()
        self._choices: list[tuple[int, Callable[[], Op | None]]] = [
            (9, self._choose_create), (3, self._choose_mkdir), (3, self._choose_symlink),
            (3, self._choose_link), (9, self._choose_rename), (2, self._choose_exchange),
            (5, self._choose_unlink), (3, self._choose_rmdir), (20, self._choose_write),
            (6, self._choose_append), (4, self._choose_truncate), (4, self._choose_chmod),
            (3, self._choose_utime), (3, self._choose_setxattr), (2, self._choose_removexattr),
            (2, self._choose_fsync), (12, self._choose_slot), (4, self._choose_log),
            (6, self._look),
        ]  # fmt: skip

    # The loop ----------------------------------------------------------------------------------

    def run(self) -> Report:
        """Until it is told to stop."""
        weights = [weight for weight, _ in self._choices]
        self._acknowledged = time.monotonic_ns()
        for kind, name in (("create", "big"), ("create", "big2")):
            self._do((kind, f"{self._state.own}/{name}", 0o644))
            self._do(("write", f"{self._state.own}/{name}", 0, BIG, self._number))
        while not self._page[_STOP]:
            if self._page[_HOLD]:
                self._be_held()
                continue
            op = self._random.choices(self._choices, weights)[0][1]()
            if op is not None:
                self._do(op)
                self._page[self._base + _DONE] += 1
            if self._rest_s:
                time.sleep(self._rest_s)
                self._acknowledged = time.monotonic_ns()
        self._close_all()
        return self.report

    def _be_held(self) -> None:
        self._page[self._base + _IDLE] = 1
        while self._page[_HOLD] and not self._page[_STOP]:
            time.sleep(_POLL_S)
        self._page[self._base + _IDLE] = 0
        self._record.open()
        self._acknowledged = time.monotonic_ns()

    def _do(self, op: Op) -> None:
        """One operation, with its record; again if the mount went away in the middle."""
        number = self._next()
        began = time.monotonic_ns()
        self._record.write(("b", number, began, *op))
        while True:
            try:
                self._call(lambda op=op: self._execute(op))  # type: ignore[misc]
            except MountDown:
                outcome, again = self._resolve(number, op)
                if outcome == "done":
                    break
                if again is None:
                    return
                number, op = again
                began = time.monotonic_ns()
            except OSError as error:
                if op[0] != "link" or error.errno != errno.EXDEV:
                    raise
                # Between what is replicated and what a policy keeps here there are no hard links.
                self._record.write(("n", number, time.monotonic_ns()))
                return
            else:
                now = time.monotonic_ns()
                self._record.write(("e", number, now))
                self._count_it(op[0], began, now)
                break
        self._state.apply(number, op)

    def _next(self) -> int:
        self._sequence += 1
        return self._sequence

    def _count_it(self, kind: str, began: int, now: int) -> None:
        report = self.report
        report.done[kind] += 1
        report.latencies_us.append((now - began) // 1000)
        pause = now - self._acknowledged
        self._acknowledged = now
        if pause > report.longest_ns:
            report.longest_ns, report.longest = pause, kind
            self._page[self._base + _LONGEST] = pause

    def _call(self, function: Callable[[], None]) -> None:
        """Whatever *function* raises while the mount is, or goes, down means that."""
        epoch = self._page[_EPOCH]
        try:
            function()
        except (OSError, Failed) as error:
            if epoch % 2 or self._page[_EPOCH] != epoch:
                raise MountDown from error
            raise

    # After the end of the mount -----------------------------------------------------------------

    def _resolve(self, number: int, op: Op) -> tuple[str, tuple[int, Op] | None]:
        """Look what became of an operation that was cut off, when the mount is back.

        Returns:
            `done`, or `undone` with its repetition under a new number where it is to be repeated.
        """
        self._close_all()
        kind = op[0]
        while True:
            self._wait_up()
            try:
                outcome = "x"
                if kind in {"log", "fsync"}:
                    outcome = "m" if kind == "log" else "n"
                elif kind in _LOOKS:
                    done: list[bool] = []
                    self._call(lambda done=done: done.append(_LOOKS[kind](self, *op[1:])))  # type: ignore[misc]
                    outcome = "y" if done[0] else "n"
                break
            except MountDown:
                continue
        now = time.monotonic_ns()
        self._acknowledged = now
        if outcome == "y" and kind in {"create", "mkdir"}:
            # It may have been cut off between making and its mode.
            self._state.apply(number, op)
            again = self._next(), ("chmod", op[1], op[2])
            self._record.write(("y", number, now), ("b", again[0], now, *again[1]))
            return "undone", again
        if outcome == "x":
            if kind == "append":
                op = "write", op[1], len(self._state.find(op[1]).data), *op[2:]
            self._state.cut_off(op)
            again = self._next(), op
            self._record.write(("x", number, now), ("b", again[0], now, *op))
            return "undone", again
        self._record.write((outcome, number, now))
        return ("done", None) if outcome == "y" else ("undone", None)

    def _wait_up(self) -> None:
        marker = f"{self._top}/{self._state.own}"
        while not self._page[_STOP]:
            if self._page[_EPOCH] % 2 == 0:
                with contextlib.suppress(OSError):
                    os.stat(marker)
                    return
            time.sleep(_POLL_S)
        raise Stopped

    def _is_there(self, path: str, *_: Any) -> bool:
        try:
            os.lstat(f"{self._top}/{path}")
        except FileNotFoundError:
            return False
        return True

    def _is_gone(self, path: str, *_: Any) -> bool:
        return not self._is_there(path)

    def _is_linked(self, _old: str, new: str) -> bool:
        return self._is_there(new)

    def _is_exchanged(self, old: str, _new: str) -> bool:
        with open(f"{self._top}/{old}", "rb") as file:
            return file.read() != self._state.find(old).data

    # Doing -------------------------------------------------------------------------------------

    def _execute(self, op: Op) -> None:
        kind, *arguments = op
        getattr(self, f"_{kind}")(*arguments)

    def _fd(self, path: str) -> int:
        """A descriptor of a file, kept for a while: names may change under it."""
        thing = self._state.find(path)
        if self._opened_in != self._page[_EPOCH]:
            self._close_all()
            self._opened_in = self._page[_EPOCH]
        known = self._open.get(id(thing))
        if known is not None:
            return known[0]
        if len(self._open) >= _OPEN_MAX:
            os.close(self._open.pop(next(iter(self._open)))[0])
        fd = os.open(f"{self._top}/{path}", os.O_RDWR)
        self._open[id(thing)] = fd, thing
        return fd

    def _close_all(self) -> None:
        for fd, _ in self._open.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._open.clear()

    def _create(self, path: str, mode: int) -> None:
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        os.close(os.open(f"{self._top}/{path}", flags, mode))

    def _mkdir(self, path: str, mode: int) -> None:
        os.mkdir(f"{self._top}/{path}", mode)

    def _symlink(self, path: str, target: str) -> None:
        os.symlink(target, f"{self._top}/{path}")

    def _link(self, old: str, new: str) -> None:
        os.link(f"{self._top}/{old}", f"{self._top}/{new}")

    def _unlink(self, path: str) -> None:
        os.unlink(f"{self._top}/{path}")

    def _rmdir(self, path: str) -> None:
        os.rmdir(f"{self._top}/{path}")

    def _rename(self, old: str, new: str) -> None:
        os.rename(f"{self._top}/{old}", f"{self._top}/{new}")

    def _exchange(self, old: str, new: str) -> None:
        renameat2(f"{self._top}/{old}", f"{self._top}/{new}", RENAME_EXCHANGE)

    def _write(self, path: str, offset: int, length: int, seed: int) -> None:
        _all(os.pwrite(self._fd(path), payload(seed, length), offset), length)

    def _append(self, path: str, length: int, seed: int) -> None:
        fd = os.open(f"{self._top}/{path}", os.O_WRONLY | os.O_APPEND)
        try:
            _all(os.write(fd, payload(seed, length)), length)
        finally:
            os.close(fd)

    def _truncate(self, path: str, size: int) -> None:
        if size or self._random.random() < 0.5:
            os.truncate(f"{self._top}/{path}", size)
        else:
            os.close(os.open(f"{self._top}/{path}", os.O_WRONLY | os.O_TRUNC))

    def _chmod(self, path: str, mode: int) -> None:
        os.chmod(f"{self._top}/{path}", mode)

    def _utime(self, path: str, ns: int) -> None:
        os.utime(f"{self._top}/{path}", ns=(ns, ns))

    def _setxattr(self, path: str, name: str, seed: int, length: int) -> None:
        os.setxattr(f"{self._top}/{path}", name, payload(seed, length))

    def _removexattr(self, path: str, name: str) -> None:
        try:
            os.removexattr(f"{self._top}/{path}", name)
        except OSError as error:
            if error.errno != errno.ENODATA:  # it is a repetition
                raise

    def _fsync(self, path: str) -> None:
        fd = os.open(f"{self._top}/{path}", os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def _slot(self, block: int, seed: int) -> None:
        fd = os.open(f"{self._top}/common/slots", os.O_WRONLY)
        try:
            _all(os.pwrite(fd, payload(seed, BLOCK), block * BLOCK), BLOCK)
        finally:
            os.close(fd)

    def _log(self, entry: int) -> None:
        fd = os.open(f"{self._top}/common/log", os.O_WRONLY | os.O_APPEND)
        try:
            _all(os.write(fd, log_line(self._number, entry)), len(log_line(0, 0)))
        finally:
            os.close(fd)

    # Choosing ----------------------------------------------------------------------------------

    def _directory(self) -> str:
        state = self._state
        if self._random.random() < 0.15:
            return "shared"
        path, thing = state.own, state.root.entries[state.own]
        for _ in range(self._random.randrange(DEPTH_MAX)):
            below = [name for name, one in thing.entries.items() if one.kind == "directory"]
            if not below:
                break
            name = self._random.choice(below)
            path, thing = f"{path}/{name}", thing.entries[name]
        return path

    def _new(self, directory: str | None = None) -> str:
        self._names += 1
        return f"{directory or self._directory()}/{self._state.own}-{self._names}"

    def _victim(self, *kinds: str) -> str | None:
        for _ in range(6):
            directory = self._directory()
            found = [
                name
                for name, one in self._state.find(directory).entries.items()
                if not kinds or one.kind in kinds
            ]
            if found:
                return f"{directory}/{self._random.choice(found)}"
        return None

    def _seed(self) -> int:
        return self._random.getrandbits(40)

    def _how_many(self) -> int:
        """Names, roughly."""
        own = self._state.root.entries[self._state.own]
        pending, count = [own, self._state.root.entries["shared"]], 0
        while pending:
            thing = pending.pop()
            count += len(thing.entries)
            pending += [one for one in thing.entries.values() if one.kind == "directory"]
        return count

    def _is_full(self) -> bool:
        return self._how_many() >= self._files

    def _choose_create(self) -> Op | None:
        if self._is_full():
            return self._choose_unlink()
        return "create", self._new(), self._random.choice([0o600, 0o644, 0o755])

    def _choose_mkdir(self) -> Op | None:
        if self._is_full():
            return self._choose_rmdir()
        path = self._new()
        return ("mkdir", path, 0o755) if path.count("/") <= DEPTH_MAX else None

    def _choose_symlink(self) -> Op | None:
        if self._is_full():
            return self._choose_unlink()
        return "symlink", self._new(), f"nowhere-{self._random.randrange(1000)}"

    def _choose_link(self) -> Op | None:
        path = None if self._is_full() else self._victim("file")
        return ("link", path, self._new()) if path else None

    def _choose_rename(self) -> Op | None:
        old = self._victim()
        if old is None or _is_big(old):
            return None
        directory = self._directory()
        thing = self._state.find(old)
        new = self._new(directory)
        if thing.kind == "directory":
            if f"{directory}/".startswith(f"{old}/") or directory.count("/") >= DEPTH_MAX - 1:
                return None
        elif self._random.random() < 0.4:
            over = self._victim("file", "symlink")
            same = over is not None and self._state.find(over) is thing
            if over is not None and not same and not _is_big(over):
                new = over
        return "rename", old, new

    def _choose_exchange(self) -> Op | None:
        one, other = self._victim("file"), self._victim("file")
        if one is None or other is None or _is_big(one) or _is_big(other):
            return None
        same = self._state.find(one).data == self._state.find(other).data
        return None if same else ("exchange", one, other)

    def _choose_unlink(self) -> Op | None:
        path = self._victim("file", "symlink")
        return ("unlink", path) if path and not _is_big(path) else None

    def _choose_rmdir(self) -> Op | None:
        path = self._victim("directory")
        if path is None or self._state.find(path).entries:
            return None
        return "rmdir", path

    def _choose_write(self) -> Op | None:
        path = self._victim("file")
        if path is None:
            return None
        size = len(self._state.find(path).data)
        length = self._random.choice([1, 100, 4096, 4096, 10_000, 70_000])
        beyond = self._random.choice([0, 0, 0, 50_000])
        return "write", path, self._random.randrange(size + beyond + 1), length, self._seed()

    def _choose_append(self) -> Op | None:
        path = self._victim("file")
        return ("append", path, self._random.randrange(1, 9000), self._seed()) if path else None

    def _choose_truncate(self) -> Op | None:
        path = self._victim("file")
        if path is None:
            return None
        size = len(self._state.find(path).data)
        if size > BIG // 2 and self._random.random() < 0.9:
            return "truncate", path, BIG  # the large ones stay large
        return (
            "truncate",
            path,
            self._random.choice([0, size // 2, self._random.randrange(200_000)]),
        )

    def _choose_chmod(self) -> Op | None:
        path = self._victim("file", "directory")
        return ("chmod", path, 0o700 | self._random.randrange(0o100)) if path else None

    def _choose_utime(self) -> Op | None:
        path = self._victim("file", "directory")
        return ("utime", path, self._random.randrange(2 * 10**18)) if path else None

    def _choose_setxattr(self) -> Op | None:
        path = self._victim("file", "directory")
        if path is None:
            return None
        name = f"user.{self._random.choice('abc')}"
        return "setxattr", path, name, self._seed(), self._random.randrange(200)

    def _choose_removexattr(self) -> Op | None:
        path = self._victim("file", "directory")
        if path is None or not self._state.find(path).xattrs:
            return None
        return "removexattr", path, self._random.choice(sorted(self._state.find(path).xattrs))

    def _choose_fsync(self) -> Op | None:
        path = self._victim("file", "directory")
        return ("fsync", path) if path else None

    def _choose_slot(self) -> Op:
        block = self._random.randrange(BLOCKS // self._count) * self._count + self._number
        return "slot", block, self._seed()

    def _choose_log(self) -> Op:
        return "log", self._sequence + 1

    def _look(self) -> None:
        """Read something, and see that it is what it must be."""
        path = self._victim()
        if path is None:
            return
        thing = self._state.find(path)
        began = time.monotonic_ns()
        with contextlib.suppress(MountDown):
            self._call(lambda: self._look_at(path, thing))
            self._count_it("look", began, time.monotonic_ns())

    def _look_at(self, path: str, thing: Thing) -> None:
        full = f"{self._top}/{path}"
        if thing.kind == "file":
            with open(full, "rb") as file:
                data = file.read()
            if data != thing.data:
                raise Failed(f"{path}: is read as something else; {list(thing.history)}")
        elif thing.kind == "directory":
            if set(os.listdir(full)) != thing.entries.keys():
                raise Failed(f"{path}: lists {sorted(os.listdir(full))}; {list(thing.history)}")
        elif os.readlink(full) != thing.target:
            raise Failed(f"{path}: points elsewhere; {list(thing.history)}")
        found = os.lstat(full)
        if thing.mtime not in (None, found.st_mtime_ns):
            raise Failed(f"{path}: mtime {found.st_mtime_ns}; {list(thing.history)}")


class Stopped(Exception):
    """It shall stop while the mount is down."""


_LOOKS: Final[dict[str, Callable[..., bool]]] = {
    "create": Writer._is_there,
    "mkdir": Writer._is_there,
    "symlink": Writer._is_there,
    "link": Writer._is_linked,
    "unlink": Writer._is_gone,
    "rmdir": Writer._is_gone,
    "rename": Writer._is_gone,
    "exchange": Writer._is_exchanged,
}
"""Whether an operation that was cut off was done; what is not here is repeated."""


def _is_big(path: str) -> bool:
    """One of the two large files, which stay where they are."""
    return path.rpartition("/")[2].startswith("big")


def _all(written: int, length: int) -> None:
    if written != length:
        raise Failed(f"a write of {length} bytes wrote {written}")


class Writers:
    """Several writers on one mount; a context manager that ends them.

    Args:
        top: the mount; `prepare` makes what they share.
        records: a directory on another filesystem than the stores.
        count: how many.
        seed: of what they do.
        rest_s: between two operations of each, seconds.
        files: names that each has at most, about.
    """

    def __init__(
        self, top: Path, records: Path, *, count: int = 3, seed: int = 1, rest_s: float = 0.0,
        files: int = 120,
    ) -> None:  # fmt: skip
        self._top = top
        self._paths = [records / f"w{number}.record" for number in range(count)]
        self._seed = seed
        self._rest_s = rest_s
        self._files = files
        self._page = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
        self._children: list[Child] = []
        self.records: list[Record] = []
        self.report = Report()

    def __enter__(self) -> Self:
        """Make what they share, and start them."""
        self.prepare()
        for number, path in enumerate(self._paths):
            path.touch()
            self.records.append(Record(path, number))
            writer = spawn(
                _run, self._top, path, number, len(self._paths), self._seed, self._page,
                self._rest_s, self._files,
            )  # fmt: skip
            self._children.append(writer)
        return self

    def prepare(self) -> None:
        """The directories of each, and the two files of all."""
        for number in range(len(self._paths)):
            (self._top / f"w{number}").mkdir()
        for name in ("shared", "common"):
            (self._top / name).mkdir()
        (self._top / "common/slots").write_bytes(bytes(BLOCK * BLOCKS))
        (self._top / "common/log").touch()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop them; with a failure already, whatever it takes."""
        if error is None:
            self.stop()
            return
        self._page[_STOP] = 1
        while self._children:
            with contextlib.suppress(OSError):
                self._children.pop().kill()

    def stop(self) -> Report:
        """Let them finish, and tell what they did; raises what failed in one of them."""
        self._page[_STOP] = 1
        while self._children:
            self.report.add(self._children.pop().result())
        return self.report

    def check_alive(self) -> None:
        """Raise Failed with what a writer failed with."""
        for child in list(self._children):
            # Relies on: waitid(2), WNOWAIT leaves the child to be waited for.
            flags = os.WEXITED | os.WNOHANG | os.WNOWAIT
            if os.waitid(os.P_PID, child.pid, flags) is not None:
                self._children.remove(child)
                try:
                    child.result()
                except Exception as error:
                    raise Failed(f"a writer has failed: {error}") from error
                raise Failed("a writer has stopped by itself")

    def done(self) -> list[int]:
        """Operations of each so far."""
        return [self._get(number, _DONE) for number in range(len(self._paths))]

    def longest_ms(self) -> float:
        """The longest pause of any between two acknowledged operations, so far."""
        return max(self._get(number, _LONGEST) for number in range(len(self._paths))) / 1e6

    def _get(self, number: int, field: int) -> int:
        return self._page[_FIRST + _EACH * number + field]

    def wait_more(self, count: int = 50, timeout_s: float = 60.0) -> None:
        """Wait until each has done so many operations more."""
        before = self.done()

        def has_more() -> bool:
            self.check_alive()
            return all(now >= was + count for was, now in zip(before, self.done(), strict=True))

        wait_for(has_more, timeout_s, f"{count} operations more than {before}")

    @contextlib.contextmanager
    def mount_down(self) -> Iterator[None]:
        """The mount is, or may be, down in this block: errors are to be expected."""
        self._page[_EPOCH] += 1
        yield
        self._page[_EPOCH] += 1

    @contextlib.contextmanager
    def held(self, timeout_s: float = 60.0) -> Iterator[None]:
        """Nobody does anything in this block."""
        self._page[_HOLD] = 1

        def is_idle() -> bool:
            self.check_alive()
            return all(self._get(number, _IDLE) for number in range(len(self._paths)))

        wait_for(is_idle, timeout_s, "the writers to be held")
        try:
            yield
        finally:
            self._page[_HOLD] = 0
            wait_for(
                lambda: not any(self._get(n, _IDLE) for n in range(len(self._paths))),
                timeout_s, "the writers to go on",
            )  # fmt: skip

    def check(
        self, top: Path, *, acknowledged_ns: int | None = None, begun_ns: int | None = None,
        timeout_s: float = 3.0,
    ) -> None:  # fmt: skip
        """The tree at *top* holds all that was acknowledged until then, and nothing begun later.

        Moments must not go backwards from one call to the next. What is in flight may still be
        arriving: it becomes so within *timeout_s*.

        Raises:
            AssertionError: it does not; says what is wrong, with what was done there last.
        """
        now = time.monotonic_ns()
        until = time.monotonic() + timeout_s
        for record in self.records:
            while found := admissible.inadmissible(
                top,
                record,
                acknowledged_ns=now if acknowledged_ns is None else acknowledged_ns,
                begun_ns=now if begun_ns is None else begun_ns,
            ):
                assert time.monotonic() < until, found


def _run(*arguments: Any) -> Report:
    """In the child: be ended with the parent."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    writer = Writer(*arguments)
    with contextlib.suppress(Stopped):
        writer.run()
    return writer.report
