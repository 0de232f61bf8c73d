"""The requests the kernel sends: unpack, call the volume, reply.

A handler is a few lines, and decides nothing. Every exception becomes an errno here and nowhere
else: pyfuse3 ends the whole mount if a handler raises anything but FUSEError. What pyfuse3 has no
handler for (fallocate, SEEK_DATA, copy_file_range, ioctl, O_TMPFILE) the kernel answers itself.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat as _stat
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Concatenate, Final, ParamSpec, Protocol, TypeVar, cast

import pyfuse3
import trio
from pyfuse3 import EntryAttributes, FUSEError, RequestContext

from replfs.errors import ReplfsError
from replfs.front import protocol
from replfs.front.chores import Chores
from replfs.front.dispatch import Prompt
from replfs.front.protocol import Entry, Listing, Opened

log = logging.getLogger(__name__)

FOREVER_S: Final = 86400.0
"""Entry and attribute timeout of a primary: the kernel may keep what it knows, for nobody else
changes it."""

_ANYBODY: Final = 0
"""In place of a thread's id: several, or it is not known which."""

P = ParamSpec("P")
R = TypeVar("R")


class Object(Protocol):
    """An inode, as far as a reply needs it."""

    nodeid: int


class Kernel(Protocol):
    """What is told that something is not as the kernel knows it: the session."""

    def invalidate_inode(self, nodeid: int, *, attr_only: bool) -> None: ...
    def invalidate_entry(self, parent: int, name: bytes) -> None: ...


class Handle(Protocol):
    """An open handle, as far as a reply needs it."""

    number: int
    silent: bool


Caller = RequestContext | protocol.Context
Found = tuple[Any, os.stat_result]


class Mounted(Protocol):
    """What is mounted: `node.mounted.volume.Volume`, or `node.mounted.view.ReadOnlyView`."""

    def lookup(self, parent: int, name: bytes) -> Found: ...
    def forget(self, references: Sequence[tuple[int, int]]) -> Sequence[int]: ...
    def getattr(self, nodeid: int) -> Found: ...
    def readlink(self, nodeid: int) -> bytes: ...
    def statfs(self) -> os.statvfs_result: ...
    def opendir(self, nodeid: int) -> Any: ...
    def entries(self, number: int, start: int) -> list[bytes]: ...
    def entry(self, number: int, name: bytes) -> Found | None: ...
    def referenced(self, found: Any) -> None: ...
    def releasedir(self, number: int) -> None: ...
    async def open(self, nodeid: int, flags: int) -> Any: ...
    async def read(self, number: int, offset: int, size: int) -> bytes | bytearray | memoryview: ...
    async def flush(self, number: int) -> None: ...
    def close(self, number: int) -> None: ...
    async def release(self, number: int) -> None: ...
    def getxattr(self, nodeid: int, name: bytes) -> bytes: ...
    def listxattr(self, nodeid: int) -> list[bytes]: ...

    @property
    def closes_at_once(self) -> bool: ...

    @property
    def setattr(self) -> Callable[..., Awaitable[Found]]: ...

    @property
    def make(self) -> Callable[..., Awaitable[Found]]: ...

    @property
    def create(self) -> Callable[..., Awaitable[tuple[Any, Any, os.stat_result]]]: ...

    @property
    def unlink(self) -> Callable[[int, bytes], Awaitable[None]]: ...

    @property
    def rmdir(self) -> Callable[[int, bytes], Awaitable[None]]: ...

    @property
    def rename(self) -> Callable[..., Awaitable[None]]: ...

    @property
    def link(self) -> Callable[[int, int, bytes], Awaitable[Found]]: ...

    @property
    def write(self) -> Callable[[int, int, bytes], Awaitable[int]]: ...

    @property
    def fsync(self) -> Callable[..., Awaitable[None]]: ...

    @property
    def fsyncdir(self) -> Callable[..., Awaitable[None]]: ...

    @property
    def setxattr(self) -> Callable[..., Awaitable[None]]: ...

    @property
    def removexattr(self) -> Callable[..., Awaitable[None]]: ...


