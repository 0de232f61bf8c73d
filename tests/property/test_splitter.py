"""The splitter: what is marked is never sent, and the log covers all that an operation did."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replfs.core import ops, splitter
from replfs.core.dirty import DirtyLog
from replfs.core.regions import REGION_SIZE

OBJECTS = [bytes([n]) * 16 for n in range(1, 5)]
NAMES = [b"a", b"b", b"\xff" * 255]
OBJECT = st.sampled_from(OBJECTS)
NAME = st.sampled_from(NAMES)
OFFSET = st.one_of(
    st.integers(0, 5 * REGION_SIZE),
    st.integers(0, 6).map(lambda n: n * REGION_SIZE),
    st.just((1 << 63) - ops.PAYLOAD_MAX),
)
LENGTH = st.one_of(st.integers(1, 3 * REGION_SIZE), st.just(ops.PAYLOAD_MAX))
TYPE = st.sampled_from([0o100644, 0o040755, 0o120777, 0o010600, 0o020600])

WRITE = st.builds(ops.Write, OBJECT, OFFSET, st.integers())
TRUNCATE = st.builds(ops.Truncate, OBJECT, OFFSET, st.integers())
ATTRS = st.one_of(
    st.builds(ops.SetAttr, OBJECT),
    st.builds(ops.SetXattr, OBJECT, st.just(b"user.a"), st.just(b"")),
    st.builds(ops.RemoveXattr, OBJECT, st.just(b"user.a")),
    st.builds(ops.SetPolicy, OBJECT, st.just(1), st.just(0)),
)
MAKE = st.builds(
    ops.Make, OBJECT, OBJECT, NAME, TYPE, st.just(0), st.just(0), st.just(0), st.just(b""),
    st.just(0), st.just(0),
)  # fmt: skip
LINK = st.builds(ops.Link, OBJECT, OBJECT, NAME, st.just(0))
UNLINK = st.builds(ops.Unlink, OBJECT, OBJECT, NAME, st.booleans(), st.just(0))
RENAME = st.builds(
    ops.Rename, OBJECT, OBJECT, NAME, OBJECT, NAME, st.one_of(OBJECT, st.just(b"")),
    st.booleans(), st.just(0), st.just(0),
)  # fmt: skip
CHANGE = st.one_of(WRITE, TRUNCATE, ATTRS, MAKE, LINK, UNLINK, RENAME)
BARRIER = st.one_of(
    st.builds(ops.Sync, OBJECT, st.booleans()), st.builds(ops.Checkpoint, st.just(b"g" * 16))
)
STEP = st.tuples(CHANGE, LENGTH, st.one_of(st.none(), OFFSET))


def locate(object_id):
    return b"at " + object_id


def all_steps(log, steps):
    for op, length, start in steps:
        splitter.mark(log, op, locate, length=length, start=start)


def effects(op, length, start):
    """Questions about the peer that *op* makes the answer to uncertain: (question, arguments)."""
    match op:
        case ops.Write():
            first = op.offset if start is None else min(start, op.offset)
            return [("data", op.object, first, op.offset + length), ("attrs", op.object)]
        case ops.Truncate():
            first = op.size if start is None else min(start, op.size)
            return [("data", op.object, first, None), ("attrs", op.object)]
        case ops.Make():
            found = [("name", op.parent, op.name), ("attrs", op.parent), ("attrs", op.object)]
            return found + (
                [("data", op.object, 0, None)] if op.mode & 0o170000 == 0o100000 else []
            )
        case ops.Link() | ops.Unlink():
            return [("name", op.parent, op.name), ("attrs", op.parent)]
        case ops.Rename():
            return [
                ("name", op.parent, op.name),
                ("name", op.new_parent, op.new_name),
                ("attrs", op.parent),
                ("attrs", op.new_parent),
            ]
        case ops.SetAttr() | ops.SetXattr() | ops.RemoveXattr() | ops.SetPolicy():
            return [("attrs", op.object)]
        case _:
            return []


def is_clean(log, effect):
    kind, *arguments = effect
    ask = {"data": log.data_is_clean, "name": log.name_is_clean, "attrs": log.attrs_are_clean}
    return ask[kind](*arguments)


@given(CHANGE, LENGTH, st.one_of(st.none(), OFFSET))
def test_what_is_marked_is_not_sent(op, length, start):
    log = DirtyLog()
    assert splitter.is_clean(log, op)
    splitter.mark(log, op, locate, length=length, start=start)
    assert not splitter.is_clean(log, op)


@given(st.lists(STEP, max_size=6), STEP)
def test_the_log_covers_all_that_was_marked(steps, last):
    """Whatever else is marked before or after, nothing that an operation did becomes clean."""
    log = DirtyLog()
    all_steps(log, [*steps, last])
    for op, length, start in [*steps, last]:
        for effect in effects(op, length, start):
            assert not is_clean(log, effect), (op, effect)


@given(st.lists(STEP, min_size=1, max_size=6))
def test_marking_again_adds_nothing(steps):
    once, twice = DirtyLog(), DirtyLog()
    all_steps(once, steps)
    all_steps(twice, [*steps, *steps])
    assert shape(once) == shape(twice)


@given(st.lists(STEP, max_size=6), st.randoms(use_true_random=False))
def test_order_does_not_matter(steps, random):
    """Marks only add up: what a peer lacks does not depend on the order in which it missed it."""
    mixed = list(steps)
    random.shuffle(mixed)
    first, second = DirtyLog(), DirtyLog()
    all_steps(first, steps)
    all_steps(second, mixed)
    assert shape(first) == shape(second)


def shape(log):
    """All that a log says, without its versions."""
    found = {}
    for object_id in log.objects():
        marks = log.marks(object_id)
        regions = list(log.dirty_regions(object_id, 8 * REGION_SIZE))
        names = sorted(marks.names or ())
        found[object_id] = (marks.flags, marks.tail, regions, names, marks.handle)
    return found


@given(CHANGE, LENGTH)
def test_a_mark_says_where_the_object_is(op, length):
    log = DirtyLog()
    splitter.mark(log, op, locate, length=length)
    for object_id in log.objects():
        assert log.marks(object_id).handle == locate(object_id)


@given(BARRIER, st.lists(STEP, max_size=3))
def test_a_barrier_is_always_sent_and_marks_nothing(op, steps):
    log = DirtyLog()
    all_steps(log, steps)
    before = shape(log)
    assert splitter.is_clean(log, op)
    splitter.mark(log, op, locate)
    assert shape(log) == before


@given(CHANGE, STEP)
def test_what_is_sent_touches_nothing_that_is_marked(op, step):
    """`is_clean` looks at all that an operation needs on the peer, not at a part of it.

    For a write that is its first byte here: its length is known to the caller, who asks the log.
    """
    log = DirtyLog()
    all_steps(log, [step])
    if splitter.is_clean(log, op):
        needed = [one for one in effects(op, 1, None) if one[0] != "attrs"]
        if isinstance(op, ops.Make):
            needed = [one for one in needed if one[0] == "name"]
        assert all(is_clean(log, one) for one in needed)


@pytest.mark.parametrize("removal", [False, True])
def test_a_name_may_be_marked_for_removal(removal):
    log = DirtyLog()
    splitter.mark_name(log, OBJECTS[0], b"a", locate, removal=removal)
    assert log.is_removal(OBJECTS[0], b"a") is removal
    assert not log.name_is_clean(OBJECTS[0], b"a")


def test_with_every_name_unknown_no_name_is_sent():
    log = DirtyLog()
    log.mark_names_all(OBJECTS[0])
    made = ops.Make(OBJECTS[1], OBJECTS[0], b"new", 0o100644, 0, 0, 0, b"", 0, 0)
    assert not splitter.is_clean(log, made)


def test_a_write_of_nothing_marks_the_attributes():
    log = DirtyLog()
    splitter.mark(log, ops.Write(OBJECTS[0], 5, 0), locate, length=0)
    assert not log.attrs_are_clean(OBJECTS[0])
