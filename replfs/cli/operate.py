"""Commands that ask a running node: `status`, `wait`, `sync`, `pause`, `resync`, `peer` and more.

All go through the control socket. `status` and `wait` only look; what they show is one dictionary
that the node fills (`docs/operations/cli.md`), and anything missing in it is left out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from typing import Any, Final

from replfs.cli import text
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, Parser, add_target, seconds
from replfs.cli.progress import ask, describe_progress
from replfs.errors import NotInSync, UsageError
from replfs.node.operating import client

Json = dict[str, Any]

IN_SYNC: Final = "in-sync"
WAIT_POLL_S: Final = 0.1
WATCH_S: Final = 1.0


# status ----------------------------------------------------------------------------------------


def _declare_status(parser: argparse.ArgumentParser) -> None:
    add_target(parser, nargs="?")
    parser.add_argument("--json", action="store_true", help="as JSON, for programs")
    parser.add_argument("--metrics", action="store_true", help="in Prometheus' text format")
    parser.add_argument("--watch", action="store_true", help="again every second, until Ctrl-C")


def _run_status(args: argparse.Namespace) -> int:
    if not args.watch:
        shown, code = _look(args)
        print(shown)
        return code
    screen = text.Screen()
    try:
        while True:
            try:
                shown, _ = _look(args)
            except client.NodeDown as error:
                shown = f"replfs: {error}"
            screen.show(shown)
            time.sleep(WATCH_S)
    finally:
        screen.leave()


def _look(args: argparse.Namespace) -> tuple[str, ExitCode]:
    """What there is to see, and the exit code that goes with it."""
    targets = [args.target] if args.target else client.node_names(args.rundir)
    if not targets:
        raise client.NodeDown("no node is running here (or it has another --rundir)")
    found = []
    for target in targets:
        # A socket left over from a killed node is of no interest where no target was given.
        with contextlib.suppress(*([] if args.target else [client.NodeDown])):
            found.append(client.request(target, "status", {}, 5.0, args.rundir))
    if not found:
        raise client.NodeDown("no node is running here (or it has another --rundir)")
    if args.json:
        shown = json.dumps(found[0] if args.target else found, indent=2)
    elif args.metrics:
        from replfs.node.operating.metrics import render

        shown = render(found).rstrip("\n")
    else:
        shown = "\n\n".join(render_status(status) for status in found)
    return shown, worst([exit_code_of(status) for status in found])


def exit_code_of(status: Json) -> ExitCode:
    """What `status` and `wait` exit with."""
    if status.get("hung"):
        return ExitCode.DOWN
    return ExitCode.OK if status.get("state") == IN_SYNC else ExitCode.NOT_IN_SYNC


def worst(codes: list[ExitCode]) -> ExitCode:
    """The gravest of several exit codes."""
    return max(codes, key=[ExitCode.OK, ExitCode.NOT_IN_SYNC, ExitCode.DOWN].index)


def render_status(status: Json) -> str:
    """What `replfs status` prints for one node."""
    state = "hung" if status.get("hung") else status.get("state", "?")
    lines = [f"{status.get('store', '?')}: {status.get('role', '?')}, {state}"]
    facts = [
        ("mounted on", status.get("mountpoint")),
        ("listening on", status.get("listen")),
        ("metrics", status.get("metrics") and f"http://{status['metrics']}/metrics"),
        ("node", _node_line(status)),
        ("volume", _volume_line(status)),
        ("primary", _primary_line(status)),
        ("frozen until", status.get("frozen_until") and text.moment(status["frozen_until"])),
        ("policy", status.get("policy_default")),
        ("in flight", status.get("in_flight")),
        ("event loop", _hung_line(status)),
        ("disk failed", status.get("disk_error")),
        ("held", ", ".join(f"{n} {why}" for why, n in (status.get("held") or {}).items() if n)),
        ("unrepresentable", status.get("unrepresentable")),
        ("removal pending", status.get("removal_pending")),
        ("kept beside", ", ".join(status.get("kept") or [])),
        ("warning", "; ".join(status.get("warnings") or [])),
    ]
    lines += [f"  {name.ljust(15)} {value}" for name, value in facts if value]
    peers = status.get("peers") or []
    if peers:
        lines += ["", text.table([_PEER_HEADING, *map(_peer_row, peers)], "  ")]
        for peer in peers:
            lines += [f"  {peer.get('name', '?')}: {remark}" for remark in _peer_remarks(peer)]
    operations = status.get("operations") or {}
    rows = [_operation_row(name, row) for name, row in operations.items() if row.get("count")]
    if rows:
        lines += ["", text.table([_OPERATION_HEADING, *rows], "  ")]
    return "\n".join(lines)


def _node_line(status: Json) -> str:
    parts = [str(status.get("name", ""))]
    if "pid" in status:
        parts.append(f"process {status['pid']}")
    if "uptime_s" in status:
        parts.append(f"up {text.duration(status['uptime_s'])}")
    if "version" in status:
        parts.append(f"version {status['version']}")
    return ", ".join(part for part in parts if part)


def _volume_line(status: Json) -> str:
    volume, generation = status.get("volume"), status.get("generation")
    return f"{volume}, generation {generation}" if volume and generation else str(volume or "")


def _primary_line(status: Json) -> str:
    if "link" not in status:
        return ""
    return f"{status.get('primary') or 'not met yet'}, link {status['link']}"


def _hung_line(status: Json) -> str:
    if not status.get("hung"):
        return ""
    return f"has not moved for {text.duration(status.get('hung_s'))}"


_PEER_HEADING: Final = ("PEER", "LINK", "STATE", "DATA", "DIRTY", "LAG", "LAST IN SYNC")


def _peer_row(peer: Json) -> tuple[str, ...]:
    dirty = []
    if peer.get("dirty_files"):
        dirty.append(f"{peer['dirty_files']} files")
    if peer.get("dirty_bytes"):
        dirty.append(text.size(peer["dirty_bytes"]))
    if peer.get("dirty_names"):
        dirty.append(f"{peer['dirty_names']} names")
    lag = f"{peer['lag_ops']} ops" if peer.get("lag_ops") else "-"
    if peer.get("lag_bytes"):
        lag += f", {text.size(peer['lag_bytes'])}"
    last = "now" if peer.get("state") == IN_SYNC else text.moment(peer.get("last_in_sync"))
    return (
        str(peer.get("name", "?")),
        str(peer.get("link", "?")),
        str(peer.get("state", "?")),
        str(peer.get("data", "?")),
        ", ".join(dirty) or "-",
        lag,
        last,
    )


def _peer_remarks(peer: Json) -> list[str]:
    remarks = []
    if peer.get("reason"):
        since = f" for {text.duration(peer['since_s'])}" if peer.get("since_s") else ""
        remarks.append(f"{peer.get('state', '?')}{since}: {peer['reason']}")
    if peer.get("progress"):
        remarks.append(describe_progress({**peer["progress"], "phase": ""}))
    for stuck in peer.get("stuck") or []:
        again = (
            f", next try in {text.duration(stuck['next_try_s'])}" if "next_try_s" in stuck else ""
        )
        remarks.append(f"cannot be copied: {stuck.get('path', '?')}: {stuck.get('reason')}{again}")
    error = peer.get("last_error")
    if isinstance(error, dict):
        path = f"{error['path']}: " if error.get("path") else ""
        when = f" ({text.moment(error['when'])})" if error.get("when") else ""
        remarks.append(f"last error: {path}{error.get('reason', '?')}{when}")
    elif error:
        remarks.append(f"last error: {error}")
    return remarks


_OPERATION_HEADING: Final = ("OPERATIONS", "COUNT", "HELD", "P50", "P99")


def _operation_row(name: str, row: Json) -> tuple[str, ...]:
    def micro(key: str) -> str:
        return f"{row[key]:.0f} us" if isinstance(row.get(key), (int, float)) else "-"

    return (name, str(row["count"]), str(row.get("held", 0)), micro("p50_us"), micro("p99_us"))


# wait ------------------------------------------------------------------------------------------


def _declare_wait(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--for", dest="goal", choices=["in-sync", "connected", "up"],
                        default="in-sync", help="in-sync (default), connected: every link is up, "
                        "up: the node answers")  # fmt: skip
    parser.add_argument("--timeout", metavar="TIME", type=seconds,
                        help="give up after this long (default: never)")  # fmt: skip
    parser.add_argument("--peer", metavar="NAME", help="only this peer")


def _run_wait(args: argparse.Namespace) -> int:
    deadline = None if args.timeout is None else time.monotonic() + args.timeout
    progress = text.Progress()
    answered = False
    try:
        while True:
            try:
                status = client.request(args.target, "status", {}, 5.0, args.rundir)
                answered = True
                if _has_come_to_pass(status, args.goal, args.peer):
                    return ExitCode.OK
                where = _where_it_stands(status)
            except client.NodeDown as error:
                where = str(error)
            if deadline is not None and time.monotonic() >= deadline:
                break
            progress.update(f"waiting for {args.goal}: {where}")
            time.sleep(WAIT_POLL_S)
    finally:
        progress.clear()
    if not answered:
        raise client.NodeDown(where)
    raise NotInSync(f"{args.target} is not {args.goal} after {args.timeout:g} s: {where}")


def _has_come_to_pass(status: Json, goal: str, peer_name: str | None) -> bool:
    if status.get("hung"):
        return False
    if goal == "up":
        return True
    peers = status.get("peers") or []
    if peer_name is not None:
        peers = [peer for peer in peers if peer.get("name") == peer_name]
        if not peers:
            raise UsageError(f"there is no peer {peer_name!r}; see 'replfs peer list'")
    if goal == "connected":
        return bool(peers) and all(peer.get("link") == "up" for peer in peers)
    if peer_name is not None:
        return all(peer.get("state") == IN_SYNC for peer in peers)
    return status.get("state") == IN_SYNC


def _where_it_stands(status: Json) -> str:
    if status.get("hung"):
        return "the node hangs"
    parts = []
    for peer in status.get("peers") or []:
        part = f"{peer.get('name', '?')} {peer.get('state', '?')}, link {peer.get('link', '?')}"
        if peer.get("progress"):
            progress = {**peer["progress"], "phase": ""}  # it is the state
            part += f", {describe_progress(progress)}"
        elif peer.get("reason"):
            part += f" ({peer['reason']})"
        parts.append(part)
    return "; ".join(parts) or f"{status.get('state', '?')}, no peer"


# What the node is asked to do -------------------------------------------------------------------


def _declare_peer_choice(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--peer", metavar="NAME", help="only this peer (default: all)")


def _declare_pause(parser: argparse.ArgumentParser) -> None:
    _declare_peer_choice(parser)
    parser.add_argument("--reason", default="", help="shown by status until resume")


def _run_pause(args: argparse.Namespace) -> int:
    return _do(args, "pause", {"peer": args.peer, "reason": args.reason})


def _run_resume(args: argparse.Namespace) -> int:
    return _do(args, "resume", {"peer": args.peer})


def _declare_resync(parser: argparse.ArgumentParser) -> None:
    _declare_peer_choice(parser)
    parser.add_argument("--full", action="store_true", help="compare everything, not the log only")
    parser.add_argument("--tentative", action="store_true", help="only say what would be done")


def _run_resync(args: argparse.Namespace) -> int:
    return _do(args, "resync", {"peer": args.peer, "full": args.full, "tentative": args.tentative})


def _declare_sync(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--timeout", metavar="TIME", type=seconds, default=300.0,
                        help="give up after this long (default 5m)")  # fmt: skip


def _run_sync(args: argparse.Namespace) -> int:
    return _do(args, "sync", {}, args.timeout)


def _declare_verify(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("path", metavar="PATH", nargs="?", help="only this file or directory")
    parser.add_argument("--repair", action="store_true", help="mark what differs dirty")
    parser.add_argument("--peer", metavar="NAME", help="only this peer (default: all)")


def _run_verify(args: argparse.Namespace) -> int:
    fields = {
        "peer": args.peer,
        "path": _below(args.target, args.path) if args.path else None,
        "repair": args.repair,
    }
    answer = ask(args, "verify", fields, 7 * 86400.0)
    for line in answer.get("differences") or []:
        print(line)
    print(answer.get("message", "done"))
    return ExitCode.NOT_IN_SYNC if answer.get("differences") and not args.repair else ExitCode.OK


def _below(target: str, path: str) -> str:
    """PATH as the node knows it: absolute, as text; relative to TARGET where it is not below it."""
    top, full = os.path.abspath(target), os.path.abspath(path)
    if full == top or full.startswith(top.rstrip("/") + "/") or os.path.isabs(path):
        return full
    return os.path.normpath(os.path.join(top, path))


def _do(args: argparse.Namespace, command: str, fields: Json, timeout_s: float = 60.0) -> int:
    answer = ask(args, command, fields, timeout_s)
    print(answer.get("message", "done"))
    return ExitCode.OK


# events ----------------------------------------------------------------------------------------


def _declare_events(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--follow", action="store_true", help="go on with what happens next")
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def _run_events(args: argparse.Namespace) -> int:
    # The node answers at once what is newer than `after`, and waits a while if nothing is.
    after = -1
    events = _events_after(args, after)
    if args.follow:
        # What is so now, and then what becomes otherwise: nothing in between is left out.
        after = max([0, *(int(event["number"]) for event in events)])
        events = [_now(args, after)]
    while True:
        for event in events:
            after = max(after, int(event["number"]))
            print(json.dumps(event) if args.json else _event_line(event))
        if not args.follow:
            return ExitCode.OK
        sys.stdout.flush()
        events = _events_after(args, after)


def _events_after(args: argparse.Namespace, after: int) -> list[Json]:
    answer = client.request(args.target, "events", {"after": after}, 30.0, args.rundir)
    return list(answer.get("events") or [])


def _now(args: argparse.Namespace, number: int) -> Json:
    """The present state, as an event."""
    status = client.request(args.target, "status", {}, 5.0, args.rundir)
    peers = {str(peer.get("name")): peer.get("state") for peer in status.get("peers") or []}
    return {
        "number": number,
        "time": time.time(),
        "event": "now",
        "role": status.get("role"),
        "state": status.get("state"),
        "peers": peers,
    }


def _event_line(event: Json) -> str:
    fields = {name: value for name, value in event.items() if name not in _EVENT_HEAD}
    words = [
        f"{name}={value}" for name, value in fields.items() if value is not None and value != ""
    ]
    return "  ".join([text.moment(event.get("time")), str(event.get("event", "?")), *words])


_EVENT_HEAD: Final = ("number", "time", "event")


# peer ------------------------------------------------------------------------------------------


def _declare_peer(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    for name, help_text in (
        ("list", "names, endpoints and states"),
        ("add", "replicate to one more peer"),
        ("remove", "forget a peer and what it lacks"),
        ("replace", "another machine takes a peer's place; all of it is compared"),
    ):
        action = actions.add_parser(name, help=help_text, description=help_text, allow_abbrev=False)
        add_target(action)
        if name == "add":
            action.add_argument("peer", metavar="[NAME=]ENDPOINT")
        elif name != "list":
            action.add_argument("name", metavar="NAME")
        if name == "replace":
            action.add_argument("endpoint", metavar="ENDPOINT")


def _run_peer(args: argparse.Namespace) -> int:
    from replfs.node.settings.values import parse_endpoint, parse_peer

    if args.action == "list":
        status = client.request(args.target, "status", {}, 5.0, args.rundir)
        peers = status.get("peers") or []
        if peers:
            fields = ("name", "endpoint", "link", "state", "data")
            rows = [tuple(str(peer.get(field, "?")) for field in fields) for peer in peers]
            print(text.table([tuple(field.upper() for field in fields), *rows]))
        return ExitCode.OK
    try:
        if args.action == "add":
            peer = parse_peer(args.peer)
            fields_sent = {"name": peer.name, "endpoint": peer.endpoint}
        elif args.action == "replace":
            fields_sent = {"name": args.name, "endpoint": parse_endpoint(args.endpoint)}
        else:
            fields_sent = {"name": args.name}
    except ValueError as error:
        raise UsageError(f"peer {args.action}: the peer {error}") from None
    return _do(args, f"peer-{args.action}", fields_sent)


COMMANDS: Final = {
    "status": Command(_declare_status, _run_status),
    "wait": Command(_declare_wait, _run_wait),
    "events": Command(_declare_events, _run_events),
    "sync": Command(_declare_sync, _run_sync),
    "pause": Command(_declare_pause, _run_pause),
    "resume": Command(_declare_peer_choice, _run_resume),
    "resync": Command(_declare_resync, _run_resync),
    "verify": Command(_declare_verify, _run_verify),
    "peer": Command(_declare_peer, _run_peer),
}
