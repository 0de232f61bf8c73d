"""All that is in a store, as the file system has it: for what has to be done to every object.

For a thread: nothing here knows of the tree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from replfs.store.reach import RESERVED


class Entry(NamedTuple):
    """One name in a directory."""

    directory: int
    """A descriptor of the directory, until the next entry is asked for."""
    above: bytes
    """The directory's path, which begins with `./` or is `.`."""
    name: bytes
    found: os.stat_result


def everything(root_fd: int, *, reserved: bool) -> Iterator[Entry]:
    """Every name below *root_fd*, a directory's before those in it; mounts inside are not crossed.

    What cannot be looked at is passed over. *reserved*: with what users do not see.
    """
    device = os.fstat(root_fd).st_dev
    for above, directories, files, fd in os.fwalk(b".", dir_fd=root_fd, follow_symlinks=False):
        if above == b"." and not reserved:
            directories[:] = [name for name in directories if name != RESERVED]
        entered = []
        for name in directories + files:
            try:
                found = os.stat(name, dir_fd=fd, follow_symlinks=False)
            except OSError:
                continue
            if found.st_dev == device:
                entered.append(name)
                yield Entry(fd, above, name, found)
        inside = set(entered)
        directories[:] = [name for name in directories if name in inside]
