"""The two targets that replicate nothing: the disk alone, and FUSE in C above it."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import images, packages
from benchmarks.processes import Namespace, own_name
from benchmarks.targets.base import Running


@dataclass(frozen=True)
class Ext4:
    """The filesystem beneath all the others."""

    title: str = "ext4"
    packages: tuple[str, ...] = ()

    @contextlib.contextmanager
    def start(self, base: Path) -> Iterator[Running]:
        """Only the image."""
        with images.fresh(base) as stores:
            mount = stores / "files"
            mount.mkdir()
            yield Running(mount, stores)


@dataclass(frozen=True)
class Passthrough:
    """libfuse's low-level passthrough: the floor of FUSE in C, with its defaults."""

    title: str = "passthrough_ll"
    packages: tuple[str, ...] = ("libfuse3-dev", "fuse3", "gcc", "libc6-dev", "pkg-config")

    @contextlib.contextmanager
    def start(self, base: Path) -> Iterator[Running]:
        """It keeps a descriptor for every inode that the kernel knows, so it gets many."""
        program = packages.passthrough_ll()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        with images.fresh(base) as stores, Namespace(own_name(base.name)) as namespace:
            source, mount = stores / "files", base / "mount"
            source.mkdir()
            mount.mkdir()
            options = f"source={source},allow_other,fsname=passthrough_ll"
            limited = ("prlimit", f"--nofile={most}", program)
            try:
                namespace.start(*limited, "-f", "-o", options, mount, log=base / "log")
                images.wait_for_mount(mount)
                yield Running(mount, stores, namespace)
            finally:
                images.unmount(mount)
