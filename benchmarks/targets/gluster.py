"""GlusterFS: one volume with two replicas, both on this machine."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks import images
from benchmarks.errors import BenchmarkError
from benchmarks.processes import Namespace, own_name
from benchmarks.targets.base import Running

# 127.0.0.1 is refused.
_HOST: Final = "127.0.0.2"
_VOLUME: Final = "measured"
_START_S: Final = 30.0
# The directories that glusterd cannot be told to leave alone are hidden from it, and it from them.
_HIDDEN: Final = """\
mkdir "$0/log" "$0/runtime" "$0/lib"
cp -a /var/lib/glusterd/. "$0/lib"
mount --bind "$0/log" /var/log/glusterfs
mount --bind "$0/lib" /var/lib/glusterd
if [ -d /run/gluster ]; then mount --bind "$0/runtime" /run/gluster; fi
exec glusterd -f "$0/glusterd.vol" -p "$0/pid" -l "$0/log/glusterd.log"
"""
_GLUSTERD: Final = """\
volume management
    type mgmt/glusterd
    option working-directory {work}/state
    option run-directory {work}
    option glusterd-sockfile {work}/glusterd.socket
    option transport-type socket
    option transport.address-family inet
    option transport.socket.bind-address {host}
    option ping-timeout 0
    option event-threads 1
end-volume
"""


@dataclass(frozen=True)
class Gluster:
    """A volume with these settings; none: as it comes.

    With write-behind, its default, a write is acknowledged from the client's memory.
    """

    title: str
    settings: tuple[tuple[str, str], ...] = ()
    packages: tuple[str, ...] = ("glusterfs-server", "glusterfs-client")

    @contextlib.contextmanager
    def start(self, base: Path) -> Iterator[Running]:
        """glusterd, which starts the bricks and the self-healing daemon, and a client."""
        with images.fresh(base) as stores, Namespace(own_name(base.name)) as namespace:
            work, mount = base / "gluster", base / "mount"
            (work / "state").mkdir(parents=True)
            mount.mkdir()
            volfile = work / "glusterd.vol"
            volfile.write_text(_GLUSTERD.format(work=work, host=_HOST))
            namespace.run("unshare", "--mount", "--propagation=slave", "sh", "-ec", _HIDDEN, work)
            self._make_volume(namespace, work, stores)
            try:
                namespace.run(
                    "glusterfs",
                    f"--volfile-server={_HOST}",
                    f"--volfile-id={_VOLUME}",
                    f"--log-file={work}/mount.log",
                    mount,
                )
                yield Running(mount, stores, namespace)
            finally:
                images.unmount(mount)

    def _make_volume(self, namespace: Namespace, work: Path, stores: Path) -> None:
        def gluster(*words: str) -> str:
            return namespace.run(
                "gluster", "--mode=script", f"--glusterd-sock={work}/glusterd.socket",
                f"--log-file={work}/cli.log", *words,
            )  # fmt: skip

        until = time.monotonic() + _START_S
        while True:
            try:
                gluster("volume", "list")
                break
            except BenchmarkError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)
        bricks = [f"{_HOST}:{stores / name}" for name in ("brick1", "brick2")]
        gluster("volume", "create", _VOLUME, "replica", "2", *bricks, "force")
        for key, value in self.settings:
            gluster("volume", "set", _VOLUME, key, value)
        gluster("volume", "start", _VOLUME)
        while gluster("volume", "status", _VOLUME, "detail").count(": Y ") < len(bricks):
            if time.monotonic() > until:
                raise BenchmarkError("GlusterFS's bricks do not start: look into its logs")
            time.sleep(0.1)
