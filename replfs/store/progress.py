"""How far a secondary has followed its primary: one number, which survives the process.

A primary numbers its changes, and tells a peer that has everything the number of the last one; from
there both count. Of two stores at one generation, the one with the higher number has all that the
other has. The number goes up before the change is applied, so that it never says too little.

The file is on tmpfs, mapped into memory: a change costs one store. After a loss of power, as
without the file, the number is not known (0); over a clean stop it is kept in the state.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from typing import Final

_MAGIC: Final = b"replfs-progress\0"
_HEADER: Final = struct.Struct("<16s16s")
_AT: Final = _HEADER.size // 8
"""Where the number is, in words of eight bytes."""
_SIZE: Final = _HEADER.size + 8


class Progress:
    """The number of one node, at most 2^64 - 1; 0: it is not known."""

    def __init__(self, path: str, node: bytes, saved: int | None) -> None:
        """Go on with the number in the file, or, where *saved* is given, with that.

        Raises:
            OSError: the file cannot be made.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            if os.fstat(fd).st_size != _SIZE:
                os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, _SIZE)
            self._map = mmap.mmap(fd, _SIZE)
        finally:
            os.close(fd)
        self._path = path
        self._words = memoryview(self._map).cast("Q")
        header = _HEADER.pack(_MAGIC, node)
        if self._map[: _HEADER.size] != header:
            self._words[_AT] = 0
            self._map[: _HEADER.size] = header
        if saved is not None:
            self._words[_AT] = saved

    @property
    def number(self) -> int:
        """The last change that was applied, or is about to be."""
        return self._words[_AT]

    @number.setter
    def number(self, number: int) -> None:
        # Relies on: an aligned store of eight bytes is not seen half done by whoever reads the
        # file after this process was killed (x86-64 and AArch64 make it one instruction's effect).
        self._words[_AT] = number

    def count(self) -> None:
        """One more change is about to be applied."""
        number = self._words[_AT]
        if number:
            self._words[_AT] = number + 1

    def close(self, *, clean: bool) -> None:
        """After the end; *clean*: the number was saved elsewhere. Closing twice is harmless."""
        self._words.release()
        self._map.close()
        if clean:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
