"""Every option of a node: its name, its default, its bounds, and where it may be given.

One table, `OPTIONS`, describes what can be set; `Settings` holds the values and the defaults. The
same kebab-case names are used on the command line (`--peer-timeout 5s`), in `-o`
(`-o peer-timeout=5s`) and in a TOML file (`peer-timeout = "5s"`), and they win in that order. An
unknown name, a value that cannot be read, and a value out of bounds are `ConfigError`s that say
what to write instead: there are no silent defaults.

This module looks at no file but the TOML file.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Literal

import msgspec

from replfs.errors import ConfigError, UsageError

MIB: Final = 1 << 20
NAME_SIZE_MAX: Final = 64
DEFAULT_FILE: Final = "/etc/replfs/replfs.toml"
"""Read when it exists and `--config` names no other file."""

Command = Literal["mount", "agent"]


class PeerSetting(msgspec.Struct, frozen=True):
    """A peer as it was typed: `[NAME=]ENDPOINT`."""

    name: str
    endpoint: str


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What a node was asked to do. Durations end in `_s` (seconds), sizes in `_bytes`."""

    command: Command
    """Which command started the node; a new store takes its role from it."""
    store: str
    """Absolute, as typed (symbolic links are not resolved)."""
    mountpoint: str | None = None
    """Absolute, as typed; may be equal to `store`."""

    name: str
    listen: str | None = None
    peers: tuple[PeerSetting, ...] = ()

    policy: Literal["sync", "strict", "async", "none"] = "sync"
    ack: Literal["op", "close"] = "op"
    strict_peers: int | None = None
    """None: all configured peers."""
    strict_on_loss: Literal["fail", "suspend"] = "fail"
    suspend_timeout_s: float = 60.0
    none_patterns: tuple[str, ...] = ()

    peer_timeout_s: float = 5.0
    slow_peer_s: float = 30.0
    """0: never."""
    async_queue_bytes: int = 64 * MIB
    resync_rate_bytes: int = 0
    """Bytes a second; 0: as fast as it goes."""
    checkpoint_interval_s: float = 5.0
    rescan: bool = True
    start_wait_s: float = 30.0
    start_alone: bool = False

    insecure: bool = False
    key_file: str | None = None
    peer_keys: str | None = None

    read_only: bool = False
    allow_other: bool = True
    acl: bool = True
    nosuid: bool = False
    nodev: bool = False
    noexec: bool = False
    noatime: bool = False
    export: bool = False
    writeback: bool = False
    max_background: int = 64
    spin: bool = True

    rundir: str | None = None
    """None: the default run directory (`node.settings.rundir.default_rundir`)."""
    metrics: str | None = None
    hook: str | None = None
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    log_format: Literal["text", "json", "journal"] = "text"
    foreground: bool = False


# Reading values --------------------------------------------------------------------------------
# Every reader takes what a source gave (text, or a TOML value) and returns what `Settings` holds,
# or raises ValueError with half a sentence that follows the option's name.

Reader = Callable[[object], object]

_DURATION: Final = {
    "": 1.0,
    "ms": 1e-3,
    "s": 1.0,
    "min": 60.0,
    "m": 60.0,
    "h": 3600.0,
    "d": 86400.0,
}
_SIZE: Final = {
    "": 1, "b": 1,
    "k": 1 << 10, "kib": 1 << 10, "kb": 10**3,
    "m": 1 << 20, "mib": 1 << 20, "mb": 10**6,
    "g": 1 << 30, "gib": 1 << 30, "gb": 10**9,
    "t": 1 << 40, "tib": 1 << 40, "tb": 10**12,
}  # fmt: skip
_YES: Final = ("yes", "true", "on", "1")
_NO: Final = ("no", "false", "off", "0")
_QUANTITY: Final = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*")
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:\[\]-]*")


def parse_duration(value: object) -> float:
    """Seconds, from a number of seconds or from text such as `500ms`, `5s`, `2m`, `1h`."""
    number, unit = _quantity(value, "5s, 500ms, 2m or 1h")
    if unit not in _DURATION:
        raise ValueError(f"has an unknown unit {unit!r}; write 5s, 500ms, 2m or 1h")
    return number * _DURATION[unit]


def parse_size(value: object) -> int:
    """Bytes, from a number of bytes or from text such as `64KiB`, `64M`, `1GiB`, `10MB`."""
    number, unit = _quantity(value, "65536, 64KiB, 64M or 10MB")
    if unit not in _SIZE:
        raise ValueError(f"has an unknown unit {unit!r}; write 65536, 64KiB, 64M or 10MB")
    return int(number * _SIZE[unit])


