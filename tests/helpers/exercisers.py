"""Random operations with a seed: on one file against a model, and on a tree by many processes.

`FileExerciser` knows what every byte of its file must be and checks it as it goes (in the manner
of fsx). `stress` has several processes do everything to a small tree, so that they meet often; it
checks that no call fails in a way it must not (in the manner of fsstress), and leaves it to the
caller to compare the stores afterwards.
"""

from __future__ import annotations

import errno
import mmap
import os
import random
import stat
from collections import Counter, deque
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from helpers import acl
from helpers.children import together
from helpers.libc import RENAME_EXCHANGE, renameat2

LENGTH_MAX = 48 * 1024
SIZE_MAX = 384 * 1024
HISTORY = 30


class FileExerciser:
    """Random operations on one file, each checked against a copy in memory.

    The same seed gives the same operations. Operations are on odd offsets and lengths, through two
    descriptors and a mapping, in one thread: what one wrote, the next must read.

    Args:
        path: the file; created, or emptied.
        seed: of the random numbers.
    """

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path
        self.seed = seed
        self.random = random.Random(seed)
        self.model = bytearray()
        self.history: deque[str] = deque(maxlen=HISTORY)
        self.fds = [os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR) for _ in range(2)]
        self.operations: list[tuple[int, Callable[[], None]]] = [
            (30, self.write),
            (6, self.append),
            (25, self.read),
            (6, self.shorten),
            (4, self.lengthen),
            (8, self.read_mapping),
            (8, self.write_mapping),
            (4, self.copy),
            (4, self.flush),
            (3, self.reopen),
            (1, self.empty),
        ]

    def run(self, count: int) -> None:
        """Do `count` operations, then compare the whole file.

        Raises:
            AssertionError: the file is not what it should be; tells the seed and the last
                operations.
        """
        weights = [weight for weight, _ in self.operations]
        try:
            for number in range(count):
                operation = self.random.choices(self.operations, weights)[0][1]
                self.history.append(f"{number}: {operation.__name__}")
                operation()
                if os.fstat(self.fds[0]).st_size != len(self.model):
                    self.fail(f"size {os.fstat(self.fds[0]).st_size}, not {len(self.model)}")
            self.check(0, os.pread(self.fds[1], SIZE_MAX * 2, 0), len(self.model))
        finally:
            for fd in self.fds:
                os.close(fd)
        with self.path.open("rb") as file:
            self.check(0, file.read(), len(self.model))

    def fail(self, what: str) -> NoReturn:
        """Raise with all that is needed to do it again."""
        history = "\n  ".join(self.history)
        raise AssertionError(f"seed {self.seed}: {what}; last operations:\n  {history}")

    def check(self, offset: int, data: bytes, length: int) -> None:
        """`data` must be what the model has at `offset`, up to `length` bytes of it."""
        expected = self.model[offset : offset + length]
        if data != expected:
            same = min(len(data), len(expected))
            first = next((i for i in range(same) if data[i] != expected[i]), same)
            self.fail(
                f"{len(data)} of {len(expected)} bytes at {offset}, differ at {offset + first}: "
                f"{data[first : first + 16]!r}, not {bytes(expected[first : first + 16])!r}"
            )

    def note(self, text: str) -> None:
        """Add the arguments to the operation's line in the history."""
        self.history[-1] += f" {text}"

    def place(self, limit: int) -> tuple[int, int]:
        """A random (offset, length) below `limit`; small ones are as likely as large ones."""
        offset = self.random.randrange(limit)
        longest = min(LENGTH_MAX, limit - offset)
        length = self.random.randrange(1, longest + 1)
        if self.random.random() < 0.4:
            length = min(length, self.random.choice([1, 7, 100, 4096]))
        self.note(f"{offset}+{length}")
        return offset, length

    def fd(self) -> int:
        """One of the two descriptors."""
        return self.random.choice(self.fds)

    def put(self, offset: int, data: bytes) -> None:
        """Change the model as a write does."""
        if offset > len(self.model):
            self.model.extend(bytes(offset - len(self.model)))
        self.model[offset : offset + len(data)] = data

    def write(self) -> None:
        """Anywhere, often beyond the end."""
        offset, length = self.place(SIZE_MAX)
        data = self.random.randbytes(length)
        written = os.pwrite(self.fd(), data, offset)
        if written != length:
            self.fail(f"wrote {written} of {length} bytes")
        self.put(offset, data)

    def append(self) -> None:
        """Through a descriptor opened with O_APPEND."""
        if len(self.model) >= SIZE_MAX:
            return
        data = self.random.randbytes(self.random.randrange(1, 5000))
        fd = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)
        self.put(len(self.model), data)

    def read(self) -> None:
        """Anywhere, also across and beyond the end."""
        offset, length = self.place(SIZE_MAX)
        self.check(offset, os.pread(self.fd(), length, offset), length)

    def shorten(self) -> None:
        """Truncate to any smaller size."""
        size = self.random.randrange(len(self.model) + 1)
        self.note(str(size))
        os.ftruncate(self.fd(), size)
        del self.model[size:]

    def lengthen(self) -> None:
        """Truncate to any larger size."""
        size = self.random.randrange(len(self.model), max(SIZE_MAX, len(self.model)) + 1)
        self.note(str(size))
        os.truncate(self.path, size)
        self.model.extend(bytes(size - len(self.model)))

    def read_mapping(self) -> None:
        """Through a new mapping."""
        if self.model:
            offset, length = self.place(len(self.model))
            with mmap.mmap(self.fd(), len(self.model), prot=mmap.PROT_READ) as mapping:
                self.check(offset, mapping[offset : offset + length], length)

    def write_mapping(self) -> None:
        """Through a new shared mapping, with or without msync."""
        if self.model:
            offset, length = self.place(len(self.model))
            data = self.random.randbytes(length)
            with mmap.mmap(self.fd(), len(self.model)) as mapping:
                mapping[offset : offset + length] = data
                if self.random.random() < 0.5:
                    mapping.flush()
            self.put(offset, data)

    def copy(self) -> None:
        """Part of the file to elsewhere in it, within the kernel."""
        if len(self.model) < 2:
            return
        offset, length = self.place(len(self.model) // 2)
        target = self.random.randrange(offset + length, SIZE_MAX)
        self.note(f"to {target}")
        fd = self.fd()
        done = os.copy_file_range(fd, fd, length, offset, target)
        self.put(target, bytes(self.model[offset : offset + done]))

    def flush(self) -> None:
        """Fsync or fdatasync."""
        self.random.choice([os.fsync, os.fdatasync])(self.fd())

    def reopen(self) -> None:
        """Close both descriptors and open the file again."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
        self.fds += [os.open(self.path, os.O_RDWR) for _ in range(2)]

    def empty(self) -> None:
        """Open with O_TRUNC."""
        os.close(os.open(self.path, os.O_WRONLY | os.O_TRUNC))
        self.model.clear()


EXPECTED = frozenset(
    (
        errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENODATA, errno.ENOENT,
        errno.ENOTDIR, errno.ENOTEMPTY, errno.ENXIO, errno.EPERM,
    )
)  # fmt: skip
"""What a call may fail with when others change the tree at the same time; all else is a fault."""

DIRECTORIES = 6
DEPTH_MAX = 4


class TreeExerciser:
    """Random operations on the tree below `root` by one process; several may run at once.

    Victims are chosen among what is there, so that most operations do real work.
    """

    def __init__(self, root: Path, seed: int) -> None:
        self.root = os.fspath(root)
        self.random = random.Random(seed)
        self.done: Counter[str] = Counter()
        self.operations: list[tuple[int, Callable[[], None]]] = [
            (14, self.create), (6, self.mkdir), (3, self.mknod), (4, self.symlink), (6, self.link),
            (12, self.rename), (3, self.exchange), (10, self.unlink), (4, self.rmdir),
            (14, self.write), (5, self.truncate), (6, self.chmod), (4, self.chown),
            (4, self.utime), (4, self.setxattr), (2, self.removexattr), (2, self.set_acl),
            (6, self.read), (3, self.list), (2, self.flush), (3, self.unlinked),
        ]  # fmt: skip

    def run(self, count: int) -> Counter[str]:
        """Do `count` operations; returns how often each ended in which way.

        Raises:
            AssertionError: a call failed with an errno that is not to be expected.
        """
        weights = [weight for weight, _ in self.operations]
        for number in range(count):
            operation = self.random.choices(self.operations, weights)[0][1]
            try:
                operation()
            except OSError as error:
                if error.errno not in EXPECTED:
                    raise AssertionError(
                        f"operation {number}, {operation.__name__}: {error}"
                    ) from error
                self.done[f"{operation.__name__} {errno.errorcode[error.errno]}"] += 1
            else:
                self.done[f"{operation.__name__} ok"] += 1
        return self.done

    def directory(self) -> str:
        """A directory somewhere below the root, or the root."""
        path = self.root
        for _ in range(self.random.randrange(DEPTH_MAX)):
            with os.scandir(path) as entries:
                below = sorted(e.path for e in entries if e.is_dir(follow_symlinks=False))
            if not below:
                break
            path = self.random.choice(below)
        return path

    def new(self) -> str:
        """A name that may or may not be taken."""
        return f"{self.directory()}/{self.random.choice('nopq')}{self.random.randrange(12)}"

    def victim(self, *kinds: int) -> str:
        """Something that was there a moment ago, of one of these file types if any is."""
        for _ in range(5):
            with os.scandir(self.directory()) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
            if kinds:
                found = [entry for entry in found if _type(entry) in kinds]
            if found:
                return found[self.random.randrange(1 << 30) % len(found)].path
        raise FileNotFoundError(errno.ENOENT, "nothing of that kind")

    def file(self) -> str:
        """A regular file that was there a moment ago."""
        return self.victim(stat.S_IFREG)

    def create(self) -> None:
        """A new file with something in it."""
        fd = os.open(
            self.new(), os.O_CREAT | os.O_EXCL | os.O_WRONLY, self.random.choice([0o600, 0o644])
        )
        try:
            os.write(fd, self.random.randbytes(self.random.randrange(20_000)))
        finally:
            os.close(fd)

    def mkdir(self) -> None:
        """A new directory, while there are few."""
        parent = self.directory()
        if parent.count("/") - self.root.count("/") < DEPTH_MAX:
            os.mkdir(f"{parent}/d{self.random.randrange(DIRECTORIES)}")

    def mknod(self) -> None:
        """A fifo, socket or device."""
        kind = self.random.choice([stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK])
        os.mknod(self.new(), kind | 0o640, os.makedev(1, self.random.randrange(200)))

    def symlink(self) -> None:
        """To something in the same directory, that may exist, or be a loop."""
        os.symlink(f"{self.random.choice('nopq')}{self.random.randrange(12)}", self.new())

    def link(self) -> None:
        """Another name for anything."""
        os.link(self.victim(), self.new(), follow_symlinks=False)

    def rename(self) -> None:
        """Anything to anywhere, over anything."""
        source = self.victim()
        if stat.S_ISDIR(os.lstat(source).st_mode) and self.random.random() < 0.8:
            os.rename(source, f"{self.directory()}/d{self.random.randrange(DIRECTORIES)}")
        else:
            os.rename(source, self.new())

    def exchange(self) -> None:
        """Anything with anything."""
        renameat2(self.victim(), self.victim(), RENAME_EXCHANGE)

    def unlink(self) -> None:
        """Any name that is no directory's."""
        os.unlink(self.victim(*(set(range(0o010000, 0o150000, 0o010000)) - {stat.S_IFDIR})))

    def rmdir(self) -> None:
        """Any directory; most are not empty."""
        os.rmdir(self.victim(stat.S_IFDIR))

    def write(self) -> None:
        """Into a file, somewhere, often beyond its end."""
        fd = os.open(self.file(), os.O_WRONLY | os.O_NONBLOCK)
        try:
            data = self.random.randbytes(self.random.randrange(1, 30_000))
            os.pwrite(fd, data, self.random.randrange(200_000))
        finally:
            os.close(fd)

    def truncate(self) -> None:
        """Shorter or longer."""
        os.truncate(self.file(), self.random.randrange(200_000))

    def chmod(self) -> None:
        """Anything; a symlink's target."""
        path = self.victim()
        bits = 0o700 if os.path.isdir(path) else 0
        os.chmod(path, bits | self.random.randrange(0o10000))

    def chown(self) -> None:
        """Anything, also a symlink."""
        os.lchown(self.victim(), self.random.randrange(1000), self.random.randrange(1000))

    def utime(self) -> None:
        """Anything, also a symlink, to any time."""
        moment = self.random.randrange(-(10**18), 4 * 10**18)
        os.utime(self.victim(), ns=(moment, moment), follow_symlinks=False)

    def setxattr(self) -> None:
        """On a file or directory."""
        value = self.random.randbytes(self.random.randrange(300))
        name = f"user.{self.random.choice('abc')}"
        os.setxattr(self.victim(stat.S_IFREG, stat.S_IFDIR), name, value)

    def removexattr(self) -> None:
        """From a file or directory."""
        path = self.victim(stat.S_IFREG, stat.S_IFDIR)
        names = [name for name in os.listxattr(path) if name.startswith("user.")]
        os.removexattr(path, self.random.choice(names or ["user.a"]))

    def set_acl(self) -> None:
        """An access ACL, or a default ACL for what will be made."""
        path = self.victim(stat.S_IFREG, stat.S_IFDIR)
        name = acl.DEFAULT if os.path.isdir(path) and self.random.random() < 0.5 else acl.ACCESS
        entries = acl.pack(7, self.random.randrange(8), 5, users={self.random.randrange(9): 6})
        os.setxattr(path, name, entries)

    def read(self) -> None:
        """A whole file."""
        with open(self.file(), "rb") as file:
            file.read()

    def list(self) -> None:
        """A whole directory with its attributes."""
        with os.scandir(self.directory()) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)

    def flush(self) -> None:
        """A file or a directory."""
        fd = os.open(self.victim(stat.S_IFREG, stat.S_IFDIR), os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def unlinked(self) -> None:
        """Use a file after its name has gone."""
        path = self.file()
        fd = os.open(path, os.O_RDWR)
        try:
            os.unlink(path)
            os.pwrite(fd, b"after the end of its name", self.random.randrange(50_000))
            os.ftruncate(fd, self.random.randrange(50_000))
            os.fchmod(fd, 0o640)
            os.pread(fd, 50_000, 0)
        finally:
            os.close(fd)


def _type(entry: os.DirEntry[str]) -> int:
    return stat.S_IFMT(entry.stat(follow_symlinks=False).st_mode)


def stress(root: Path, seed: int, *, processes: int, operations: int) -> Counter[str]:
    """Have several processes work on the tree below `root` at the same time.

    Args:
        root: an existing directory; what is in it is fair game.
        seed: of the random numbers; processes meet in an order that no seed can repeat.
        processes: how many.
        operations: of each process.

    Returns:
        How often each operation ended in which way, e.g. `"rename ok"`, over all processes.
    """
    exercisers = [TreeExerciser(root, seed * 1000 + number) for number in range(processes)]
    results = together(
        *[lambda exerciser=exerciser: exerciser.run(operations) for exerciser in exercisers]
    )
    total: Counter[str] = Counter()
    for result in results:
        total += result
    return total
