"""What a failing disk dropped on the primary overwrites nothing that a replica has.

The kernel tells of it once, and then reads what the disk has instead. Where such a file is to be
compared, it stays as it is on the replica until the primary is started again and has fetched it.
"""

from __future__ import annotations

import errno
import os
import stat

import pytest
from simulation.harness.life import acting
from simulation.harness.run import run_seed
from simulation.harness.world import Simulation


class Dropped(Simulation):
    """The primary's kernel drops what was written to a file, and then all is compared."""

    async def _faults(self):
        for one in self.replicas:
            if one.life is None:
                await self.start(one)
        await self.until("in sync", self.is_in_sync)
        peers = self.primary.pipeline.peers
        await self.until("stable", lambda: all(peer.unstable.is_empty for peer in peers))
        primary, life = self.primary, self.life_of_primary()
        roles = primary.node._roles
        life.errors += 1  # of which applications may be told
        with acting(life):
            roles.unwritten.failed(OSError(errno.EIO, os.strerror(errno.EIO)))
        while (found := self._drop()) is None:
            self.gate.open()
            self.budget = 100
            await self.until("the applications are done", lambda: self.budget <= 0)
            await self.stand_still()
            await self.until("in sync", self.is_in_sync)
        path, content = found
        with acting(life):
            for peer in primary.pipeline.peers:
                peer.compare_all()
        await self.until("the operator is told", self.is_held)
        for one in self.replicas:
            with open(os.path.join(one.raw, path), "rb") as file:
                assert file.read() == content
        life.die()
        await self.recovery.buried(primary)
        await self.start(primary)
        self.gate.open()

    def _drop(self):
        """A file that was written after the disk had failed, and what was in it; None: none yet."""
        for peer in self.primary.pipeline.peers:
            unstable = peer.unstable.snapshot(everywhere=False)
            for object_id in unstable.objects_with_data():
                inode = self.primary.tree.table.by_id.get(object_id)
                if inode is None or not inode.named:
                    continue
                path = os.path.join(self.primary.raw, inode.path())
                found = os.stat(path)
                if found.st_ino != inode.ino or not stat.S_ISREG(found.st_mode):
                    continue
                with open(path, "r+b") as file:
                    content = file.read()
                    if not content.strip(b"\0"):
                        continue
                    file.seek(0)
                    file.write(bytes(len(content)))
                os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))
                return inode.path(), content
        return None


@pytest.mark.parametrize("seed", range(1, 5))
def test_nothing_is_overwritten_with_it_and_a_restart_fetches_it(seed, tmp_path):
    result = run_seed(seed, tmp_path, kind=Dropped)
    if result.error is not None:
        pytest.fail(result.report(), pytrace=False)