def _quantity(value: object, examples: str) -> tuple[float, str]:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ValueError(f"is not a quantity; write {examples}")
    if not isinstance(value, str):
        return float(value), ""
    match = _QUANTITY.fullmatch(value)
    if match is None:
        raise ValueError(f"cannot be {value!r}; write {examples}")
    return float(match[1]), match[2].lower()


def parse_bool(value: object) -> bool:
    """A truth value, from TOML or from `yes`/`no`, `true`/`false`, `on`/`off`, `1`/`0`."""
    if isinstance(value, bool):
        return value
    text = str(value).lower()
    if text in _YES:
        return True
    if text in _NO:
        return False
    raise ValueError(f"cannot be {value!r}; write yes or no")


def parse_endpoint(value: object, *, listen: bool = False) -> str:
    """A ZeroMQ endpoint, `tcp://HOST:PORT` or `ipc://PATH`, as it was given."""
    text = value if isinstance(value, str) else ""
    if text.startswith("ipc://") and len(text) > len("ipc://"):
        return text
    example = "tcp://0.0.0.0:4710" if listen else "tcp://host:4710"
    if not text.startswith("tcp://"):
        raise ValueError(f"cannot be {value!r}; write an endpoint such as {example}")
    host, colon, port = text.removeprefix("tcp://").rpartition(":")
    if not colon or not host or "/" in host:
        raise ValueError(f"cannot be {text!r}: it needs a host and a port, such as {example}")
    if ":" in host and not (host.startswith("[") and host.endswith("]")):
        raise ValueError(
            f"cannot be {text!r}: an IPv6 address stands in brackets, tcp://[::1]:4710"
        )
    if not port.isascii() or not port.isdigit() or not (0 if listen else 1) <= int(port) <= 65535:
        raise ValueError(f"cannot be {text!r}: {port!r} is no port number")
    return text


def parse_peer(value: object) -> PeerSetting:
    """A peer, from `[NAME=]ENDPOINT`; without a name it is called by its host and port."""
    text = value if isinstance(value, str) else ""
    name, equals, endpoint = text.partition("=")
    if not equals or "://" in name:
        endpoint = parse_endpoint(value)
        return PeerSetting(default_peer_name(endpoint), endpoint)
    return PeerSetting(_node_name(name), parse_endpoint(endpoint))


def default_peer_name(endpoint: str) -> str:
    """What a peer is called when it was given no name."""
    name = endpoint.partition("://")[2].strip("/").replace("/", "-")
    return name[-NAME_SIZE_MAX:]


def is_node_name(text: str) -> bool:
    """Whether a node may be called so."""
    return _NAME.fullmatch(text) is not None and len(text) <= NAME_SIZE_MAX


def _node_name(value: object) -> str:
    if not isinstance(value, str) or not is_node_name(value):
        raise ValueError(
            f"cannot be {value!r}; write letters, digits, '.', '-' and '_', at most {NAME_SIZE_MAX}"
        )
    return value


def _listen(value: object) -> str:
    return parse_endpoint(value, listen=True)


def _address(value: object) -> str:
    """`HOST:PORT` of this machine; an IPv6 address stands in brackets."""
    text = value if isinstance(value, str) else ""
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not host or not is_port or "/" in host or (":" in host and not is_bracketed):
        raise ValueError(f"cannot be {value!r}; write ADDRESS:PORT, such as 127.0.0.1:9942")
    return text


def _path(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"cannot be {value!r}; write a path")
    return value


def _patterns(value: object) -> tuple[str, ...]:
    """File name patterns; in text they are separated by ':', which no pattern can contain."""
    parts = value.split(":") if isinstance(value, str) else value
    if not isinstance(parts, (list, tuple)) or not all(isinstance(p, str) and p for p in parts):
        raise ValueError(f"cannot be {value!r}; write patterns such as '*.tmp:node_modules/'")
    for pattern in parts:
        if "/" in pattern.removesuffix("/"):
            raise ValueError(
                f"cannot contain {pattern!r}: a pattern is a name, with a '/' only at its end"
            )
    return tuple(parts)


