"""Asking a node for something that takes time, and showing how far it has come meanwhile."""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any

from replfs.cli import text
from replfs.errors import ReplfsError
from replfs.node.operating import client

Json = dict[str, Any]


def ask(args: argparse.Namespace, command: str, fields: Json, timeout_s: float) -> Json:
    """Send *command* to the node of `args.target`; shows progress until it has answered.

    Raises:
        NodeDown, NodeHung, CommandFailed: as `client.request`.
    """
    progress = text.Progress()
    deadline = time.monotonic() + timeout_s
    with client.Connection(args.target, args.rundir) as connection:
        connection.send(command, fields, timeout_s)
        try:
            while (answer := connection.receive(0.5)) is None:
                if time.monotonic() > deadline + 2.0:
                    raise client.NodeHung(f"the node of {args.target} does not answer")
                with contextlib.suppress(ReplfsError):
                    status = client.request(args.target, "status", {}, 2.0, args.rundir)
                    progress.update(f"{command}: {_summary(status)}")
        finally:
            progress.clear()
    return answer


def _summary(status: Json) -> str:
    parts = [f"{status.get('in_flight', 0)} operations in flight"]
    if status.get("verify"):
        parts = [describe_progress(status["verify"])]
    for peer in status.get("peers") or []:
        if peer.get("progress"):
            parts.append(f"{peer.get('name', '?')} {describe_progress(peer['progress'])}")
    return ", ".join(parts)


def describe_progress(progress: Json) -> str:
    """A transfer in words: `phase`, files, bytes, rate, time left; what is not known is left out.

    `files` and `bytes` are what is done, `files_total` and `bytes_total` what there is.
    """
    parts = [str(progress["phase"])] if progress.get("phase") else []
    if progress.get("files") is not None:
        total = f" of {progress['files_total']}" if progress.get("files_total") else ""
        parts.append(f"{progress['files']}{total} files")
    if progress.get("bytes") is not None:
        total = f" of {text.size(progress['bytes_total'])}" if progress.get("bytes_total") else ""
        parts.append(f"{text.size(progress['bytes'])}{total}")
    if progress.get("rate"):
        parts.append(f"{text.size(progress['rate'])}/s")
    if progress.get("eta_s") is not None:
        parts.append(f"{text.duration(progress['eta_s'])} left")
    return ", ".join(parts)
