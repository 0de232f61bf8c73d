"""mount(2), umount2(2): the kernel's side of a mount, before it serves.

Imports neither pyfuse3 nor trio, so that every command may use it. Nothing here stats, opens or
lists a mountpoint: one that is hung must not hang the caller, and a daemon that touches its own
mount waits for itself.

Source: mount(2), umount2(2), fuse(4), linux/fuse.h.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import subprocess
from pathlib import Path
from typing import Final

import msgspec

from replfs.errors import UsageError
from replfs.front import protocol
from replfs.front.mountinfo import FSTYPE, MountPoint, find_mount, is_dead_mount

_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_REMOUNT: Final = 32
_MS_NOATIME: Final = 1024
_FLAGS: Final = {
    "nosuid": _MS_NOSUID,
    "nodev": _MS_NODEV,
    "noexec": _MS_NOEXEC,
    "noatime": _MS_NOATIME,
    "nodiratime": 2048,
    "relatime": 1 << 21,
}
_MNT_DETACH: Final = 2
_UMOUNT_NOFOLLOW: Final = 8
_PR_SET_IO_FLUSHER: Final = 57
_OOM_SCORE_ADJ: Final = -900
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_FROM_THE_KERNEL: Final = 4 << 20
"""Bytes: what is larger is not worth keeping."""
_KEPT_FREE: Final = 16 << 20

_libc: Final = ctypes.CDLL(None, use_errno=True)


class MountOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a mount is asked for. Permissions are always checked by the kernel."""

    read_only: bool = False
    allow_other: bool = True
    """Other users than the daemon's may use the mount."""
    fsname: str = "replfs"
    """What mountinfo and df(1) show as the source: the store's path, say."""
    writeback: bool = False
    """The kernel's write-back cache: write() returns before the daemon has seen the data."""
    acl: bool = True
    """POSIX ACLs are checked by the kernel."""
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    noatime: bool = False
    max_background: int = 32
    """Asynchronous requests (read-ahead, direct I/O, write-back) the kernel has outstanding at
    most; 1 to 65535. Needs the tuned path; the stock path keeps the kernel's 12."""
    exclusive: bool = False
    """No file changes but through this mount or after an explicit invalidation: the kernel need
    not drop a file's cached pages when it sees a new mtime (FUSE_AUTO_INVAL_DATA off; needs the
    tuned path)."""


# --------------------------------------------------------------------------- mount and unmount


def check_mountpoint(path: str) -> str:
    """The canonical form of *path*, a directory to mount on; it is looked at before it is touched.

    Raises:
        UsageError: it is no directory, or a FUSE mount is there that must go first.
    """
    mount = find_mount(path)
    if mount is not None and mount.is_fuse:
        if is_dead_mount(path):
            raise UsageError(f"{path} is the left-over mount of a daemon that died: unmount it")
        if mount.fstype == FSTYPE:
            raise UsageError(f"{path} is a replfs mount already: unmount it first")
    try:
        real = os.path.realpath(path, strict=True)
        is_directory = Path(real).is_dir()
    except OSError as error:
        raise UsageError(f"mountpoint {path} cannot be used: {error.strerror}") from error
    if not is_directory:
        raise UsageError(f"mountpoint {path} is not a directory")
    return real


def mount_fuse(fd: int, path: str, options: MountOptions) -> None:
    """Mount /dev/fuse *fd* on the directory *path*. FUSE_INIT then waits to be read from *fd*.

    Raises:
        OSError: EPERM without CAP_SYS_ADMIN, else whatever mount(2) says.
    """
    flags = (
        _MS_RDONLY * options.read_only
        | _MS_NOSUID * options.nosuid
        | _MS_NODEV * options.nodev
        | _MS_NOEXEC * options.noexec
        | _MS_NOATIME * options.noatime
    )
    data = f"fd={fd},rootmode=40000,user_id={os.geteuid()},group_id={os.getegid()}"
    data += ",default_permissions"
    if options.allow_other:
        data += ",allow_other"
    result = _libc.mount(
        os.fsencode(options.fsname or "replfs"),
        os.fsencode(path),
        FSTYPE.encode(),
        ctypes.c_ulong(flags),
        data.encode(),
    )
    if result:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot mount on {path}: {os.strerror(code)}")


