"""Metrics: the text format, what is listed, the dashboard, and the HTTP end."""

from __future__ import annotations

import contextlib
import json
import re
import selectors
import socket
import threading
import time
from pathlib import Path

import pytest

import replfs
from replfs.cli.share import shared
from replfs.errors import UsageError
from replfs.node.operating import scrape
from replfs.node.operating.metrics import METRICS, NODE, OPERATION, PEER, render
from replfs.node.operating.scrape import Scrape
from replfs.node.replication.flight import Latencies

SAMPLE = re.compile(r'(replfs_[a-z_]+)\{((?:[a-z]+="(?:[^"\\]|\\.)*",?)+)\} ([0-9.e+-]+)')
STATUS = {
    "store": "/srv/data", "name": "a", "role": "primary", "version": "1", "state": "in-sync",
    "hung": False, "uptime_s": 3.5, "in_flight": 2, "suspended": 0, "unrepresentable": 0,
    "process": {"objects": 9, "memory_bytes": 1 << 20, "descriptors": 20, "cpu_s": 0.5},
    "peers": [{
        "name": "b", "link": "up", "state": "in-sync", "last_in_sync": None, "dirty_objects": 1,
        "dirty_files": 0, "dirty_bytes": 0, "dirty_names": 0, "lag_ops": 0, "lag_bytes": 0,
        "rtt_us": 120, "sent_ops": 1, "sent_bytes": 2,
        "progress": {"rate": 1e6, "eta_s": 3.0},
    }],
    "operations": {"write": {"count": 3, "held": 1, "seconds": 0.25,
                             "histogram_us": {"16": 0, "64": 2}}},
}  # fmt: skip


def samples(text: str) -> list[tuple[str, str, str]]:
    found = []
    for line in text.splitlines():
        if not line.startswith("# "):
            match = SAMPLE.fullmatch(line)
            assert match is not None, line
            found.append((match[1], match[2], match[3]))
    return found


def test_a_primary():
    text = render([STATUS])
    assert ("replfs_in_sync", 'store="/srv/data"', "1") in samples(text)
    assert ("replfs_peer_round_trip_seconds", 'store="/srv/data",peer="b"', "0.00012") in samples(
        text
    )
    assert 'replfs_info{store="/srv/data",name="a",role="primary",version="1"} 1\n' in text
    assert 'replfs_peer_state{store="/srv/data",peer="b",state="in-sync"} 1\n' in text
    # What has no value is left out, with its heading.
    assert "last_in_sync" not in text
    assert "replfs_applied" not in text
    assert text.count("# TYPE replfs_operation_duration_seconds histogram\n") == 1
    where = 'store="/srv/data",class="write"'
    assert [line for line in text.splitlines() if line.startswith("replfs_operation_dur")] == [
        f'replfs_operation_duration_seconds_bucket{{{where},le="1.6e-05"}} 0',
        f'replfs_operation_duration_seconds_bucket{{{where},le="6.4e-05"}} 2',
        f'replfs_operation_duration_seconds_bucket{{{where},le="+Inf"}} 3',
        f"replfs_operation_duration_seconds_sum{{{where}}} 0.25",
        f"replfs_operation_duration_seconds_count{{{where}}} 3",
    ]


def test_labels_are_quoted():
    text = render([{"store": 'a"\\b\n'}])
    assert 'replfs_info{store="a\\"\\\\b\\n",' in text
    assert samples(text)


def test_a_histogram_counts_what_is_below_each_edge():
    found = Latencies()
    for us in (3, 15, 16, 63, 64, 1_000_000, 90_000_000):
        found.add(us * 1000)
    below = found.below_us()
    assert (below["16"], below["64"], below["256"]) == (2, 4, 5)
    assert below[str(1 << 18)] == 5
    assert below[str(1 << 20)] == 6
    assert below[str(1 << 24)] == 6
    assert found.total_ns == 91_000_161_000


# The documents and the dashboard -----------------------------------------------------------------


