"""Disks of their own: file systems in files, on loop devices; some can lose power. Needs root."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from helpers.nodes import unmount_all, wait_for
from replfs.store import syscalls

MAKE = {
    "ext4": ("mkfs.ext4", "-q", "-F", "-m", "0", "-b", "4096"),
    "xfs": ("mkfs.xfs", "-q", "-f"),
    "btrfs": ("mkfs.btrfs", "-q", "-f"),
}
"""How each kind of file system is made."""
SIZE_MIN = {"ext4": 4 << 20, "xfs": 300 << 20, "btrfs": 120 << 20}
"""Bytes below which none can be made."""
_BLOCK = 4096
_FIBMAP = 1
"""Of linux/fs.h."""


@contextlib.contextmanager
def disk(
    image: Path,
    place: Path,
    size: int,
    kind: str = "ext4",
    *,
    inodes: int = 0,
    options: Sequence[str] = (),
    whole: bool = False,
) -> Iterator[None]:
    """An empty file system of `size` bytes mounted on the directory `place`.

    Args:
        image: the file to make for it.
        place: where it is mounted.
        size: bytes, its own administration included.
        kind: which of `MAKE`.
        inodes: how many it has (ext4 only); 0: as many as usual.
        options: more of mkfs(8).
        whole: all of the image has room where it lies.
    """
    with image.open("wb") as file:
        file.truncate(size)
    few = ["-N", str(inodes)] if inodes else []
    _run(*MAKE[kind], *few, *options, str(image))
    if whole:
        with image.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, size)
    device = _run("losetup", "--find", "--show", str(image))
    try:
        _run("mount", "-t", kind, device, str(place))
        try:
            if kind == "ext4":
                os.rmdir(place / "lost+found")
            yield
        finally:
            unmount_all(place)
    finally:
        _run("losetup", "--detach", device)
        image.unlink()


class BrokenDisk:
    """An ext4 that cannot write to some blocks for a while, and has lost what was in them."""

    def __init__(self, image: Path) -> None:
        """*image* lies on a file system of its own, which has no room for anything else."""
        self._image = image

    @contextlib.contextmanager
    def breaks(self, path: Path) -> Iterator[None]:
        """Writing back what is written to a file fails; the kernel drops it then."""
        blocks = _blocks_of(path)
        with self._image.open("r+b") as image:
            for block in blocks:
                syscalls.punch_hole(image.fileno(), block * _BLOCK, _BLOCK)
        filler = self._image.with_name("filler")
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while file.write(bytes(_BLOCK)):
                pass
        try:
            yield
        finally:
            filler.unlink()


def _blocks_of(path: Path) -> list[int]:
    """Where on its disk a file is."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        found = []
        for number in range(os.fstat(file.fileno()).st_size // _BLOCK):
            answer = fcntl.ioctl(file.fileno(), _FIBMAP, number.to_bytes(4, "little"))
            found.append(int.from_bytes(answer, "little"))
    return found


@contextlib.contextmanager
def broken_disk(base: Path, place: Path) -> Iterator[BrokenDisk]:
    """A `BrokenDisk` on `place`."""
    outer = base / f"{place.name}.memory"
    outer.mkdir()
    _run("mount", "-t", "tmpfs", "-o", "size=25m", "replfs-test", str(outer))
    try:
        image = outer / "image"
        with disk(image, place, 24 << 20, options=("-J", "size=4"), whole=True):
            yield BrokenDisk(image)
    finally:
        unmount_all(outer)
        outer.rmdir()


_XFS_GOING_DOWN = 0x8004587D
"""XFS_IOC_GOINGDOWN of xfs(5)'s ioctl_xfs_goingdown(2)."""
_NO_LOG_FLUSH = 2
_FICLONE = 0x40049409
"""ioctl_ficlone(2)."""
_SIZE = 320 << 20
"""Bytes: mkfs.xfs makes no smaller ones."""


class CrashDisk:
    """A filesystem in a file that can lose what it has not written, as by a loss of power.

    Whatever used it must be dead, or stopped and killed before it runs again, when `cut` returns.
    """

    def __init__(self, base: Path, place: Path, kind: str) -> None:
        """An empty one of `kind` (xfs, ext4), mounted on `place`; its image is below `base`.

        The image lies on an xfs of its own, so that it can be copied in a moment.
        """
        self.place = place
        self.kind = kind
        self._outer_image = base / f"{place.name}.outer"
        self._outer = base / f"{place.name}.images"
        self._outer.mkdir()
        with self._outer_image.open("wb") as file:
            file.truncate(3 * _SIZE)
        _run("mkfs.xfs", "-q", str(self._outer_image))
        _run("mount", "-o", "loop", str(self._outer_image), str(self._outer))
        self._image = self._outer / "image"
        self._copy = self._outer / "copy"
        with self._image.open("wb") as file:
            file.truncate(_SIZE)
        _run(f"mkfs.{kind}", "-q", str(self._image))
        self.attach()
        with contextlib.suppress(FileNotFoundError):
            (place / "lost+found").rmdir()

    def attach(self) -> None:
        """Mount it."""
        _run("mount", "-t", self.kind, "-o", "loop", str(self._image), str(self.place))

    def cut(self) -> None:
        """From now on nothing is written, and what was not written before is lost."""
        if self.kind == "xfs":
            fd = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
            try:
                fcntl.ioctl(fd, _XFS_GOING_DOWN, _NO_LOG_FLUSH.to_bytes(4, "little"))
            finally:
                os.close(fd)
        else:
            # Not by cp(1): a child closes descriptors of the mount that is frozen, and hangs.
            with self._image.open("rb") as image, self._copy.open("wb") as copy:
                fcntl.ioctl(copy.fileno(), _FICLONE, image.fileno())

    def turn_read_only(self) -> None:
        """As the kernel does with an ext4 in which it finds something wrong."""
        device = os.stat(self.place).st_dev
        name = os.path.basename(
            os.readlink(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
        )
        _run("mount", "-o", "remount,errors=remount-ro", str(self.place))
        Path(f"/sys/fs/ext4/{name}/trigger_fs_error").write_text("test")

    def come_back(self) -> None:
        """Mount what is left."""
        unmount_all(self.place)
        # The kernel takes a detached mount down in its own time; until then mount(8) would find the
        # loop device, and on it the file system that was cut.
        wait_for(lambda: not _run("losetup", "-j", str(self._image)), 30, "the old mount to go")
        if self.kind != "xfs":
            os.rename(self._copy, self._image)
        self.attach()

    def close(self) -> None:
        """Detach and remove it."""
        unmount_all(self.place)
        unmount_all(self._outer)
        with contextlib.suppress(OSError):
            self._outer.rmdir()
            self._outer_image.unlink()


@contextlib.contextmanager
def crash_disk(base: Path, place: Path, kind: str) -> Iterator[CrashDisk]:
    """A `CrashDisk` for a while."""
    disk = CrashDisk(base, place, kind)
    try:
        yield disk
    finally:
        disk.close()


def free_bytes(place: Path) -> int:
    """What can still be written."""
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout.strip()
