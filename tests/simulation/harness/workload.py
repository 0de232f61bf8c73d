"""What applications do: random operations on few names, so that they meet."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable

from simulation.harness.kernel import Kernel, OpenFile

from replfs.core.policy import Policy
from replfs.errors import NotInSync
from replfs.store import syscalls

NAMES = (b"a", b"b", b"c", b"d", b"\xffe")
XATTRS = (b"user.x", b"user.y", b"trusted.z")
DEPTH = 3
REGION = 1 << 16
SIZE_MAX = 3 << 20

Path = tuple[bytes, ...]

EXPECTED = frozenset({
    errno.EEXIST, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENOTEMPTY, errno.EXDEV,
    errno.EINVAL, errno.ENODATA, errno.EPERM, errno.ENXIO, errno.EOPNOTSUPP,
})  # fmt: skip
"""What an application may see when nothing is broken and the kernel has checked what it checks."""

_DEFAULT_ACL = bytes.fromhex(
    "0200000001000700ffffffff02000500e803000004000500ffffffff10000700ffffffff20000100ffffffff"
)


class Habits:
    """What the applications of one run like to do."""

    def __init__(self, rng: random.Random, *, has_policies: bool) -> None:
        weights = {
            "create": 10, "write": 14, "mapped": 4, "mkdir": 8, "symlink": 2, "mknod": 2,
            "unlink": 6, "rmdir": 3, "rename": 12, "exchange": 3, "noreplace": 1, "link": 5,
            "truncate": 5, "ftruncate": 3, "chmod": 4, "chown": 2, "utimens": 3, "setxattr": 3,
            "removexattr": 2, "acl": 1, "fsync": 3, "fsyncdir": 1, "barrier": 1, "readdir": 3,
            "stat": 2, "read": 2, "open": 4, "close": 4, "policy": 0,
        }  # fmt: skip
        for kind in weights:
            weights[kind] *= rng.choice((0, 1, 1, 1, 1, 3))
        for kind in ("create", "mkdir"):
            weights[kind] = max(weights[kind], 5)
        self.policies: tuple[str, ...] = ()
        if has_policies and rng.random() < 0.5:
            weights["policy"] = rng.choice((2, 6))
            self.policies = rng.choice((
                ("none", "sync", "inherit"),
                ("none", "inherit"),
                ("none", "inherit", "async"),
                ("async", "inherit"),
                ("none", "sync", "async", "strict", "inherit"),
            ))  # fmt: skip
        self.kinds = tuple(weights)
        self.weights = tuple(weights.values())
        self.large_share = rng.choice((0.0, 0.02, 0.1))
        self.names = NAMES[: rng.choice((2, 3, 5))]
        self.pauses_s = rng.choice(((0.0,), (0.0, 0.001), (0.0, 0.0, 0.001, 0.05, 0.4)))


class Process:
    """One application."""

    def __init__(self, kernel: Kernel, store: bytes, rng: random.Random, habits: Habits) -> None:
        self.kernel = kernel
        self.store = store
        self.rng = rng
        self.habits = habits
        self.files: list[OpenFile] = []

    # Choices ---------------------------------------------------------------------------------

    def _entries(self, path: Path) -> dict[bytes, bool]:
        """Names in a directory of the store, and whether they are directories."""
        where = b"/".join((self.store, *path))
        with os.scandir(where) as found:
            entries = {entry.name: entry.is_dir(follow_symlinks=False) for entry in found}
        return {name: entries[name] for name in sorted(entries) if name != b".replfs"}

    def _directory(self) -> Path:
        """One that is there, mostly near the root."""
        path: Path = ()
        while len(path) < DEPTH and self.rng.random() < 0.6:
            below = [name for name, is_directory in self._entries(path).items() if is_directory]
            if not below:
                break
            path = (*path, self.rng.choice(below))
        return path

    def _new(self) -> Path:
        """A name, often free, in a directory that is there."""
        return (*self._directory(), self.rng.choice(self.habits.names))

    def _path(self, *, directory: bool | None = None) -> Path:
        """What is there, mostly, and mostly of the wanted kind."""
        rng = self.rng
        for _ in range(4):
            above = self._directory()
            found = [
                name
                for name, is_directory in self._entries(above).items()
                if directory in {None, is_directory}
            ]
            if found and rng.random() < 0.9:
                return (*above, rng.choice(found))
        return self._new()

    def _file(self, *, writable: bool = False) -> OpenFile | None:
        self.files = [one for one in self.files if not one.is_closed]
        found = [one for one in self.files if one.writable or not writable]
        return self.rng.choice(found) if found else None

    def _offset(self) -> int:
        rng = self.rng
        if rng.random() < self.habits.large_share:
            return rng.randrange(SIZE_MAX)
        return rng.choice((
            0, rng.randrange(100), rng.randrange(20_000), rng.randrange(4) * REGION,
            rng.randrange(4 * REGION),
        ))  # fmt: skip

    def _data(self) -> bytes:
        rng = self.rng
        size = rng.choice((1, 10, 4096, rng.randrange(1, 10_000), rng.randrange(1, 10_000)))
        if rng.random() < self.habits.large_share:
            size = rng.choice((REGION, rng.randrange(1, 3 * REGION), 5 * REGION))
        if rng.random() < 0.1:
            return bytes(size)
        return rng.randbytes(min(size, 512)).ljust(size, rng.randbytes(1))

    # One operation ---------------------------------------------------------------------------

    async def step(self, note: Callable[[str], None]) -> None:
        """Do one random operation; OSError is an answer like any other."""
        kind = self.rng.choices(self.habits.kinds, self.habits.weights)[0]
        try:
            text = await getattr(self, f"_do_{kind}")(lambda text: note(f"> {kind} {text}"))
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, str(error.errno))
            note(f"  {kind}: {name}")
            if error.errno not in EXPECTED:
                raise
        except NotInSync as error:
            note(f"  {kind}: {error}")
        else:
            note(f"  {kind}: {text or 'done'}")
        if self.rng.random() < 0.2:
            self.kernel.reclaim()

    async def _do_create(self, note: Callable[[str], None]) -> None:
        path = self._new()
        flags = os.O_RDWR | self.rng.choice((0, 0, 0, os.O_EXCL, os.O_TRUNC, os.O_SYNC, os.O_DSYNC))
        mode = 0o100000 | self.rng.choice((0o644, 0o600, 0o755, 0o4755, 0o2775))
        note(f"{_show(path)} {flags:o} {mode:o}")
        opened = await self.kernel.create(path, mode, flags)
        if self.rng.random() < 0.5:
            self.files.append(opened)
        else:
            await self._close(opened)

    async def _do_open(self, note: Callable[[str], None]) -> None:
        path = self._path(directory=False)
        flags = self.rng.choice((os.O_RDONLY, os.O_RDWR, os.O_RDWR, os.O_WRONLY | os.O_TRUNC))
        note(f"{_show(path)} {flags:o}")
        self.files.append(await self.kernel.open(path, flags))

    async def _close(self, opened: OpenFile) -> None:
        self.kernel.files.remove(opened)
        await self.kernel.close(opened)

    async def _do_close(self, note: Callable[[str], None]) -> None:
        opened = self._file()
        if opened is not None:
            note(f"inode {opened.node.nodeid}")
            self.files.remove(opened)
            await self._close(opened)

    async def _write(self, note: Callable[[str], None], *, mapped: bool) -> str:
        opened = self._file(writable=True)
        own = opened is None
        if opened is None:
            path = self._path(directory=False)
            note(f"{_show(path)}")
            opened = await self.kernel.open(path, os.O_RDWR)
        offset, data = self._offset(), self._data()
        note(f"inode {opened.node.nodeid} offset {offset} length {len(data)}")
        try:
            written = await self.kernel.write(opened, offset, data, mapped=mapped)
        finally:
            if own:
                await self._close(opened)
        return f"{written} bytes"

    async def _do_write(self, note: Callable[[str], None]) -> str:
        return await self._write(note, mapped=False)

    async def _do_mapped(self, note: Callable[[str], None]) -> str:
        return await self._write(note, mapped=True)

    async def _do_read(self, note: Callable[[str], None]) -> None:
        opened = self._file()
        if opened is not None and opened.readable:
            note(f"inode {opened.node.nodeid}")
            await self.kernel.read(opened, self._offset(), 4096)

    async def _do_ftruncate(self, note: Callable[[str], None]) -> None:
        opened = self._file(writable=True)
        if opened is not None:
            size = self._offset()
            note(f"inode {opened.node.nodeid} to {size}")
            await self.kernel.truncate(opened, size)

    async def _do_fsync(self, note: Callable[[str], None]) -> None:
        opened = self._file()
        if opened is not None:
            note(f"inode {opened.node.nodeid}")
            await self.kernel.fsync(opened, data_only=self.rng.random() < 0.5)

    async def _do_truncate(self, note: Callable[[str], None]) -> None:
        path, size = self._path(directory=False), self._offset()
        note(f"{_show(path)} to {size}")
        await self.kernel.setattr(path, size=size)

    async def _do_mkdir(self, note: Callable[[str], None]) -> None:
        path = self._new()
        mode = 0o040000 | self.rng.choice((0o755, 0o700, 0o2775, 0o1777))
        note(f"{_show(path)} {mode:o}")
        await self.kernel.make(path, mode, umask=0o022)

    async def _do_symlink(self, note: Callable[[str], None]) -> None:
        path = self._new()
        note(_show(path))
        await self.kernel.make(path, 0o120777, target=b"/".join(self._path()))

    async def _do_mknod(self, note: Callable[[str], None]) -> None:
        path = self._new()
        mode, rdev = self.rng.choice((
            (0o010600, 0), (0o140755, 0), (0o020666, os.makedev(1, 3)), (0o100640, 0),
        ))  # fmt: skip
        note(f"{_show(path)} {mode:o}")
        await self.kernel.make(path, mode, umask=0o027, rdev=rdev)

    async def _do_unlink(self, note: Callable[[str], None]) -> None:
        path = self._path(directory=False)
        note(_show(path))
        await self.kernel.unlink(path)

    async def _do_rmdir(self, note: Callable[[str], None]) -> None:
        path = self._path(directory=True)
        note(_show(path))
        await self.kernel.unlink(path, directory=True)

    async def _rename(self, note: Callable[[str], None], flags: int) -> None:
        old = self._path()
        new = self._path() if flags or self.rng.random() < 0.4 else self._new()
        note(f"{_show(old)} to {_show(new)}")
        await self.kernel.rename(old, new, flags)

    async def _do_rename(self, note: Callable[[str], None]) -> None:
        await self._rename(note, 0)

    async def _do_exchange(self, note: Callable[[str], None]) -> None:
        await self._rename(note, syscalls.RENAME_EXCHANGE)

    async def _do_noreplace(self, note: Callable[[str], None]) -> None:
        await self._rename(note, syscalls.RENAME_NOREPLACE)

    async def _do_link(self, note: Callable[[str], None]) -> None:
        old, new = self._path(directory=False), self._new()
        note(f"{_show(old)} as {_show(new)}")
        await self.kernel.link(old, new)

    async def _do_chmod(self, note: Callable[[str], None]) -> None:
        path, mode = self._path(), self.rng.choice((0o644, 0o755, 0o4711, 0o2770, 0o2755))
        note(f"{_show(path)} {mode:o}")
        await self.kernel.setattr(path, mode=mode)

    async def _do_chown(self, note: Callable[[str], None]) -> None:
        path, uid = self._path(), self.rng.choice((0, 1000, 1001))
        note(f"{_show(path)} {uid}")
        await self.kernel.setattr(path, uid=uid, gid=self.rng.choice((0, 1000)))

    async def _do_utimens(self, note: Callable[[str], None]) -> None:
        path, mtime = self._path(), self.rng.choice((-1, 0, 1 << 60, self.rng.getrandbits(60)))
        note(f"{_show(path)} {mtime}")
        await self.kernel.setattr(path, atime=self.rng.getrandbits(60), mtime=mtime)

    async def _do_setxattr(self, note: Callable[[str], None]) -> None:
        path, name = self._path(), self.rng.choice(XATTRS)
        note(f"{_show(path)} {name!r}")
        await self.kernel.setxattr(path, name, self.rng.randbytes(self.rng.choice((0, 5, 200))))

    async def _do_removexattr(self, note: Callable[[str], None]) -> None:
        path, name = self._path(), self.rng.choice(XATTRS)
        note(f"{_show(path)} {name!r}")
        await self.kernel.removexattr(path, name)

    async def _do_acl(self, note: Callable[[str], None]) -> None:
        path = self._directory()
        note(_show(path))
        await self.kernel.setxattr(path, b"system.posix_acl_default", _DEFAULT_ACL)

    async def _do_fsyncdir(self, note: Callable[[str], None]) -> None:
        path = self._directory()
        note(_show(path))
        await self.kernel.fsyncdir(path)

    async def _do_barrier(self, note: Callable[[str], None]) -> None:
        note("everything")
        await self.kernel.fsyncdir(())

    async def _do_readdir(self, note: Callable[[str], None]) -> str:
        path = self._directory()
        note(_show(path))
        return repr(await self.kernel.readdir(path))

    async def _do_stat(self, note: Callable[[str], None]) -> None:
        path = self._path()
        note(_show(path))
        await self.kernel.stat(path)

    async def _do_policy(self, note: Callable[[str], None]) -> None:
        path = self._path() if self.rng.random() < 0.9 else ()
        policy = self.rng.choice(self.habits.policies)
        note(f"{_show(path)} {policy}")
        await self.kernel.setxattr(path, b"user.replfs.policy", policy.encode())


POLICY_NAMES = tuple(policy.name.lower() for policy in Policy)


def _show(path: Path) -> str:
    return "/" + b"/".join(path).decode(errors="backslashreplace")
