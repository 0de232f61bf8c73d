"""The scheduler against a model so plain that it is its own specification.

The model keeps every operation that is not complete, in the order of admission; one may run when
no earlier one conflicts with it. One that runs and claims more goes before all others.
"""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from replfs.core import footprint
from replfs.core.scheduler import END, EXCLUSIVE, RANGE, SHARED, Scheduler

KEYS = ["a", "b", "c", ("a", b"x"), ("a", b"y")]
KINDS = ["write", "unlink", "fsync"]

BYTES = st.integers(0, 12)
RANGES = st.builds(
    lambda start, length: (start, END if length is None else start + length),
    BYTES,
    st.one_of(st.integers(1, 6), st.none()),
)
CLAIM = st.one_of(
    st.tuples(st.sampled_from(KEYS), st.sampled_from([SHARED, EXCLUSIVE]), st.just(0), st.just(0)),
    st.builds(lambda key, ends: (key, RANGE, *ends), st.sampled_from(KEYS[:3]), RANGES),
)
# One claim a key: what `core.footprint` makes is such, see test_footprint.
CLAIMS = st.lists(CLAIM, max_size=4, unique_by=lambda claim: claim[0]).map(tuple)


def conflict(one, other):
    """The table in the scheduler's text, claim by claim."""
    for key, mode, start, stop in one:
        for their_key, their_mode, their_start, their_stop in other:
            if key != their_key:
                continue
            if EXCLUSIVE in (mode, their_mode):
                return True
            if mode == their_mode == RANGE and start < their_stop and their_start < stop:
                return True
    return False


class Model:
    """What is not complete yet, in the order of admission."""

    def __init__(self):
        self.tickets = []

    def behind(self, ticket):
        """Earlier ones that *ticket* has to wait for."""
        earlier = self.tickets[: self.tickets.index(ticket)]
        return [one for one in earlier if conflict(one.claims, ticket.claims)]

    def ready(self):
        return [ticket for ticket in self.tickets if not self.behind(ticket)]


class SchedulerMachine(RuleBasedStateMachine):
    """Admissions and completions in any order that callers can produce."""

    def __init__(self):
        super().__init__()
        self.scheduler = Scheduler()
        self.model = Model()
        self.announced = []
        self.held = Counter()
        self.held_later = False
        self.admitted = 0

    @rule(claims=CLAIMS, kind=st.sampled_from(KINDS))
    def admit(self, claims, kind):
        ticket = self.scheduler.admit(claims, kind)
        self.admitted += 1
        self.model.tickets.append(ticket)
        behind = self.model.behind(ticket)
        assert ticket.waits == len(behind)
        if behind:
            self.held[kind] += 1
        else:
            self.announced.append(ticket)

    @precondition(lambda self: self.announced)
    @rule(data=st.data())
    def complete(self, data):
        ticket = data.draw(st.sampled_from(self.announced), label="complete")
        self.announced.remove(ticket)
        before = {id(one) for one in self.model.ready()}
        self.model.tickets.remove(ticket)
        expected = [one for one in self.model.ready() if id(one) not in before]
        became = list(self.scheduler.complete(ticket))
        # Each exactly once, in the order of admission: nothing is lost or overtaken.
        if self.held_later:
            became.sort(key=self.model.tickets.index)
        assert became == expected
        self.announced += became

    @precondition(lambda self: self.announced)
    @rule(data=st.data(), keys=st.sets(st.sampled_from(KEYS), min_size=1, max_size=3))
    def extend(self, data, keys):
        ticket = data.draw(st.sampled_from(self.announced), label="extend")
        owned = {claim[0]: claim[1] for claim in ticket.claims}
        others = [one for one in self.announced if one is not ticket]
        taken = {claim[0] for one in others for claim in one.claims}
        taken |= {key for key, mode in owned.items() if mode != EXCLUSIVE}
        # What it has exclusively nobody else that is ready has.
        assert self.scheduler.extend(ticket, tuple(keys)) == (not keys & taken)
        if not keys & taken:
            assert {claim[0] for claim in ticket.claims} == owned.keys() | keys
            self.held_later = True
            self.model.tickets.remove(ticket)
            self.model.tickets.insert(0, ticket)

    @invariant()
    def what_may_run_is_what_the_model_says(self):
        assert sorted(map(id, self.announced)) == sorted(map(id, self.model.ready()))

    @invariant()
    def nothing_that_conflicts_runs_together(self):
        for index, one in enumerate(self.announced):
            for other in self.announced[index + 1 :]:
                assert not conflict(one.claims, other.claims)

    @invariant()
    def tickets_know_what_they_wait_for(self):
        for ticket in self.model.tickets:
            assert ticket.waits == len(self.model.behind(ticket))

    @invariant()
    def counters_are_right(self):
        assert self.scheduler.admitted == self.admitted
        assert self.scheduler.in_flight == len(self.model.tickets)
        held = Counter()
        for reason, count in self.scheduler.held.items():
            held[reason.split(" behind ")[0]] += count
        assert held == self.held
        claimed = {claim[0] for ticket in self.model.tickets for claim in ticket.claims}
        assert self.scheduler._lines.keys() == claimed

    def teardown(self):
        """Whatever is left ends: nobody waits for ever, and nothing is remembered."""
        while self.announced:
            self.announced += self.scheduler.complete(self.announced.pop(0))
        assert self.scheduler.in_flight == 0
        assert not self.scheduler._lines


TestScheduler = SchedulerMachine.TestCase


@given(RANGES, RANGES)
def test_ranges_of_one_object_run_together_unless_they_overlap(one, other):
    scheduler = Scheduler()
    scheduler.admit(footprint.data("a", *one), "write")
    second = scheduler.admit(footprint.data("a", *other), "write")
    overlap = max(one[0], other[0]) < min(one[1], other[1])
    assert bool(second.waits) == overlap
    assert scheduler.held == ({"write behind write": 1} if overlap else {})


def test_a_long_line_is_first_in_first_out():
    scheduler = Scheduler()
    tickets = [scheduler.admit(footprint.whole("a"), "setattr") for _ in range(100)]
    running = tickets[0]
    for following in tickets[1:]:
        assert following.waits
        assert list(scheduler.complete(running)) == [following]
        running = following
    assert list(scheduler.complete(running)) == []
    assert scheduler.held == {"setattr behind setattr": 99}


def test_a_barrier_holds_what_comes_after_it():
    scheduler = Scheduler()
    writing = scheduler.admit(footprint.data("a", 0, 10), "write")
    barrier = scheduler.admit(footprint.whole("a"), "fsync")
    later = scheduler.admit(footprint.data("a", 100, 110), "write")
    assert (writing.waits, barrier.waits, later.waits) == (0, 1, 1)
    assert list(scheduler.complete(writing)) == [barrier]
    assert list(scheduler.complete(barrier)) == [later]
