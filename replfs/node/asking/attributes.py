"""What an object is besides its names and its data: read, told, compared.

Both sides read the same way. A resync sends all of it (`read`); a verification compares, and gets
along with digests of the extended attributes' values (`inspect`).
"""

from __future__ import annotations

import errno
import os
import stat as _stat

import msgspec
import xxhash

from replfs.core import ops
from replfs.core.policy import Policy
from replfs.store.inode import Inode
from replfs.store.tree import Tree

_DEVICES = frozenset({_stat.S_IFCHR, _stat.S_IFBLK})


def read(tree: Tree, inode: Inode) -> ops.Attributes:
    """All of an object's attributes. Raises OSError."""
    tree.read_record(inode)
    found = tree.stat(inode)
    xattrs = {}
    for name in tree.list_xattrs(inode):
        try:
            xattrs[name] = tree.get_xattr(inode, name)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    return ops.Attributes(
        mode=found.st_mode,
        uid=found.st_uid,
        gid=found.st_gid,
        rdev=found.st_rdev if inode.type in _DEVICES else 0,
        size=found.st_size if inode.type == _stat.S_IFREG else 0,
        mtime=found.st_mtime_ns,
        target=tree.readlink(inode) if inode.type == _stat.S_IFLNK else b"",
        policy=inode.policy,
        ack=inode.ack,
        xattrs=xattrs,
    )


def inspect(tree: Tree, inode: Inode) -> ops.Attributes:
    """As `read`, with a digest (16 bytes) in place of each extended attribute's value."""
    found = read(tree, inode)
    digests = {name: xxhash.xxh3_128_digest(value) for name, value in found.xattrs.items()}
    return msgspec.structs.replace(found, xattrs=digests)


def type_word(mode: int) -> str:
    """A file type in words."""
    return _TYPES.get(_stat.S_IFMT(mode), "unknown")


_TYPES = {
    _stat.S_IFREG: "file",
    _stat.S_IFDIR: "directory",
    _stat.S_IFLNK: "symbolic link",
    _stat.S_IFIFO: "FIFO",
    _stat.S_IFSOCK: "socket",
    _stat.S_IFCHR: "character device",
    _stat.S_IFBLK: "block device",
}


def differences(mine: ops.Attributes, theirs: ops.Attributes) -> list[str]:
    """What differs between two objects as `inspect` sees them, in words: here, then there."""
    if _stat.S_IFMT(mine.mode) != _stat.S_IFMT(theirs.mode):
        return [f"type: {type_word(mine.mode)} here, {type_word(theirs.mode)} there"]
    found = []
    if mine.mode != theirs.mode and not _stat.S_ISLNK(mine.mode):
        found.append(f"mode: {mine.mode & 0o7777:04o} here, {theirs.mode & 0o7777:04o} there")
    if (mine.uid, mine.gid) != (theirs.uid, theirs.gid):
        found.append(f"owner: {mine.uid}:{mine.gid} here, {theirs.uid}:{theirs.gid} there")
    if mine.rdev != theirs.rdev:
        found.append(f"device number: {_device(mine.rdev)} here, {_device(theirs.rdev)} there")
    if mine.size != theirs.size:
        found.append(f"size: {mine.size} here, {theirs.size} there")
    if mine.mtime != theirs.mtime:
        found.append(f"mtime: {_time(mine.mtime)} here, {_time(theirs.mtime)} there")
    if mine.target != theirs.target:
        found.append(f"target: {mine.target!r} here, {theirs.target!r} there")
    if (mine.policy, mine.ack) != (theirs.policy, theirs.ack):
        found.append(f"policy: {_policy(mine.policy)} here, {_policy(theirs.policy)} there")
    for name in sorted(mine.xattrs.keys() | theirs.xattrs.keys()):
        here, there = mine.xattrs.get(name), theirs.xattrs.get(name)
        if here != there:
            what = "only there" if here is None else "only here" if there is None else "differs"
            found.append(f"xattr {name.decode(errors='backslashreplace')}: {what}")
    return found


def _device(number: int) -> str:
    return f"{os.major(number)}:{os.minor(number)}"


def _time(ns: int) -> str:
    return f"{ns // 10**9}.{ns % 10**9:09d}"


def _policy(number: int) -> str:
    return Policy(number).name.lower() if number in set(Policy) else str(number)
