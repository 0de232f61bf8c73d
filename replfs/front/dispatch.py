"""From the kernel's request to a handler and back: which method answers what, with which arguments.

The handlers are those of `pyfuse3.Operations`, so that what is mounted does not know who speaks
with the kernel. Instead of pyfuse3's `EntryAttributes` and `FileInfo`, which may be returned as
well, they do better to return `protocol.Entry` and `protocol.Opened`. Questions that never wait are
answered on the spot where there are plain calls for them (`Prompt`): a chain of coroutines would
take half as long again as the answer.
"""

from __future__ import annotations

import abc
import errno
import logging
import os
import stat
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from pyfuse3 import EntryAttributes, FileInfo, FUSEError

from replfs.front import protocol
from replfs.front.protocol import BODY, NUMBER, PAIR, QUAD, Context, Entry, Opened, Reply

log = logging.getLogger(__name__)

_COPIED_MAX: Final = 32 << 10
_JOIN_MAX: Final = 4096
"""Bytes of a reply that are copied behind its head: one buffer is cheaper to write than two."""
_GONE: Final = frozenset({errno.ENOENT, errno.ENODEV, errno.ECONNABORTED})
"""The mount is gone, or is just going: nobody waits for the reply.

Relies on: the kernel takes every other reply, for a caller that is killed after its request was
read waits for it all the same. So what a reply opens is released, and what it names is forgotten.
"""

Handler = Callable[[int, Context, bytes], Awaitable[Reply | None]]
PromptHandler = Callable[[int, Context, bytes], Reply | None]


class Prompt(abc.ABC):
    """Plain calls for what is asked most, besides the handlers. They raise FUSEError or OSError."""

    @abc.abstractmethod
    def look_up(self, parent: int, name: bytes, who: Context) -> Any:
        """As `lookup`."""

    @abc.abstractmethod
    def take_back(self, references: Sequence[tuple[int, int]]) -> None:
        """As `forget`."""

    @abc.abstractmethod
    def attributes(self, nodeid: int, who: Context) -> Any:
        """As `getattr`."""

    @abc.abstractmethod
    def target(self, nodeid: int) -> bytes:
        """As `readlink`."""

    @abc.abstractmethod
    def xattr(self, nodeid: int, name: bytes, who: Context) -> bytes:
        """As `getxattr`."""

    @abc.abstractmethod
    def xattrs(self, nodeid: int, who: Context) -> Sequence[bytes]:
        """As `listxattr`."""


