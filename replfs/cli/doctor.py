"""`doctor`: can this machine run replfs, and this directory be a STORE? One line for each answer.

It makes the run directory and, with `--fix`, clears dead mounts away, and what is in memory of
stores that are gone; nothing else: attributes are tried on a file without a name.
"""

from __future__ import annotations

import argparse
import errno
import importlib.metadata
import os
import platform
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import replfs
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command, add_rundir
from replfs.errors import ReplfsError

PACKAGES: Final = ("pyfuse3", "trio", "pyzmq", "msgspec", "xxhash", "pyroaring")
CONNECT_TIMEOUT_S: Final = 3.0
CLOCK_APART_MAX_S: Final = 2.0
KERNEL_MIN: Final = (5, 10)
"""FUSE_HANDLE_KILLPRIV_V2 came with 5.11, and is done without; nothing older was tried."""
INODES_MIN: Final = 10_000
NETWORK: Final = frozenset(("9p", "cifs", "nfs", "nfs4", "smb3", "ceph"))


class Finding(NamedTuple):
    """One answer; `good` None is a remark."""

    good: bool | None
    text: str


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("store", metavar="STORE", nargs="?", help="also look at this directory")
    parser.add_argument("--peer", metavar="[NAME=]ENDPOINT", help="also try to reach this peer")
    parser.add_argument("--listen", metavar="ENDPOINT", help="also try to listen here")
    parser.add_argument("--fix", action="store_true",
                        help="clear mounts away whose node is gone, and what is in memory "
                        "of stores that are")  # fmt: skip
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
    release = platform.release()
    is_new = tuple(map(int, re.findall(r"\d+", release)[:2])) >= KERNEL_MIN
    minimum = ".".join(map(str, KERNEL_MIN))
    yield Finding(sys.platform == "linux" and is_new, f"Linux {release} ({minimum} or newer)")
    for package in PACKAGES:
        yield _check_package(package)
    yield from _check_fuse()
    yield _check_rundir(args.rundir)
    yield from _check_mounts(fix=args.fix)
    yield from _check_leftovers(args.rundir, fix=args.fix)
    if args.store is not None:
        yield from _check_store(args.store)
        yield from _check_node(args.store, args.rundir)
    if args.listen is not None:
        yield _check_listen(args.listen)
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
    from replfs.node.settings.rundir import default_rundir, make_rundir

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
        yield from _check_space(store, os.fstatvfs(fd))
    finally:
        os.close(fd)
    yield from _check_file_system(store)


def _check_space(store: str, space: os.statvfs_result) -> Iterator[Finding]:
    free = space.f_bavail * space.f_frsize / 2**30
    more = "" if free > 0.1 else "; writes will fail soon, make room"
    yield Finding(free > 0.1 or None, f"{store} has {free:.1f} GiB free{more}")
    if space.f_files:  # btrfs and others count none
        enough = space.f_favail > INODES_MIN
        more = "" if enough else "; new files will fail soon, remove some"
        yield Finding(enough or None, f"{store} has {space.f_favail} inodes free{more}")


def _check_file_system(store: str) -> Iterator[Finding]:
    from replfs.front import mountinfo

    real = os.path.realpath(store)
    while (mount := mountinfo.find_mount(real)) is None and real != "/":
        real = os.path.dirname(real)
    if mount is None:
        return
    kind = f"{store} is on {mount.fstype}"
    if "ro" in mount.options.split(","):
        yield Finding(False, f"{kind}, mounted read-only; remount {mount.path} read-write")
    elif mount.fstype in NETWORK or mount.is_fuse:
        yield Finding(None, f"{kind}: only local file systems are tested")
    elif mount.fstype in {"tmpfs", "ramfs"}:
        yield Finding(None, f"{kind}: what is there is gone after a restart of the machine")
    else:
        yield Finding(True, kind)
    # A subvolume's root has this number.
    if mount.fstype == "zfs" or (mount.fstype == "btrfs" and os.stat(store).st_ino == 256):
        yield Finding(True, f"{store} can be snapshot: freeze, snapshot, thaw")
    else:
        yield Finding(
            None,
            f"{store} has no snapshots of its own: a backup of a replica freezes it for longer",
        )


