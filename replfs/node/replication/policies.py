"""Policies of the objects of a mounted volume: asking, setting, and what a change of name means.

The rules are `core.policy`'s; here they meet inodes. An object's own policy stands in its record;
the effective one is resolved upwards when asked, and cached until any policy or any name with a
policy below it changes.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from replfs.core import policy as rules
from replfs.core.policy import NO_PATTERNS, POLICIES, Ack, NamePatterns, Policy
from replfs.store.inode import Inode
from replfs.store.syscalls import failure
from replfs.store.tree import Tree

_POLICY: Final = b"user.replfs.policy"
_ACK: Final = b"user.replfs.ack"
_EFFECTIVE: Final = b"user.replfs.policy.effective"
_SOURCE: Final = b"user.replfs.policy.source"
_ACK_EFFECTIVE: Final = b"user.replfs.ack.effective"
_ACK_SOURCE: Final = b"user.replfs.ack.source"


_epochs = itertools.count(1)
"""One for all: inodes stay known over changes of role, and with them what was resolved before."""


class RenamePlan(NamedTuple):
    """What a rename means on the peers."""

    local: bool
    """Nothing: neither name is replicated."""
    crossing: bool
    """An object appears or vanishes there, though here it only moves."""
    crossed: tuple[Inode, ...]
    """Those of which that is true."""
    appears: tuple[Inode, ...]
    """Objects that the peers do not have, and shall."""
    vanishes: bool
    """What stood under the old name is to be removed there."""


class Policies:
    """Effective policies of the inodes of *tree*."""

    def __init__(
        self,
        tree: Tree,
        default: Policy,
        default_ack: Ack,
        *,
        used: bool,
        on_used: Callable[[], None],
        generation: Callable[[], bytes],
        patterns: NamePatterns = NO_PATTERNS,
    ) -> None:
        """*used*: some object has, or once had, a policy of its own; *on_used* remembers that.

        *patterns*: names that are `none` where their objects have no policy of their own.
        """
        self._tree = tree
        self.default = default
        self.default_ack = default_ack
        self._is_deferred_by_default = default_ack == Ack.CLOSE and _is_awaited_later(default)
        self.writeback = False
        """The kernel keeps written data back, so that no write can be `strict`."""
        self._patterns = patterns
        self._remembered = used
        self._used = used or bool(patterns)
        self._on_used = on_used
        self._epoch = next(_epochs)
        self.generation = generation

    def effective(self, inode: Inode) -> int:
        """The policy that an object is treated by, never INHERIT.

        Below a directory of policy `none` nothing is on the peers, whatever it says itself: there
        this is NONE. An object with several names is on the peers while one of them is; while only
        some of them are known it is taken to be there, see `is_undecided`.
        """
        if not self._used:
            return self.default
        cached = inode.resolved
        if cached is not None and cached[0] == self._epoch:
            return cached[1]
        chain = []
        found: int = self.default
        ack: int = self.default_ack
        one: Inode | None = inode
        while one is not None:
            cached = one.resolved
            if cached is not None and cached[0] == self._epoch:
                _, found, ack = cached
                break
            chain.append(one)
            one = one.parent
        for one in reversed(chain):
            self._tree.read_record(one)
            if self._pattern(one.name, one):
                found = Policy.NONE
            if found == Policy.NONE and one.policy != Policy.NONE and not one.is_directory:
                found = self._by_other_names(one)
                if found == Policy.NONE and self._has_unseen_names(one):
                    return one.policy or self._visible
                if one.parent is not None and one.parent.resolved is not None:
                    ack = one.parent.resolved[2]
            if one.policy and (found != Policy.NONE or one.parent is None):
                found = one.policy
            if one.ack:
                ack = one.ack
            resolved = self._epoch, found, ack
            above = one.parent.resolved if one.parent is not None else None
            one.resolved = above if above == resolved else resolved  # one for a whole tree
        return found

    def is_deferred(self, inode: Inode, policy: int) -> bool:
        """Whether the object's changes, under its effective *policy*, are awaited together."""
        if not self._used:
            return self._is_deferred_by_default
        cached = inode.resolved
        if cached is None or cached[0] != self._epoch or cached[2] != Ack.CLOSE:
            return False  # what `effective` could not decide is not deferred
        return _is_awaited_later(policy)

    @property
    def _visible(self) -> int:
        return self.default if POLICIES[self.default].replicated else Policy.SYNC

    def _by_other_names(self, inode: Inode) -> int:
        """What the directories of an object's further names say; one on the peers comes first."""
        for parent, name in inode.names()[1:]:
            if self._pattern(name, inode):
                continue
            found = self.effective(parent)
            if found != Policy.NONE:
                inode.prefer(parent, name)
                return found
        return Policy.NONE

    def _has_unseen_names(self, inode: Inode) -> bool:
        return inode.named and self._tree.stat(inode).st_nlink > len(inode.names())

    def is_undecided(self, inode: Inode) -> bool:
        """No known name of the object is on the peers, but it has names that nobody looked up."""
        if not self._used or inode.is_directory or self.effective(inode) == Policy.NONE:
            return False
        return not any(
            self._replicated(parent) and not self._pattern(name, inode)
            for parent, name in inode.names()
        )

    def _pattern(self, name: bytes, inode: Inode) -> str:
        """The pattern that makes a name of the object `none`, or an empty text."""
        if not self._patterns or inode.policy:
            return ""
        return self._patterns.match(name, directory=inode.is_directory)

    def is_none_by_itself(self, name: bytes, policy: int, *, directory: bool) -> bool:
        """Whether an object with this own policy is `none`, whatever directory it is in."""
        if policy:
            return policy == Policy.NONE
        return bool(self._patterns) and bool(self._patterns.match(name, directory=directory))

    def _chain(self, inode: Inode) -> Iterator[tuple[str, Policy]]:
        one: Inode | None = inode
        while one is not None:
            self._tree.read_record(one)
            own = Policy.NONE if self._pattern(one.name, one) else Policy(one.policy)
            yield "/" + os.fsdecode(one.path()), own
            one = one.parent

    def source(self, inode: Inode) -> str:
        """Where it comes from: `local`, `pattern:*.tmp`, `inherited:/path` or `default`."""
        self._tree.read_record(inode)
        pattern = self._pattern(inode.name, inode)
        if pattern:
            return f"pattern:{pattern}"
        return rules.effective(self._chain(inode), self.default)[1]

    def changed(self) -> None:
        """A policy was set: nothing cached counts any more."""
        self._epoch = next(_epochs)
        self._used = True
        if not self._remembered:
            self._remembered = True
            self._on_used()

    def moved(self, *inodes: Inode | None) -> None:
        """These have other parents now."""
        if self._used and any(inode is not None for inode in inodes):
            self._epoch = next(_epochs)

    def child(self, directory: Inode, name: bytes) -> Inode | None:
        """What the peers shall have under a name; None: nothing.

        Raises:
            OSError: it cannot be read.
        """
        tree = self._tree
        try:
            inode = tree.lookup(directory, name)[0]
        except OSError as error:
            if error.errno in {errno.ENOENT, errno.ENOTDIR}:
                return None
            raise
        tree.read_record(inode)
        if inode.foreign or not self.is_replicated_name(directory, name, inode):
            tree.drop_unused(inode)
            return None
        return inode

    def readable_child(self, directory: Inode, name: bytes) -> Inode | None:
        """As `child`; None also where that cannot be read."""
        try:
            return self.child(directory, name)
        except OSError:
            return None

    def is_replicated_name(self, parent: Inode, name: bytes, inode: Inode) -> bool:
        """Whether the peers have this name: its directory is replicated, it and its object are."""
        return self.is_replicated_entry(parent, name, inode.policy, directory=inode.is_directory)

    def is_replicated_entry(self, parent: Inode, name: bytes, own: int, *, directory: bool) -> bool:
        """As `is_replicated_name`, of an object with this policy of its own."""
        if not self._used:
            return POLICIES[self.default].replicated
        return self._replicated(parent) and not self.is_none_by_itself(
            name, own, directory=directory
        )

    @property
    def replicates_all(self) -> bool:
        """No object here, and no name, is kept from the peers by a policy."""
        return not self._used and POLICIES[self.default].replicated

    def _replicated(self, inode: Inode) -> bool:
        return POLICIES[Policy(self.effective(inode))].replicated

    def link_crosses(self, inode: Inode, parent: Inode, name: bytes) -> bool:
        """Whether a link would give one object two answers."""
        if not self._used:
            return False
        self._tree.read_record(inode)
        if inode.parent is not None and (
            bool(self._pattern(inode.name, inode)) != bool(self._pattern(name, inode))
        ):
            return True
        above = inode.parent or parent
        return not rules.is_link_allowed(
            Policy(self.effective(above)), Policy(self.effective(parent))
        )

    def plan_rename(
        self,
        parent: Inode,
        name: bytes,
        new_parent: Inode,
        new_name: bytes,
        inode: Inode,
        replaced: Inode | None,
        *,
        exchange: bool,
    ) -> RenamePlan:
        """What the move means on the peers; asked before it is made."""
        if not self._used:
            replicated = POLICIES[self.default].replicated
            return RenamePlan(
                not replicated, crossing=False, crossed=(), appears=(), vanishes=False
            )
        old = self.is_replicated_name(parent, name, inode)
        new = self.is_replicated_name(new_parent, new_name, inode)
        there = replaced is not None and self.is_replicated_name(new_parent, new_name, replaced)
        appears = [inode] if new and not old else []
        crossed = [inode] if new != old else []
        if exchange and replaced is not None:
            back = self.is_replicated_name(parent, name, replaced)
            if back and not there:
                appears.append(replaced)
            if back != there:
                crossed.append(replaced)
        replaced_differs = replaced is not None and there != new
        return RenamePlan(
            local=not old and not new and not there and not appears,
            crossing=bool(crossed) or replaced_differs,
            crossed=tuple(crossed),
            appears=tuple(appears),
            vanishes=old and not new,
        )

    # The xattrs --------------------------------------------------------------------------------

    def virtual_xattr(self, inode: Inode, name: bytes) -> bytes | None:
        """The value of a policy xattr; None for names that are not about policy."""
        if name == _POLICY:
            self._tree.read_record(inode)
            if not inode.policy:
                raise failure(errno.ENODATA)
            return rules.policy_name(Policy(inode.policy)).encode()
        if name == _ACK:
            self._tree.read_record(inode)
            if not inode.ack:
                raise failure(errno.ENODATA)
            return rules.ack_name(Ack(inode.ack)).encode()
        if name == _EFFECTIVE:
            declared, _ = rules.effective(self._chain(inode), self.default)
            return rules.policy_name(declared).encode()
        if name == _SOURCE:
            return os.fsencode(self.source(inode))
        if name == _ACK_EFFECTIVE:
            return rules.ack_name(self._effective_ack(inode)[0]).encode()
        if name == _ACK_SOURCE:
            return os.fsencode(self._effective_ack(inode)[1])
        return None

    def _effective_ack(self, inode: Inode) -> tuple[Ack, str]:
        chain = []
        one: Inode | None = inode
        while one is not None:
            self._tree.read_record(one)
            chain.append(("/" + os.fsdecode(one.path()), Ack(one.ack)))
            one = one.parent
        policy = Policy(self.effective(inode))
        return rules.effective_ack(chain, self.default_ack, policy)

    def parse(
        self, inode: Inode, name: bytes, value: bytes | None, uid: int, found: os.stat_result
    ) -> tuple[Policy, Ack]:
        """Policy and acknowledgement level after setting (or, with None, removing) an xattr.

        Errors: EOPNOTSUPP for read-only and unknown names, EPERM for others than the owner and
        root, EINVAL for a bad value and for one that cannot be had together with what is there,
        ENODATA where there is nothing to remove.
        """
        if name not in {_POLICY, _ACK}:
            raise failure(errno.EOPNOTSUPP)
        if uid not in {0, found.st_uid}:
            raise failure(errno.EPERM)
        self._tree.read_record(inode)
        policy, ack = Policy(inode.policy), Ack(inode.ack)
        if value is None:
            if not (policy if name == _POLICY else ack):
                raise failure(errno.ENODATA)
            value = b"inherit"
        try:
            if name == _POLICY:
                policy = rules.parse(value)
                contradicts = not _is_deferrable(policy) and (ack == Ack.CLOSE or self.writeback)
            else:
                ack = rules.parse_ack(value)
                contradicts = ack == Ack.CLOSE and not _is_deferrable(self.effective(inode))
        except ValueError:
            raise failure(errno.EINVAL) from None
        if contradicts:
            raise failure(errno.EINVAL)
        return policy, ack


def _is_deferrable(policy: int) -> bool:
    """Whether a change may return before it is confirmed; of INHERIT nothing is known."""
    return not policy or POLICIES[Policy(policy)].may_defer


def _is_awaited_later(policy: int) -> bool:
    """Whether a change that is let go early is awaited all the same."""
    return POLICIES[Policy(policy)].waits and _is_deferrable(policy)
