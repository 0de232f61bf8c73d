"""The status in Prometheus' text format, for `--metrics` and for `replfs status --metrics`.

`METRICS` is the one list of what there is; docs/operations/metrics.md and the dashboard are checked
against it. Each metric has the label `store`, and those that its table row names.

Source: Prometheus, "Exposition formats", text-based format 0.0.4; "Metric and label naming".
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final, Literal, NamedTuple

Json = dict[str, Any]
Labels = dict[str, str]

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


class Metric(NamedTuple):
    """One metric: what it is called, what it tells, and where the status has it."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    value: Callable[[Json], object]
    """Its value in the part of the status that its table is about; None: there is none."""


def _field(key: str, divisor: float = 1) -> Callable[[Json], object]:
    def read(part: Json) -> object:
        value = part.get(key)
        return value if value is None or divisor == 1 else value / divisor

    return read


def _process(key: str) -> Callable[[Json], object]:
    return lambda part: (part.get("process") or {}).get(key)


def _is(key: str, word: str) -> Callable[[Json], object]:
    return lambda part: part[key] == word if key in part else None


NODE: Final = (
    Metric("replfs_info", "gauge", "1; the labels tell which node this is: name, role, version.",
           lambda _: 1),
    Metric("replfs_in_sync", "gauge", "1 if all peers are in sync; of a secondary, if it follows "
           "and is complete.", _is("state", "in-sync")),
    Metric("replfs_hung", "gauge", "1 if the event loop does not move.", _field("hung")),
    Metric("replfs_uptime_seconds", "gauge", "Since the node was started.", _field("uptime_s")),
    Metric("replfs_in_flight_operations", "gauge", "Begun and not yet done.", _field("in_flight")),
    Metric("replfs_suspended_operations", "gauge", "Strict changes that wait for lost peers.",
           _field("suspended")),
    Metric("replfs_unrepresentable_objects", "gauge", "Objects a peer's store cannot hold.",
           _field("unrepresentable")),
    Metric("replfs_applied_operations_total", "counter", "Applied by this secondary.",
           _field("applied")),
    Metric("replfs_primary_link_up", "gauge", "Of a secondary: 1 if its primary is connected.",
           _is("link", "up")),
    Metric("replfs_frozen", "gauge", "Of a secondary: 1 while it is frozen for a backup.",
           lambda part: part["frozen_until"] is not None if "frozen_until" in part else None),
    Metric("replfs_known_objects", "gauge", "Files and directories in memory.",
           _process("objects")),
    Metric("replfs_memory_bytes", "gauge", "Resident memory of the process.",
           _process("memory_bytes")),
    Metric("replfs_open_descriptors", "gauge", "File descriptors of the process.",
           _process("descriptors")),
    Metric("replfs_cpu_seconds_total", "counter", "Processor time of the process.",
           _process("cpu_s")),
)  # fmt: skip
PEER: Final = (
    Metric("replfs_peer_link_up", "gauge", "1 if the link is up.", _is("link", "up")),
    Metric("replfs_peer_in_sync", "gauge", "1 if the peer is in sync.", _is("state", "in-sync")),
    Metric("replfs_peer_state", "gauge", "1; the label `state` tells the replication state.",
           lambda _: 1),
    Metric("replfs_peer_last_in_sync_timestamp_seconds", "gauge",
           "When the peer was last in sync, in seconds since the epoch.", _field("last_in_sync")),
    Metric("replfs_peer_dirty_objects", "gauge", "Objects of which the peer lacks something.",
           _field("dirty_objects")),
    Metric("replfs_peer_dirty_files", "gauge", "Files of which the peer lacks data.",
           _field("dirty_files")),
    Metric("replfs_peer_dirty_bytes", "gauge", "Bytes the peer lacks, at most.",
           _field("dirty_bytes")),
    Metric("replfs_peer_dirty_names", "gauge", "Names that differ on the peer.",
           _field("dirty_names")),
    Metric("replfs_peer_lag_operations", "gauge", "Sent and not yet answered.", _field("lag_ops")),
    Metric("replfs_peer_lag_bytes", "gauge", "Bytes of those.", _field("lag_bytes")),
    Metric("replfs_peer_round_trip_seconds", "gauge", "Of the last heartbeat.",
           _field("rtt_us", 1e6)),
    Metric("replfs_peer_sent_operations_total", "counter", "Sent since the start.",
           _field("sent_ops")),
    Metric("replfs_peer_sent_bytes_total", "counter", "Bytes of those.", _field("sent_bytes")),
    Metric("replfs_peer_stuck_objects", "gauge", "Things that could not be carried, 20 at most.",
           lambda part: len(part.get("stuck") or [])),
    Metric("replfs_peer_resync_bytes_per_second", "gauge", "While a resync is going on: its rate.",
           lambda part: (part.get("progress") or {}).get("rate")),
    Metric("replfs_peer_resync_remaining_seconds", "gauge",
           "While a resync is going on: the time left at this rate.",
           lambda part: (part.get("progress") or {}).get("eta_s")),
)  # fmt: skip
OPERATION: Final = (
    Metric("replfs_operations_total", "counter", "Operations, by class.", _field("count")),
    Metric("replfs_operations_held_total", "counter", "Operations that had to wait, by class.",
           _field("held")),
    Metric("replfs_operation_duration_seconds", "histogram",
           "From the request to the answer, by class.", _field("histogram_us")),
)  # fmt: skip
METRICS: Final = (*NODE, *PEER, *OPERATION)


