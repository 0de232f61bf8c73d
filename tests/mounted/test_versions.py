"""Two nodes of which one speaks the next version of the protocol: refused in a sentence, recorded.

The newer one is this program with another number in it.
"""

from __future__ import annotations

import pytest
from helpers.nodes import REPOSITORY, Pair, wait_for

pytestmark = pytest.mark.mounted

NEWER = """
from replfs.core import messages
messages.PROTOCOL_VERSION += 1
"""


@pytest.mark.parametrize("newer", ["mount", "agent"])
def test_what_differs_by_one_version_waits_for_the_upgrade(newer, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NEWER)
    with Pair(mount_arguments=["--peer-timeout", "1s"], start=False) as pair:
        node = getattr(pair, newer)
        node.environ = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
        pair.agent.start()
        pair.mount.start()

        def is_refused() -> bool:
            peer = pair.peer()
            reason = peer["reason"]
            return peer["state"] == "refused" and "use the same release on both nodes" in reason

        wait_for(is_refused, 30, "the peer to be refused")
        (pair.mountpoint / "file").write_text("recorded")
        assert not (pair.secondary_store / "file").exists()
        # Whichever is the older one gets the other's release.
        node.environ = {}
        node.restart()
        pair.wait_in_sync()
        pair.assert_equal()
