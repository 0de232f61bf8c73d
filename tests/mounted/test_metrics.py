"""`--metrics` of real nodes: a primary, a secondary, and one that hangs."""

from __future__ import annotations

import urllib.request

import pytest
from helpers.nodes import Node, Pair

from replfs.node.operating.metrics import METRICS

pytestmark = pytest.mark.mounted

LISTEN = ["--metrics", "127.0.0.1:0"]


def metrics_of(node: Node) -> str:
    address = node.status()["metrics"]
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as answer:
        text: str = answer.read().decode()
    return text


def value(text: str, start: str) -> float:
    found = [line for line in text.splitlines() if line.startswith(start)]
    assert len(found) == 1, found
    return float(found[0].rpartition(" ")[2])


def test_both_nodes_tell_what_status_tells():
    with Pair(mount_arguments=LISTEN, agent_arguments=LISTEN) as pair:
        for number in range(20):
            (pair.mountpoint / str(number)).write_bytes(b"x")
        text = metrics_of(pair.mount)
        assert value(text, "replfs_in_sync") == 1
        assert value(text, "replfs_peer_link_up") == 1
        writes = "replfs_operation_duration_seconds"
        count = value(text, f'{writes}_count{{store="{pair.primary_store}",class="write"}}')
        assert count >= 20
        assert 0 < value(text, f'{writes}_sum{{store="{pair.primary_store}",class="write"}}') < 60
        assert value(text, "replfs_memory_bytes") > 1 << 20
        other = metrics_of(pair.agent)
        assert value(other, "replfs_primary_link_up") == 1
        assert value(other, "replfs_applied_operations_total") >= 40
        known = {metric.name for metric in METRICS}
        told = {line.split()[2] for line in (text + other).splitlines() if line.startswith("# H")}
        assert told <= known
        assert known - told <= {
            "replfs_peer_resync_bytes_per_second", "replfs_peer_resync_remaining_seconds",
        }  # fmt: skip