def remount(mount: MountPoint, *, read_only: bool) -> None:
    """Make a mount read-only or read-write; all other flags stay.

    Dirty pages are taken first, and names that nobody uses are dropped: the daemon must not call
    this from its event loop.

    Relies on: FUSE takes no other option at a remount, and mount(2) sets exactly the flags given.

    Raises:
        OSError: EBUSY while files are open for writing, EPERM without CAP_SYS_ADMIN.
    """
    flags = _MS_REMOUNT | (_MS_RDONLY if read_only else 0)
    for option in mount.options.split(","):
        flags |= _FLAGS.get(option, 0)
    if _libc.mount(None, os.fsencode(mount.path), None, ctypes.c_ulong(flags), None):
        code = ctypes.get_errno()
        raise OSError(code, f"cannot remount {mount.path}: {os.strerror(code)}")


def libfuse_options(options: MountOptions) -> set[str]:
    """The same options as strings for libfuse, which mounts by itself or by fusermount3."""
    fsname = (options.fsname or "replfs").encode("ascii", "backslashreplace").decode()
    result = {
        # libfuse takes a comma as the end of the option, and a backslash as an escape.
        "fsname=" + fsname.replace("\\", "\\\\").replace(",", "\\,"),
        "subtype=replfs",
        "default_permissions",
    }
    if options.allow_other:
        result.add("allow_other")
    if options.read_only:
        result.add("ro")
    if options.noexec:
        result.add("noexec")
    if options.noatime:
        result.add("noatime")
    if os.geteuid() == 0:
        # libfuse starts from nosuid,nodev; fusermount3 lets nobody but root change that.
        result.add("nosuid" if options.nosuid else "suid")
        result.add("nodev" if options.nodev else "dev")
    return result


def unmount_lazily(path: str) -> None:
    """Take the topmost mount off *path* now; it goes away when its last user does (MNT_DETACH).

    If nobody uses it any more it goes away within this call, which may ask the daemon to take
    dirty pages first: the daemon must not call this from its event loop.

    Raises:
        OSError: EINVAL if nothing is mounted there, EPERM without CAP_SYS_ADMIN.
    """
    _unmount(path, _MNT_DETACH | _UMOUNT_NOFOLLOW, "-z")


def unmount(path: str) -> None:
    """Unmount *path* where nobody uses it; not to be called from the daemon's event loop.

    Raises:
        OSError: EBUSY while it is used, EINVAL if nothing is mounted there.
    """
    _unmount(path, _UMOUNT_NOFOLLOW)


def _unmount(path: str, flags: int, *words: str) -> None:
    if not _libc.umount2(os.fsencode(path), flags):
        return
    code = ctypes.get_errno()
    if code == errno.EPERM and os.geteuid() != 0:
        code = _unmount_as_user(path, *words)
    if code:
        raise OSError(code, f"cannot unmount {path}: {os.strerror(code)}")


def _unmount_as_user(path: str, *words: str) -> int:
    """Ask fusermount3, which is root, to unmount what this user has mounted; the errno."""
    try:
        done = subprocess.run(
            ["fusermount3", "-u", "-q", *words, "--", path],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=os.environ | {"LC_ALL": "C"},
            check=False,
        )
    except OSError:
        return errno.EPERM
    if done.returncode == 0:
        return 0
    # With -q it does not say why: what is still there is in use.
    return errno.EBUSY if find_mount(path) is not None else errno.EINVAL


def unmount_quietly(path: str) -> None:
    """`unmount_lazily`, where a failure is of no interest."""
    with contextlib.suppress(OSError):
        unmount_lazily(path)


