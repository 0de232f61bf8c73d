"""What is mounted inside STORE is shown empty, not replicated, and told of."""

from __future__ import annotations

import errno
import os
import subprocess

import pytest
from helpers.cases import fails, write
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted


def test_a_file_system_mounted_inside_the_store():
    def prepare(pair: Pair) -> None:
        inner = pair.primary_store / "inner"
        inner.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "none", inner], check=True)
        (inner / "file").write_bytes(b"x")
        (pair.primary_store / "other").write_bytes(b"y")

    with Pair(prepare=prepare) as pair:
        inner = pair.mountpoint / "inner"
        assert os.listdir(inner) == []
        with fails(errno.EXDEV):
            write(inner / "new", b"z")
        with fails(errno.EBUSY):
            os.rmdir(inner)
        pair.wait_in_sync()
        assert sorted(os.listdir(pair.secondary_store)) == [".replfs", "other"]
        wait_for(lambda: "/inner is another file system" in pair.mount.log_tail(200), what="a word")
        assert pair.mount.log_tail(200).count("/inner is another file system") == 1
