"""The policy table, the words for it, and inheritance."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replfs.core import policy
from replfs.core.policy import Ack, Policy
from replfs.node.mounted.volume import Volume
from replfs.node.replication.policies import Policies
from replfs.store.activity import KIND_ATTRS, KIND_NAMES
from replfs.store.record import ROOT_ID
from replfs.store.tree import Tree


def test_values_are_those_on_disk_and_on_the_wire():
    assert [int(p) for p in Policy] == [0, 1, 2, 3, 4]
    assert [p.name for p in Policy] == ["INHERIT", "SYNC", "STRICT", "ASYNC", "NONE"]
    assert [int(a) for a in Ack] == [0, 1, 2]
    assert [a.name for a in Ack] == ["INHERIT", "OP", "CLOSE"]


def test_the_table_has_every_policy_but_inherit():
    assert set(policy.POLICIES) == set(Policy) - {Policy.INHERIT}


@pytest.mark.parametrize("setting", list(Policy))
@pytest.mark.parametrize("tail", [b"", b"\n", b"\0"])
def test_every_policy_is_parsed_from_its_own_name(setting, tail):
    assert policy.parse(policy.policy_name(setting).encode() + tail) is setting


@pytest.mark.parametrize("setting", list(Ack))
def test_every_level_is_parsed_from_its_own_name(setting):
    assert policy.parse_ack(policy.ack_name(setting).encode()) is setting


@pytest.mark.parametrize("value", [b"", b"SYNC", b"sync ", b"sync\n\n", b"\n", b"1", b"\xff" * 9])
def test_anything_else_is_an_error_that_names_the_choices(value):
    with pytest.raises(ValueError, match="sync, strict, async, none"):
        policy.parse(value)
    with pytest.raises(ValueError, match="op, close"):
        policy.parse_ack(value)


@given(st.binary(max_size=20))
def test_parse_raises_nothing_but_value_error(value):
    try:
        found = policy.parse(value)
    except ValueError:
        return
    assert policy.policy_name(found).encode() == value.rstrip(b"\n\0")


def test_own_value_counts_first():
    chain = [("/a/f", Policy.ASYNC), ("/a", Policy.NONE), ("/", Policy.STRICT)]
    assert policy.effective(chain, Policy.SYNC) == (Policy.ASYNC, "local")


def test_nearest_ancestor_counts_next():
    chain = [("/a/b/f", Policy.INHERIT), ("/a/b", Policy.INHERIT), ("/a", Policy.NONE)]
    assert policy.effective([*chain, ("/", Policy.STRICT)], Policy.SYNC) == (
        Policy.NONE,
        "inherited:/a",
    )


def test_default_counts_last():
    assert policy.effective([("/f", Policy.INHERIT)], Policy.STRICT) == (Policy.STRICT, "default")
    assert policy.effective([], Policy.STRICT) == (Policy.STRICT, "default")


def test_the_chain_is_not_read_further_than_needed():
    def chain():
        yield "/f", Policy.SYNC
        raise RuntimeError("read on")

    assert policy.effective(chain(), Policy.NONE)[0] is Policy.SYNC


def test_default_must_not_inherit():
    with pytest.raises(ValueError, match="nothing to inherit"):
        policy.effective([], Policy.INHERIT)


@given(st.lists(st.sampled_from(Policy)), st.sampled_from([p for p in Policy if p]))
def test_effective_is_the_first_that_is_set(settings, default):
    chain = [(f"/{depth}", setting) for depth, setting in enumerate(settings)]
    found, source = policy.effective(chain, default)
    set_ones = [(path, setting) for path, setting in chain if setting]
    if not set_ones:
        assert (found, source) == (default, "default")
    elif set_ones[0][0] == "/0":
        assert (found, source) == (set_ones[0][1], "local")
    else:
        assert (found, source) == (set_ones[0][1], f"inherited:{set_ones[0][0]}")


def test_strict_is_always_confirmed_per_operation():
    chain = [("/f", Ack.CLOSE)]
    assert policy.effective_ack(chain, Ack.CLOSE, Policy.STRICT) == (Ack.OP, "policy")
    assert policy.effective_ack(chain, Ack.OP, Policy.SYNC) == (Ack.CLOSE, "local")
    assert policy.effective_ack([("/f", Ack.INHERIT)], Ack.CLOSE, Policy.SYNC) == (
        Ack.CLOSE,
        "default",
    )


@pytest.fixture
def tree(tmp_path):
    """A store with a file `f` in a directory `d`."""
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").touch()
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd)
    yield tree
    tree.close_all()
    os.close(fd)


@pytest.mark.parametrize("directory", [p for p in Policy if p])
@pytest.mark.parametrize("own", [p for p in Policy if p])
def test_a_name_is_replicated_unless_it_or_its_directory_is_none(tree, directory, own):
    policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=True, on_used=lambda: None, generation=lambda: b"g" * 16
    )
    above = tree.lookup(tree.root, b"d")[0]
    file = tree.lookup(above, b"f")[0]
    tree.set_policy(above, directory, Ack.INHERIT)
    tree.set_policy(file, own, Ack.INHERIT)
    assert policies.is_replicated_name(above, b"f", file) == (Policy.NONE not in {directory, own})


@pytest.mark.parametrize(
    ("source", "target", "allowed"),
    [
        (Policy.SYNC, Policy.ASYNC, True),
        (Policy.NONE, Policy.NONE, True),
        (Policy.SYNC, Policy.NONE, False),
        (Policy.NONE, Policy.STRICT, False),
    ],
)
def test_no_link_between_replicated_and_unreplicated(source, target, allowed):
    assert policy.is_link_allowed(source, target) is allowed


def test_what_was_resolved_in_an_earlier_reign_does_not_count(tree):
    """The node was a primary before: the inodes are the same, and the policies another one's."""
    inode = tree.lookup(tree.root, b"d")[0]
    for own in (Policy.NONE, Policy.SYNC):
        policies = Policies(
            tree, Policy.SYNC, Ack.OP, used=True, on_used=lambda: None, generation=lambda: b""
        )
        tree.set_policy(tree.root, own, 0)
        assert policies.effective(inode) == own


@pytest.mark.parametrize("path", ["", "d"])
async def test_where_a_change_may_be_cut_off_the_names_that_it_is_about_are_noted(tree, path):
    """After a kill in it they are compared: of the root those in it, for it has none itself."""
    inode = tree.at(path.encode())
    policies = Policies(
        tree, Policy.SYNC, Ack.OP, used=True, on_used=lambda: None, generation=lambda: b""
    )
    noted = []

    class Pipeline:
        is_over = False
        flights = 0

        def __init__(self):
            self.peers = [self]

        def record(self, mark):
            mark(self)

        async def claim(self, _claims, _kind):
            return None

        def release_claim(self, _ticket):
            pass

        def note(self, touched):
            noted.extend((one.id, kind) for one, kind, _ in touched)
            return []

        def mark_policy_change(self, _inode, *, removal):
            assert removal

    volume: Any = SimpleNamespace(tree=tree, policies=policies, pipeline=Pipeline())
    await Volume.set_policy(volume, inode, Policy.NONE, Ack.INHERIT)
    assert noted == [(inode.id, KIND_ATTRS), (ROOT_ID, KIND_NAMES)]
