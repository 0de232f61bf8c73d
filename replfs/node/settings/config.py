"""What a node was asked to do, out of everything it was told.

`node.settings.options` is the table of what can be set; `Settings` holds the values and the
defaults. The command line wins over `-o`, and that over the TOML file. An unknown name, a value
that cannot be read, and a value out of bounds are `ConfigError`s that say what to write instead:
there are no silent defaults.

This module looks at no file but the TOML file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from typing import Final, Literal

import msgspec

from replfs.errors import ConfigError, UsageError
from replfs.node.settings.options import (
    BY_NAME,
    MIB,
    OPTIONS,
    POSITIONAL,
    Option,
    look_up,
    unknown,
)
from replfs.node.settings.values import (
    PeerSetting,
    Reader,
    default_node_name,
    parse_bool,
    parse_path,
)

DEFAULT_FILE: Final = "/etc/replfs/replfs.toml"
"""Read when it exists and `--config` names no other file."""

Command = Literal["mount", "agent"]


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


IGNORED_MOUNT_OPTIONS: Final = frozenset(
    (
        "defaults", "auto", "noauto", "user", "nouser", "users", "owner", "group", "nofail", "fail",
        "_netdev", "relatime", "norelatime", "strictatime", "nostrictatime", "diratime",
        "nodiratime", "lazytime", "nolazytime", "async", "loud", "silent", "mand", "nomand",
    )
)  # fmt: skip
"""What mount(8) and fstab(5) write that says nothing to this filesystem."""
_IGNORED_PREFIXES: Final = ("x-", "X-", "comment=", "uhelper=", "helper=")


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
        option, yes = look_up(name, "-o")
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
    known = [option.name for option in OPTIONS if option.everywhere] + list(POSITIONAL)
    for key, value in content.items():
        if key not in known:
            raise ConfigError(f"{path}: {key}: {unknown(key, 'option', known)}")
        is_path = key in POSITIONAL or BY_NAME[key].is_path
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
            if name in POSITIONAL:
                values.setdefault(
                    name, os.path.abspath(str(_read(name, parse_path, source, value)))
                )
                continue
            option = BY_NAME[name]
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