def answered(
    handler: Callable[Concatenate[Operations, P], Awaitable[R]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, R]]:
    """Turn whatever a handler raises into the errno that the application sees."""

    async def wrapped(self: Operations, /, *args: P.args, **keywords: P.kwargs) -> R:
        try:
            return await handler(self, *args, **keywords)
        except OSError as error:
            self.chores.failed(error.errno)
            raise FUSEError(error.errno or errno.EIO) from None
        except (FUSEError, trio.Cancelled, KeyboardInterrupt):
            raise
        except BaseException as error:  # noqa: BLE001 - the one boundary, see the module's text
            number = getattr(error, "errno", None)
            if not isinstance(number, int):
                log.exception("%r failed", handler)
                number = errno.EIO
            raise FUSEError(number) from None

    return wrapped


class _naming:  # noqa: N801 - used as a keyword
    """A change of names is made inside; where it fails all the same, the kernel looks again.

    A strict change that no peer confirmed is applied here, and an error to the kernel, which would
    believe for a day that the names are what they were.
    """

    __slots__ = ("_kernel", "_names")

    def __init__(self, kernel: Kernel | None, *names: tuple[int, bytes]) -> None:
        """*names*: (parent's inode, name)."""
        self._kernel = kernel
        self._names = names

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if isinstance(error, ReplfsError) and self._kernel is not None:
            trio.lowlevel.spawn_system_task(_look_again, self._kernel, self._names)


async def _look_again(kernel: Kernel, names: Sequence[tuple[int, bytes]]) -> None:
    def tell() -> None:
        for parent, name in names:
            with contextlib.suppress(OSError):  # the kernel does not know it
                kernel.invalidate_entry(parent, name)

    # In a thread: it waits for the reply to whoever changes names in the same directory.
    await trio.to_thread.run_sync(tell, abandon_on_cancel=True)


