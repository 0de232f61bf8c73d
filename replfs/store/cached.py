"""What the kernel has in memory of a store: to be forgotten where it may not be on the disk."""

from __future__ import annotations

import contextlib
import os
import stat
from typing import Final

_FLAGS: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOATIME | os.O_CLOEXEC


def forget(fd: int) -> None:
    """Have what is in memory of the file *fd*, and not waiting to be written, read anew.

    Relies on: pages whose writing has failed do not wait to be written again, and
    POSIX_FADV_DONTNEED drops what nobody has mapped.
    """
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def forget_all(root_fd: int) -> None:
    """`forget` for every file of the file system that *root_fd* is on, from there on downwards.

    Takes some 10 us a file, in whatever thread. What cannot be opened is left out.
    """
    device = os.fstat(root_fd).st_dev
    for _, names, files, above in os.fwalk(".", dir_fd=root_fd):
        for name in files:
            with contextlib.suppress(OSError):
                if not stat.S_ISREG(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
                    continue
                fd = os.open(name, _FLAGS, dir_fd=above)
                try:
                    forget(fd)
                finally:
                    os.close(fd)
        names[:] = [name for name in names if _is_on(device, name, above)]


def _is_on(device: int, name: str, above: int) -> bool:
    try:
        return os.stat(name, dir_fd=above, follow_symlinks=False).st_dev == device
    except OSError:
        return False
