"""Every option of a node: what it is called, how it is read, what it is for, where it may be given.

The same kebab-case names are used on the command line (`--peer-timeout 5s`), in `-o`
(`-o peer-timeout=5s`) and in a TOML file (`peer-timeout = "5s"`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Final

import msgspec

from replfs.errors import ConfigError
from replfs.node.settings.values import (
    Choice,
    Reader,
    between,
    integer,
    parse_address,
    parse_bool,
    parse_duration,
    parse_listen,
    parse_node_name,
    parse_path,
    parse_patterns,
    parse_peers,
    parse_size,
)

MIB: Final = 1 << 20


class Option(msgspec.Struct, frozen=True):
    """One row: how an option is called, read and explained."""

    name: str
    field: str
    read: Reader
    help: str
    metavar: str = ""
    """Empty: a switch, which may be given without a value (yes) and as `no-NAME`."""
    repeated: bool = False
    """May be given several times; the values are collected."""
    opposite: str = ""
    """Another spelling of `no-NAME`, or of NAME where that itself says no: `rw`, `suid`."""
    is_path: bool = False
    """Relative to the directory it was typed in, or to that of the file it stands in."""
    everywhere: bool = True
    """False: only on the command line and in `-o`."""

    @property
    def is_switch(self) -> bool:
        """Whether it may be given without a value."""
        return not self.metavar


_AT_MOST_A_DAY: Final = 86400.0

OPTIONS: Final[tuple[Option, ...]] = (
    Option("listen", "listen", parse_listen, "accept peers at this endpoint", "ENDPOINT"),
    Option("peer", "peers", parse_peers, "a peer, as [NAME=]tcp://HOST:PORT; may be repeated",
           "[NAME=]ENDPOINT", repeated=True),
    Option("name", "name", parse_node_name, "what this node is called (default: the host's name)",
           "NAME"),
    Option("policy", "policy", Choice("sync", "strict", "async", "none"),
           "policy of what has none of its own and inherits none: sync (default), strict, async, "
           "none", "POLICY"),
    Option("ack", "ack", Choice("op", "close"),
           "acknowledge every operation (op, default), or together at close and fsync (close)",
           "LEVEL"),
    Option("strict-peers", "strict_peers", integer(1, 64),
           "how many peers must confirm a strict change (default: all)", "N"),
    Option("strict-on-loss", "strict_on_loss", Choice("fail", "suspend"),
           "what a strict change does while a peer it needs is lost: fail (default) or suspend",
           "ACTION"),
    Option("suspend-timeout", "suspend_timeout_s",
           between(parse_duration, 0, _AT_MOST_A_DAY, "0 to 1d"),
           "how long a suspended change waits before it fails (default 60s)", "TIME"),
    Option("none", "none_patterns", parse_patterns,
           "names that are never replicated, such as '*.tmp:node_modules/'; may be repeated",
           "PATTERNS", repeated=True),
    Option("peer-timeout", "peer_timeout_s", between(parse_duration, 0.1, 600, "100ms to 10m"),
           "a peer that does not answer for this long is lost (default 5s)", "TIME"),
    Option("slow-peer", "slow_peer_s", between(parse_duration, 0, _AT_MOST_A_DAY, "0 to 1d"),
           "a peer that answers, but holds changes up for this long, is set out of sync and "
           "resynced later (default 30s; 0: never)", "TIME"),
    Option("async-queue", "async_queue_bytes",
           between(parse_size, MIB, 1 << 30, "1MiB to 1GiB"),
           "bytes on their way to a peer under policy async before the dirty region log takes over "
           "(default 64MiB)",
           "SIZE"),
    Option("resync-rate", "resync_rate_bytes",
           between(lambda v: parse_size(v.removesuffix("/s") if isinstance(v, str) else v),
                    0, 1 << 40, "0 to 1TiB"),
           "most bytes a second that a resync transfers (default 0: no limit)", "SIZE"),
    Option("checkpoint-interval", "checkpoint_interval_s",
           between(parse_duration, 0.1, 3600, "100ms to 1h"),
           "how often both sides are flushed together (default 5s)", "TIME"),
    Option("rescan", "rescan", parse_bool,
           "at start, look for changes made to STORE behind the mount (default yes)"),
    Option("start-wait", "start_wait_s", between(parse_duration, 0, _AT_MOST_A_DAY, "0 to 1d"),
           "after a power loss, how long to wait for a peer that kept what was lost (default 30s)",
           "TIME"),
    Option("start-alone", "start_alone", parse_bool,
           "after a power loss, start without that peer: what only it kept may be lost"),
    Option("insecure", "insecure", parse_bool,
           "neither encrypt nor authenticate beyond loopback; logged"),
    Option("key-file", "key_file", parse_path, "this node's secret key (see replfs keygen)", "FILE",
           is_path=True),
    Option("peer-keys", "peer_keys", parse_path, "public keys of the peers, one NAME = KEY a line",
           "FILE", is_path=True),
    Option("ro", "read_only", parse_bool, "mount read-only", opposite="rw"),
    Option("allow-other", "allow_other", parse_bool,
           "let other users in, as far as modes and ACLs permit (default: yes for root)"),
    Option("acl", "acl", parse_bool, "POSIX ACLs (default yes)", opposite="noacl"),
    Option("nosuid", "nosuid", parse_bool, "ignore set-user-ID bits", opposite="suid"),
    Option("nodev", "nodev", parse_bool, "ignore device files", opposite="dev"),
    Option("noexec", "noexec", parse_bool, "refuse to execute programs", opposite="exec"),
    Option("noatime", "noatime", parse_bool, "do not update access times", opposite="atime"),
    Option("export", "export", parse_bool,
           "for an NFS server: what was looked up once can be opened by its handle"),
    Option("writeback", "writeback", parse_bool,
           "the kernel's write-back cache: faster, and the promise then is fsync and close"),
    Option("max-background", "max_background", integer(1, 65535),
           "asynchronous requests the kernel may have waiting (default 64)", "N"),
    Option("spin", "spin", parse_bool,
           "poll for a moment before sleeping: lower latency, some CPU time (default yes)"),
    Option("rundir", "rundir", parse_path, "directory of control sockets and logs", "DIR",
           is_path=True),
    Option("metrics", "metrics", parse_address,
           "answer Prometheus at http://ADDRESS:PORT/metrics", "ADDRESS:PORT"),
    Option("hook", "hook", parse_path, "a program to run when a state changes", "PROGRAM",
           is_path=True),
    Option("log-level", "log_level", Choice("debug", "info", "warning", "error"),
           "debug, info (default), warning, error", "LEVEL"),
    Option("log-format", "log_format", Choice("text", "json", "journal"),
           "text (default), json, or journal (priority prefixes)", "FORMAT"),
    Option("foreground", "foreground", parse_bool, "stay in the foreground", everywhere=False),
)  # fmt: skip

BY_NAME: Final = {option.name: option for option in OPTIONS}
POSITIONAL: Final = ("store", "mountpoint")


def option_names() -> list[str]:
    """All option names, in the order of the table."""
    return [option.name for option in OPTIONS]


def look_up(name: str, source: str) -> tuple[Option, bool]:
    """The option *name* stands for, and whether it says yes to it. Raises ConfigError."""
    option = BY_NAME.get(name)
    if option is not None:
        return option, True
    for option in OPTIONS:
        if option.is_switch and name in {f"no-{option.name}", option.opposite}:
            return option, False
    raise ConfigError(f"{source} {name}: {unknown(name, 'option', option_names())}")


def unknown(name: str, what: str, known: Iterable[str]) -> str:
    """Half a sentence about a word that is not known, with the closest one that is."""
    close = difflib.get_close_matches(name, list(known), 1, 0.6)
    return f"there is no such {what}" + (f"; did you mean {close[0]}?" if close else "")
