"""`promote`, `switchover`, `split-brain`, `adopt`: who is the primary, and who a store is.

`adopt` works on a STORE that no node has, `promote` on such a one too; the others ask a running
node.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from typing import Final

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, add_target, seconds
from replfs.cli.progress import Json, ask
from replfs.errors import UsageError
from replfs.node.operating import client

RESERVED: Final = ".replfs"
SPLIT_BRAIN_ACTIONS: Final = ("list", "keep-mine", "keep-theirs", "keep-both")


def _declare_promote(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--force", action="store_true",
                        help="even if the data is inconsistent or the primary may still run; "
                        "says what may be lost")  # fmt: skip
    parser.add_argument("--tentative", action="store_true", help="only say what would be done")
    parser.add_argument("--mount", metavar="DIR", help="a node without a mount: also mount it here")


def _run_promote(args: argparse.Namespace) -> int:
    mountpoint = os.path.abspath(args.mount) if args.mount else None
    fields = {"force": args.force, "tentative": args.tentative, "mount": mountpoint}
    try:
        return _do(args, "promote", fields, 120.0)
    except client.NodeDown:
        if not os.path.isdir(os.path.join(args.target, RESERVED)):
            raise
    return _promote_stopped(args)


def _promote_stopped(args: argparse.Namespace) -> int:
    """No node serves the STORE: what is promoted is what it will be when one does."""
    from replfs.node.failover.promotion import promote_stopped
    from replfs.store.state import State

    if args.mount:
        raise UsageError(
            f"no node serves {args.target}: promote it without --mount, then use 'replfs mount'"
        )
    with contextlib.ExitStack() as cleanup:
        fd = os.open(args.target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        cleanup.callback(os.close, fd)
        state = State(fd)
        cleanup.callback(state.close)
        print(promote_stopped(state, fd, force=args.force, tentative=args.tentative))
    return ExitCode.OK


def _declare_switchover(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--peer", metavar="NAME", help="the new primary (needed if several)")
    parser.add_argument("--tentative", action="store_true", help="only say what would be done")
    parser.add_argument("--timeout", metavar="TIME", type=seconds, default=120.0,
                        help="give up after this long (default 2m)")  # fmt: skip


def _run_switchover(args: argparse.Namespace) -> int:
    fields = {"peer": args.peer, "tentative": args.tentative}
    return _do(args, "switchover", fields, args.timeout)


def _declare_split_brain(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("action", metavar="ACTION", choices=SPLIT_BRAIN_ACTIONS,
                        help="list: the files that differ; keep-mine, keep-theirs: that side "
                        "wins; keep-both: theirs is kept beside mine")  # fmt: skip
    parser.add_argument("--peer", metavar="NAME", help="which peer (needed if several)")
    parser.add_argument("--tentative", action="store_true", help="only say what would be done")


def _run_split_brain(args: argparse.Namespace) -> int:
    fields = {"action": args.action, "peer": args.peer, "tentative": args.tentative}
    return _do(args, "split-brain", fields, 600.0)


def _do(args: argparse.Namespace, command: str, fields: Json, timeout_s: float) -> int:
    answer = ask(args, command, fields, timeout_s)
    for path in answer.get("paths") or []:
        print(path)
    print(answer.get("message", "done"))
    return ExitCode.OK


def _declare_adopt(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--move", action="store_true",
                     help="it is the same store in another place; there is no other")  # fmt: skip
    how.add_argument("--new", action="store_true",
                     help="it is a copy: a store of its own, which has no peers yet")  # fmt: skip
    parser.add_argument("--tentative", action="store_true", help="only say what would be done")


def _run_adopt(args: argparse.Namespace) -> int:
    from replfs.node.failover.adoption import adopt
    from replfs.store.state import State

    if not os.path.isdir(os.path.join(args.store, RESERVED)):
        raise UsageError(f"{args.store} is no store: there is no {RESERVED} in it")
    with contextlib.ExitStack() as cleanup:
        fd = os.open(args.store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        cleanup.callback(os.close, fd)
        state = State(fd)
        cleanup.callback(state.close)
        message = adopt(state, new=args.new, tentative=args.tentative)
    print(f"{args.store}: {message}")
    return ExitCode.OK


COMMANDS: Final = {
    "adopt": Command(_declare_adopt, _run_adopt),
    "promote": Command(_declare_promote, _run_promote),
    "switchover": Command(_declare_switchover, _run_switchover),
    "split-brain": Command(_declare_split_brain, _run_split_brain),
}
