"""`replfs status --metrics`: the status in Prometheus' text format.

Meant for node_exporter's textfile collector, or any other that runs a command. One gauge or counter
for each question an operator asks; the labels are the store and the peer.

Source: Prometheus, "Exposition formats", text-based format 0.0.4.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

Json = dict[str, Any]


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str
    key: str


_NODE: Final = (
    _Metric("replfs_hung", "gauge", "1 if the event loop does not move.", "hung"),
    _Metric("replfs_uptime_seconds", "gauge", "Since the node was started.", "uptime_s"),
    _Metric("replfs_in_flight_operations", "gauge", "Issued and not yet done.", "in_flight"),
    _Metric("replfs_unrepresentable_objects", "gauge", "Objects a peer's store cannot hold.",
            "unrepresentable"),
)  # fmt: skip
_PEER: Final = (
    _Metric("replfs_peer_dirty_files", "gauge", "Files of which the peer lacks data.",
            "dirty_files"),
    _Metric("replfs_peer_dirty_bytes", "gauge", "Bytes the peer lacks, at most.", "dirty_bytes"),
    _Metric("replfs_peer_dirty_names", "gauge", "Names that differ on the peer.", "dirty_names"),
    _Metric("replfs_peer_lag_operations", "gauge", "Sent and not yet answered.", "lag_ops"),
    _Metric("replfs_peer_lag_bytes", "gauge", "Bytes of those.", "lag_bytes"),
)  # fmt: skip
_OPERATION: Final = (
    _Metric("replfs_operations_total", "counter", "Operations, by class.", "count"),
    _Metric("replfs_operations_held_total", "counter", "Operations that had to wait.", "held"),
)


def render(statuses: list[Json]) -> str:
    """All metrics of the given nodes."""
    lines: list[str] = []

    def family(metric: _Metric, samples: list[tuple[dict[str, str], object]]) -> None:
        known = [(labels, _number(value)) for labels, value in samples if value is not None]
        if known:
            lines.append(f"# HELP {metric.name} {metric.help}")
            lines.append(f"# TYPE {metric.name} {metric.kind}")
            lines.extend(f"{metric.name}{_labels(labels)} {value}" for labels, value in known)

    node = [({"store": str(s.get("store", ""))}, s) for s in statuses]
    peers = [
        ({**labels, "peer": str(peer.get("name", ""))}, peer)
        for labels, s in node
        for peer in s.get("peers") or []
    ]
    operations = [
        ({**labels, "class": name}, row)
        for labels, s in node
        for name, row in (s.get("operations") or {}).items()
    ]
    in_sync = _Metric("replfs_in_sync", "gauge", "1 if all peers are in sync.", "")
    family(in_sync, [(labels, s.get("state") == "in-sync") for labels, s in node])
    for metric in _NODE:
        family(metric, [(labels, s.get(metric.key)) for labels, s in node])
    link = _Metric("replfs_peer_link_up", "gauge", "1 if the link is up.", "")
    family(link, [(labels, peer.get("link") == "up") for labels, peer in peers])
    state = _Metric("replfs_peer_in_sync", "gauge", "1 if the peer is in sync.", "")
    family(state, [(labels, peer.get("state") == "in-sync") for labels, peer in peers])
    for metric in _PEER:
        family(metric, [(labels, peer.get(metric.key)) for labels, peer in peers])
    for metric in _OPERATION:
        family(metric, [(labels, row.get(metric.key)) for labels, row in operations])
    latency = _Metric("replfs_operation_microseconds", "gauge", "Latency, by class.", "")
    family(
        latency,
        [
            ({**labels, "quantile": quantile}, row.get(key))
            for labels, row in operations
            for quantile, key in (("0.5", "p50_us"), ("0.99", "p99_us"))
        ],
    )
    return "".join(line + "\n" for line in lines)


def _number(value: object) -> str:
    if isinstance(value, (bool, int)):
        return str(int(value))
    return repr(float(str(value)))


def _labels(labels: dict[str, str]) -> str:
    def quote(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{quote(value)}"' for name, value in labels.items()) + "}"
