"""`freeze`, `thaw`: hold a replica still while its STORE is backed up."""

from __future__ import annotations

import argparse
from typing import Final

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, add_target, seconds
from replfs.cli.progress import ask
from replfs.errors import UsageError

FREEZE_S: Final = 600.0
FREEZE_MAX_S: Final = 7 * 86400.0


def _declare_freeze(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--timeout", metavar="TIME", type=seconds, default=FREEZE_S,
                        help="thaw by itself after this long (default 10m)")  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="even in the middle of a resync: the backup is then of no single "
                        "moment")  # fmt: skip


def _run_freeze(args: argparse.Namespace) -> int:
    if not 1 <= args.timeout <= FREEZE_MAX_S:
        raise UsageError(f"freeze: --timeout cannot be {args.timeout:g} s: it must be 1s to 7d")
    answer = ask(args, "freeze", {"timeout_s": args.timeout, "force": args.force}, 120.0)
    print(answer["message"])
    return ExitCode.OK


def _run_thaw(args: argparse.Namespace) -> int:
    print(ask(args, "thaw", {}, 30.0)["message"])
    return ExitCode.OK


COMMANDS: Final = {
    "freeze": Command(_declare_freeze, _run_freeze),
    "thaw": Command(add_target, _run_thaw),
}
