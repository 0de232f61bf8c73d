"""The commands, one line each, and the one place where an exception becomes an exit status.

A command's module is imported only when that command is given: `status` loads neither trio nor
ZeroMQ nor libfuse. A module lists its commands in `COMMANDS`, by name, as `Command`s.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Final

import replfs
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command
from replfs.errors import ReplfsError, UsageError

MODULES: Final = {
    "demo": ("demo", "show it: two stores, a mount, a failure and a repair, all checked"),
    "mount": ("mount", "mount STORE on MOUNTPOINT and replicate it to peers"),
    "agent": ("mount", "serve STORE as a peer of another node"),
    "umount": ("mount", "drain, make a checkpoint, unmount"),
    "stop": ("mount", "drain, make a checkpoint, end the node"),
    "status": ("operate", "what a node does and how its peers are; exit status tells the state"),
    "wait": ("operate", "wait until a node is in sync"),
    "events": ("operate", "what happened lately"),
    "sync": ("operate", "flush both sides: all that was done is on stable storage"),
    "pause": ("operate", "stop replicating to a peer, until resume"),
    "resume": ("operate", "end a pause, or let suspended changes go on"),
    "resync": ("operate", "bring a peer in sync now"),
    "verify": ("operate", "compare with the peers while everything goes on"),
    "peer": ("operate", "list, add, remove or replace peers"),
    "policy": ("policy", "get, set, clear or report the policy of files and directories"),
    "freeze": ("backup", "hold a replica still while its STORE is backed up"),
    "thaw": ("backup", "let a frozen replica follow its primary again"),
    "promote": ("roles", "make a secondary the primary"),
    "switchover": ("roles", "swap roles with a peer, losing nothing"),
    "split-brain": ("roles", "settle it when both sides changed on their own"),
    "adopt": ("roles", "accept a store that was moved or copied"),
    "dashboard": ("share", "print a Grafana dashboard for the metrics"),
    "config": ("configuration", "check a configuration file, or print a sample"),
    "systemd": ("systemd", "print or install the units for the service manager"),
    "completion": ("completion", "print what makes a shell complete replfs commands"),
    "man": ("manual", "show or install the manual pages"),
    "keygen": ("keys", "make this node's key pair"),
    "doctor": ("doctor", "check whether this machine can run replfs"),
}  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run one command; returns its exit status, and never raises for what a person can mend."""
    try:
        return _run(list(argv))
    except ReplfsError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on (`replfs status | head`). Python flushes at exit: to nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.ERROR
    except OSError as error:
        if os.environ.get("REPLFS_TRACEBACK"):
            raise
        where = f"{error.filename}: " if error.filename else ""
        _complain(f"{where}{error.strerror or error}")
        return ExitCode.ERROR


def _complain(sentence: str) -> None:
    print(f"replfs: {sentence}", file=sys.stderr)


def _run(argv: list[str]) -> int:
    name = argv[0] if argv else "--help"
    if name in {"-h", "--help", "help"}:
        print(_overview())
        return ExitCode.OK if argv else ExitCode.USAGE
    if name in {"-V", "--version", "version"}:
        print(f"replfs {replfs.__version__}")
        return ExitCode.OK
    if name not in MODULES:
        import difflib

        close = difflib.get_close_matches(name, MODULES, 1)
        hint = f"did you mean {close[0]}?" if close else "see replfs --help"
        raise UsageError(f"there is no command {name!r}; {hint}")
    command, help_text = find(name)
    args = command.parse(name, help_text, argv[1:])
    return int(command.run(args))


def find(name: str) -> tuple[Command, str]:
    """A command, and what it does in a few words. Raises KeyError."""
    module_name, help_text = MODULES[name]
    module = importlib.import_module(f"replfs.cli.{module_name}")
    command: Command = module.COMMANDS[name]
    return command, help_text


def _overview() -> str:
    width = max(map(len, MODULES))
    lines = [
        "usage: replfs COMMAND ...        (replfs COMMAND --help tells more)",
        "",
        "replfs keeps a directory synchronously replicated on other machines.",
        "",
        *(f"  {name.ljust(width)}  {help_text}" for name, (_, help_text) in MODULES.items()),
        "",
        "TARGET is a MOUNTPOINT or a STORE. Exit status:",
        *(f"  {code.value:>3}  {code.meaning}" for code in ExitCode),
    ]
    return "\n".join(lines)


def entry() -> None:
    """What the `replfs` script calls."""
    sys.exit(main(sys.argv[1:]))


def entry_mount_helper() -> None:
    """What `mount -t replfs` calls, as `mount.replfs STORE MOUNTPOINT [-sfnv] [-o OPTIONS]`."""
    from replfs.cli.mount import translate_mount_helper

    def run() -> int:
        try:
            argv = translate_mount_helper(sys.argv[1:])
        except UsageError as error:
            _complain(str(error))
            return error.exit_code
        return main(argv) if argv else ExitCode.OK

    sys.exit(run())
