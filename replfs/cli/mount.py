"""`mount`, `agent`, `umount`, `stop`: the beginning and the end of a node.

`mount` and `agent` read their settings, look at the paths, and then become the node (foreground),
or start it as a process of its own and return once it is ready. Signals are the node's business
from then on.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import select
import signal
import stat
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from replfs.cli import logs, spawn
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, add_target, seconds
from replfs.cli.progress import ask
from replfs.cli.text import Progress
from replfs.errors import ReplfsError, UsageError
from replfs.node.operating import client, service
from replfs.node.settings.rundir import default_rundir, file_stem, make_rundir, replfs_mounts

if TYPE_CHECKING:
    from replfs.node.settings import config

POLL_S: Final = 0.1
_FLUSH_S: Final = 60.0

# mount(2)
_MS_RDONLY: Final = 1
_MS_FLAGS: Final = {"nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048}
_MS_REMOUNT: Final = 32


# mount, agent ----------------------------------------------------------------------------------


def _declare_node(parser: argparse.ArgumentParser) -> None:
    from replfs.node.settings.options import OPTIONS

    parser.add_argument("-o", dest="mount_options", metavar="OPT,...", action="append", default=[])
    parser.add_argument("--config", metavar="FILE", help="options from a TOML file")
    parser.add_argument("--ready-fd", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--log-file", help=argparse.SUPPRESS)
    for option in OPTIONS:
        names = [f"--{option.name}"]
        if option.name == "foreground":
            names.insert(0, "-f")
        if not option.is_switch:
            parser.add_argument(
                *names,
                dest=option.name,
                metavar=option.metavar,
                action="append" if option.repeated else "store",
                help=option.help.replace("%", "%%"),
            )
            continue
        parser.add_argument(
            *names, dest=option.name, action="store_const", const=True, help=option.help
        )
        parser.add_argument(
            f"--{option.opposite or 'no-' + option.name}",
            dest=option.name,
            action="store_const",
            const=False,
            help=argparse.SUPPRESS,
        )


def _declare_mount(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", nargs="?")
    parser.add_argument("mountpoint", metavar="MOUNTPOINT", nargs="?")
    _declare_node(parser)


def _declare_agent(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", nargs="?")
    parser.add_argument(
        "--mount", dest="mountpoint", metavar="DIR", help="also mount it here (read-only)"
    )
    _declare_node(parser)


def _switches_with_values(argv: list[str]) -> list[str]:
    """`--rescan=no`, as `-o` and the file have it, becomes what argparse knows."""
    from replfs.node.settings.config import parse_bool_option
    from replfs.node.settings.options import OPTIONS

    switches = {f"--{option.name}": option for option in OPTIONS if option.is_switch}
    result = []
    for word in argv:
        name, equals, value = word.partition("=")
        option = switches.get(name)
        if option is None or not equals:
            result.append(word)
        elif parse_bool_option("--", option.name, value):
            result.append(name)
        else:
            result.append(f"--{option.opposite or 'no-' + option.name}")
    return result


def _settings(command: config.Command, args: argparse.Namespace) -> config.Settings:
    from replfs.node.settings import config
    from replfs.node.settings.options import option_names

    given = {name: value for name, value in vars(args).items() if value is not None}
    names = {*option_names(), "store", "mountpoint"}
    return config.build(
        command,
        {name: value for name, value in given.items() if name in names},
        ",".join(args.mount_options),
        args.config,
    )


def _run_mount(args: argparse.Namespace) -> int:
    return _start("mount", args)


def _run_agent(args: argparse.Namespace) -> int:
    return _start("agent", args)


def _start(command: config.Command, args: argparse.Namespace) -> int:
    settings = _settings(command, args)
    _check_paths(settings)
    if settings.foreground:
        return _serve(settings, args.ready_fd, args.log_file)
    if os.geteuid() != 0:
        from replfs.store.permitted import WITHOUT_ROOT

        print(f"replfs: {WITHOUT_ROOT}", file=sys.stderr)
    return _start_in_background(settings, args.argv)


def _check_paths(settings: config.Settings) -> None:
    """STORE must be a directory, and MOUNTPOINT one that can be mounted on.

    What a killed node left mounted there is cleared away first: it may cover STORE.

    Raises:
        UsageError: one cannot be used, or lies in the other once links are resolved.
    """
    from replfs.front import mountinfo, mounting
    from replfs.node.settings.config import check_nesting

    mountpoint = settings.mountpoint
    if mountpoint is not None and mountpoint in replfs_mounts():
        if mountinfo.is_dead_mount(mountpoint):
            _clear_dead_mount(mountpoint)
    try:
        is_directory = stat.S_ISDIR(os.stat(settings.store).st_mode)
    except FileNotFoundError:
        raise UsageError(f"STORE {settings.store} does not exist; create it first") from None
    except OSError as error:
        raise UsageError(f"STORE {settings.store} cannot be used: {error.strerror}") from None
    if not is_directory:
        raise UsageError(f"STORE {settings.store} is not a directory")
    if mountpoint is not None:
        check_nesting(os.path.realpath(settings.store), mounting.check_mountpoint(mountpoint))


def _serve(settings: config.Settings, ready_fd: int | None, log_file: str | None) -> int:
    """Be the node until it ends."""
    from replfs.node.node import run

    logs.configure(settings.log_level, settings.log_format, log_file)
    announcement = spawn.Announcement(-1 if ready_fd is None else ready_fd)
    if ready_fd is not None:
        os.set_inheritable(ready_fd, False)
        os.chdir("/")

    def ready(listening: str) -> None:
        service.notify("READY=1")
        announcement.ready(listening)
        if ready_fd is None:
            where = f", mounted on {settings.mountpoint}" if settings.mountpoint else ""
            where += f", listening on {listening}" if listening else ""
            print(f"replfs: {settings.store} is ready{where}", flush=True)

    try:
        return run(settings, ready)
    except ReplfsError as error:
        if announcement.failed(str(error), error.exit_code):
            return error.exit_code
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        if announcement.failed(f"{where}{error.strerror or error}", ExitCode.ERROR):
            return ExitCode.ERROR
        raise


def _start_in_background(settings: config.Settings, argv: Sequence[str]) -> int:
    rundir = make_rundir(settings.rundir or default_rundir())
    node = spawn.NodeProcess(argv, f"{rundir}/{file_stem(settings.store)}.log")
    progress = Progress()
    started = time.monotonic()
    try:
        while (listening := node.poll_ready(1.0)) is None:
            waited = time.monotonic() - started
            if waited > 3:
                progress.update(f"still starting after {waited:.0f} s (log: {node.log_path})")
    except KeyboardInterrupt:
        node.process.send_signal(signal.SIGTERM)
        node.process.wait()
        return ExitCode.INTERRUPTED
    finally:
        progress.clear()
        node.close()
    if listening and settings.listen is not None and settings.listen != listening:
        print(f"listening on {listening}")
    return ExitCode.OK


# umount, stop ----------------------------------------------------------------------------------


def _declare_umount(parser: argparse.ArgumentParser) -> None:
    add_target(parser)
    parser.add_argument("--timeout", metavar="TIME", type=seconds, default=60.0,
                        help="how long what is in flight may take; a peer that has not answered "
                        "by then is cut off (default 60s)")  # fmt: skip
    parser.add_argument("--lazy", "-l", action="store_true",
                        help="unmount even if it is busy, as umount -l does")  # fmt: skip


def _declare_stop(parser: argparse.ArgumentParser) -> None:
    _declare_umount(parser)


def _run_umount(args: argparse.Namespace) -> int:
    return _end(args, "umount")


def _run_stop(args: argparse.Namespace) -> int:
    return _end(args, "stop")


def _end(args: argparse.Namespace, command: str) -> int:
    path = os.path.abspath(args.target)
    try:
        connection = client.Connection(args.target, args.rundir)
    except client.NodeDown:
        if path not in replfs_mounts():
            if command == "umount" and not os.path.ismount(path):
                raise UsageError(f"{path} is not mounted") from None
            raise
        _clear_dead_mount(path)
        print(f"the node of {path} was gone; its mount is cleared")
        return ExitCode.OK
    with connection:
        process = _pidfd(connection.pid)
    try:
        fields = {"lazy": args.lazy, "timeout_s": args.timeout}
        # The drain has its bound; beyond it the node only records and flushes.
        answer = ask(args, command, fields, args.timeout + _FLUSH_S)
        if answer.get("stopping"):
            _wait_for_end(process, args)
    finally:
        if process is not None:
            os.close(process)
    if answer.get("message"):
        print(answer["message"])
    return ExitCode.OK


def _pidfd(pid: int) -> int | None:
    # In another pid namespace the kernel gives 0, and the socket's end must do.
    with contextlib.suppress(OSError):
        return os.pidfd_open(pid) if pid > 0 else None
    return None


def _wait_for_end(process: int | None, args: argparse.Namespace) -> None:
    progress = Progress()
    started = time.monotonic()
    try:
        while (waited := time.monotonic() - started) < _FLUSH_S:
            if process is None:
                time.sleep(POLL_S)
                client.Connection(args.target, args.rundir).close()
            elif select.select([process], [], [], POLL_S)[0]:
                return
            if waited > 1:
                progress.update(f"waiting for the process to end: {waited:.0f} s")
    except client.NodeDown:
        return
    finally:
        progress.clear()
    raise client.NodeHung(f"the node of {args.target} is drained, but its process does not end")


def _clear_dead_mount(path: str) -> None:
    """Take away what a killed daemon left: the kernel answers ENOTCONN there until then.

    Raises:
        UsageError: no permission.
    """
    from replfs.front import mounting

    try:
        mounting.unmount_lazily(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be unmounted: {error.strerror}") from None


# mount(8) --------------------------------------------------------------------------------------


def translate_mount_helper(argv: Sequence[str]) -> list[str]:
    """What mount(8) gives to `mount.replfs`, as the arguments of `replfs`; empty: nothing to do.

    A remount is done here: FUSE changes no more than the flags every filesystem has.

    Raises:
        UsageError: it cannot be understood, or the remount failed.
    """
    words = list(argv)
    positional, options = [], []
    is_fake = False
    while words:
        word = words.pop(0)
        if word in {"-o", "-N", "-t"}:
            value = words.pop(0) if words else ""
            options += [value] if word == "-o" else []
        elif word.startswith("-"):
            is_fake = is_fake or "f" in word
        else:
            positional.append(word)
    if len(positional) != 2:
        raise UsageError("usage: mount.replfs STORE MOUNTPOINT [-sfnv] [-o OPTION,...]")
    items = [item for text in options for item in text.split(",") if item]
    if is_fake:
        return []
    if "remount" in items:
        _remount(positional[1], items)
        return []
    return ["mount", *positional, *(["-o", ",".join(items)] if items else [])]


def _remount(mountpoint: str, items: Sequence[str]) -> None:
    flags = _MS_REMOUNT
    for item in items:
        flags |= _MS_FLAGS.get(item, 0) | (_MS_RDONLY if item == "ro" else 0)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(None, os.fsencode(mountpoint), None, flags, None) != 0:
        raise UsageError(f"{mountpoint} cannot be remounted: {os.strerror(ctypes.get_errno())}")


COMMANDS: Final = {
    "mount": Command(_declare_mount, _run_mount, _switches_with_values),
    "agent": Command(_declare_agent, _run_agent, _switches_with_values),
    "umount": Command(_declare_umount, _run_umount),
    "stop": Command(_declare_stop, _run_stop),
}
