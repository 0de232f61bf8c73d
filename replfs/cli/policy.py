"""`policy get|set|clear|report`: the policy of files and directories, through their xattrs.

It works on paths below a mount and needs no control socket: `setfattr -n user.replfs.policy` does
the same.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Final

from replfs.cli import text
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, Parser
from replfs.errors import UsageError

POLICY: Final = "user.replfs.policy"
ACK: Final = "user.replfs.ack"
EFFECTIVE: Final = "user.replfs.policy.effective"
SOURCE: Final = "user.replfs.policy.source"
ACK_EFFECTIVE: Final = "user.replfs.ack.effective"
STATE: Final = "user.replfs.state"
POLICIES: Final = ("sync", "strict", "async", "none", "inherit")
LEVELS: Final = ("op", "close", "inherit")


def _declare(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    get = actions.add_parser("get", help="what counts for each path, and why", allow_abbrev=False)
    get.add_argument("paths", metavar="PATH", nargs="+")
    put = actions.add_parser("set", help="give paths a policy of their own", allow_abbrev=False)
    put.add_argument("policy", metavar="POLICY", choices=POLICIES,
                     help="sync, strict, async, none, or inherit")  # fmt: skip
    put.add_argument("paths", metavar="PATH", nargs="+")
    put.add_argument("--ack", choices=LEVELS, help="and this acknowledgement level")
    clear = actions.add_parser("clear", help="let paths inherit again", allow_abbrev=False)
    clear.add_argument("paths", metavar="PATH", nargs="+")
    report = actions.add_parser(
        "report", help="everything below that has a policy of its own", allow_abbrev=False
    )
    report.add_argument("paths", metavar="PATH", nargs="+")


def _run(args: argparse.Namespace) -> int:
    actions = {"get": _get, "set": _set, "clear": _clear, "report": _report}
    return actions[args.action](args)


def _get(args: argparse.Namespace) -> int:
    rows = [("POLICY", "SOURCE", "ACK", "STATE", "PATH")]
    failed = False
    for path in args.paths:
        try:
            effective = _read(path, EFFECTIVE)
            if effective is None:
                raise UsageError(f"{path} is not on a replfs mount")
            others = (_read(path, name) or "?" for name in (SOURCE, ACK_EFFECTIVE, STATE))
            rows.append((effective, *others, path))
        except OSError as error:
            print(f"replfs: {path}: {error.strerror}", file=sys.stderr)
            failed = True
    if len(rows) > 1:
        print(text.table(rows))
    return ExitCode.ERROR if failed else ExitCode.OK


def _set(args: argparse.Namespace) -> int:
    settings = [(POLICY, args.policy)]
    if args.ack is not None:
        # Between the two nothing may stand that is refused: strict and close.
        settings.insert(0 if args.ack != "close" else 1, (ACK, args.ack))
    for path in args.paths:
        for name, value in settings:
            _write(path, name, value)
    return ExitCode.OK


def _clear(args: argparse.Namespace) -> int:
    for path in args.paths:
        for name in (POLICY, ACK):
            _write(path, name, "inherit")
    return ExitCode.OK


def _report(args: argparse.Namespace) -> int:
    rows = [("POLICY", "ACK", "PATH")]
    count: Counter[str] = Counter()
    for top in args.paths:
        if _read(top, EFFECTIVE) is None:
            raise UsageError(f"{top} is not on a replfs mount")
        for path in _walk(top):
            try:
                own, ack = _read(path, POLICY), _read(path, ACK)
            except (FileNotFoundError, NotADirectoryError):
                if path == top:
                    raise
                continue  # applications go on: it was removed since its directory was listed
            count["looked at"] += 1
            if own is not None or ack is not None:
                rows.append((own or "inherit", ack or "inherit", path))
    if len(rows) > 1:
        print(text.table(rows))
    print(f"{len(rows) - 1} of {count['looked at']} objects have a policy of their own")
    return ExitCode.OK


def _walk(top: str) -> Iterator[str]:
    """Files and directories from *top* down. Links cannot carry a `user.` attribute."""
    yield top
    if not os.path.isdir(top):
        return
    for directory, directories, files in os.walk(top):
        for name in (*directories, *files):
            path = os.path.join(directory, name)
            if not os.path.islink(path):
                yield path


def _read(path: str, name: str) -> str | None:
    """The attribute's value; None if it is not set, or the file is on no replfs mount."""
    try:
        return os.getxattr(path, name).decode(errors="replace").rstrip("\0\n")
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.ENOTSUP}:
            return None
        if error.filename is None:
            error.filename = path
        raise


def _write(path: str, name: str, value: str) -> None:
    # On any other filesystem this would succeed and mean nothing.
    if _read(path, EFFECTIVE) is None:
        raise UsageError(f"{path} is not on a replfs mount")
    try:
        os.setxattr(path, name, value.encode())
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise UsageError(
            f"{path}: strict goes neither with ack=close nor with a mount with writeback; "
            "choose one of the two"
        ) from None


COMMANDS: Final = {"policy": Command(_declare, _run)}