class Operations(Prompt, pyfuse3.Operations):
    """The handlers, in front of what is mounted."""

    def __init__(
        self,
        mounted: Mounted,
        *,
        acl: bool = True,
        writeback: bool = False,
        generation: Callable[[int], int] | None = None,
    ) -> None:
        """In front of *mounted*.

        With *generation* (of an inode number) an object can be opened by its handle, however long
        ago the kernel has forgotten it.
        """
        super().__init__()
        self._generation = generation
        self.supports_dot_lookup = generation is not None
        self.mounted = mounted
        self.chores = Chores()
        """What the kernel has forgotten and closed, and waits for nobody to take in."""
        self.timeout_s = FOREVER_S
        """How long the kernel may trust what it was told."""
        self.keep_cache = True
        """The kernel may keep the contents of files it has from an earlier open."""
        self.direct_io = False
        """The kernel keeps no contents at all."""
        self.enable_acl = acl
        self.enable_writeback_cache = writeback
        self._kernel: Kernel | None = None
        self._is_direct = False
        """`Entry` is taken for `EntryAttributes`, `Opened` for a `FileInfo` or a handle."""
        self._told: dict[int, int] = {}
        """Directories whose attributes the kernel may have, by the thread that asked for them."""

    def served_by(self, kernel: Kernel, *, directly: bool) -> None:
        """It is mounted. *kernel* is told what to forget, and *directly*: no pyfuse3 is between."""
        self._kernel = kernel
        self._is_direct = directly

    # Attributes --------------------------------------------------------------------------------

    def _attributes(
        self, inode: Object, found: os.stat_result, thread: int = _ANYBODY
    ) -> EntryAttributes:
        nodeid = inode.nodeid
        if _stat.S_ISDIR(found.st_mode):
            self._told[nodeid] = thread if self._told.get(nodeid, thread) == thread else _ANYBODY
        if self._is_direct:
            generation = 0 if self._generation is None else self._generation(nodeid)
            entry = Entry(nodeid, found, self.timeout_s, self.timeout_s, generation)
            return cast(EntryAttributes, entry)
        told = EntryAttributes()
        told.st_ino = cast(Any, nodeid)
        told.st_mode = cast(Any, found.st_mode)
        told.st_nlink = found.st_nlink
        told.st_uid = found.st_uid
        told.st_gid = found.st_gid
        told.st_rdev = found.st_rdev
        told.st_size = found.st_size
        told.st_blksize = found.st_blksize
        told.st_blocks = found.st_blocks
        told.st_atime_ns = found.st_atime_ns
        told.st_mtime_ns = found.st_mtime_ns
        told.st_ctime_ns = found.st_ctime_ns
        told.entry_timeout = self.timeout_s
        told.attr_timeout = self.timeout_s
        if self._generation is not None:
            told.generation = self._generation(nodeid)
        return told

    def _changed(self, directory: int, thread: int) -> None:
        """Names in *directory* were changed by *thread*, which has no reply yet.

        A thread that asked for the attributes before may take in its answer after this one's, and
        keep them as they were: rsync(1), which looks while it renames, then leaves a wrong mtime.
        Only what the changing thread asked for itself has certainly been taken in by now.

        Relies on: the kernel drops the answer to what was asked before attributes were
        invalidated, and does not invalidate them in this way after a change of names itself.
        Invalidating attributes alone waits for nothing.
        """
        told = self._told.get(directory)
        if told is None or (told == thread and thread != _ANYBODY):
            return
        del self._told[directory]
        with contextlib.suppress(OSError):  # the kernel does not know it any more
            if self._kernel is not None:
                self._kernel.invalidate_inode(directory, attr_only=True)

    def look_up(self, parent: int, name: bytes, who: Caller) -> EntryAttributes:
        """A name; a missing one is cached by the kernel too (st_ino 0)."""
        try:
            inode, found = self.mounted.lookup(parent, name)
        except FileNotFoundError:
            if self._is_direct:
                return cast(EntryAttributes, Entry(0, None, self.timeout_s, 0))
            entry = EntryAttributes()
            entry.st_ino = cast(Any, 0)
            entry.entry_timeout = self.timeout_s
            return entry
        return self._attributes(inode, found, who.pid)

    @answered
    async def lookup(self, parent_inode: int, name: bytes, ctx: RequestContext) -> EntryAttributes:
        """As `look_up`."""
        return self.look_up(parent_inode, name, ctx)

    def take_back(self, references: Sequence[tuple[int, int]]) -> None:
        """References the kernel gives back; has no reply."""
        self.chores.put(partial(self._forget, references))

    async def forget(self, inode_list: Sequence[tuple[int, int]]) -> None:
        """As `take_back`."""
        self.take_back(inode_list)

    def _forget(self, references: Sequence[tuple[int, int]]) -> None:
        # Not of all of them: what was looked up since may have its attributes in the kernel.
        for nodeid in self.mounted.forget(references):
            self._told.pop(nodeid, None)

    def attributes(self, nodeid: int, who: Caller) -> EntryAttributes:
        """Attributes."""
        return self._attributes(*self.mounted.getattr(nodeid), who.pid)

    @answered
    async def getattr(self, inode: int, ctx: RequestContext) -> EntryAttributes:
        """As `attributes`."""
        return self.attributes(inode, ctx)

    @answered
    async def setattr(
        self,
        inode: int,
        attr: EntryAttributes,
        fields: pyfuse3.SetattrFields,
        fh: int | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Size, mode, owner, times: each only if asked for."""
        found = await self.mounted.setattr(
            inode,
            fh,
            size=attr.st_size if fields.update_size else None,
            mode=attr.st_mode & 0o7777 if fields.update_mode else None,
            uid=attr.st_uid if fields.update_uid else None,
            gid=attr.st_gid if fields.update_gid else None,
            atime=attr.st_atime_ns if fields.update_atime else None,
            mtime=attr.st_mtime_ns if fields.update_mtime else None,
        )
        return self._attributes(*found, ctx.pid)

    def target(self, nodeid: int) -> bytes:
        """A symlink's target."""
        return self.mounted.readlink(nodeid)

    @answered
    async def readlink(self, inode: int, ctx: RequestContext) -> bytes:
        """As `target`."""
        del ctx
        return self.target(inode)

    # Names -------------------------------------------------------------------------------------

    @answered
    async def mknod(
        self, parent_inode: int, name: bytes, mode: int, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """A fifo, socket, device or empty file."""
        with _naming(self._kernel, (parent_inode, name)):
            made = await self.mounted.make(
                parent_inode,
                name,
                mode,
                owner=(ctx.uid, ctx.gid),
                umask=ctx.umask,
                rdev=rdev,
                kind="mknod",
            )
        self._changed(parent_inode, ctx.pid)
        return self._attributes(*made, ctx.pid)

    @answered
    async def mkdir(
        self, parent_inode: int, name: bytes, mode: int, ctx: RequestContext
    ) -> EntryAttributes:
        """A directory."""
        with _naming(self._kernel, (parent_inode, name)):
            made = await self.mounted.make(
                parent_inode, name, mode, owner=(ctx.uid, ctx.gid), umask=ctx.umask, kind="mkdir"
            )
        self._changed(parent_inode, ctx.pid)
        return self._attributes(*made, ctx.pid)

    @answered
    async def symlink(
        self, parent_inode: int, name: bytes, target: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """A symbolic link."""
        with _naming(self._kernel, (parent_inode, name)):
            made = await self.mounted.make(
                parent_inode,
                name,
                0o120777,
                owner=(ctx.uid, ctx.gid),
                target=target,
                kind="symlink",
            )
        self._changed(parent_inode, ctx.pid)
        return self._attributes(*made, ctx.pid)

    @answered
    async def unlink(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove a name."""
        with _naming(self._kernel, (parent_inode, name)):
            await self.mounted.unlink(parent_inode, name)
        self._changed(parent_inode, ctx.pid)

    @answered
    async def rmdir(self, parent_inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        with _naming(self._kernel, (parent_inode, name)):
            await self.mounted.rmdir(parent_inode, name)
        self._changed(parent_inode, ctx.pid)

    @answered
    async def rename(
        self,
        parent_inode_old: int,
        name_old: bytes,
        parent_inode_new: int,
        name_new: bytes,
        flags: int,
        ctx: RequestContext,
    ) -> None:
        """Rename, replace, exchange; what `RENAME_WHITEOUT` leaves is the caller's."""
        with _naming(self._kernel, (parent_inode_old, name_old), (parent_inode_new, name_new)):
            await self.mounted.rename(
                parent_inode_old,
                name_old,
                parent_inode_new,
                name_new,
                flags,
                owner=(ctx.uid, ctx.gid),
            )
        self._changed(parent_inode_old, ctx.pid)
        self._changed(parent_inode_new, ctx.pid)

    @answered
    async def link(
        self, inode: int, new_parent_inode: int, new_name: bytes, ctx: RequestContext
    ) -> EntryAttributes:
        """One more name."""
        with _naming(self._kernel, (new_parent_inode, new_name)):
            linked = await self.mounted.link(inode, new_parent_inode, new_name)
        self._changed(new_parent_inode, ctx.pid)
        return self._attributes(*linked, ctx.pid)

    # Files -------------------------------------------------------------------------------------

    @answered
    async def create(
        self, parent_inode: int, name: bytes, mode: int, flags: int, ctx: RequestContext
    ) -> tuple[pyfuse3.FileInfo, EntryAttributes]:
        """A new file, open."""
        with _naming(self._kernel, (parent_inode, name)):
            handle, inode, found = await self.mounted.create(
                parent_inode, name, mode, flags, owner=(ctx.uid, ctx.gid), umask=ctx.umask
            )
        self._changed(parent_inode, ctx.pid)
        return self._opened(handle), self._attributes(inode, found, ctx.pid)

    @answered
    async def open(self, inode: int, flags: int, ctx: RequestContext) -> pyfuse3.FileInfo:
        """A handle."""
        del ctx
        handle = await self.mounted.open(inode, flags)
        return self._opened(handle)

    def _opened(self, handle: Handle) -> pyfuse3.FileInfo:
        if self._is_direct:
            flags = protocol.OPEN_KEEP_CACHE * self.keep_cache
            flags |= protocol.OPEN_DIRECT_IO * self.direct_io
            flags |= protocol.OPEN_NOFLUSH * handle.silent
            return cast(pyfuse3.FileInfo, Opened(handle.number, flags))
        return pyfuse3.FileInfo(
            fh=cast(Any, handle.number), keep_cache=self.keep_cache, direct_io=self.direct_io
        )

    @answered
    async def read(self, fh: int, off: int, size: int) -> bytes:
        """Bytes of the local store."""
        return cast(bytes, await self.mounted.read(fh, off, size))

    @answered
    async def write(self, fh: int, off: int, buf: bytes) -> int:
        """Bytes to both sides."""
        return await self.mounted.write(fh, off, buf)

    @answered
    async def flush(self, fh: int) -> None:
        """close(2) of one descriptor."""
        await self.mounted.flush(fh)

    @answered
    async def release(self, fh: int) -> None:
        """The last descriptor is closed."""
        if self.mounted.closes_at_once:
            self.chores.put(partial(self._close, fh))
        else:
            await self.mounted.release(fh)

    def _close(self, fh: int) -> None:
        self.mounted.close(fh)

    @answered
    async def fsync(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's form
        """Stable on both sides."""
        await self.mounted.fsync(fh, data_only=bool(datasync))

    # Directories -------------------------------------------------------------------------------

    @answered
    async def opendir(self, inode: int, ctx: RequestContext) -> int:
        """A directory's handle."""
        del ctx
        number = int(self.mounted.opendir(inode).number)
        if self._is_direct and self.keep_cache:
            # Relies on: the kernel drops what it has kept of a directory when it changes a name
            # there, and when it is told to forget the directory or a name in it.
            flags = protocol.OPEN_KEEP_CACHE | protocol.OPEN_CACHE_DIR
            return cast(int, Opened(number, flags))
        return number

    @answered
    async def readdir(self, fh: int, start_id: int, token: pyfuse3.ReaddirToken | Listing) -> None:
        """Entries, from a position on."""
        names = self.mounted.entries(fh, start_id)
        for position in range(start_id, len(names)):
            name = names[position]
            found = self.mounted.entry(fh, name)
            if found is None:
                continue
            entry = self._attributes(*found)
            if isinstance(token, Listing):
                if not token.add(name, cast(Any, entry), position + 1):
                    break
                if not token.plus:
                    continue
            elif not pyfuse3.readdir_reply(token, cast(Any, name), entry, position + 1):
                break
            if name not in {b".", b".."}:
                self.mounted.referenced(found[0])

    @answered
    async def releasedir(self, fh: int) -> None:
        """A directory's handle is closed."""
        self.mounted.releasedir(fh)

    @answered
    async def fsyncdir(self, fh: int, datasync: bool) -> None:  # noqa: FBT001 - pyfuse3's form
        """A directory, stable on both sides; the root: everything."""
        await self.mounted.fsyncdir(fh, data_only=bool(datasync))

    @answered
    async def statfs(self, ctx: RequestContext) -> pyfuse3.StatvfsData:
        """The file system beneath."""
        del ctx
        self.chores.finish()  # of what was removed, and is closed, the space is free
        found = self.mounted.statfs()
        data = pyfuse3.StatvfsData()
        for name in (
            "f_bsize", "f_frsize", "f_blocks", "f_bfree", "f_bavail", "f_files", "f_ffree",
            "f_favail", "f_namemax",
        ):  # fmt: skip
            setattr(data, name, getattr(found, name))
        return data

    # Extended attributes -----------------------------------------------------------------------

    @answered
    async def setxattr(self, inode: int, name: bytes, value: bytes, ctx: RequestContext) -> None:
        """Set an attribute or a policy."""
        await self.mounted.setxattr(inode, name, value, uid=ctx.uid, groups=lambda: _groups_of(ctx))

    def xattr(self, nodeid: int, name: bytes, who: Caller) -> bytes:
        """An attribute, never ENOSYS: the kernel would stop asking for the whole mount."""
        if who.uid and name.startswith(b"trusted."):
            raise FUSEError(errno.ENODATA)
        return self.mounted.getxattr(nodeid, name)

    @answered
    async def getxattr(self, inode: int, name: bytes, ctx: RequestContext) -> bytes:
        """As `xattr`."""
        return self.xattr(inode, name, ctx)

    def xattrs(self, nodeid: int, who: Caller) -> Sequence[bytes]:
        """Names; `trusted.*` only for root."""
        names = self.mounted.listxattr(nodeid)
        if who.uid:
            names = [name for name in names if not name.startswith(b"trusted.")]
        return names

    @answered
    async def listxattr(self, inode: int, ctx: RequestContext) -> Sequence[bytes]:
        """As `xattrs`."""
        return self.xattrs(inode, ctx)

    @answered
    async def removexattr(self, inode: int, name: bytes, ctx: RequestContext) -> None:
        """Remove an attribute or a policy."""
        await self.mounted.removexattr(inode, name, uid=ctx.uid)

    @answered
    async def access(self, inode: int, mode: int, ctx: RequestContext) -> bool:
        """The kernel has checked already (default_permissions)."""
        del inode, mode, ctx
        return True


def _groups_of(ctx: RequestContext) -> set[int]:
    """All groups of the calling process."""
    try:
        return {ctx.gid, *pyfuse3.get_sup_groups(ctx.pid)}
    except (OSError, RuntimeError):
        return {ctx.gid}  # it is gone already
