"""What stands in STORE/.replfs must be of the right kind, before any of it is opened.

SQLite's own words for that name another file, or none; a fifo would be waited for.
"""

from __future__ import annotations

import os
import stat
from typing import Final

from replfs.errors import StoreError
from replfs.store import lock
from replfs.store.database import FILE, LOG

_IS_STATE: Final = "put a good copy back, or move .replfs away to have the store compared in full"
_IS_REMADE: Final = "move it away, it is made anew"
_FILES: Final = {
    FILE: _IS_STATE,
    LOG: _IS_STATE,
    f"{FILE}-journal": "move it away, it is not replfs's",
    lock.NAME: _IS_REMADE,
    "reserve": _IS_REMADE,
}
_DIRECTORIES: Final = {"limbo": _IS_REMADE, "kept": _IS_REMADE}
_KINDS: Final = {
    stat.S_IFREG: "a file",
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a symlink",
    stat.S_IFIFO: "a fifo",
    stat.S_IFSOCK: "a socket",
}


def check_layout(directory: int, where: str) -> None:
    """Look at the directory that *directory* is open on, the reserved one of the store *where*.

    Raises:
        StoreError: something in it is not what it should be: what to do about it.
    """
    for wanted, names in ((stat.S_IFREG, _FILES), (stat.S_IFDIR, _DIRECTORIES)):
        for name, remedy in names.items():
            try:
                found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            except FileNotFoundError:
                continue
            kind = stat.S_IFMT(found.st_mode)
            if kind != wanted:
                raise StoreError(
                    f"{where}/.replfs/{name} is {_KINDS.get(kind, 'a device')}, and should be "
                    f"{_KINDS[wanted]}; {remedy}"
                )
