"""What a call on an object waits for: the replication policy and the acknowledgement level.

Both are set per file and per directory and are inherited. They are resolved when asked, from the
object upwards, so that a change on a directory takes effect at once on everything below it.
`POLICIES` is the whole of what differs between policies: no other module branches on a policy's
name where one of its columns answers the question.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

import msgspec


class Policy(enum.IntEnum):
    """When a change may return to the application. The values are on disk and on the wire."""

    INHERIT = 0
    SYNC = 1
    STRICT = 2
    ASYNC = 3
    NONE = 4


class Ack(enum.IntEnum):
    """How far a confirmation may be put off. The values are on disk and on the wire."""

    INHERIT = 0
    OP = 1
    """Every operation is confirmed before it returns."""
    CLOSE = 2
    """Sent at once and in order; confirmed together at close, fsync, rename and link."""


class Behaviour(msgspec.Struct, frozen=True, gc=False):
    """The columns in which policies differ."""

    replicated: bool
    """The object is kept on the peers."""
    waits: bool
    """A change returns only once the peers that are in sync have applied it."""
    confirmed: bool
    """A change that the peers asked for have not confirmed is an error to the caller."""
    may_defer: bool
    """`Ack.CLOSE` and the kernel's write-back cache are allowed."""


POLICIES: Final[dict[Policy, Behaviour]] = {
    #                        replicated    waits        confirmed        may_defer
    Policy.SYNC: Behaviour(replicated=True, waits=True, confirmed=False, may_defer=True),
    Policy.STRICT: Behaviour(replicated=True, waits=True, confirmed=True, may_defer=False),
    Policy.ASYNC: Behaviour(replicated=True, waits=False, confirmed=False, may_defer=True),
    Policy.NONE: Behaviour(replicated=False, waits=False, confirmed=False, may_defer=True),
}

SOURCE_LOCAL: Final = "local"
SOURCE_DEFAULT: Final = "default"
SOURCE_POLICY: Final = "policy"
"""The acknowledgement level follows from the policy, whatever is set."""
SOURCE_INHERITED: Final = "inherited:"
"""Followed by the path, from the mount's root, of the directory the value comes from."""

_Setting = TypeVar("_Setting", Policy, Ack)


def policy_name(policy: Policy) -> str:
    """The word a person uses for *policy*: `sync`, `strict`, `async`, `none`, `inherit`."""
    return policy.name.lower()


def ack_name(ack: Ack) -> str:
    """The word a person uses for *ack*: `op`, `close`, `inherit`."""
    return ack.name.lower()


POLICY_NAMES: Final[tuple[str, ...]] = tuple(policy_name(policy) for policy in Policy)
ACK_NAMES: Final[tuple[str, ...]] = tuple(ack_name(ack) for ack in Ack)

_POLICY_BY_WORD: Final = {policy_name(policy).encode(): policy for policy in Policy}
_ACK_BY_WORD: Final = {ack_name(ack).encode(): ack for ack in Ack}


def parse(value: bytes) -> Policy:
    """The policy named by the value of a `user.replfs.policy` xattr.

    One trailing newline or NUL is forgiven: shells and C programs add them.

    Raises:
        ValueError: the value names no policy; the caller of setxattr(2) sees EINVAL.
    """
    policy = _POLICY_BY_WORD.get(_word(value))
    if policy is None:
        raise ValueError(f"no such policy: {value[:40]!r}; it is one of {', '.join(POLICY_NAMES)}")
    return policy


def parse_ack(value: bytes) -> Ack:
    """The acknowledgement level named by the value of a `user.replfs.ack` xattr.

    Raises:
        ValueError: the value names no level; the caller of setxattr(2) sees EINVAL.
    """
    ack = _ACK_BY_WORD.get(_word(value))
    if ack is None:
        raise ValueError(
            f"no such acknowledgement level: {value[:40]!r}; it is one of {', '.join(ACK_NAMES)}"
        )
    return ack


def effective(own_chain: Iterable[tuple[str, Policy]], default: Policy) -> tuple[Policy, str]:
    """The policy that counts, and where it comes from.

    Args:
        own_chain: (path, own policy) of the object, then of its parent, and so on to the root.
            It is read no further than the first that is not `INHERIT`.
        default: the mount's; not `INHERIT`.

    Returns:
        The policy, never `INHERIT`, and its source: `local`, `inherited:/path` or `default`.

    Raises:
        ValueError: *default* is `INHERIT`.
    """
    return _resolve(own_chain, default)


def effective_ack(
    own_chain: Iterable[tuple[str, Ack]], default: Ack, policy: Policy
) -> tuple[Ack, str]:
    """The acknowledgement level that counts under the effective *policy*, and its source.

    A policy that may not defer is always confirmed per operation, whatever is set: the source is
    then `policy`.
    """
    if not POLICIES[policy].may_defer:
        return Ack.OP, SOURCE_POLICY
    return _resolve(own_chain, default)


def is_link_allowed(source: Policy, target: Policy) -> bool:
    """Whether link(2) may add a name in *target* to an object reached through *source*.

    Both are effective policies of directories. A link between a replicated and an unreplicated
    directory would give one object two answers; the caller sees EXDEV.
    """
    return POLICIES[source].replicated == POLICIES[target].replicated


def _resolve(own_chain: Iterable[tuple[str, _Setting]], default: _Setting) -> tuple[_Setting, str]:
    if default == 0:
        raise ValueError("the default has nothing to inherit from")
    source = SOURCE_LOCAL
    for depth, (path, setting) in enumerate(own_chain):
        if setting != 0:
            if depth > 0:
                source = SOURCE_INHERITED + path
            return setting, source
    return default, SOURCE_DEFAULT


def _word(value: bytes) -> bytes:
    return value[:-1] if value[-1:] in {b"\n", b"\0"} else value


class NamePatterns:
    """Names that are `none` by the configuration: `*.tmp`, or, for directories only, `cache/`.

    Patterns are a shell's (`*`, `?`, `[...]`), for one name, and tell upper case from lower.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.patterns = tuple(patterns)
        self._any: list[tuple[Callable[[str], object], str]] = []
        self._directories: list[tuple[Callable[[str], object], str]] = []
        for pattern in self.patterns:
            matches = re.compile(fnmatch.translate(pattern.removesuffix("/"))).match
            self._directories.append((matches, pattern))
            if not pattern.endswith("/"):
                self._any.append((matches, pattern))

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def match(self, name: bytes, *, directory: bool) -> str:
        """The first pattern that *name* matches, or an empty text."""
        patterns = self._directories if directory else self._any
        if patterns:
            text = name.decode("utf-8", "surrogateescape")
            for matches, pattern in patterns:
                if matches(text):
                    return pattern
        return ""


NO_PATTERNS: Final = NamePatterns()
