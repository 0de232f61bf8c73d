"""A new file with all there is to it: in few calls, and with nothing to be remembered of it."""

from __future__ import annotations

import errno
import os
from typing import Final

from replfs.core import ops
from replfs.store import locators
from replfs.store import record as records
from replfs.store.inode import Inode
from replfs.store.record import Record
from replfs.store.syscalls import failure
from replfs.store.tree import Tree

_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
_PERMISSIONS: Final = 0o7777


def plant(
    tree: Tree,
    parent: Inode,
    name: bytes,
    object_id: bytes,
    attributes: ops.Attributes,
    contents: bytes | memoryview,
    *,
    locate: bool = True,
) -> bytes:
    """Make the file *name*, which stays unknown to the tree; what finds it again (`locators`).

    Empty without *locate*, which takes as long as writing a small file.

    Its record is written last: what a crash leaves of it has no id, and is taken for an earlier
    copy.

    Raises:
        FileExistsError: something stands there.
        OSError: it cannot be made; nothing is left of it.
    """
    above = tree.directory_fd(parent)
    tree.set_umask(0)
    fd = os.open(name, _FLAGS, attributes.mode & _PERMISSIONS, dir_fd=above)
    try:
        if len(contents) and os.pwrite(fd, contents, 0) != len(contents):
            raise failure(errno.ENOSPC)
        found = os.fstat(fd)
        is_changed = found.st_mode != attributes.mode
        if (found.st_uid, found.st_gid) != (attributes.uid, attributes.gid):
            os.fchown(fd, attributes.uid, attributes.gid)
            is_changed = True
        is_changed |= _set_xattrs(fd, attributes.xattrs)
        if is_changed:
            # Owner and ACLs change the mode, too.
            os.fchmod(fd, attributes.mode & _PERMISSIONS)
        os.utime(fd, ns=(found.st_atime_ns, attributes.mtime))
        record = Record(object_id, 0, attributes.policy, attributes.ack)
        os.setxattr(fd, records.XATTR, records.pack(record, found.st_ino))
        tree.displace(found.st_ino)
        locator = locators.of_file(tree, parent, fd) if locate else b""
    except BaseException:
        os.close(fd)
        os.unlink(name, dir_fd=above)
        raise
    os.close(fd)
    return locator


def _set_xattrs(fd: int, wanted: dict[bytes, bytes]) -> bool:
    """Make them exactly these; whether there was anything to do. A default ACL leaves some."""
    present = [os.fsencode(name) for name in os.listxattr(fd)]
    if not present and not wanted:
        return False
    for name in present:
        if name not in wanted:
            os.removexattr(fd, name)
    for name, value in wanted.items():
        os.setxattr(fd, name, value)
    return True
