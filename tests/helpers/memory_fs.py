"""A file system in memory, served by `replfs.front.session` in a process of its own.

    python -m helpers.memory_fs MOUNTPOINT [--tuning all|loop|none] [--workers N] ...

Commands come on standard input, one a line; each is answered by one line of JSON:

    stats      counters of the session and calls per handler; then they start from zero
    open       let all who wait at a gate go on
    stop       stop(), wait for run(), unmount, exit
    detach     detach() in a thread; goes on serving
    cancel     cancel run(), unmount, exit

When `run()` ends by itself, the process prints {"ended": ...}, unmounts and exits. Names do
things: a lookup of `gate…` and a create of `later…` wait for the command `open`, a lookup of
`boom…` raises ValueError out of the handler, and no close of what was made as `silent` is told.
Never touch the mount from this process.
"""

from __future__ import annotations

import argparse
import collections
import errno
import json
import logging
import os
import stat
import sys
import time
from collections.abc import Callable
from typing import Any

import pyfuse3
import trio
import trio.testing

from replfs.front import mounting
from replfs.front.protocol import OPEN_NOFLUSH, Entry, Listing, Opened
from replfs.front.session import FuseSession, MountOptions, Tuning


class Node:
    def __init__(self, ino: int, mode: int, uid: int, gid: int) -> None:
        self.ino, self.mode, self.uid, self.gid = ino, mode, uid, gid
        self.data = bytearray()
        self.target = b""
        self.xattrs: dict[bytes, bytes] = {}
        self.entries: dict[bytes, int] = {}
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.mtime_ns = self.ctime_ns = time.time_ns()


