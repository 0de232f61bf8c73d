"""`config check|sample`: is this file right, and what can stand in one.

`check` does everything a start does before it touches anything: names, values, what goes together,
and the files that are named. The sample is made from the table of options.
"""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from typing import Final

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, Parser
from replfs.errors import ReplfsError
from replfs.node.settings import config
from replfs.node.settings.options import MIB, OPTIONS, Option


def _declare(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(
        dest="action", required=True, metavar="ACTION", parser_class=Parser
    )
    check = actions.add_parser(
        "check", help="whether a node could start with this file", allow_abbrev=False
    )
    check.add_argument("file", metavar="FILE", nargs="?", default=config.DEFAULT_FILE,
                       help=f"the file (default {config.DEFAULT_FILE})")  # fmt: skip
    actions.add_parser("sample", help="print a file with every key, explained",
                       allow_abbrev=False)  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    if args.action == "sample":
        print(sample(), end="")
        return ExitCode.OK
    problems = list(_problems(args.file))
    for problem in problems:
        print(f"replfs: {problem}", file=sys.stderr)
    if problems:
        return ExitCode.USAGE
    return ExitCode.OK


def _problems(path: str) -> list[str]:
    """What is wrong, one sentence each; if nothing is, says what the file means."""
    try:
        values = config.load_file(path)
        # A secondary may know its primary, too, so that the roles can be swapped.
        is_primary = "peer" in values and ("mountpoint" in values or "listen" not in values)
        command: config.Command = "mount" if is_primary else "agent"
        settings = config.build(command, {}, config_file=path)
    except ReplfsError as error:
        sentence = str(error)
        if "agent: it needs a STORE" in sentence:
            sentence = (
                "store: there is none; only under systemd it may be left out, where "
                "replfs-agent@NAME has /var/lib/replfs/NAME"
            )
        return [sentence if sentence.startswith(path) else f"{path}: {sentence}"]
    found = [f"{path}: {problem}" for problem in _unusable(settings)]
    if not found:
        print(f"{path} is fine for 'replfs {command}': {_meaning(settings)}")
    return found


def _unusable(settings: config.Settings) -> list[str]:
    """What a start with *settings* would be refused for, as far as files tell."""
    from replfs.node.operating.hook import check_program
    from replfs.transport.security import AllowList, Curve, load_keypair, require_curve

    found = []
    for name, path in (("store", settings.store), ("mountpoint", settings.mountpoint)):
        if path is not None and not os.path.isdir(path):
            found.append(f"{name}: {path} is not a directory; create it first")
    curve = None
    try:
        if (settings.key_file is None) != (settings.peer_keys is None):
            missing = "peer-keys" if settings.peer_keys is None else "key-file"
            found.append(f"{missing}: it is needed too; keys are no use without it")
        elif settings.key_file is not None and settings.peer_keys is not None:
            curve = Curve(load_keypair(settings.key_file), AllowList(settings.peer_keys))
            for peer in settings.peers:
                curve.allowed.keys_of(peer.name)
    except ReplfsError as error:
        found.append(str(error))
    else:
        for endpoint in [*(peer.endpoint for peer in settings.peers), settings.listen]:
            try:
                if endpoint is not None:
                    require_curve(endpoint, settings.insecure, curve)
            except ReplfsError as error:
                found.append(str(error))
    if settings.hook is not None:
        try:
            check_program(settings.hook)
        except ReplfsError as error:
            found.append(str(error))
    return found


def _meaning(settings: config.Settings) -> str:
    parts = [f"{settings.store} as {settings.name}"]
    if settings.mountpoint is not None:
        parts.append(f"mounted on {settings.mountpoint}")
    if settings.listen is not None:
        parts.append(f"listening on {settings.listen}")
    if settings.peers:
        parts.append(f"replicated to {', '.join(peer.name for peer in settings.peers)}")
    return ", ".join(parts)


# The sample ------------------------------------------------------------------------------------

_HEAD: Final = """\
# replfs: every key, with its default. Remove the '#' before what you change.
# `replfs mount` and `replfs agent` read /etc/replfs/replfs.toml, or --config FILE; the command
# line and -o win over it. Check it with: replfs config check FILE

# the directory that holds the data: an ordinary tree on an ordinary filesystem
# (default: what the command line says)
#store = "/srv/data"

# where it is mounted; may be the same directory
# (default: what the command line says; an agent mounts nothing)
#mountpoint = "/data"
"""
_EXAMPLES: Final = {
    "listen": '"tcp://0.0.0.0:4710"',
    "peer": '["beta=tcp://beta:4710"]',
    "name": '"alpha"',
    "strict-peers": "1",
    "none": '["*.tmp", "node_modules/"]',
    "key-file": '"/etc/replfs/key"',
    "peer-keys": '"/etc/replfs/peers"',
    "rundir": '"/run/replfs"',
    "metrics": '"127.0.0.1:9942"',
    "hook": '"/etc/replfs/hook"',
    "allow-other": "true",
}
"""What stands where the default is nothing, or depends on the machine."""


def sample() -> str:
    """A file with every key, each commented out."""
    parts = [_HEAD]
    for option in OPTIONS:
        if not option.everywhere:
            continue
        value = _EXAMPLES.get(option.name) or literal_default(option)
        text = textwrap.fill(option.help, 98, initial_indent="# ", subsequent_indent="# ")
        parts.append(f"{text}\n#{option.name} = {value}\n")
    return "\n".join(parts)


def literal_default(option: Option) -> str:
    """An option's default as TOML; empty if there is none."""
    value = getattr(config.Settings(command="mount", store="", name=""), option.field)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        if option.field.endswith("_s"):
            return f'"{value:g}s"'
        if option.field.endswith("_bytes") and value and value % MIB == 0:
            return f'"{value // MIB:g}MiB"'
        return f"{value:g}"
    return f'"{value}"' if value else ""


COMMANDS: Final = {"config": Command(_declare, _run)}
