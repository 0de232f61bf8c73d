"""What is mounted where, by /proc/self/mountinfo, and whether a daemon is still behind it.

Nothing here stats, opens or lists a mountpoint: one that is hung must not hang the caller. Whether
a daemon is still there is asked by a child process that can be left behind (`is_dead_mount`). It
is small, since `replfs status` needs it and is to be quick.

Source: proc_pid_mountinfo(5).
"""

from __future__ import annotations

import os
import re
import select
import signal
import sys
from pathlib import Path
from typing import Final, NamedTuple

FSTYPE: Final = "fuse.replfs"
"""File system type of every mount made here, as mountinfo and df(1) show it."""


class MountPoint(NamedTuple):
    """One line of /proc/self/mountinfo, unescaped."""

    mount_id: int
    parent_id: int
    device: str
    """MAJOR:MINOR of the file system, as /sys/class/bdi and /sys/fs/fuse/connections name it."""
    root: str
    path: str
    """Absolute and canonical; bytes that are not UTF-8 are surrogates, as in os.fsdecode."""
    options: str
    fstype: str
    source: str
    super_options: str

    @property
    def is_fuse(self) -> bool:
        """A FUSE file system of any kind."""
        return self.fstype in {"fuse", "fuseblk"} or self.fstype.startswith("fuse.")


_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")


def _unescape(field: bytes) -> str:
    return os.fsdecode(_ESCAPE.sub(lambda found: bytes([int(found[1], 8) & 0xFF]), field))


def parse_mountinfo(text: bytes) -> list[MountPoint]:
    """Parse the contents of a mountinfo file. Lines that are not understood are left out."""
    result = []
    for line in text.split(b"\n"):
        # Optional fields (propagation) stand before the lone dash: any number, none included.
        head, dash, tail = line.partition(b" - ")
        fields = head.split(b" ")
        rest = tail.split(b" ")
        if not dash or len(fields) < 6 or len(rest) < 3 or not fields[0].isdigit():
            continue
        result.append(
            MountPoint(
                mount_id=int(fields[0]),
                parent_id=int(fields[1]),
                device=fields[2].decode("ascii", "replace"),
                root=_unescape(fields[3]),
                path=_unescape(fields[4]),
                options=_unescape(fields[5]),
                fstype=_unescape(rest[0]),
                source=_unescape(rest[1]),
                super_options=_unescape(rest[2]),
            )
        )
    return result


def mount_points() -> list[MountPoint]:
    """Every mount this process sees, in the kernel's order."""
    return parse_mountinfo(Path("/proc/self/mountinfo").read_bytes())


def find_mount(path: str, mounts: list[MountPoint] | None = None) -> MountPoint | None:
    """The topmost mount whose mountpoint is exactly *path*, or None.

    *path* is made absolute lexically, never resolved: resolving would ask the file system
    mounted there.
    """
    wanted = os.path.abspath(path)
    here = [m for m in (mount_points() if mounts is None else mounts) if m.path == wanted]
    # Of mounts stacked on one directory each is the parent of the next.
    covered = {m.parent_id for m in here}
    top = [m for m in here if m.mount_id not in covered]
    return top[-1] if top else None


def is_dead_mount(path: str, *, timeout_s: float = 5.0) -> bool:
    """True if a FUSE file system is mounted on *path* whose daemon is gone (ENOTCONN).

    A child process asks, because a daemon that is alive but hung would never answer, and the
    asking thread could not be killed. No answer within *timeout_s* seconds is "not dead".
    """
    mount = find_mount(path)
    if mount is None or not mount.is_fuse:
        return False
    probe = (
        "import os, sys\n"
        "try: os.statvfs(sys.argv[1])\n"
        "except OSError as error: os._exit(99 if error.errno in (103, 107) else 0)\n"
        "os._exit(0)\n"
    )
    null = [(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in (0, 1, 2)]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", "-c", probe, mount.path],
        os.environ,
        file_actions=null,
    )
    pidfd = os.pidfd_open(pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        if not poll.poll(timeout_s * 1000):
            os.kill(pid, signal.SIGKILL)
            if not poll.poll(200):
                # In an uninterruptible wait for the hung daemon: the kernel reaps it when we end.
                return False
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 99
    finally:
        os.close(pidfd)