class MemoryFs(pyfuse3.Operations):
    def __init__(self, answer_delay_s: float = 0.0) -> None:
        super().__init__()
        self.calls: collections.Counter[str] = collections.Counter()
        self.created: dict[str, tuple[int, int]] = {}
        self.gate = trio.Event()
        self.most_at_gate = 0
        self.at_gate = 0
        self.passed = 0
        self.delay_s = answer_delay_s
        self.nodes = {1: Node(1, stat.S_IFDIR | 0o777, 0, 0)}
        self.next_ino = 2

    def attributes(self, ino: int) -> pyfuse3.EntryAttributes:
        node = self.nodes.get(ino)
        if node is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        a = pyfuse3.EntryAttributes()
        a.st_ino, a.st_mode, a.st_nlink = ino, node.mode, node.nlink
        a.st_uid, a.st_gid = node.uid, node.gid
        a.st_size = len(node.data) or len(node.target)
        a.st_blocks = (a.st_size + 511) // 512
        a.st_atime_ns = a.st_mtime_ns = node.mtime_ns
        a.st_ctime_ns = node.ctime_ns
        return a

    def node(self, ino: int) -> Node:
        try:
            return self.nodes[ino]
        except KeyError:
            raise pyfuse3.FUSEError(errno.ENOENT) from None

    def new(self, parent: int, name: bytes, mode: int, ctx: Any) -> Node:
        folder = self.node(parent)
        if name in folder.entries:
            raise pyfuse3.FUSEError(errno.EEXIST)
        self.created[os.fsdecode(name)] = (stat.S_IMODE(mode), ctx.umask)
        mode &= ~ctx.umask
        node = Node(self.next_ino, mode, ctx.uid, ctx.gid)
        self.next_ino += 1
        self.nodes[node.ino] = node
        folder.entries[name] = node.ino
        folder.mtime_ns = time.time_ns()
        if name == b"silent":
            self.silent = node.ino
        return node

    async def lookup(self, parent, name, ctx):
        self.calls["lookup"] += 1
        if self.delay_s:
            await trio.sleep(self.delay_s)
        if name.startswith(b"gate"):
            await self.wait_at_gate()
        if name.startswith(b"boom"):
            raise ValueError("a handler's bug")
        ino = self.node(parent).entries.get(name)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self.attributes(ino)

    async def wait_at_gate(self) -> None:
        self.at_gate += 1
        self.most_at_gate = max(self.most_at_gate, self.at_gate)
        try:
            await self.gate.wait()
            self.passed += 1
        finally:
            self.at_gate -= 1

    async def forget(self, inode_list):
        self.calls["forget"] += 1

    async def getattr(self, inode, ctx):
        self.calls["getattr"] += 1
        a = self.attributes(inode)
        if self.calls_uncached:
            a.attr_timeout = 0
        return a

    calls_uncached = False
    silent = 0
    checkpoints = False

    async def setattr(self, inode, attr, fields, fh, ctx):
        self.calls["setattr"] += 1
        node = self.node(inode)
        if fields.update_size:
            old = len(node.data)
            if attr.st_size < old:
                del node.data[attr.st_size :]
            else:
                node.data.extend(bytes(attr.st_size - old))
        if fields.update_mode:
            node.mode = stat.S_IFMT(node.mode) | stat.S_IMODE(attr.st_mode)
        if fields.update_uid:
            node.uid = attr.st_uid
        if fields.update_gid:
            node.gid = attr.st_gid
        if fields.update_mtime:
            node.mtime_ns = attr.st_mtime_ns
        return self.attributes(inode)

    async def mkdir(self, parent_inode, name, mode, ctx):
        self.calls["mkdir"] += 1
        node = self.new(parent_inode, name, mode, ctx)
        node.nlink = 2
        return self.attributes(node.ino)

    async def symlink(self, parent_inode, name, target, ctx):
        self.calls["symlink"] += 1
        node = self.new(parent_inode, name, stat.S_IFLNK | 0o777, ctx)
        node.mode, node.target = stat.S_IFLNK | 0o777, target
        return self.attributes(node.ino)

    async def readlink(self, inode, ctx):
        self.calls["readlink"] += 1
        return self.node(inode).target

    async def unlink(self, parent_inode, name, ctx):
        self.calls["unlink"] += 1
        ino = self.node(parent_inode).entries.pop(name, None)
        if ino is None:
            raise pyfuse3.FUSEError(errno.ENOENT)
        self.nodes[ino].nlink = 0

    async def rmdir(self, parent_inode, name, ctx):
        await self.unlink(parent_inode, name, ctx)

    async def open(self, inode, flags, ctx):
        self.calls["open"] += 1
        if flags & os.O_TRUNC:
            self.node(inode).data.clear()
        if inode == self.silent:
            return Opened(inode, OPEN_NOFLUSH)
        return pyfuse3.FileInfo(fh=inode)

    async def create(self, parent_inode, name, mode, flags, ctx):
        self.calls["create"] += 1
        if name.startswith(b"later"):
            await self.wait_at_gate()
        node = self.new(parent_inode, name, mode, ctx)
        return pyfuse3.FileInfo(fh=node.ino), self.attributes(node.ino)

    async def read(self, fh, off, size):
        self.calls["read"] += 1
        return bytes(self.node(fh).data[off : off + size])

    async def write(self, fh, off, buf):
        self.calls["write"] += 1
        if self.delay_s:
            await trio.sleep(self.delay_s)
        elif self.checkpoints:
            await trio.lowlevel.checkpoint()
        node = self.node(fh)
        if len(node.data) < off:
            node.data.extend(bytes(off - len(node.data)))
        node.data[off : off + len(buf)] = buf
        node.mtime_ns = time.time_ns()
        return len(buf)

    async def flush(self, fh):
        self.calls["flush"] += 1

    async def fsync(self, fh, datasync):
        self.calls["fsync"] += 1

    async def release(self, fh):
        self.calls["release"] += 1

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        self.calls["readdir"] += 1
        for index, (name, ino) in enumerate(list(self.node(fh).entries.items())):
            if index < start_id:
                continue
            found = self.attributes(ino)
            if isinstance(token, Listing):
                room = token.add(name, Entry(ino, found, 300, 300), index + 1)
            else:
                room = pyfuse3.readdir_reply(token, name, found, index + 1)
            if not room:
                break

    async def releasedir(self, fh):
        pass

    async def statfs(self, ctx):
        self.calls["statfs"] += 1
        s = pyfuse3.StatvfsData()
        s.f_bsize = s.f_frsize = 4096
        s.f_blocks = s.f_bfree = s.f_bavail = 1 << 20
        s.f_files = s.f_ffree = s.f_favail = 1 << 20
        s.f_namemax = 255
        return s

    async def getxattr(self, inode, name, ctx):
        self.calls["getxattr"] += 1
        value = self.node(inode).xattrs.get(name)
        if value is None:
            raise pyfuse3.FUSEError(errno.ENODATA)
        return value

    async def setxattr(self, inode, name, value, ctx):
        self.calls["setxattr"] += 1
        self.node(inode).xattrs[name] = value

    async def listxattr(self, inode, ctx):
        self.calls["listxattr"] += 1
        return list(self.node(inode).xattrs)


def say(**values: Any) -> None:
    print(json.dumps(values), flush=True)


