"""Versions of another store, brought into the volume beside what stands there.

They are made like an application's files: through the volume, so that they are replicated.
"""

from __future__ import annotations

import os
import stat as _stat
from typing import Final

from replfs.core import ops
from replfs.node.asking.inspector import Inspector
from replfs.node.mounted.volume import Volume
from replfs.store.inode import Inode

_NAME_MAX: Final = 255


class Copies:
    """Makes them, each under its name with *suffix*."""

    def __init__(self, volume: Volume, inspector: Inspector, suffix: bytes) -> None:
        self._volume = volume
        self._inspector = inspector
        self._suffix = suffix
        self.count = 0
        self.made: list[tuple[int, list[tuple[int, bytes]]]] = []
        """(node id, [(parent's node id, name)]): the kernel may believe that they are not there."""

    async def copy(self, path: bytes) -> None:
        """Bring what stands at a path there, if it is a file or a symlink.

        Raises:
            OSError: it cannot be read there, or made here.
        """
        there = await self._inspector.at(path)
        found = there.attributes if there is not None else None
        if there is None or found is None:
            return
        *above, name = path.split(b"/")
        kind = _stat.S_IFMT(found.mode)
        if kind not in {_stat.S_IFREG, _stat.S_IFLNK}:
            return
        directory = await self._directory(above)
        free = self._beside(name)
        owner = (found.uid, found.gid)
        if kind == _stat.S_IFLNK:
            inode, _ = await self._volume.make(
                directory.nodeid, free, found.mode, owner=owner, target=found.target, kind="symlink"
            )
            self._note(inode, directory, free)
        else:
            handle, inode, _ = await self._volume.create(
                directory.nodeid,
                free,
                _stat.S_IFREG | 0o600,
                os.O_RDWR | os.O_EXCL,
                owner=owner,
                umask=0,
            )
            # Before anything is asked there, which may fail: the half of a copy stays, and is held.
            self._note(inode, directory, free)
            try:
                await self._fill(handle.number, there.object, found.size)
                await self._volume.setattr(
                    inode.nodeid, handle.number, size=found.size, mode=found.mode & 0o7777,
                    uid=None, gid=None, atime=None, mtime=None,
                )  # fmt: skip
                # Only now: a write or another size takes a capability away.
                await self._set_xattrs(inode, there.object, set(found.xattrs))
                await self._volume.setattr(
                    inode.nodeid, handle.number, size=None, mode=None,
                    uid=None, gid=None, atime=None, mtime=found.mtime,
                )  # fmt: skip
            finally:
                await self._volume.release(handle.number)
        self.count += 1

    async def _set_xattrs(self, inode: Inode, object_id: bytes, names: set[bytes]) -> None:
        """Those that it has there, and no others: its directory here may give it an ACL."""
        for name in self._volume.listxattr(inode.nodeid):
            if name not in names:
                await self._volume.removexattr(inode.nodeid, name)
        for name in sorted(names):
            value = await self._inspector.xattr(object_id, name)
            await self._volume.setxattr(inode.nodeid, name, value, uid=0, groups=set)

    async def _fill(self, number: int, object_id: bytes, size: int) -> None:
        for offset in range(0, size, ops.PAYLOAD_MAX):
            fetched = await self._inspector.fetch(
                object_id, offset, min(ops.PAYLOAD_MAX, size - offset)
            )
            at, taken = offset, 0
            end = offset + len(fetched.data) + sum(stop - start for start, stop in fetched.holes)
            for start, stop in [*fetched.holes, (end, end)]:
                piece = fetched.data[taken : taken + start - at]
                if piece:
                    await self._volume.write(number, at, piece)
                taken += len(piece)
                at = stop

    async def _directory(self, parts: list[bytes]) -> Inode:
        """The directory here, made where only the other store has it.

        Where something else has its name here, it is made beside that, with the suffix.
        """
        directory = self._volume.tree.root
        for name in parts:
            inode = await self._enter(directory, name)
            if not inode.is_directory:
                inode = await self._enter(directory, self._beside(name))
            directory = inode
        return directory

    async def _enter(self, directory: Inode, name: bytes) -> Inode:
        """What has the name, with a reference so that it stays known; a new directory if nothing.

        Raises:
            OSError: it cannot be made.
        """
        try:
            inode = self._volume.lookup(directory.nodeid, name)[0]
        except FileNotFoundError:
            inode, _ = await self._volume.make(
                directory.nodeid, name, _stat.S_IFDIR | 0o755, owner=(0, 0), kind="mkdir"
            )
            self._note(inode, directory, name)
        else:
            self.made.append((inode.nodeid, []))
        return inode

    def _beside(self, name: bytes) -> bytes:
        return name[: _NAME_MAX - len(self._suffix)] + self._suffix

    def _note(self, inode: Inode, directory: Inode, name: bytes) -> None:
        self.made.append((inode.nodeid, [(directory.nodeid, name)]))

    def close(self) -> None:
        """Forget what was made: with a reference of the kernel's, which does not know of it."""
        self._volume.forget([(nodeid, 1) for nodeid, _ in self.made])