def _check_mounts(*, fix: bool) -> Iterator[Finding]:
    from replfs.front import mountinfo, mounting
    from replfs.node.settings.rundir import replfs_mounts

    for path in dict.fromkeys(replfs_mounts()):
        if not mountinfo.is_dead_mount(path):
            yield Finding(True, f"{path} is mounted, and its node is there")
            continue
        if not fix:
            yield Finding(
                False, f"{path}: its node is gone ({os.strerror(errno.ENOTCONN)}); doctor --fix"
            )
            continue
        try:
            mounting.unmount_lazily(path)
        except OSError as error:
            yield Finding(False, f"{path}: its node is gone, and {error.strerror}")
        else:
            yield Finding(True, f"{path}: its node was gone; the mount is cleared away")


def _check_leftovers(rundir: str | None, *, fix: bool) -> Iterator[Finding]:
    from replfs.node.settings.memory import leftovers
    from replfs.node.settings.rundir import default_rundir

    try:
        found = list(leftovers(rundir or default_rundir()))
    except OSError:
        return  # the run directory has been looked at
    for one in found:
        what = f"{one.paths[0]} is what a killed node of {one.store} had in flight"
        if not fix:
            yield Finding(
                None,
                f"{what}, and no store is there: mount its disk, or, if it is gone, doctor --fix",
            )
            continue
        try:
            one.remove()
        except OSError as error:
            yield Finding(False, f"{what}, and cannot be removed: {error.strerror}")
        else:
            yield Finding(True, f"{what}; no store is there, and it is removed")


def _check_node(store: str, rundir: str | None) -> Iterator[Finding]:
    """If a node runs on STORE: what it knows of itself and of its peers."""
    from replfs.node.operating import client

    try:
        status = client.request(store, "status", {}, 5.0, rundir)
    except client.NodeDown:
        yield Finding(None, f"no node runs on {store}: versions and clocks are not compared")
        return
    if status.get("hung"):
        yield Finding(
            False, f"the node of {store} hangs: look at its disk, then kill {status['pid']}"
        )
        return
    version = status.get("version")
    same = version == replfs.__version__
    more = "" if same else f", this is {replfs.__version__}; restart the node to have it"
    yield Finding(same or None, f"the node of {store} is version {version}{more}")
    for peer in status.get("peers") or []:
        yield from _check_known_peer(peer, version)
    if count := status.get("unrepresentable"):
        yield Finding(
            None,
            f"{count} objects are not on the peers, whose stores cannot hold them: the log of "
            f"{store} names each; an agent that is not root holds only files of its own user",
        )


def _check_known_peer(peer: dict[str, Any], version: object) -> Iterator[Finding]:
    name = peer.get("name")
    if peer.get("link") != "up":
        yield Finding(False, f"peer {name} is not connected: {peer.get('reason') or 'see its log'}")
        return
    theirs = peer.get("release") or "of unknown version"
    more = "" if theirs == version else f", this node {version}: use one version when you can"
    yield Finding(theirs == version or None, f"peer {name} is {theirs}{more}")
    apart = peer.get("clock_difference_s")
    if apart is not None:
        fine = abs(apart) <= CLOCK_APART_MAX_S
        more = "" if fine else "; set both clocks by NTP"
        yield Finding(fine or None, f"peer {name}: clocks differ by {abs(apart):.1f} s{more}")


def _check_listen(text: str) -> Finding:
    from replfs.node.settings.values import parse_endpoint

    try:
        endpoint = parse_endpoint(text, listen=True)
    except ValueError as error:
        return Finding(False, f"--listen {error}")
    if not endpoint.startswith("tcp://"):
        return Finding(None, f"{endpoint} is not looked into")
    host, _, port = endpoint.removeprefix("tcp://").rpartition(":")
    host = host.strip("[]").replace("*", "0.0.0.0")  # noqa: S104 - ZeroMQ's word for it
    try:
        family = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0][0]
        socket.create_server((host, int(port)), family=family).close()
        return Finding(True, f"{endpoint} is free")
    except OSError as error:
        return Finding(False, f"{endpoint} cannot be listened on: {error.strerror or error}")


def _check_peer(text: str) -> Finding:
    from replfs.node.settings.values import parse_peer

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