class Dispatcher:
    """Answers requests on *fd* by the handlers of *operations*."""

    def __init__(self, operations: Any, fd: int) -> None:
        self._do = operations
        self._fd = fd
        self._handlers: dict[int, Handler] = {
            protocol.LOOKUP: self._lookup,
            protocol.FORGET: self._forget,
            protocol.BATCH_FORGET: self._forget,
            protocol.GETATTR: self._getattr,
            protocol.SETATTR: self._setattr,
            protocol.READLINK: self._readlink,
            protocol.SYMLINK: self._symlink,
            protocol.MKNOD: self._mknod,
            protocol.MKDIR: self._mkdir,
            protocol.UNLINK: self._unlink,
            protocol.RMDIR: self._rmdir,
            protocol.RENAME: self._rename,
            protocol.RENAME2: self._rename2,
            protocol.LINK: self._link,
            protocol.OPEN: self._open,
            protocol.CREATE: self._create,
            protocol.READ: self._read,
            protocol.WRITE: self._write,
            protocol.FLUSH: self._flush,
            protocol.RELEASE: self._release,
            protocol.FSYNC: self._fsync,
            protocol.OPENDIR: self._opendir,
            protocol.READDIR: self._readdir,
            protocol.READDIRPLUS: self._readdirplus,
            protocol.RELEASEDIR: self._releasedir,
            protocol.FSYNCDIR: self._fsyncdir,
            protocol.STATFS: self._statfs,
            protocol.SETXATTR: self._setxattr,
            protocol.GETXATTR: self._getxattr,
            protocol.LISTXATTR: self._listxattr,
            protocol.REMOVEXATTR: self._removexattr,
            protocol.INTERRUPT: self._ignore,
        }
        self._prompt: dict[int, PromptHandler] = {}
        if isinstance(operations, Prompt):
            self._prompt = {
                protocol.LOOKUP: self._look_up,
                protocol.FORGET: self._take_back,
                protocol.BATCH_FORGET: self._take_back,
                protocol.GETATTR: self._attributes,
                protocol.READLINK: self._target,
                protocol.GETXATTR: self._xattr,
                protocol.LISTXATTR: self._xattrs,
            }

    def answer(self, request: bytes) -> Awaitable[None] | None:
        """Reply to a request, or return what is to be awaited until it is replied to.

        Raises, when awaited:
            Exception: what a handler raised that is no FUSEError; there is no reply then.
        """
        _, operation, unique, nodeid, uid, gid, pid, _, _ = protocol.HEADER.unpack_from(request)
        prompt = self._prompt.get(operation)
        who = Context(uid, gid, pid)
        if prompt is None:
            return self._answer(operation, unique, nodeid, who, request)
        try:
            body = prompt(nodeid, who, request)
        except (OSError, FUSEError) as error:
            self._send(protocol.error_reply(unique, error.errno or errno.EIO))
        except Exception:
            log.exception("%r failed", prompt)
            self._send(protocol.error_reply(unique, errno.EIO))
        else:
            self._reply(unique, body)
        return None

    async def _answer(
        self, operation: int, unique: int, nodeid: int, who: Context, request: bytes
    ) -> None:
        handler = self._handlers.get(operation)
        if handler is None:
            self._send(protocol.error_reply(unique, errno.ENOSYS))
            return
        try:
            body = await handler(nodeid, who, request)
        except FUSEError as error:
            self._send(protocol.error_reply(unique, error.errno))
            return
        self._reply(unique, body)

    def _reply(self, unique: int, body: Reply | None) -> None:
        if body is None:
            return
        if len(body) <= _JOIN_MAX:
            self._send(protocol.reply(unique, body))
        else:
            self._send(protocol.reply_head(unique, len(body)), body)

    def _send(self, data: Reply, more: Reply | None = None) -> None:
        try:
            if more is None:
                os.write(self._fd, data)
            else:
                os.writev(self._fd, (data, more))
        except OSError as error:
            if error.errno not in _GONE:
                log.error("the kernel does not take a reply: %s", error.strerror)

    # On the spot ---------------------------------------------------------------------------------

    def _look_up(self, parent: int, who: Context, request: bytes) -> Reply:
        return protocol.entry(self._do.look_up(parent, request[BODY:-1], who))

    def _take_back(self, _: int, __: Context, request: bytes) -> None:
        self._do.take_back(protocol.forgotten(request))

    def _attributes(self, nodeid: int, who: Context, _: bytes) -> Reply:
        return protocol.attributes(self._do.attributes(nodeid, who))

    def _target(self, nodeid: int, _: Context, __: bytes) -> Reply:
        target: bytes = self._do.target(nodeid)
        return target

    def _xattr(self, nodeid: int, who: Context, request: bytes) -> Reply:
        room, _ = PAIR.unpack_from(request, BODY)
        return _fitting(self._do.xattr(nodeid, request[BODY + PAIR.size : -1], who), room)

    def _xattrs(self, nodeid: int, who: Context, request: bytes) -> Reply:
        return _listed(self._do.xattrs(nodeid, who), request)

    # Names ---------------------------------------------------------------------------------------

    async def _lookup(self, parent: int, who: Context, request: bytes) -> Reply:
        return protocol.entry(_entry(await self._do.lookup(parent, request[BODY:-1], who)))

    async def _forget(self, _: int, __: Context, request: bytes) -> None:
        await self._do.forget(protocol.forgotten(request))

    async def _symlink(self, parent: int, who: Context, request: bytes) -> Reply:
        name, target = protocol.names_at(request, BODY)
        return protocol.entry(_entry(await self._do.symlink(parent, name, target, who)))

    async def _mknod(self, parent: int, who: Context, request: bytes) -> Reply:
        mode, device, umask, _ = QUAD.unpack_from(request, BODY)
        name = protocol.name_at(request, BODY + QUAD.size)
        who = Context(who.uid, who.gid, who.pid, umask)
        return protocol.entry(_entry(await self._do.mknod(parent, name, mode, device, who)))

    async def _mkdir(self, parent: int, who: Context, request: bytes) -> Reply:
        mode, umask = PAIR.unpack_from(request, BODY)
        name = protocol.name_at(request, BODY + PAIR.size)
        who = Context(who.uid, who.gid, who.pid, umask)
        made = await self._do.mkdir(parent, name, stat.S_IFDIR | stat.S_IMODE(mode), who)
        return protocol.entry(_entry(made))

    async def _unlink(self, parent: int, who: Context, request: bytes) -> Reply:
        await self._do.unlink(parent, request[BODY:-1], who)
        return b""

    async def _rmdir(self, parent: int, who: Context, request: bytes) -> Reply:
        await self._do.rmdir(parent, request[BODY:-1], who)
        return b""

    async def _rename(self, parent: int, who: Context, request: bytes) -> Reply:
        (new_parent,) = NUMBER.unpack_from(request, BODY)
        name, new_name = protocol.names_at(request, BODY + NUMBER.size)
        await self._do.rename(parent, name, new_parent, new_name, 0, who)
        return b""

    async def _rename2(self, parent: int, who: Context, request: bytes) -> Reply:
        new_parent, flags, _ = protocol.RENAME2_IN.unpack_from(request, BODY)
        name, new_name = protocol.names_at(request, BODY + protocol.RENAME2_IN.size)
        await self._do.rename(parent, name, new_parent, new_name, flags, who)
        return b""

    async def _link(self, parent: int, who: Context, request: bytes) -> Reply:
        (nodeid,) = NUMBER.unpack_from(request, BODY)
        name = protocol.name_at(request, BODY + NUMBER.size)
        return protocol.entry(_entry(await self._do.link(nodeid, parent, name, who)))

    # Attributes ----------------------------------------------------------------------------------

    async def _getattr(self, nodeid: int, who: Context, _: bytes) -> Reply:
        return protocol.attributes(_entry(await self._do.getattr(nodeid, who)))

    async def _setattr(self, nodeid: int, who: Context, request: bytes) -> Reply:
        wanted = protocol.changes(request, time.time_ns())
        found = await self._do.setattr(nodeid, wanted, wanted, wanted.handle, who)
        return protocol.attributes(_entry(found))

    async def _readlink(self, nodeid: int, who: Context, _: bytes) -> Reply:
        return bytes(await self._do.readlink(nodeid, who))

    async def _statfs(self, _: int, who: Context, __: bytes) -> Reply:
        return protocol.statfs(await self._do.statfs(who))

    # Files ---------------------------------------------------------------------------------------

    async def _open(self, nodeid: int, who: Context, request: bytes) -> Reply:
        flags, _ = PAIR.unpack_from(request, BODY)
        return protocol.opened(_opened(await self._do.open(nodeid, flags, who)))

    async def _create(self, parent: int, who: Context, request: bytes) -> Reply:
        flags, mode, umask, _ = QUAD.unpack_from(request, BODY)
        name = protocol.name_at(request, BODY + QUAD.size)
        handle, made = await self._do.create(
            parent, name, mode, flags, Context(who.uid, who.gid, who.pid, umask)
        )
        return protocol.entry(_entry(made)) + protocol.opened(_opened(handle))

    async def _read(self, _: int, __: Context, request: bytes) -> Reply:
        handle, offset, size = protocol.READ_IN.unpack_from(request, BODY)
        data: Reply = await self._do.read(handle, offset, size)
        return data

    async def _write(self, _: int, __: Context, request: bytes) -> Reply:
        handle, offset, size, *_rest = protocol.WRITE_IN.unpack_from(request, BODY)
        start = BODY + protocol.WRITE_IN.size
        # The rest of a large request is kept with it, rather than copied without.
        data: Reply = request[start:] if size <= _COPIED_MAX else memoryview(request)[start:]
        return PAIR.pack(await self._do.write(handle, offset, data), 0)

    async def _flush(self, _: int, __: Context, request: bytes) -> Reply:
        await self._do.flush(NUMBER.unpack_from(request, BODY)[0])
        return b""

    async def _release(self, _: int, __: Context, request: bytes) -> Reply:
        await self._do.release(NUMBER.unpack_from(request, BODY)[0])
        return b""

    async def _fsync(self, _: int, __: Context, request: bytes) -> Reply:
        handle, flags = protocol.FSYNC_IN.unpack_from(request, BODY)
        await self._do.fsync(handle, bool(flags & 1))
        return b""

    # Directories ---------------------------------------------------------------------------------

    async def _opendir(self, nodeid: int, who: Context, _: bytes) -> Reply:
        return protocol.opened(_opened(await self._do.opendir(nodeid, who)))

    async def _readdir(self, _: int, __: Context, request: bytes) -> Reply:
        return await self._list(request, plus=False)

    async def _readdirplus(self, _: int, __: Context, request: bytes) -> Reply:
        return await self._list(request, plus=True)

    async def _list(self, request: bytes, *, plus: bool) -> Reply:
        handle, offset, size = protocol.READ_IN.unpack_from(request, BODY)
        listing = protocol.Listing(size, plus=plus)
        await self._do.readdir(handle, offset, listing)
        return listing.packed()

    async def _releasedir(self, _: int, __: Context, request: bytes) -> Reply:
        await self._do.releasedir(NUMBER.unpack_from(request, BODY)[0])
        return b""

    async def _fsyncdir(self, _: int, __: Context, request: bytes) -> Reply:
        handle, flags = protocol.FSYNC_IN.unpack_from(request, BODY)
        await self._do.fsyncdir(handle, bool(flags & 1))
        return b""

    # Extended attributes -------------------------------------------------------------------------

    async def _setxattr(self, nodeid: int, who: Context, request: bytes) -> Reply:
        size, flags = PAIR.unpack_from(request, BODY)
        name = protocol.name_at(request, BODY + PAIR.size)
        start = BODY + PAIR.size + len(name) + 1
        if flags:
            await self._check_flags(nodeid, name, flags, who)
        await self._do.setxattr(nodeid, name, request[start : start + size], who)
        return b""

    async def _check_flags(self, nodeid: int, name: bytes, flags: int, who: Context) -> None:
        try:
            await self._do.getxattr(nodeid, name, who)
        except FUSEError as error:
            if error.errno != errno.ENODATA:
                raise
            if flags & os.XATTR_REPLACE:
                raise
        else:
            if flags & os.XATTR_CREATE:
                raise FUSEError(errno.EEXIST)

    async def _getxattr(self, nodeid: int, who: Context, request: bytes) -> Reply:
        room, _ = PAIR.unpack_from(request, BODY)
        value = await self._do.getxattr(nodeid, request[BODY + PAIR.size : -1], who)
        return _fitting(value, room)

    async def _listxattr(self, nodeid: int, who: Context, request: bytes) -> Reply:
        return _listed(await self._do.listxattr(nodeid, who), request)

    async def _removexattr(self, nodeid: int, who: Context, request: bytes) -> Reply:
        await self._do.removexattr(nodeid, request[BODY:-1], who)
        return b""

    async def _ignore(self, _: int, __: Context, ___: bytes) -> None:
        """A caller that is killed waits for the reply all the same."""


def _entry(one: Entry | EntryAttributes) -> Entry:
    if type(one) is Entry:
        return one
    return Entry(int(one.st_ino), one, one.entry_timeout, one.attr_timeout, one.generation)  # type: ignore[union-attr]


def _opened(one: Opened | FileInfo | int) -> Opened:
    if type(one) is Opened:
        return one
    if isinstance(one, FileInfo):
        flags = protocol.OPEN_DIRECT_IO * one.direct_io | protocol.OPEN_KEEP_CACHE * one.keep_cache
        return Opened(int(one.fh), flags)
    return Opened(int(one), 0)  # type: ignore[arg-type]


def _listed(names: Sequence[bytes], request: bytes) -> bytes:
    room, _ = PAIR.unpack_from(request, BODY)
    return _fitting(b"".join(name + b"\0" for name in names), room)


def _fitting(value: bytes, room: int) -> bytes:
    """A value, or where *room* is 0 how long it is. Raises FUSEError ERANGE where it is longer."""
    if not room:
        return PAIR.pack(len(value), 0)
    if len(value) > room:
        raise FUSEError(errno.ERANGE)
    return value