async def serve(session: FuseSession, fs: MemoryFs, arguments: argparse.Namespace) -> None:
    ended = trio.Event()
    outcome = "normally"

    async def run(scope: trio.CancelScope) -> None:
        nonlocal outcome
        with scope:
            try:
                await session.run()
            except* ValueError:
                outcome = "handler"
        if scope.cancelled_caught:
            outcome = "cancelled"
        ended.set()

    async def commands(run_scope: trio.CancelScope) -> None:
        buffer = b""
        while True:
            await trio.lowlevel.wait_readable(0)
            data = os.read(0, 4096)
            if not data:
                session.stop()
                return
            buffer += data
            while b"\n" in buffer:
                line, buffer = buffer.split(b"\n", 1)
                word = line.decode()
                if word == "stats":
                    say(
                        calls=dict(fs.calls),
                        created=fs.created,
                        most_at_gate=fs.most_at_gate,
                        at_gate=fs.at_gate,
                        passed=fs.passed,
                        session=session.statistics(),
                    )
                    fs.calls.clear()
                elif word == "open":
                    fs.gate.set()
                    fs.gate = trio.Event()
                elif word == "stop":
                    session.stop()
                elif word == "detach":
                    await trio.to_thread.run_sync(session.detach)
                    say(detached=True)
                elif word == "cancel":
                    run_scope.cancel()

    async with trio.open_nursery() as nursery:
        scope = trio.CancelScope()
        nursery.start_soon(run, scope)
        nursery.start_soon(commands, scope)
        say(ready=True, tuned=session.tuned, reason=session.reason, fd=session.fd)
        await ended.wait()
        nursery.cancel_scope.cancel()
    say(ended=outcome)


def lying(poll: Callable[[int], object], each: int) -> Callable[[int], object]:
    """A poll that says "readable" when nothing is there, once in so many calls at the most."""
    count = 0

    def answer(timeout: int) -> object:
        nonlocal count
        count += 1
        if real := poll(timeout):
            return real
        if count < each:
            return []
        count = 0
        return True

    return answer


def break_insides(what: str) -> None:
    """Be a pyfuse3 or libfuse that is not as expected."""
    insides: Any = pyfuse3
    if what == "version":
        insides.__version__ = "3.6.0"
    elif what == "names":
        insides._wait_fuse_readable = None
    elif what == "init":

        def refuse(*_arguments: Any) -> Any:
            raise mounting.InitError("a kernel of another kind")

        mounting.mount_up_to_init = refuse  # type: ignore[assignment]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--tuning", default="all")
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--spin-ns", type=int, default=60_000)
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--uncached", action="store_true")
    parser.add_argument("--checkpoints", action="store_true", help="one in each write")
    parser.add_argument("--spurious", type=int, default=0, help="say readable each Nth time")
    parser.add_argument("--broken", choices=["version", "names", "init"])
    parser.add_argument("--uid", type=int, default=0, help="be this user")
    parser.add_argument("--other", help="then try to mount a second session here")
    parser.add_argument("--twice", action="store_true", help="a first session before this one")
    parser.add_argument("-o", dest="options", default="{}", help="MountOptions, as JSON")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    fs = MemoryFs(arguments.delay_ms / 1000)
    fs.calls_uncached = arguments.uncached
    fs.checkpoints = arguments.checkpoints
    os.umask(0)

    if arguments.broken:
        break_insides(arguments.broken)
    if arguments.uid:
        os.setgroups([])
        os.setresgid(arguments.uid, arguments.uid, arguments.uid)
        os.setresuid(arguments.uid, arguments.uid, arguments.uid)

    def new_session(mountpoint: str = arguments.mountpoint) -> FuseSession:
        return FuseSession(
            fs,
            mountpoint,
            MountOptions(**json.loads(arguments.options)),
            spin_ns=arguments.spin_ns,
            workers=arguments.workers,
            tuning=Tuning(arguments.tuning),
        )

    async def briefly(session: FuseSession) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(session.run)
            await trio.testing.wait_all_tasks_blocked()
            session.stop()

    before = len(os.listdir("/proc/self/fd"))
    if arguments.twice:
        first = new_session()
        first.mount()
        trio.run(briefly, first)
        first.unmount()
        first.unmount()
    session = new_session()
    try:
        session.mount()
    except Exception as error:
        say(error=str(error), kind=type(error).__name__)
        return 1
    if arguments.other:
        try:
            new_session(arguments.other).mount()
        except Exception as error:
            say(error=str(error), kind=type(error).__name__)
    if arguments.spurious:
        session._poll = lying(session._poll, arguments.spurious)
    try:
        trio.run(serve, session, fs, arguments)
    finally:
        session.unmount()
    session.unmount()
    say(unmounted=True, descriptors_left=len(os.listdir("/proc/self/fd")) - before)
    return 0


if __name__ == "__main__":
    sys.exit(main())
