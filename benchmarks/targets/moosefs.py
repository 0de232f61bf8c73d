"""MooseFS: a master, two chunkservers, goal 2."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import images
from benchmarks.errors import BenchmarkError
from benchmarks.processes import Namespace, own_name, run
from benchmarks.targets.base import Running

# MooseFS refuses 127/8 between its daemons. These exist on the loopback of a namespace alone.
_MASTER: Final = "10.99.0.1"
_CHUNKSERVERS: Final = ("10.99.0.11", "10.99.0.12")
_START_S: Final = 60.0


@dataclass(frozen=True)
class MooseFS:
    """Its fsync waits for both chunkservers, but reaches no disk."""

    title: str = "MooseFS, goal 2"
    packages: tuple[str, ...] = ("moosefs-master", "moosefs-chunkserver", "moosefs-client")

    @contextlib.contextmanager
    def start(self, base: Path) -> Iterator[Running]:
        """All daemons and a client."""
        with images.fresh(base) as stores, Namespace(own_name(base.name)) as namespace:
            for address in (_MASTER, *_CHUNKSERVERS):
                run("ip", "-n", namespace.name, "address", "add", f"{address}/32", "dev", "lo")
            work, mount = base / "moosefs", base / "mount"
            work.mkdir()
            mount.mkdir()
            master = _master(work, stores)
            chunkservers = [
                _chunkserver(work, stores, number, address)
                for number, address in enumerate(_CHUNKSERVERS)
            ]
            run("chown", "-R", "mfs:mfs", work, *stores.glob("replica*"), stores / "master")
            namespace.run("mfsmaster", "-c", master, "start")
            for configuration in chunkservers:
                namespace.run("mfschunkserver", "-c", configuration, "start")
            try:
                namespace.run("mfsmount", "-H", _MASTER, "-S", "/", mount)
                namespace.run("mfssetgoal", "2", mount)
                _wait_for_both_copies(namespace, mount / "probe")
                yield Running(mount, stores, namespace)
            finally:
                images.unmount(mount)


def _master(work: Path, stores: Path) -> Path:
    (stores / "master").mkdir()
    shutil.copy("/var/lib/mfs/metadata.mfs.empty", stores / "master" / "metadata.mfs")
    (work / "exports.cfg").write_text("* / rw,alldirs,admin,maproot=0:0\n")
    (work / "topology.cfg").write_text("")
    return _write(
        work / "master.cfg",
        DATA_PATH=stores / "master",
        EXPORTS_FILENAME=work / "exports.cfg",
        TOPOLOGY_FILENAME=work / "topology.cfg",
        MATOML_LISTEN_HOST=_MASTER,
        MATOCS_LISTEN_HOST=_MASTER,
        MATOCL_LISTEN_HOST=_MASTER,
    )


def _chunkserver(work: Path, stores: Path, number: int, address: str) -> Path:
    data, chunks = work / f"data{number}", stores / f"replica{number}"
    data.mkdir()
    chunks.mkdir()
    disks = work / f"disks{number}.cfg"
    disks.write_text(f"{chunks}\n")
    return _write(
        work / f"chunkserver{number}.cfg",
        DATA_PATH=data,
        HDD_CONF_FILENAME=disks,
        MASTER_HOST=_MASTER,
        BIND_HOST=address,
        CSSERV_LISTEN_HOST=address,
    )


def _write(path: Path, **settings: object) -> Path:
    path.write_text("".join(f"{key} = {value}\n" for key, value in settings.items()))
    return path


def _wait_for_both_copies(namespace: Namespace, probe: Path) -> None:
    """Until what is written is on both chunkservers; they are slow to report at first."""
    until = time.monotonic() + _START_S
    while True:
        try:
            probe.write_bytes(b"x")
            if namespace.run("mfsfileinfo", probe).count("copy ") == len(_CHUNKSERVERS):
                return
        except (OSError, BenchmarkError):
            pass  # no chunkserver yet
        if time.monotonic() > until:
            raise BenchmarkError("MooseFS does not make two copies: look into its logs")
        time.sleep(0.2)