def _peers(value: object) -> tuple[PeerSetting, ...]:
    """One peer as text, or a list of texts and of TOML tables with `name` and `endpoint`."""
    items = value if isinstance(value, (list, tuple)) else [value]
    peers = []
    for item in items:
        if isinstance(item, Mapping):
            unknown = set(item) - {"name", "endpoint"}
            if unknown or "endpoint" not in item:
                what = f"has an unknown key {min(unknown)!r}" if unknown else "has no endpoint"
                raise ValueError(f"{what}; a peer has the keys name and endpoint")
            text = f"{item['name']}={item['endpoint']}" if "name" in item else item["endpoint"]
            peers.append(parse_peer(text))
        else:
            peers.append(parse_peer(item))
    names = [peer.name for peer in peers]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"gives two peers the same name {name!r}; write NAME=ENDPOINT")
    return tuple(peers)


class Choice:
    """Reads one of a few words."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __call__(self, value: object) -> str:
        """The word. Raises ValueError."""
        if not isinstance(value, str) or value not in self.words:
            close = difflib.get_close_matches(str(value), self.words, 1)
            hint = f"did you mean {close[0]}?" if close else f"write one of {', '.join(self.words)}"
            raise ValueError(f"cannot be {value!r}; {hint}")
        return value


def _between(read: Callable[[object], float], low: float, high: float, words: str) -> Reader:
    def bounded(value: object) -> float:
        number = read(value)
        if not low <= number <= high:
            raise ValueError(f"cannot be {value}: it must be {words}")
        return number

    return bounded


def _integer(low: int, high: int) -> Reader:
    def read(value: object) -> int:
        text = str(value)
        if isinstance(value, bool) or re.fullmatch(r"[0-9]{1,18}", text) is None:
            raise ValueError(f"cannot be {value!r}; write a whole number")
        if not low <= int(text) <= high:
            raise ValueError(f"cannot be {text}: it must be {low} to {high}")
        return int(text)

    return read


# The table -------------------------------------------------------------------------------------


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
    Option("listen", "listen", _listen, "accept peers at this endpoint", "ENDPOINT"),
    Option("peer", "peers", _peers, "a peer, as [NAME=]tcp://HOST:PORT; may be repeated",
           "[NAME=]ENDPOINT", repeated=True),
    Option("name", "name", _node_name, "what this node is called (default: the host's name)",
           "NAME"),
    Option("policy", "policy", Choice("sync", "strict", "async", "none"),
           "policy of what has none of its own and inherits none: sync (default), strict, async, "
           "none", "POLICY"),
    Option("ack", "ack", Choice("op", "close"),
           "acknowledge every operation (op, default), or together at close and fsync (close)",
           "LEVEL"),
    Option("strict-peers", "strict_peers", _integer(1, 64),
           "how many peers must confirm a strict change (default: all)", "N"),
    Option("strict-on-loss", "strict_on_loss", Choice("fail", "suspend"),
           "what a strict change does while a peer it needs is lost: fail (default) or suspend",
           "ACTION"),
    Option("suspend-timeout", "suspend_timeout_s",
           _between(parse_duration, 0, _AT_MOST_A_DAY, "0 to 1d"),
           "how long a suspended change waits before it fails (default 60s)", "TIME"),
    Option("none", "none_patterns", _patterns,
           "names that are never replicated, such as '*.tmp:node_modules/'; may be repeated",
           "PATTERNS", repeated=True),
    Option("peer-timeout", "peer_timeout_s", _between(parse_duration, 0.1, 600, "100ms to 10m"),
           "a peer that does not answer for this long is lost (default 5s)", "TIME"),
    Option("slow-peer", "slow_peer_s", _between(parse_duration, 0, _AT_MOST_A_DAY, "0 to 1d"),
           "a peer that answers, but holds changes up for this long, is set out of sync and "
           "resynced later (default 30s; 0: never)", "TIME"),
    Option("async-queue", "async_queue_bytes",
           _between(parse_size, MIB, 1 << 34, "1MiB to 16GiB"),
           "bytes queued for policy async before the dirty region log takes over (default 64MiB)",
           "SIZE"),
    Option("resync-rate", "resync_rate_bytes",
           _between(lambda v: parse_size(v.removesuffix("/s") if isinstance(v, str) else v),
                    0, 1 << 40, "0 to 1TiB"),
           "most bytes a second that a resync transfers (default 0: no limit)", "SIZE"),
    Option("checkpoint-interval", "checkpoint_interval_s",
           _between(parse_duration, 0.1, 3600, "100ms to 1h"),
           "how often both sides are flushed together (default 5s)", "TIME"),
    Option("rescan", "rescan", parse_bool,
           "at start, look for changes made to STORE behind the mount (default yes)"),
    Option("start-wait", "start_wait_s", _between(parse_duration, 0, _AT_MOST_A_DAY, "0 to 1d"),
           "after a power loss, how long to wait for a peer that kept what was lost (default 30s)",
           "TIME"),
    Option("start-alone", "start_alone", parse_bool,
           "after a power loss, start without that peer: what only it kept may be lost"),
    Option("insecure", "insecure", parse_bool,
           "neither encrypt nor authenticate beyond loopback; logged"),
    Option("key-file", "key_file", _path, "this node's secret key (see replfs keygen)", "FILE",
           is_path=True),
    Option("peer-keys", "peer_keys", _path, "public keys of the peers, one NAME = KEY a line",
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
    Option("max-background", "max_background", _integer(1, 65535),
           "asynchronous requests the kernel may have waiting (default 64)", "N"),
    Option("spin", "spin", parse_bool,
           "poll for a moment before sleeping: lower latency, some CPU time (default yes)"),
    Option("rundir", "rundir", _path, "directory of control sockets and logs", "DIR",
           is_path=True),
    Option("metrics", "metrics", _address,
           "answer Prometheus at http://ADDRESS:PORT/metrics", "ADDRESS:PORT"),
    Option("hook", "hook", _path, "a program to run when a state changes", "PROGRAM",
           is_path=True),
    Option("log-level", "log_level", Choice("debug", "info", "warning", "error"),
           "debug, info (default), warning, error", "LEVEL"),
    Option("log-format", "log_format", Choice("text", "json", "journal"),
           "text (default), json, or journal (priority prefixes)", "FORMAT"),
    Option("foreground", "foreground", parse_bool, "stay in the foreground", everywhere=False),
)  # fmt: skip

_BY_NAME: Final = {option.name: option for option in OPTIONS}
_POSITIONAL: Final = ("store", "mountpoint")

IGNORED_MOUNT_OPTIONS: Final = frozenset(
    (
        "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "fail",
        "_netdev", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime",
        "nodiratime", "lazytime", "nolazytime", "async", "loud", "silent", "mand", "nomand",
    )
)  # fmt: skip
"""What mount(8) and fstab(5) write that says nothing to this filesystem."""
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "uhelper=", "helper=")


def option_names() -> list[str]:
    """All option names, in the order of the table."""
    return [option.name for option in OPTIONS]


# Sources ---------------------------------------------------------------------------------------


def split_mount_options(text: str) -> dict[str, object]:
    """The options in a `-o` string, by name; what is fstab's own is left out.

    Raises:
        ConfigError: an option is not known, or a value is missing.
    """
    found: dict[str, object] = {}
    for item in text.split(","):
        name, equals, value = item.strip().partition("=")
        if not name or name in IGNORED_MOUNT_OPTIONS or item.strip().startswith(_IGNORED_PREFIXES):
            continue
        if name == "config" and equals:
            found["config"] = value
            continue
        option, yes = _look_up(name, "-o")
        if option.is_switch:
            answer = parse_bool_option("-o", name, value) if equals else True
            found[option.name] = answer if yes else not answer
        elif not equals:
            raise ConfigError(f"-o {name}: it needs a value; write {name}={option.metavar}")
        elif option.repeated and option.name in found:
            collected = found[option.name]
            found[option.name] = [*collected, value] if isinstance(collected, list) else value
        else:
            found[option.name] = [value] if option.repeated else value
    return found


def parse_bool_option(source: str, name: str, value: object) -> bool:
    """As `parse_bool`, with a `ConfigError` that names the option."""
    try:
        return parse_bool(value)
    except ValueError as error:
        raise ConfigError(f"{source} {name}: it {error}") from None


def _look_up(name: str, source: str) -> tuple[Option, bool]:
    """The option *name* stands for, and whether it says yes to it."""
    option = _BY_NAME.get(name)
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


def load_file(path: str) -> dict[str, object]:
    """The options in a TOML file, by name; relative paths become absolute.

    Raises:
        ConfigError: it cannot be read, is not TOML, or has an unknown key.
    """
    try:
        with open(path, "rb") as file:
            content = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: it cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it is not TOML: {error}") from None
    found: dict[str, object] = {}
    base = os.path.dirname(os.path.abspath(path))
    known = [option.name for option in OPTIONS if option.everywhere] + list(_POSITIONAL)
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{path}: {key}: {unknown(key, 'option', known)}")
        is_path = key in _POSITIONAL or _BY_NAME[key].is_path
        found[key] = os.path.join(base, value) if is_path and isinstance(value, str) else value
    return found


def build(
    command: Command,
    typed: Mapping[str, object],
    mount_options: str = "",
    config_file: str | None = None,
) -> Settings:
    """`Settings` out of what was typed (by option name, and `store`, `mountpoint`), `-o`, a file.

    Raises:
        ConfigError: a name or a value is wrong, or two do not go together.
        UsageError: something needed is missing.
    """
    layered = split_mount_options(mount_options)
    file = config_file or layered.pop("config", None)
    if file is None and os.path.exists(DEFAULT_FILE):
        file = DEFAULT_FILE
    values: dict[str, object] = {}
    sources: list[tuple[str, Mapping[str, object]]] = [("--", typed), ("-o ", layered)]
    if isinstance(file, str):
        sources.append((f"{file}: ", load_file(file)))
    for source, given in sources:
        for name, value in given.items():
            if name in _POSITIONAL:
                values.setdefault(name, os.path.abspath(str(_read(name, _path, source, value))))
                continue
            option = _BY_NAME[name]
            if option.field not in values:
                value = _collected(option, value)
                read = _read(name, option.read, source, value)
                values[option.field] = os.path.abspath(str(read)) if option.is_path else read
    values.setdefault("name", default_node_name())
    values.setdefault("allow_other", os.geteuid() == 0)
    values.setdefault("foreground", command == "agent")
    # The service manager's directory for this unit: systemd.exec(5), StateDirectory=.
    state_directory = os.environ.get("STATE_DIRECTORY", "").partition(":")[0]
    if command == "agent" and state_directory:
        values.setdefault("store", state_directory)
    if "store" not in values:
        raise UsageError(f"{command}: it needs a STORE; see replfs {command} --help")
    try:
        settings = msgspec.convert({"command": command, **values}, Settings)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error)) from None
    _check_together(settings)
    return settings


def _collected(option: Option, value: object) -> object:
    """Several texts of a repeated option as its reader wants them."""
    if option.field == "none_patterns" and isinstance(value, list):
        return [pattern for text in value for pattern in str(text).split(":")]
    return value


def _read(name: str, read: Reader, source: str, value: object) -> object:
    try:
        return read(value)
    except ValueError as error:
        raise ConfigError(f"{source}{name}: it {error}") from None


def default_node_name() -> str:
    """The host's name, made fit to be a node's."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", os.uname().nodename).lstrip("._-")
    return name[:NAME_SIZE_MAX] or "node"


