"""`systemd show|install`: the units for the service manager, and mount(8)'s helper.

The units are installed with the way this very `replfs` was started in their place of `@REPLFS@`.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Final

from replfs.cli import spawn
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, Parser
from replfs.cli.share import install_text, shared
from replfs.errors import UsageError

UNITS: Final = ("replfs-agent@.service", "replfs-mount@.service")
UNIT_DIRECTORY: Final = "etc/systemd/system"
HELPER: Final = "sbin/mount.replfs"


def _declare(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    actions.add_parser("show", help="print the units", allow_abbrev=False)
    install = actions.add_parser(
        "install", help="write the units, and link mount(8)'s helper into /sbin", allow_abbrev=False
    )
    install.add_argument("--root", metavar="DIR", default="/", help="below this directory")


def _run(args: argparse.Namespace) -> int:
    if args.action == "show":
        print("\n".join(f"# {name}\n{unit(name)}" for name in UNITS), end="")
        return ExitCode.OK
    for name in UNITS:
        path = os.path.join(args.root, UNIT_DIRECTORY, name)
        install_text(path, unit(name))
        print(path)
    helper = os.path.join(os.path.dirname(sys.executable), "mount.replfs")
    if os.path.exists(helper):
        link = os.path.join(args.root, HELPER)
        _link(link, helper)
        print(f"{link} -> {helper}")
    print("now: systemctl daemon-reload, then systemctl enable --now replfs-mount@NAME or")
    print("replfs-agent@NAME, where /etc/replfs/NAME.toml is the configuration")
    return ExitCode.OK


def unit(name: str) -> str:
    """The text of a unit, for this installation."""
    return shared(f"systemd/{name}").replace("@REPLFS@", _executable())


def _executable() -> str:
    """How the service manager starts replfs, with an absolute path and no environment."""
    script = os.path.join(os.path.dirname(sys.executable), "replfs")
    words = [script] if os.access(script, os.X_OK) else spawn.python()
    if any(set(word) & set(" \t\"'\\%$;") for word in words):
        raise UsageError(f"systemd cannot start {words[0]!r}: install replfs at a plainer path")
    return " ".join(words)


def _link(link: str, target: str) -> None:
    try:
        os.makedirs(os.path.dirname(link), exist_ok=True)
        if os.path.islink(link):
            os.unlink(link)
        os.symlink(target, link)
    except OSError as error:
        raise UsageError(f"{link} cannot be made: {error.strerror}; remove what is there") from None


COMMANDS: Final = {"systemd": Command(_declare, _run)}