def test_every_metric_is_documented_and_no_other():
    page = (Path(replfs.__path__[0]).parent / "docs/operations/metrics.md").read_text()
    labels = {**dict.fromkeys(NODE, "`store`"), **dict.fromkeys(PEER, "`store`, `peer`"),
              **dict.fromkeys(OPERATION, "`store`, `class`")}  # fmt: skip
    more = {"replfs_info": ", `name`, `role`, `version`", "replfs_peer_state": ", `state`"}
    expected = [
        f"| `{one.name}` | {one.kind} | {labels[one]}{more.get(one.name, '')} | {one.help} |"
        for one in METRICS
    ]
    assert [line for line in page.splitlines() if line.startswith("| `")] == expected


def names(expression: str) -> set[str]:
    return {
        re.sub(r"_(bucket|sum|count)$", "", name) if "duration" in name else name
        for name in re.findall(r"\breplfs_\w+", expression)
    }


def test_the_dashboard_shows_metrics_that_there_are():
    board = json.loads(shared("grafana.json"))
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    used: set[str] = set()
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        assert panel["title"]
        assert panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken
        taken |= cells
        for target in panel["targets"]:
            used |= names(target["expr"])
            assert target["expr"].count("(") == target["expr"].count(")")
            assert 'store=~"$store"' in target["expr"]
    for variable in board["templating"]["list"]:
        used |= names(str(variable["query"]))
    known = {metric.name for metric in METRICS}
    assert used <= known
    assert known - used == {"replfs_uptime_seconds", "replfs_unrepresentable_objects",
                            "replfs_frozen", "replfs_peer_lag_bytes",
                            "replfs_peer_sent_operations_total"}  # fmt: skip


# The HTTP end ------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """A `Scrape` whose selector a thread serves."""
    selector = selectors.DefaultSelector()
    end = Scrape("127.0.0.1:0", lambda: "x 1\n")
    end.open(selector)
    stop = threading.Event()

    def serve() -> None:
        while not stop.is_set():
            for key, _ in selector.select(0.02):
                key.data(key.fd)
            end.expire()

    thread = threading.Thread(target=serve)
    thread.start()
    yield end
    stop.set()
    thread.join(10)
    end.close()
    selector.close()


def ask(server: Scrape, request: bytes) -> bytes:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), 10) as connection:
        connection.sendall(request)
        answer = b""
        with contextlib.suppress(ConnectionError):
            while chunk := connection.recv(4096):
                answer += chunk
    return answer


def test_it_answers_what_prometheus_asks(server):
    answer = ask(server, b"GET /metrics?x=1 HTTP/1.1\r\nHost: a\r\nAccept: text/plain\r\n\r\n")
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.splitlines() == [
        b"HTTP/1.1 200 OK", b"Content-Type: text/plain; version=0.0.4; charset=utf-8",
        b"Content-Length: 4", b"Connection: close",
    ]  # fmt: skip
    assert body == b"x 1\n"


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"404"),
        (b"POST /metrics HTTP/1.1\r\n\r\n", b"405"),
        (b"\r\n\r\n", b"405"),
        (b"GET /metrics\r\n\r\n", b"404"),
        (bytes(100) + b"\r\n\r\n", b"405"),
    ],
)
def test_anything_else_is_refused(server, request_, status):
    assert ask(server, request_).split()[1] == status


def test_it_reads_no_endless_request_and_waits_for_nobody(server, monkeypatch):
    assert ask(server, b"x" * (scrape.REQUEST_MAX + 1)) == b""
    monkeypatch.setattr(scrape, "PATIENCE_S", 0.1)
    began = time.monotonic()
    assert ask(server, b"GET /metrics") == b""
    assert time.monotonic() - began < 5


def test_more_connections_than_it_serves_are_closed(server):
    host, _, port = server.address.rpartition(":")
    with contextlib.ExitStack() as stack:
        for _ in range(scrape.CONNECTIONS_MAX):
            stack.enter_context(socket.create_connection((host, int(port)), 10))
        assert ask(server, b"") == b""


def test_an_address_that_is_taken_is_refused(server):
    with pytest.raises(UsageError, match=r"metrics: 127.0.0.1:\d+ cannot be used: .*in use"):
        Scrape(server.address, str)
