"""The dirty region log against a model made of plain sets, and what it saves against itself."""

from __future__ import annotations

import errno
import itertools
from contextlib import nullcontext

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from replfs.core import regions as sets
from replfs.core.dirty import DirtyLog
from replfs.core.marks import (
    ALL_NAMES,
    DropAll,
    DropName,
    DropObject,
    SaveName,
    SaveObject,
    SaveRegions,
)
from replfs.core.regions import CHUNK_REGIONS, REGION_LIMIT, REGION_SIZE

OBJECTS = [bytes([n]) * 16 for n in range(4)]
NAMES = [b"a", b"b", b"\xff" * 255]
INFINITE = 1 << 40

# Around what the representation depends on: an int's 64 regions, chunks, and small files.
REGION = st.one_of(
    st.integers(0, 8),
    st.integers(60, 68),
    st.integers(CHUNK_REGIONS - 3, CHUNK_REGIONS + 3),
    st.integers(3 * CHUNK_REGIONS - 2, 3 * CHUNK_REGIONS + 2),
)
LENGTH = st.one_of(st.integers(1, 5), st.sampled_from([64, CHUNK_REGIONS, 2 * CHUNK_REGIONS + 1]))
OBJECT = st.sampled_from(OBJECTS)
NAME = st.sampled_from(NAMES)
OFFSET_IN_REGION = st.sampled_from([0, 1, REGION_SIZE - 1])


class Disk:
    """A journal that keeps rows, can lose what was saved lazily, and can be full."""

    def __init__(self):
        self.behind = False
        self.is_full = False
        self.loses = False
        self.rows = {}

    def together(self):
        return nullcontext()

    def __call__(self, changes, *, lazily=False):
        if lazily and self.loses:
            return
        if self.is_full and not lazily:
            raise OSError(errno.ENOSPC, "full")
        for change in changes:
            match change:
                case SaveRegions(object_id, chunk, b""):
                    self.rows.pop(("r", object_id, chunk), None)
                case SaveRegions(object_id, chunk, saved):
                    assert len(saved) <= 32
                    self.rows["r", object_id, chunk] = change
                case SaveObject(object_id):
                    self.rows["o", object_id] = change
                case SaveName(directory, name):
                    self.rows["n", directory, name] = change
                case DropName(directory, name):
                    self.rows.pop(("n", directory, name), None)
                case DropObject(object_id):
                    self.rows = {key: row for key, row in self.rows.items() if key[1] != object_id}
                case DropAll():
                    self.rows.clear()
                case _:
                    raise TypeError(change)

    def load(self):
        log = DirtyLog()
        for kind in "orn":
            for key, row in self.rows.items():
                if key[0] == kind:
                    log.restore(row)
        return log


class Model:
    """One object's marks, naively. A tail is a start; regions are below it."""

    def __init__(self):
        self.regions = set()
        self.tail = None
        self.attrs = self.compare = self.deep = self.own = False
        self.changed_regions = set()
        self.changed_tail = None
        self.names = {}  # name -> [removal, gathered]

    def is_dirty(self, region):
        return region in self.regions or (self.tail is not None and region >= self.tail)

    @property
    def data(self):
        return bool(self.regions) or self.tail is not None

    @property
    def is_clean(self):
        return not (self.data or self.attrs or self.names)

    @property
    def changed(self):
        return self.own or not self.compare

    def is_changed(self, region):
        """Whether it is known to be changed, and not just unknown."""
        tail = self.changed_tail
        return region in self.changed_regions or (tail is not None and region >= tail)

    def change(self, first, last):
        """Of what is marked [first, last) was changed; *last* None: and all that follows."""
        if last is not None:
            self.changed_regions |= set(range(first, last))
        elif self.changed_tail is None or first < self.changed_tail:
            self.changed_tail = first

    def clear(self, first, last):
        """Nothing in [first, last) is dirty any more."""
        self.changed_regions = {r for r in self.changed_regions if not first <= r < last}
        if self.changed_tail is not None and first <= self.changed_tail < last:
            self.changed_tail = None if last == INFINITE else last

    def mark(self, *, compare=False):
        """Attributes, with what else is marked; *compare*: that may be equal."""
        was_changed = not self.compare and (self.attrs or self.data)
        if (compare or self.compare) and (not compare or was_changed):
            self.own = True
        self.attrs = True
        self.compare |= compare

    def settle(self):
        if not self.data:
            self.compare = self.own = False
        if ALL_NAMES not in self.names:
            self.deep = False


class DirtyLogMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.disk = Disk()
        self.log = DirtyLog(self.disk)
        self.model = {object_id: Model() for object_id in OBJECTS}
        self.tokens = []  # (object, token, {marked regions, tails, names, attrs} since)

    @initialize(loses=st.booleans())
    def choose(self, loses):
        self.disk.loses = loses

    def _since(self, object_id, what):
        for token in self.tokens:
            if token[0] == object_id:
                token[2].append(what)

    # Marks

    @rule(
        object_id=OBJECT, first=REGION, length=LENGTH, head=OFFSET_IN_REGION, tail=OFFSET_IN_REGION,
        compare=st.booleans(),
    )  # fmt: skip
    def mark_data(self, object_id, first, length, head, tail, compare):
        start = first * REGION_SIZE + head
        stop = (first + length - 1) * REGION_SIZE + tail + 1
        if stop <= start:
            stop = start + 1
        self.log.mark_data(object_id, start, stop, compare=compare)
        model = self.model[object_id]
        end = (stop - 1) // REGION_SIZE + 1
        model.mark(compare=compare)
        model.regions |= {r for r in range(first, end) if not model.is_dirty(r)}
        if not compare:
            model.change(first, end)
        self._since(object_id, ("data", first, end))

    @rule(object_id=OBJECT, first=REGION, compare=st.booleans())
    def mark_tail(self, object_id, first, compare):
        self.log.mark_tail(object_id, first * REGION_SIZE + 5, compare=compare)
        model = self.model[object_id]
        model.mark(compare=compare)
        if model.tail is None or first < model.tail:
            model.tail = first
            model.regions = {r for r in model.regions if r < first}
        if not compare:
            model.change(first, None)
        self._since(object_id, ("data", first, INFINITE))

    @rule(object_id=OBJECT)
    def mark_attrs(self, object_id):
        self.log.mark_attrs(object_id)
        self.model[object_id].mark()
        self._since(object_id, ("attrs",))

    @rule(object_id=OBJECT, name=NAME, removal=st.booleans())
    def mark_name(self, object_id, name, removal):
        self.log.mark_name(object_id, name, removal=removal)
        model = self.model[object_id]
        model.names[name] = [removal, False]
        model.attrs = True
        self._since(object_id, ("name", name))

    @rule(object_id=OBJECT, deep=st.booleans())
    def mark_names_all(self, object_id, deep):
        self.log.mark_names_all(object_id, deep=deep)
        model = self.model[object_id]
        model.names[ALL_NAMES] = [False, False]
        model.attrs = True
        model.deep |= deep
        self._since(object_id, ("name", ALL_NAMES))

    @rule(object_id=OBJECT, first=REGION, name=NAME)
    def mark_on_a_full_disk(self, object_id, first, name):
        """What could not be saved is not marked, unless it was marked before."""
        model = self.model[object_id]
        self.disk.is_full = True
        try:
            start = first * REGION_SIZE
            is_marked = model.is_dirty(first) and (model.is_changed(first) or not model.compare)
            if is_marked and model.attrs:
                self.log.mark_data(object_id, start, start + 1)
                self._since(object_id, ("data", first, first + 1))
            else:
                with pytest.raises(OSError, match="full"):
                    self.log.mark_data(object_id, start, start + 1)
            if name in model.names and model.attrs:
                self.log.mark_name(object_id, name, removal=model.names[name][0])
                model.names[name][1] = False
                self._since(object_id, ("name", name))
            else:
                with pytest.raises(OSError, match="full"):
                    self.log.mark_name(object_id, name)
        finally:
            self.disk.is_full = False

    # Clears

    @rule(object_id=OBJECT)
    def take_token(self, object_id):
        self.tokens.append((object_id, self.log.mark_version(object_id), []))

    def _token(self, data, object_id):
        """A token of this object, or none, and what was marked since."""
        choices = [(None, ())] + [t[1:] for t in self.tokens if t[0] == object_id]
        return data.draw(st.sampled_from(choices))

    @rule(object_id=OBJECT, first=REGION, length=st.one_of(st.none(), LENGTH), data=st.data())
    def clear_regions(self, object_id, first, length, data):
        version, since = self._token(data, object_id)
        last = None if length is None else first + length
        done = self.log.clear_regions(object_id, first, last, version=version)
        model = self.model[object_id]
        end = INFINITE if last is None else last
        touched = any(m[0] == "data" and m[1] < end and first < m[2] for m in since)
        assert done == (model.is_clean or not touched)
        if done:
            model.regions = {r for r in model.regions if not first <= r < end}
            model.clear(first, end if model.tail is None else min(end, model.tail))
            model.settle()

    @rule(object_id=OBJECT, up_to=st.one_of(st.none(), REGION), data=st.data())
    def clear_tail(self, object_id, up_to, data):
        version, since = self._token(data, object_id)
        model = self.model[object_id]
        done = self.log.clear_tail(object_id, up_to, version=version)
        if model.tail is None or (up_to is not None and up_to <= model.tail):
            assert done
            return
        end = INFINITE if up_to is None else up_to
        touched = any(m[0] == "data" and m[1] < end and model.tail < m[2] for m in since)
        assert done == (not touched)
        if done:
            model.clear(model.tail, end)
            model.tail = up_to
            model.settle()

    @rule(object_id=OBJECT, data=st.data())
    def clear_attrs(self, object_id, data):
        version, since = self._token(data, object_id)
        model = self.model[object_id]
        done = self.log.clear_attrs(object_id, version=version)
        assert done == (not model.attrs or not since)
        if done:
            model.attrs = False

    @rule(object_id=OBJECT, name=st.one_of(NAME, st.just(ALL_NAMES)), data=st.data())
    def clear_name(self, object_id, name, data):
        version, since = self._token(data, object_id)
        model = self.model[object_id]
        done = self.log.clear_name(object_id, name, version=version)
        assert done == (name not in model.names or ("name", name) not in since)
        if done:
            model.names.pop(name, None)
            model.settle()

    @rule(object_id=OBJECT, name=NAME, data=st.data())
    def set_gathered(self, object_id, name, data):
        version, since = self._token(data, object_id)
        model = self.model[object_id]
        done = self.log.set_gathered(object_id, name, version=version)
        assert done == (name in model.names and ("name", name) not in since)
        if done:
            model.names[name][1] = True

    @rule(object_id=OBJECT)
    def forget(self, object_id):
        self.log.forget(object_id)
        self.model[object_id] = Model()

    @precondition(lambda self: not self.log.is_empty)
    @rule()
    def discard(self):
        self.log.discard()
        self.model = {object_id: Model() for object_id in OBJECTS}

    @rule()
    def copy(self):
        """Absorbing a log gives its marks."""
        other = DirtyLog()
        other.absorb(self.log)
        self._compare(other, gathered=False)

    # Checks

    @rule(object_id=OBJECT, first=REGION, length=LENGTH, head=OFFSET_IN_REGION)
    def ask(self, object_id, first, length, head):
        model = self.model[object_id]
        start, stop = first * REGION_SIZE + head, (first + length) * REGION_SIZE - 1
        dirty = [model.is_dirty(r) for r in range(first, first + length)]
        if stop > start:
            assert self.log.data_is_clean(object_id, start, stop) == (not any(dirty))
            parts = self.log.split(object_id, start, stop)
            assert parts[0][0] == start
            assert parts[-1][1] == stop
            for (_, end, clean), (begin, _, other) in itertools.pairwise(parts):
                assert end == begin
                assert clean != other
            for begin, end, clean in parts:
                for region in range(begin // REGION_SIZE, (end - 1) // REGION_SIZE + 1):
                    assert clean == (not model.is_dirty(region))
        ahead = any(r >= first for r in model.regions) or model.tail is not None
        assert self.log.data_is_clean(object_id, start, None) == (not ahead)
        assert self.log.data_is_clean(object_id, start, start)

    @rule(object_id=OBJECT, size=REGION, limit=st.sampled_from([1, 7, INFINITE]))
    def walk(self, object_id, size, limit):
        model = self.model[object_id]
        found = set()
        previous = -1
        for first, last in self.log.dirty_regions(object_id, size * REGION_SIZE - 3, limit=limit):
            assert previous <= first < last <= first + limit
            found |= set(range(first, last))
            previous = last
        assert found == {r for r in range(size) if model.is_dirty(r)}

    def _compare(self, log, *, gathered=True, extra=False):
        """*extra*: the log may hold more than the model, never less."""
        for object_id, model in self.model.items():
            marks = log.marks(object_id)
            if not extra:
                assert log.object_is_clean(object_id) == model.is_clean
                assert (marks is None) == model.is_clean
            if marks is None:
                assert model.is_clean
                continue
            pairs = [
                (marks.attrs, model.attrs),
                (marks.compare, model.compare),
                (marks.deep, model.deep),
                (marks.data, model.data),
                (marks.names_all, ALL_NAMES in model.names),
            ]
            for name in NAMES:
                dirty = name in model.names or ALL_NAMES in model.names
                pairs.append((not log.name_is_clean(object_id, name), dirty))
            for region in model.regions | {r + 1 for r in model.regions} | {0}:
                start = region * REGION_SIZE
                clean = log.data_is_clean(object_id, start, start + 1)
                pairs.append((not clean, model.is_dirty(region)))
            for actual, expected in pairs:
                assert actual == expected or (extra and actual)
            if extra:
                continue  # what a lost clear left may stand for what was changed since
            for region in model.changed_regions | {model.changed_tail or 0, 0}:
                start = region * REGION_SIZE
                if model.is_dirty(region):
                    ((_, _, is_clean),) = log.split_changed(object_id, start, start + 1)
                    assert is_clean != (model.is_changed(region) or not model.compare)
            assert marks.changed == model.changed
            assert marks.tail == (-1 if model.tail is None else model.tail)
            assert set(marks.names or {}) == set(model.names)
            for name, (removal, is_gathered) in model.names.items():
                assert log.is_removal(object_id, name) == removal
                assert log.is_gathered(object_id, name) == (is_gathered and gathered)
        if extra:
            return
        models = self.model.items()
        assert log.is_empty == all(model.is_clean for model in self.model.values())
        assert log.dirty_files == sum(model.data for model in self.model.values())
        pending = {(d, n) for d, model in models for n in model.names if n}
        assert log.dirty_names == len(pending)
        assert set(log.names_pending()) == pending
        assert set(log.removals()) == {(d, n) for d, n in pending if self.model[d].names[n][0]}
        assert set(log.directories_unknown()) == {d for d, m in models if ALL_NAMES in m.names}
        assert set(log.objects()) == {o for o, model in models if not model.is_clean}
        assert set(log.objects_with_data()) == {o for o, model in models if model.data}
        assert set(log.objects_with_attrs()) == {o for o, model in models if model.attrs}
        regions = sum(
            len(model.regions) + (model.tail is not None) for model in self.model.values()
        )
        assert log.dirty_bytes == regions * REGION_SIZE

    @invariant()
    def is_as_the_model(self):
        self._compare(self.log)
        gathered = {
            (d, n)
            for d, model in self.model.items()
            for n, (_, g) in model.names.items()
            if n and g
        }
        assert set(self.log.ungathered()) == set(self.log.names_pending()) - gathered

    @invariant()
    def what_is_saved_is_no_less(self):
        """A restart finds every mark; and no other, unless lazily saved clears were lost."""
        self._compare(self.disk.load(), gathered=False, extra=self.disk.loses)


TestDirtyLog = DirtyLogMachine.TestCase
TestDirtyLog.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_iteration_tolerates_changes():
    log = DirtyLog()
    for number in range(6):
        object_id = bytes([number]) * 16
        log.mark_data(object_id, 0, 1)
        log.mark_name(object_id, b"x")
        log.mark_name(object_id, b"y")
    seen = []
    for object_id in log.objects_with_data():
        seen.append(object_id)
        log.forget(bytes([5]) * 16)
        log.mark_data(bytes([99]) * 16, 0, 1)
        log.clear_regions(object_id, 0, None)
    assert seen == [bytes([number]) * 16 for number in range(5)]
    names = []
    for directory, name in log.names_pending():
        names.append((directory, name))
        log.clear_name(directory, b"y")
    assert names == [(bytes([number]) * 16, b"x") for number in range(5)]


def test_beyond_the_limit_everything_is_one_tail():
    log = DirtyLog()
    far = REGION_LIMIT * REGION_SIZE
    object_id = OBJECTS[0]
    log.mark_data(object_id, (1 << 62) - 10, 1 << 62)
    assert log.marks(object_id).tail == REGION_LIMIT
    assert not log.data_is_clean(object_id, (1 << 62) + 99, (1 << 62) + 100)
    assert log.data_is_clean(object_id, far - 10, far)
    log.mark_data(object_id, far - 1, far + 1)
    assert log.marks(object_id).tail == REGION_LIMIT - 1
    assert not log.data_is_clean(object_id, far - 10, far)
    # The last region that is told apart.
    log = DirtyLog()
    log.mark_data(object_id, far - 1, far)
    assert log.marks(object_id).tail == -1
    assert log.data_is_clean(object_id, far, None)
    assert log.data_is_clean(object_id, far, far + 1)
    assert list(log.dirty_regions(object_id, far + 5)) == [(REGION_LIMIT - 1, REGION_LIMIT)]
    assert log.clear_regions(object_id, 5, None)
    assert not log.marks(object_id).data


def test_a_token_outlives_neither_many_objects_nor_many_marks():
    log = DirtyLog()
    object_id = OBJECTS[0]
    token = log.mark_version(object_id)
    log.mark_data(object_id, 0, 1)
    assert not log.marked_since(object_id, token, 7, 8)
    for number in range(100):
        log.mark_version(number.to_bytes(16, "big"))
    assert log.marked_since(object_id, token, 7, 8)
    token = log.mark_version(object_id)
    assert not log.marked_since(object_id, token, 7, 8)
    for region in range(100, 3000):
        log.mark_data(object_id, region * REGION_SIZE, region * REGION_SIZE + 1)
    assert log.marked_since(object_id, token, 7, 8)
    assert not log.marked_since(object_id, log.mark_version(object_id), 7, 8)


def test_size_hints_count_in_dirty_bytes():
    log = DirtyLog()
    log.mark_tail(OBJECTS[0], REGION_SIZE, size=10 * REGION_SIZE)
    assert log.dirty_bytes == 9 * REGION_SIZE
    log.clear_tail(OBJECTS[0], 4)
    assert log.dirty_bytes == 6 * REGION_SIZE
    log.mark_unknown(OBJECTS[1], directory=False, size=1)
    assert log.dirty_bytes == 7 * REGION_SIZE
    assert log.marks(OBJECTS[1]).compare
    log.mark_unknown(OBJECTS[2], directory=True, deep=True)
    assert log.marks(OBJECTS[2]).deep
    assert log.marks(OBJECTS[2]).names_all
    log.clear_tail(OBJECTS[0], None)
    log.clear_tail(OBJECTS[1], None)
    assert log.dirty_bytes == 0


def test_handles_are_kept_until_changed():
    disk = Disk()
    log = DirtyLog(disk)
    log.mark_data(OBJECTS[0], 0, 1, handle=b"one")
    log.mark_data(OBJECTS[0], 0, 1)
    log.mark_attrs(OBJECTS[0])
    assert disk.load().marks(OBJECTS[0]).handle == b"one"
    log.mark_data(OBJECTS[0], 0, 1, handle=b"two")
    log.mark_name(OBJECTS[1], b"n", handle=b"dir")
    assert disk.load().marks(OBJECTS[0]).handle == b"two"
    assert disk.load().marks(OBJECTS[1]).handle == b"dir"


def test_a_mark_that_is_there_writes_nothing():
    calls = []

    class Counting(Disk):
        def __call__(self, changes, *, lazily=False):
            calls.append(changes)

    journal = Counting()
    log = DirtyLog(journal)
    log.mark_data(OBJECTS[0], 0, 4096, handle=b"h")
    log.mark_name(OBJECTS[1], b"n")
    done = len(calls)
    log.mark_data(OBJECTS[0], 100, 8192, handle=b"h")
    log.mark_name(OBJECTS[1], b"n")
    log.mark_attrs(OBJECTS[0])
    assert len(calls) == done
    # But where marks in memory are not saved yet, each is an occasion to save them.
    journal.behind = True
    log.mark_data(OBJECTS[0], 100, 8192, handle=b"h")
    log.mark_name(OBJECTS[1], b"n")
    log.mark_attrs(OBJECTS[0])
    assert len(calls) == done + 3


@given(st.sets(st.integers(0, 5000)), st.integers(0, 5), st.integers(0, 6000), st.integers(0, 3000))
def test_a_chunk_is_what_it_was(members, chunk, first, length):
    regions: sets.Regions = 0
    for member in members:
        regions = sets.add(regions, member, member + 1)
    saved = sets.encode_chunk(regions, chunk, first, first + length)
    base = chunk * CHUNK_REGIONS
    expected = {
        r for r in members | set(range(first, first + length)) if base <= r < base + CHUNK_REGIONS
    }
    if not expected:
        assert saved == b""
        return
    runs = list(sets.decode_chunk(saved, chunk))
    assert {r for low, high in runs for r in range(low, high)} == expected


@given(st.binary(max_size=80), st.integers(-2, 1 << 40))
def test_a_damaged_chunk_is_a_value_error(saved, chunk):
    try:
        for first, last in sets.decode_chunk(saved, chunk):
            assert chunk * CHUNK_REGIONS <= first < last <= (chunk + 1) * CHUNK_REGIONS
    except ValueError:
        pass
