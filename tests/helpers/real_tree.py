"""A tree like the ones people have: Python's standard library, and one of each special case.

`make` needs root, for owners and devices. What it makes is the same each time but for the
standard library's version and for time stamps.
"""

from __future__ import annotations

import os
import shutil
import stat
import sysconfig
import time
from pathlib import Path

from helpers import acl

MIB = 1 << 20
MINUTE_NS = 60_000_000_000
OLD_NS = 1_234_567_890_123_456_789
BEFORE_1970_NS = -1_000_000_001
AFTER_2038_NS = 4_000_000_000_987_654_321


def make(top: Path, files: int) -> int:
    """Fill the new directory `top` with at least `files` files; how many objects there are."""
    top.mkdir()
    library(top / "library", files)
    special(top / "special")
    for directory, directories, names in os.walk(top, topdown=False):
        for name in (*directories, *names):
            _age(Path(directory, name))
    _age(top)
    return sum(1 + len(names) for _, _, names in os.walk(top))


def _age(path: Path) -> None:
    """Not made a moment ago: rsync(1) leaves a copy alone that was made in the same second."""
    found = path.lstat()
    if time.time_ns() - found.st_mtime_ns < MINUTE_NS:
        times = found.st_atime_ns, found.st_mtime_ns - 60 * MINUTE_NS
        os.utime(path, ns=times, follow_symlinks=False)


def library(target: Path, files: int) -> None:
    """Up to `files` files of the standard library, with owners, modes and times of their own."""
    source = Path(sysconfig.get_path("stdlib"))
    count = 0
    for directory, directories, names in os.walk(source):
        directories[:] = sorted(d for d in directories if not d.endswith("-packages"))
        place = target / Path(directory).relative_to(source)
        place.mkdir(parents=True)
        for name in sorted(names):
            if count == files:
                return
            path = Path(directory, name)
            if path.is_symlink() or not path.is_file() or path.stat().st_size > 2 * MIB:
                continue
            shutil.copy(path, place / name)
            os.chown(place / name, 1000 + count % 5, 2000 + count % 3)
            os.chmod(place / name, (0o644, 0o600, 0o755, 0o444, 0o640)[count % 5])
            os.utime(place / name, ns=(OLD_NS, OLD_NS + count * 1_000_003))
            count += 1
    number = 0
    while count < files:  # a small installation: the same again under other names
        place = target / f"more {number}"
        place.mkdir()
        for index in range(min(200, files - count)):
            (place / f"{index}.txt").write_text(f"{number} {index}\n" * (index * 7))
            count += 1
        number += 1


def special(top: Path) -> None:
    """One of each thing that copies get wrong."""
    top.mkdir()
    for part in (links, holes, special_files, odd_names, extended_attributes, modes_and_times):
        place = top / part.__name__
        place.mkdir()
        part(place)


def links(top: Path) -> None:
    """Hard links, symbolic ones to something, nothing, and in circles."""
    (top / "deep").mkdir()
    (top / "one").write_bytes(b"three names\n")
    os.link(top / "one", top / "two")
    os.link(top / "one", top / "deep" / "three")
    os.symlink("one", top / "relative")
    os.symlink("/nowhere/" + "x" * 200, top / "dangling")
    os.symlink("circle", top / "circle")
    os.link(top / "dangling", top / "dangling too", follow_symlinks=False)
    os.lchown(top / "relative", 1234, 4321)


def holes(top: Path) -> None:
    """Holes in the middle, at the end, and nothing else."""
    for name, size, islands in (
        ("island", 8 * MIB, [5 * MIB]),
        ("tail", 3 * MIB + 5, [0]),
        ("nothing but a hole", 2 * MIB, []),
        ("many", 4 * MIB, range(0, 4 * MIB, MIB // 2)),
    ):
        with (top / name).open("wb") as file:
            file.truncate(size)
            for offset in islands:
                os.pwrite(file.fileno(), b"land" * 1024, offset)
    (top / "empty").touch()


def special_files(top: Path) -> None:
    """Devices, a fifo and a socket."""
    os.mkfifo(top / "fifo", 0o640)
    os.mknod(top / "socket", stat.S_IFSOCK | 0o700)
    os.mknod(top / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(top / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 250))
    os.chown(top / "loop", 0, 6)


def odd_names(top: Path) -> None:
    """Names with any byte, and as long as they may be."""
    base = os.fsencode(top)
    for code in range(1, 256):
        if code not in (0x2E, 0x2F):
            with open(base + b"/" + bytes([code]), "wb") as file:
                file.write(b"%d" % code)
    for name in (b"-rf", b" ", b"a\nb", b"...", b"\xff\xfe\x80", "äöü€𝄞".encode(), b"n" * 255,
                 b"\xe4" * 255, b"%s$(true)`id`", b"*?[x]"):  # fmt: skip
        os.mkdir(base + b"/" + name if len(name) > 1 else base + b"/" + name + b"d")
        target = base + b"/" + (name if len(name) > 1 else name + b"d")
        with open(target + b"/" + name, "wb") as file:
            file.write(name)
        os.symlink(name, target + b"/link")
    deep = top
    for _ in range(12):
        deep = deep / ("d" * 200)
        deep.mkdir()
    (deep / "bottom").write_bytes(b"x")


def extended_attributes(top: Path) -> None:
    """xattrs of each kind that can be copied, and ACLs."""
    for name in ("file", "directory"):
        path = top / name
        path.mkdir() if name == "directory" else path.write_bytes(b"x")
        os.setxattr(path, "user.comment", b"a remark")
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "user.binary", bytes(range(256)) * 4)
        os.setxattr(path, "user.\u00e4\u00f6", b"x")
        os.setxattr(path, "trusted.note", b"of root's")
        os.setxattr(path, acl.ACCESS, acl.pack(7, 5, 0, users={1001: 6}, groups={2001: 4}))
    os.setxattr(top / "directory", acl.DEFAULT, acl.pack(7, 5, 1, users={1002: 7}))
    (top / "directory" / "heir").write_bytes(b"x")
    os.symlink("file", top / "link")
    os.setxattr(top / "link", "trusted.note", b"on a link", follow_symlinks=False)


def modes_and_times(top: Path) -> None:
    """Special bits, modes without permissions, and times far away."""
    for mode in (0o4755, 0o2755, 0o1777, 0o6711, 0o000, 0o222):
        path = top / f"file {mode:o}"
        path.write_bytes(b"x")
        os.chown(path, 1001, 2001)
        os.chmod(path, mode)
    for mode in (0o2775, 0o1777, 0o3770, 0o700):
        path = top / f"directory {mode:o}"
        path.mkdir()
        os.chown(path, 1002, 2002)
        os.chmod(path, mode)
    for name, stamp in (("old", BEFORE_1970_NS), ("new", AFTER_2038_NS), ("exact", OLD_NS)):
        (top / name).write_bytes(b"x")
        os.utime(top / name, ns=(stamp, stamp))
        (top / f"{name} directory").mkdir()
        os.utime(top / f"{name} directory", ns=(stamp, stamp))
    os.symlink("x", top / "link")
    os.utime(top / "link", ns=(OLD_NS, OLD_NS), follow_symlinks=False)
