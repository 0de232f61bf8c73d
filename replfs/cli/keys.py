"""`keygen`: this node's key pair. The public half goes into the peers' `--peer-keys` files."""

from __future__ import annotations

import argparse
import sys
from typing import Final

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command
from replfs.errors import UsageError


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="the new file; what --key-file is given")
    parser.add_argument("--name", metavar="NAME",
                        help="the node's name (default: the host's)")  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    from replfs.node.settings.values import default_node_name, is_node_name
    from replfs.transport.security import generate_keypair, save_keypair

    name = args.name or default_node_name()
    if not is_node_name(name):
        raise UsageError(f"--name cannot be {name!r}; write letters, digits, '.', '-' and '_'")
    keys = generate_keypair()
    save_keypair(args.file, keys)
    # Apart from the line, so that it can be sent straight into a file.
    print(
        f"{args.file} is this node's --key-file; it stays here. The --peer-keys file of each\n"
        "peer gets this line, and this node's gets theirs:",
        file=sys.stderr,
    )
    print(f"{name} = {keys.public}")
    return ExitCode.OK


COMMANDS: Final = {"keygen": Command(_declare, _run)}
