"""`doctor`: can this machine run replfs, and this directory be a STORE? One line for each answer.

It makes the run directory and nothing else: attributes are tried on a file without a name.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, add_rundir
from replfs.errors import ReplfsError

PACKAGES: Final = ("pyfuse3", "trio", "pyzmq", "msgspec", "xxhash", "pyroaring")
CONNECT_TIMEOUT_S: Final = 3.0


class Finding(NamedTuple):
    """One answer; `good` None is a remark."""

    good: bool | None
    text: str


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", nargs="?", help="also look at this directory")
    parser.add_argument("--peer", metavar="[NAME=]ENDPOINT", help="also try to reach this peer")
    add_rundir(parser)


def _run(args: argparse.Namespace) -> int:
    failed = 0
    for finding in _findings(args):
        mark = {True: "ok  ", False: "FAIL", None: "note"}[finding.good]
        print(f"{mark}  {finding.text}")
        failed += finding.good is False
    if failed:
        print(f"{failed} of these must be mended first", file=sys.stderr)
    return ExitCode.ERROR if failed else ExitCode.OK


def _findings(args: argparse.Namespace) -> Iterator[Finding]:
    version = sys.version_info
    yield Finding(version >= (3, 11), f"Python {platform.python_version()} (3.11 or newer)")
    yield Finding(sys.platform == "linux", f"kernel {platform.system()} {platform.release()}")
    for package in PACKAGES:
        yield _check_package(package)
    yield from _check_fuse()
    yield _check_rundir(args.rundir)
    if args.store is not None:
        yield from _check_store(args.store)
    if args.peer is not None:
        yield _check_peer(args.peer)


def _check_package(name: str) -> Finding:
    try:
        return Finding(True, f"{name} {importlib.metadata.version(name)}")
    except importlib.metadata.PackageNotFoundError:
        return Finding(False, f"{name} is not installed; pip install {name}")


def _check_fuse() -> Iterator[Finding]:
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC))
        yield Finding(True, "/dev/fuse can be opened")
    except OSError as error:
        yield Finding(False, f"/dev/fuse: {error.strerror}; load the fuse module, or run as root")
    if shutil.which("fusermount3") is not None:
        yield Finding(True, "fusermount3 is installed")
    elif os.geteuid() == 0:
        yield Finding(None, "fusermount3 is not installed; only root can mount without it")
    else:
        yield Finding(False, "fusermount3 is not installed; install the package fuse3")
    if os.geteuid() != 0:
        yield Finding(
            None, "not root: owners and devices of other users' files cannot be replicated"
        )


def _check_rundir(rundir: str | None) -> Finding:
    from replfs.node.rundir import default_rundir, make_rundir

    try:
        return Finding(True, f"run directory {make_rundir(rundir or default_rundir())}")
    except ReplfsError as error:
        return Finding(False, str(error))


def _check_store(store: str) -> Iterator[Finding]:
    if not os.path.isdir(store):
        yield Finding(False, f"{store} is not a directory")
        return
    try:
        fd = os.open(store, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        yield Finding(None, f"{store}: {error.strerror} for a file without a name; not looked into")
        return
    path = f"/proc/self/fd/{fd}"
    acl = bytes.fromhex("02000000" + "01000600ffffffff" + "04000400ffffffff" + "20000000ffffffff")
    tries: list[tuple[str, Callable[[], None]]] = [
        ("extended attributes", lambda: os.setxattr(path, "user.replfs.try", b"x")),
        ("POSIX ACLs", lambda: os.setxattr(path, "system.posix_acl_access", acl)),
    ]
    if os.geteuid() == 0:
        tries.append(
            ("attributes only root sees", lambda: os.setxattr(path, "trusted.replfs.try", b"x"))
        )
    try:
        for what, attempt in tries:
            try:
                attempt()
                yield Finding(True, f"{store} has {what}")
            except OSError as error:
                yield Finding(
                    what == "POSIX ACLs" and None, f"{store} has no {what}: {error.strerror}"
                )
        space = os.fstatvfs(fd)
        free = space.f_bavail * space.f_frsize / 2**30
        yield Finding(free > 0.1 or None, f"{store} has {free:.1f} GiB free")
    finally:
        os.close(fd)


def _check_peer(text: str) -> Finding:
    from replfs.node.config import parse_peer

    try:
        endpoint = parse_peer(text).endpoint
    except ValueError as error:
        return Finding(False, f"the peer {error}")
    if not endpoint.startswith("tcp://"):
        return Finding(None, f"{endpoint} is not looked into")
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
        return Finding(True, f"somebody listens at {endpoint}")
    except OSError as error:
        return Finding(False, f"{endpoint} cannot be reached: {error.strerror or error}")


COMMANDS: Final = {"doctor": Command(_declare, _run)}
