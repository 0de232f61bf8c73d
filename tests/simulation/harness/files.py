"""The system calls that change a store, as the code of a simulated node makes them.

Each may be the last one of its process, or fail, and is noted by the disk of the process.
Outside of any life the real call is made, and nothing else.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from simulation.harness.disk import Disk

from replfs.store import syscalls

if TYPE_CHECKING:
    from simulation.harness.life import Life

Current = Callable[[], "Life | None"]
Calls = dict[str, Callable[..., Any]]


def _may_go_on(current: Current) -> Disk | None:
    """Raises where it may not; the disk that the call is about, None where it is nobody's."""
    life = current()
    if life is None:
        return None
    life.system_call()
    return life.disk


def calls_of(current: Current) -> Calls:
    """Those of `os`."""
    return _makes(current) | _moves(current) | _attributes(current) | _contents(current)


def _makes(current: Current) -> Calls:
    real_open, real_link, real_symlink = os.open, os.link, os.symlink

    def made(real: Callable[..., Any]) -> Callable[..., Any]:
        def make(path: Any, *args: Any, dir_fd: int | None = None) -> Any:
            disk = _may_go_on(current)
            if disk is None:
                return real(path, *args, dir_fd=dir_fd)
            return disk.make(real, disk.where(path, dir_fd), path, *args, dir_fd=dir_fd)

        return make

    def open_(path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if not flags & os.O_CREAT or (disk := _may_go_on(current)) is None:
            return real_open(path, flags, mode, dir_fd=dir_fd)
        where = disk.where(path, dir_fd)
        opened: int = disk.make(real_open, where, path, flags, mode, dir_fd=dir_fd)
        return opened

    def link(path: Any, new: Any, *, dst_dir_fd: int | None = None, **more: Any) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_link(path, new, dst_dir_fd=dst_dir_fd, **more)
        else:
            where = disk.where(new, dst_dir_fd)
            disk.make(real_link, where, path, new, dst_dir_fd=dst_dir_fd, **more)

    def symlink(target: Any, new: Any, *, dir_fd: int | None = None) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_symlink(target, new, dir_fd=dir_fd)
        else:
            disk.make(real_symlink, disk.where(new, dir_fd), target, new, dir_fd=dir_fd)

    return {
        "mkdir": made(os.mkdir),
        "mknod": made(os.mknod),
        "open": open_,
        "link": link,
        "symlink": symlink,
    }


def _moves(current: Current) -> Calls:
    real_rename = os.rename

    def removed(real: Callable[..., Any]) -> Callable[..., Any]:
        def remove(path: Any, *, dir_fd: int | None = None) -> None:
            disk = _may_go_on(current)
            if disk is None:
                real(path, dir_fd=dir_fd)
            else:
                disk.remove(real, disk.where(path, dir_fd), path, dir_fd=dir_fd)

        return remove

    def rename(
        old: Any, new: Any, *, src_dir_fd: int | None = None, dst_dir_fd: int | None = None
    ) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
        else:
            disk.rename(
                lambda: real_rename(old, new, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd),
                disk.where(old, src_dir_fd),
                disk.where(new, dst_dir_fd),
            )

    return {"unlink": removed(os.unlink), "rmdir": removed(os.rmdir), "rename": rename}


def _attributes(current: Current) -> Calls:
    def by_path(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(path: Any, *args: Any, dir_fd: int | None = None, **more: Any) -> None:
            disk = _may_go_on(current)
            if dir_fd is not None:
                more["dir_fd"] = dir_fd
            if disk is None:
                real(path, *args, **more)
            else:
                disk.attributes(real, disk.where(path, dir_fd), path, *args, **more)

        return change

    def xattr(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(path: Any, name: Any, *args: Any, **more: Any) -> None:
            disk = _may_go_on(current)
            if disk is None:
                real(path, name, *args, **more)
            else:
                disk.xattr(real, disk.where(path), name, path, name, *args, **more)

        return change

    calls = {name: by_path(getattr(os, name)) for name in _BY_PATH}
    return calls | {name: xattr(getattr(os, name)) for name in ("setxattr", "removexattr")}


_BY_PATH = ("chmod", "fchmod", "chown", "fchown", "utime")


def _contents(current: Current) -> Calls:
    real_pwrite, real_ftruncate, real_utime = os.pwrite, os.ftruncate, os.utime
    real_copy = os.copy_file_range

    def copy_file_range(source: int, fd: int, count: int, at: int, to: int) -> int:
        disk = _may_go_on(current)
        if disk is None:
            return real_copy(source, fd, count, at, to)
        copied: int = disk.contents(real_copy, fd, to, to + count, source, fd, count, at, to)
        return copied

    def pwrite(fd: int, data: Any, offset: int) -> int:
        try:
            disk = _may_go_on(current)
        except OSError:
            # The kernel changes the mtime before it looks for room.
            life = current()
            if life is not None and life.disk is not None:
                life.disk.attributes(real_utime, life.disk.where(fd), fd, times_only=True)
            raise
        if disk is None:
            return real_pwrite(fd, data, offset)
        stop = offset + len(data)
        written: int = disk.contents(real_pwrite, fd, offset, stop, fd, data, offset)
        return written

    def ftruncate(fd: int, size: int) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_ftruncate(fd, size)
        else:
            disk.truncate(real_ftruncate, fd, size)

    def flushed(*, data_only: bool) -> Callable[[int], None]:
        def flush(fd: int) -> None:
            disk = _may_go_on(current)
            if disk is not None:
                disk.fsync(fd, data_only=data_only)

        return flush

    return {
        "pwrite": pwrite,
        "copy_file_range": copy_file_range,
        "ftruncate": ftruncate,
        "fsync": flushed(data_only=False),
        "fdatasync": flushed(data_only=True),
    }


def own_calls_of(current: Current) -> Calls:
    """Those of `replfs.store.syscalls`."""
    real_renameat2, real_punch_hole = syscalls.renameat2, syscalls.punch_hole
    real_utimens, real_utimensat = syscalls.utimens, syscalls.utimensat

    def renameat2(old_dir: int, old: bytes, new_dir: int, new: bytes, flags: int) -> None:
        disk = _may_go_on(current)

        def call() -> None:
            real_renameat2(old_dir, old, new_dir, new, flags)

        if disk is None:
            call()
        elif flags == syscalls.RENAME_EXCHANGE:
            disk.exchange(call, disk.where(old, old_dir), disk.where(new, new_dir))
        else:  # it replaces nothing
            disk.rename(call, disk.where(old, old_dir), disk.where(new, new_dir))

    def punch_hole(fd: int, start: int, length: int) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_punch_hole(fd, start, length)
        else:
            disk.contents(real_punch_hole, fd, start, start + length, fd, start, length)

    def utimens(fd: int, atime: int | None, mtime: int | None) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_utimens(fd, atime, mtime)
        else:
            disk.attributes(real_utimens, disk.where(fd), fd, atime, mtime, times_only=True)

    def utimensat(directory: int, name: bytes, atime: int | None, mtime: int | None) -> None:
        disk = _may_go_on(current)
        if disk is None:
            real_utimensat(directory, name, atime, mtime)
        else:
            where = disk.where(name, directory)
            disk.attributes(real_utimensat, where, directory, name, atime, mtime, times_only=True)

    def syncfs(_: int) -> None:
        disk = _may_go_on(current)
        if disk is not None:
            disk.syncfs()

    return {
        "renameat2": renameat2,
        "punch_hole": punch_hole,
        "utimens": utimens,
        "utimensat": utimensat,
        "syncfs": syncfs,
    }
