"""Flushes that the kernel does by itself: io_submit(2) with IOCB_CMD_FSYNC and IOCB_CMD_FDSYNC.

No thread waits for the disk, and none has to be woken for it, which costs more than many a flush:
one is begun by a system call, and its end makes a descriptor readable.

Source: io_submit(2), linux/aio_abi.h.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import Final

_AT_ONCE: Final = 64
"""Flushes under way at the same time, at least; and results taken at once."""
_NUMBERS: Final = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4)}
"""Of io_setup, io_submit and io_getevents: the C library has no functions for them."""
_NONE: Final = (-1, -1, -1)
"""No kernel has these, and each says so (ENOSYS)."""
_FSYNC: Final = 2
_FDSYNC: Final = 3
_FLAG_EVENTFD: Final = 1
_REQUEST: Final = struct.Struct("=QIiHhIQQqQII")
_EVENT: Final = struct.Struct("=QQqq")

_syscall = ctypes.CDLL(None, use_errno=True).syscall
_syscall.restype = ctypes.c_long


class KernelFlushes:
    """A context for flushes under way, for the life of the process. One thread makes all calls.

    Raises:
        OSError: this kernel does not offer them, or has no room for more (fs.aio-max-nr).
    """

    def __init__(self) -> None:
        setup, self._submit, self._events = _NUMBERS.get(platform.machine(), _NONE)
        self._context = ctypes.c_ulong()
        if _syscall(ctypes.c_long(setup), ctypes.c_long(_AT_ONCE), ctypes.byref(self._context)):
            raise _failure()
        self._request = ctypes.create_string_buffer(_REQUEST.size)
        self._requests = (ctypes.c_void_p * 1)(ctypes.addressof(self._request))
        self._found = ctypes.create_string_buffer(_EVENT.size * _AT_ONCE)
        self._idle: list[int] = []
        """Descriptors that no flush uses now."""
        self._ended: dict[int, int] = {}
        """Results that nobody has taken yet, by descriptor."""

    def begin(self, fd: int, *, data_only: bool) -> int:
        """Begin to flush *fd*, which may be closed meanwhile; what becomes readable at the end.

        Raises:
            OSError: EAGAIN while too many are under way, EINVAL where the filesystem cannot.
        """
        signal = self._idle.pop() if self._idle else os.eventfd(0, os.EFD_CLOEXEC)
        code = _FDSYNC if data_only else _FSYNC
        _REQUEST.pack_into(
            self._request, 0, signal, 0, 0, code, 0, fd, 0, 0, 0, 0, _FLAG_EVENTFD, signal
        )
        # Relies on: the request is copied, and the file is held, before the call returns.
        submit, one = ctypes.c_long(self._submit), ctypes.c_long(1)
        if _syscall(submit, self._context, one, self._requests) != 1:
            failure = _failure()
            self._idle.append(signal)
            raise failure
        return signal

    def end(self, signal: int) -> None:
        """Take the result of a flush whose descriptor is readable. Raises OSError: it failed."""
        os.eventfd_read(signal)
        # Relies on: an event can be taken before its descriptor is signalled.
        while signal not in self._ended:
            self._take()
        self._idle.append(signal)
        result = self._ended.pop(signal)
        if result < 0:
            raise OSError(-result, os.strerror(-result))

    def _take(self) -> None:
        """Take the results that are there, at most as many as there is room for."""
        count = _syscall(
            ctypes.c_long(self._events),
            self._context,
            ctypes.c_long(1),
            ctypes.c_long(_AT_ONCE),
            self._found,
            None,
        )
        if count < 0:
            raise _failure()
        for at in range(0, count * _EVENT.size, _EVENT.size):
            signal, _, result, _ = _EVENT.unpack_from(self._found, at)
            self._ended[signal] = result


def _failure() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
