"""How a value is read, wherever it was given.

Every reader takes what a source gave (text, or a TOML value) and returns what `Settings` holds, or
raises ValueError with half a sentence that follows the option's name.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

NAME_SIZE_MAX: Final = 64

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


class PeerSetting(msgspec.Struct, frozen=True):
    """A peer as it was typed: `[NAME=]ENDPOINT`."""

    name: str
    endpoint: str


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
    return PeerSetting(parse_node_name(name), parse_endpoint(endpoint))


def default_peer_name(endpoint: str) -> str:
    """What a peer is called when it was given no name."""
    name = endpoint.partition("://")[2].strip("/").replace("/", "-")
    return name[-NAME_SIZE_MAX:]


def is_node_name(text: str) -> bool:
    """Whether a node may be called so."""
    return _NAME.fullmatch(text) is not None and len(text) <= NAME_SIZE_MAX


def parse_node_name(value: object) -> str:
    """What a node may be called."""
    if not isinstance(value, str) or not is_node_name(value):
        raise ValueError(
            f"cannot be {value!r}; write letters, digits, '.', '-' and '_', at most {NAME_SIZE_MAX}"
        )
    return value


def parse_listen(value: object) -> str:
    """As `parse_endpoint`, to listen at: port 0 is any."""
    return parse_endpoint(value, listen=True)


def parse_address(value: object) -> str:
    """`HOST:PORT` of this machine; an IPv6 address stands in brackets."""
    text = value if isinstance(value, str) else ""
    host, colon, port = text.rpartition(":")
    is_bracketed = host.startswith("[") and host.endswith("]")
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not host or not is_port or "/" in host or (":" in host and not is_bracketed):
        raise ValueError(f"cannot be {value!r}; write ADDRESS:PORT, such as 127.0.0.1:9942")
    return text


def parse_path(value: object) -> str:
    """A path, as it was given."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"cannot be {value!r}; write a path")
    return value


def parse_patterns(value: object) -> tuple[str, ...]:
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


def parse_peers(value: object) -> tuple[PeerSetting, ...]:
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


def between(read: Callable[[object], float], low: float, high: float, words: str) -> Reader:
    """Reads as *read*, *low* to *high*; *words* say so."""

    def bounded(value: object) -> float:
        number = read(value)
        if not low <= number <= high:
            raise ValueError(f"cannot be {value}: it must be {words}")
        return number

    return bounded


def integer(low: int, high: int) -> Reader:
    """Reads a whole number from *low* to *high*."""

    def read(value: object) -> int:
        text = str(value)
        if isinstance(value, bool) or re.fullmatch(r"[0-9]{1,18}", text) is None:
            raise ValueError(f"cannot be {value!r}; write a whole number")
        if not low <= int(text) <= high:
            raise ValueError(f"cannot be {text}: it must be {low} to {high}")
        return int(text)

    return read


def default_node_name() -> str:
    """The host's name, made fit to be a node's."""
    name = re.sub(r"[^A-Za-z0-9._-]", "-", os.uname().nodename).lstrip("._-")
    return name[:NAME_SIZE_MAX] or "node"