def is_unmounted(fd: int) -> bool:
    """True if the mount behind /dev/fuse *fd* is gone, and not merely aborted.

    Once it is gone, its device number and mount id are free for the next mount, perhaps on the
    same directory: nothing in mountinfo may be taken for ours any more.

    Relies on: with FUSE_ABORT_ERROR reading says ECONNABORTED after an abort and ENODEV after an
    unmount; without it, ENODEV after both.
    """
    poll = select.poll()
    poll.register(fd, 0)
    if not poll.poll(0):
        return False
    try:
        os.read(fd, protocol.RECEIVE_BYTES)
    except OSError as error:
        return error.errno != errno.ECONNABORTED
    return True


def fuse_descriptors() -> set[int]:
    """Numbers of this process's descriptors of /dev/fuse."""
    result = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}") == "/dev/fuse":
                result.add(int(name))
    return result


def become_io_flusher() -> list[str]:
    """Mark this thread, and those it starts later, as part of the path by which memory is freed.

    With PR_SET_IO_FLUSHER the kernel does not make the daemon wait for dirty pages which only
    the daemon itself can write, and the OOM killer is asked to look elsewhere. Both need
    CAP_SYS_RESOURCE. Call it first thing in the main thread: the mark is inherited by threads and
    children started afterwards.

    Returns:
        One sentence for each of the two that could not be done; empty if both were.
    """
    problems = []
    if _libc.prctl(_PR_SET_IO_FLUSHER, ctypes.c_ulong(1), *[ctypes.c_ulong(0)] * 3):
        problems.append(f"cannot become an I/O flusher: {os.strerror(ctypes.get_errno())}")
    try:
        Path("/proc/self/oom_score_adj").write_text(f"{_OOM_SCORE_ADJ}\n", encoding="ascii")
    except OSError as error:
        problems.append(f"cannot ask the OOM killer to spare the daemon: {error.strerror}")
    return problems


def keep_freed_memory() -> None:
    """Let the allocator keep up to 16 MiB that are free, for the next large requests.

    Each has memory of its own for as long as a peer has not confirmed it. Given back to the
    kernel in between, it comes back page by page, which costs more than to copy the request.

    Source: mallopt(3). Where the C library has none, nothing happens.
    """
    mallopt = getattr(_libc, "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _FROM_THE_KERNEL)
        mallopt(_M_TRIM_THRESHOLD, _KEPT_FREE)


def stay_no_io_flusher() -> None:
    """Take the mark of `become_io_flusher` from this thread, and from children it starts."""
    _libc.prctl(_PR_SET_IO_FLUSHER, *[ctypes.c_ulong(0)] * 4)


# --------------------------------------------------------------------------- FUSE_INIT

_INIT_TIMEOUT_S: Final = 10.0


class InitError(Exception):
    """FUSE_INIT does not look as expected: nothing has been sent to the kernel."""


def mount_up_to_init(path: str, options: MountOptions) -> tuple[int, bytes]:
    """Mount on *path* and read the kernel's FUSE_INIT, which then waits for its answer.

    Returns:
        The /dev/fuse descriptor, and the request.

    Raises:
        InitError: it cannot be done this way; libfuse or fusermount3 may be able to. Nothing is
            mounted.
        OSError: mount(2) failed for another reason than missing privilege.
    """
    try:
        device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise InitError(f"/dev/fuse cannot be opened: {error.strerror}") from error
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, device)
        try:
            mount_fuse(device, path, options)
        except OSError as error:
            if error.errno in {errno.EPERM, errno.EACCES}:
                raise InitError("mount(2) is only for root (CAP_SYS_ADMIN)") from error
            raise
        undo.callback(unmount_quietly, path)
        # Relies on: mount(2) queues FUSE_INIT before it returns.
        poll = select.poll()
        poll.register(device, select.POLLIN)
        if not poll.poll(_INIT_TIMEOUT_S * 1000):
            raise InitError("the kernel sent no FUSE_INIT")
        request = os.read(device, protocol.RECEIVE_BYTES)
        if not protocol.is_init(request):
            raise InitError("the kernel's first request is no FUSE_INIT of protocol 7.23 or later")
        undo.pop_all()
    return device, request