def _check_together(settings: Settings) -> None:
    if settings.command == "mount" and settings.mountpoint is None:
        raise UsageError("mount: it needs a MOUNTPOINT; see replfs mount --help")
    if settings.command == "agent" and settings.listen is None and not settings.peers:
        raise UsageError("agent: it needs --listen ENDPOINT, such as tcp://0.0.0.0:4710")
    if settings.writeback and settings.policy == "strict":
        raise ConfigError("writeback: policy strict refuses it; choose one of the two")
    if settings.ack == "close" and settings.policy == "strict":
        raise ConfigError("ack: policy strict refuses close; choose one of the two")
    if settings.strict_peers is not None and 0 < len(settings.peers) < settings.strict_peers:
        raise ConfigError(
            f"strict-peers: it cannot be {settings.strict_peers}: only {len(settings.peers)} "
            f"{'peer is' if len(settings.peers) == 1 else 'peers are'} configured"
        )
    check_nesting(settings.store, settings.mountpoint)


def check_nesting(store: str, mountpoint: str | None) -> None:
    """Neither path may lie inside the other; they may be equal. Both are absolute.

    Raises:
        UsageError: one does.
    """
    if mountpoint is None or mountpoint == store:
        return
    if mountpoint.startswith(store.rstrip("/") + "/"):
        raise UsageError(
            f"MOUNTPOINT {mountpoint} is inside STORE {store}; "
            "mount it outside, or over STORE itself"
        )
    if store.startswith(mountpoint.rstrip("/") + "/"):
        raise UsageError(
            f"STORE {store} is inside MOUNTPOINT {mountpoint} and would be covered; "
            "mount it elsewhere, or over STORE itself"
        )