def render(statuses: list[Json]) -> str:
    """All metrics of the given nodes."""
    nodes: list[tuple[Labels, Json]] = [({"store": str(s.get("store", ""))}, s) for s in statuses]
    peers = [
        ({**labels, "peer": str(peer.get("name", ""))}, peer)
        for labels, status in nodes
        for peer in status.get("peers") or []
    ]
    operations = [
        ({**labels, "class": name}, row)
        for labels, status in nodes
        for name, row in (status.get("operations") or {}).items()
    ]
    lines: list[str] = []
    for metrics, parts in ((NODE, nodes), (PEER, peers), (OPERATION, operations)):
        for metric in metrics:
            samples = list(_samples(metric, parts))
            if samples:
                lines.append(f"# HELP {metric.name} {metric.help}")
                lines.append(f"# TYPE {metric.name} {metric.kind}")
                lines += samples
    return "".join(line + "\n" for line in lines)


def _samples(metric: Metric, parts: list[tuple[Labels, Json]]) -> Iterator[str]:
    for labels, part in parts:
        value = metric.value(part)
        if value is None:
            continue
        if isinstance(value, dict):
            yield from _histogram(metric.name, labels, value, part)
            continue
        if metric.name == "replfs_info":
            labels = {**labels, **{key: str(part.get(key, "")) for key in _INFO}}
        elif metric.name == "replfs_peer_state":
            labels = {**labels, "state": str(part.get("state", ""))}
        yield f"{metric.name}{_labels(labels)} {_number(value)}"


_INFO: Final = ("name", "role", "version")


def _histogram(name: str, labels: Labels, below_us: Json, part: Json) -> Iterator[str]:
    for edge_us, count in below_us.items():
        yield f"{name}_bucket{_labels({**labels, 'le': repr(int(edge_us) / 1e6)})} {count}"
    yield f"{name}_bucket{_labels({**labels, 'le': '+Inf'})} {part['count']}"
    yield f"{name}_sum{_labels(labels)} {_number(part['seconds'])}"
    yield f"{name}_count{_labels(labels)} {part['count']}"


def _number(value: object) -> str:
    if isinstance(value, (bool, int)):
        return str(int(value))
    return repr(float(str(value)))


def _labels(labels: Labels) -> str:
    def quote(value: str) -> str:
        return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")

    return "{" + ",".join(f'{name}="{quote(value)}"' for name, value in labels.items()) + "}"
