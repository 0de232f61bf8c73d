"""The unstable set: it covers all that was applied since the last common checkpoint, or says so."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from replfs.core import ops, splitter
from replfs.core.dirty import DirtyLog
from replfs.core.regions import REGION_SIZE
from replfs.core.unstable import FILES_MAX, Unstable

OBJECTS = [bytes([n]) * 16 for n in range(1, 5)]
OBJECT = st.sampled_from(OBJECTS)
NAME = st.sampled_from([b"a", b"b"])
OFFSET = st.integers(0, 70 * REGION_SIZE)
LENGTH = st.integers(1, 3 * REGION_SIZE)
ATTRIBUTES = ops.Attributes(0o100644, 0, 0, 0, 5, 0, b"", 0, 0, {})

CHANGE = st.one_of(
    st.builds(ops.Write, OBJECT, OFFSET, st.just(0)),
    st.builds(ops.Truncate, OBJECT, OFFSET, st.just(0)),
    st.builds(
        ops.Make, OBJECT, OBJECT, NAME, st.sampled_from([0o100644, 0o040755]), st.just(0),
        st.just(0), st.just(0), st.just(b""), st.just(0), st.just(0),
    ),
    st.builds(ops.Link, OBJECT, OBJECT, NAME, st.just(0)),
    st.builds(ops.Unlink, OBJECT, OBJECT, NAME, st.booleans(), st.just(0)),
    st.builds(
        ops.Rename, OBJECT, OBJECT, NAME, OBJECT, NAME, st.just(b""), st.booleans(), st.just(0),
        st.just(0),
    ),
    st.builds(ops.SetAttr, OBJECT),
    st.builds(ops.Place, OBJECT, OBJECT, NAME, st.just(ATTRIBUTES), st.just([])),
    st.builds(ops.Gather, OBJECT, st.just([b"a", b"b"]), st.just([b"", b""])),
    st.builds(ops.Clear, OBJECT, NAME),
    st.builds(ops.Data, OBJECT, OFFSET),
    st.builds(ops.Data, OBJECT, OFFSET, LENGTH),
    st.builds(ops.Finish, OBJECT, st.just(ATTRIBUTES)),
)  # fmt: skip


def locate(object_id):
    return b"at " + object_id


def expected(op, length):
    """What *op* changes, as marks: for bulk operations by the plainest rule."""
    log = DirtyLog()
    match op:
        case ops.Place() | ops.Clear():
            log.mark_name(op.parent, op.name)
        case ops.Gather():
            for name in op.names:
                log.mark_name(op.parent, name)
        case ops.Data():
            log.mark_data(op.object, op.offset, op.offset + (op.hole or length))
        case ops.Finish():
            log.mark_attrs(op.object)
        case _:
            splitter.mark(log, op, locate, length=length)
    return log


def covers(log, other):
    """Whether all marks of *other* are marks of *log*, too."""
    for object_id in other.objects():
        marks = other.marks(object_id)
        if marks.attrs and log.attrs_are_clean(object_id):
            return False
        for first, last in other.runs(object_id):
            for region in range(first, last):
                if log.data_is_clean(object_id, region * REGION_SIZE, (region + 1) * REGION_SIZE):
                    return False
        if marks.tail >= 0 and not 0 <= log.marks(object_id).tail <= marks.tail:
            return False
        if any(log.name_is_clean(object_id, name) for name in marks.names or ()):
            return False
    return True


class Machine(RuleBasedStateMachine):
    """Random operations and checkpoints, some of which fail, against plain lists of their marks."""

    def __init__(self):
        super().__init__()
        self.unstable = Unstable()
        self.noted, self.flushing, self.apart = [], None, []
        self.begun = False

    @rule(op=CHANGE, length=LENGTH)
    def note(self, op, length):
        self.unstable.note(op, locate, length=length)
        self.noted.append(expected(op, length))

    @rule(op=CHANGE, length=LENGTH)
    def note_soon(self, op, length):
        self.unstable.note_soon(op, locate, length=length)
        self.noted.append(expected(op, length))

    @rule()
    def catch_up(self):
        self.unstable.catch_up()

    @rule()
    def begin(self):
        self.unstable.begin()
        self.flushing = (self.flushing or []) + self.noted
        self.begun = True
        self.noted = []

    @rule(everywhere=st.booleans())
    def settle(self, everywhere):
        self.unstable.settle(everywhere=everywhere)
        if self.flushing is None:
            return
        self.apart = [] if everywhere else self.apart + self.flushing
        self.flushing = None

    @rule(object_id=OBJECT)
    def forget(self, object_id):
        self.unstable.forget(object_id)

        for log in (*self.noted, *(self.flushing or ()), *self.apart):
            log.forget(object_id)

    @invariant()
    def all_that_is_unstable_is_known(self):
        found = self.unstable.snapshot(everywhere=False)
        if found is not None:
            assert all(covers(found, log) for log in self.noted + (self.flushing or []))
        if not self.begun:
            assert found is None
        wide = self.unstable.snapshot(everywhere=True)
        if wide is not None:
            logs = self.noted + (self.flushing or []) + self.apart
            assert all(covers(wide, log) for log in logs)

    @invariant()
    def nothing_stable_is_left(self):
        found = self.unstable.snapshot(everywhere=False)
        if found is not None and not self.noted and not self.flushing:
            assert found.is_empty
        if self.unstable.is_empty:
            assert found is not None
            assert found.is_empty


TestUnstable = Machine.TestCase


def write(offset, object_id=OBJECTS[0]):
    return ops.Write(object_id, offset, 0)


def test_nothing_is_known_before_the_first_common_checkpoint():
    unstable = Unstable()
    unstable.note(write(0), locate, length=1)
    assert unstable.snapshot(everywhere=False) is None
    unstable.begin()
    # What came before is not stable yet, and part of it is not known.
    assert unstable.snapshot(everywhere=False) is None
    unstable.settle(everywhere=True)
    assert unstable.snapshot(everywhere=True).is_empty
    assert unstable.is_empty


def test_a_checkpoint_that_failed_drops_nothing():
    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    unstable.note(write(0), locate, length=1)
    unstable.begin()
    unstable.note(write(5 * REGION_SIZE), locate, length=1)
    unstable.begin()
    assert list(unstable.snapshot(everywhere=False).runs(OBJECTS[0])) == [(0, 1), (5, 6)]
    unstable.settle(everywhere=True)
    assert unstable.is_empty


def test_what_is_stable_on_the_primary_and_not_on_every_peer_is_kept_for_a_promotion():
    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    unstable.note(write(0), locate, length=1)
    unstable.begin()
    unstable.settle(everywhere=False)
    assert unstable.snapshot(everywhere=False).is_empty
    assert list(unstable.snapshot(everywhere=True).runs(OBJECTS[0])) == [(0, 1)]


def test_a_rename_tells_anew_where_a_file_is():
    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    unstable.note(write(0), lambda _: b"old", length=1)
    rename = ops.Rename(OBJECTS[0], OBJECTS[1], b"a", OBJECTS[2], b"b", b"", False, 0, 0)
    unstable.note(rename, lambda object_id: b"new " + object_id)
    found = unstable.snapshot(everywhere=False)
    assert found.marks(OBJECTS[0]).handle == b"new " + OBJECTS[0]


def test_where_an_object_is_is_asked_once_a_checkpoint():
    asked = []

    def ask(object_id):
        asked.append(object_id)
        return b"handle"

    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    for offset in range(10):
        unstable.note(write(offset * REGION_SIZE), ask, length=1)
    assert asked == [OBJECTS[0]]


@pytest.mark.parametrize("everywhere", [False, True])
def test_beyond_its_bound_it_says_that_it_does_not_know(everywhere):
    unstable = Unstable(limit=3)
    unstable.begin()
    unstable.settle(everywhere=True)
    for number in range(1, 5):
        unstable.note(write(0, bytes([number]) * 16), locate, length=1)
    assert unstable.snapshot(everywhere=everywhere) is None
    assert not unstable.is_empty
    unstable.begin()
    unstable.settle(everywhere=everywhere)
    assert unstable.snapshot(everywhere=False).is_empty
    assert (unstable.snapshot(everywhere=True) is None) == (not everywhere)


def test_of_many_files_made_in_one_go_it_says_that_it_does_not_know():
    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    for number in range(FILES_MAX):
        unstable.note_file(OBJECTS[0], b"", b"name", b"%016d" % number, b"handle")
    found = unstable.snapshot(everywhere=False)
    assert found.marks(b"%016d" % 7).handle == b"handle"
    assert found.marks(b"%016d" % 7).tail == 0
    assert not found.name_is_clean(OBJECTS[0], b"name")
    unstable.note_file(OBJECTS[0], b"", b"name", b"one too many    ", b"handle")
    assert not unstable.is_known
    assert unstable.snapshot(everywhere=False) is None
    unstable.begin()
    unstable.settle(everywhere=True)
    assert unstable.is_known
    assert unstable.snapshot(everywhere=True).is_empty


def test_what_it_lost_track_of_is_not_known_until_the_next_checkpoint():
    unstable = Unstable()
    unstable.begin()
    unstable.settle(everywhere=True)
    unstable.lose_track()
    unstable.note(write(0), locate, length=1)
    unstable.note_soon(write(0), locate, length=1)
    assert unstable.snapshot(everywhere=False) is None
    unstable.begin()
    assert unstable.snapshot(everywhere=False) is None
    unstable.settle(everywhere=True)
    assert unstable.snapshot(everywhere=True).is_empty
