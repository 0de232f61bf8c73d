"""Links and listeners over real sockets: sessions, answers, windows, cuts, deadlines."""

from __future__ import annotations

import random

import pytest
import trio
from helpers.linkage import WIRES, RecordingSink, object_id, port_of, running_pair, until, write
from helpers.tcp_proxy import TcpProxy

from replfs.core import messages, ops
from replfs.errors import PeerLost, ProtocolError


@pytest.fixture(params=list(WIRES.values()), ids=list(WIRES))
def wires(request):
    return request.param


@pytest.fixture
async def pair(wires):
    async with running_pair(wires=wires) as made:
        yield made


@pytest.fixture
async def direct():
    """A pair for what does not depend on who speaks."""
    async with running_pair() as made:
        yield made


@pytest.fixture
async def hasty(wires):
    """A pair with a short peer timeout, for tests in which it passes."""
    async with running_pair(1.0, wires) as made:
        yield made


async def test_handshake_tells_each_side_who_the_other_is(pair):
    link = await pair.up()
    hello, welcome = pair.applier.hellos[0], pair.owner.welcomes[0]
    assert (hello.name, hello.node, hello.version) == ("primary", b"P" * 16, 1)
    assert (welcome.name, welcome.role, welcome.session) == ("secondary", "secondary", link.session)
    assert welcome.clock_ns > 0
    assert hello.clock_ns > 0
    assert len(pair.applier.hellos) == 1
    assert pair.applier.sessions[0].id == link.session
    assert pair.applier.sessions[0].name == "primary"
    assert pair.listener.statistics().sessions == 1
    assert link.statistics().state == "up"


async def test_operations_are_applied_in_order_and_answered(pair):
    link = await pair.up()
    sinks = []
    for number in range(1, 300):
        op, payload = write(number, number * 10)
        sink = RecordingSink()
        sinks.append((sink, len(payload)))
        assert link.send(op, payload, sink) == number
    await until(lambda: link.outstanding == 0, "all is answered")
    assert [sink.answer for sink, _ in sinks] == [ops.Done(0, size) for _, size in sinks]
    assert all(sink.calls == 1 for sink, _ in sinks)
    assert pair.applier.applied == [(0, n, *write(n, n * 10)) for n in range(1, 300)]


@pytest.mark.parametrize("size", [1, 4096, (512 << 10) - 1, 512 << 10, 1 << 20])
async def test_payloads_of_all_sizes(pair, size):
    link = await pair.up()
    payload = random.Random(size).randbytes(size)
    sink = RecordingSink()
    link.send(ops.Write(object_id(1), 5, 6), payload, sink)
    await until(lambda: sink.calls, "it is answered")
    assert sink.answer == ops.Done(0, size)
    assert pair.applier.applied[0][3] == payload


async def test_streams_are_numbered_and_answered_independently(pair):
    link = await pair.up()
    live, bulk = RecordingSink(), RecordingSink()
    assert link.send(*write(1), live) == 1
    assert link.send(ops.List(object_id(1), b""), None, bulk, messages.BULK) == 1
    assert link.outstanding == 1
    await until(lambda: live.calls and bulk.calls, "both are answered")
    assert isinstance(bulk.answer, ops.Listing)
    assert len(bulk.answer.entries) == 1000
    assert link.outstanding == 0


async def test_many_large_answers(pair):
    link = await pair.up()
    sinks = [RecordingSink() for _ in range(60)]
    for sink in sinks:
        link.send(ops.List(object_id(1), b""), None, sink, messages.BULK)
    await until(lambda: all(sink.calls for sink in sinks), "all are answered")


async def test_each_operation_gets_its_kind_of_answer(pair):
    link = await pair.up()
    attributes = ops.Attributes(0o100644, 1, 2, 0, 3, 4, b"", 0, 0, {b"user.a": b"b"})
    cases = [
        (ops.Place(object_id(1), object_id(2), b"n", attributes, []), ops.Placed(True, False)),
        (ops.Digest(object_id(1), 0, 3, 65536), ops.Digests(b"d" * 48, 7)),
        (ops.EmptyLimbo(), ops.Done(0)),
    ]
    for op, expected in cases:
        sink = RecordingSink()
        link.send(op, None, sink, messages.BULK)
        await until(lambda: sink.calls, "it is answered")  # noqa: B023
        assert sink.answer == expected


async def test_operations_without_answers_leave_the_window(pair):
    link = await pair.up()
    for number in range(1, 2000):
        await link.wait_room()
        link.send(ops.Locate(object_id(number), object_id(0), b"n%d" % number), None, None)
        assert link.outstanding == 0
    await until(lambda: len(pair.applier.applied) == 1999, "all have arrived")


async def test_what_cannot_be_sent_uses_no_number(pair):
    link = await pair.up()
    with pytest.raises(ProtocolError):
        link.send(ops.Write(b"short", 0, 0), b"x", RecordingSink())
    with pytest.raises(ProtocolError):
        link.send(ops.Write(object_id(1), 0, 2**70), b"x", RecordingSink())
    sink = RecordingSink()
    assert link.send(*write(1), sink) == 1
    await until(lambda: sink.calls, "it is answered")
    assert link.statistics().outstanding == 0


async def test_window_is_bounded_and_opens_again(pair):
    pair.applier.defer = lambda _op: True
    link = await pair.up()
    sent = 0
    while link.has_room():
        link.send(*write(sent), RecordingSink())
        sent += 1
    assert sent == 512
    with trio.move_on_after(0.05) as scope:
        await link.wait_room()
    assert scope.cancelled_caught
    await until(lambda: len(pair.applier.applied) == 512, "all have arrived")
    pair.applier.sessions[0].answer(0, 17, ops.Done(0))
    await link.wait_room()
    big = b"x" * (1 << 20)
    for _ in range(32):
        link.send(ops.Write(object_id(1), 0, 0), big, RecordingSink(), 0)
    assert not link.has_room()
    assert link.has_room(messages.BULK)


async def test_pump_delivers_without_the_event_loop(pair):
    link = await pair.up()
    sink = RecordingSink()
    assert link.fd >= 0
    link.send(*write(1), sink)
    await until(lambda: pair.applier.applied, "it has arrived")
    await until(lambda: link.pump() or sink.calls, "pump has something")
    await until(lambda: sink.calls, "it is answered")
    assert link.pump() is False


async def test_deferred_answers_in_any_order(pair):
    pair.applier.defer = lambda op: isinstance(op, ops.Sync)
    link = await pair.up()
    first, second, third = RecordingSink(), RecordingSink(), RecordingSink()
    link.send(ops.Sync(object_id(1), data_only=True), None, first)
    link.send(ops.Sync(object_id(2), data_only=True), None, second)
    link.send(*write(3), third)
    await until(lambda: third.calls, "the write is answered")
    assert not first.calls
    session = pair.applier.sessions[0]
    session.answer(0, 2, ops.Done(5))
    await until(lambda: second.calls, "the second is answered")
    session.answer(0, 1, ops.Done(6))
    session.answer(0, 1, ops.Done(7))  # only the first counts
    await until(lambda: first.calls, "the first is answered")
    assert (first.answer, second.answer) == (ops.Done(6), ops.Done(5))
    assert link.outstanding == 0


async def test_deferred_answers_from_within_apply(pair):
    def answer_at_once(_op: ops.AnyOp) -> None:
        pair.applier.sessions[0].answer(0, len(pair.applier.applied), ops.Done(3))

    pair.applier.defer = lambda _op: True
    pair.applier.on_apply = answer_at_once
    link = await pair.up()
    sinks = [RecordingSink() for _ in range(40)]
    for number, sink in enumerate(sinks):
        link.send(*write(number), sink)
    await until(lambda: link.outstanding == 0, "all are answered")
    assert all(sink.answer == ops.Done(3) for sink in sinks)


async def test_sinks_may_send(pair):
    link = await pair.up()
    numbers = iter(range(2, 200))

    class Chain(RecordingSink):
        def answered(self, link, answer):
            super().answered(link, answer)
            number = next(numbers, None)
            if number is not None:
                link.send(*write(number), Chain())

    link.send(*write(1), Chain())
    await until(lambda: len(pair.applier.applied) == 199, "the chain is through")


async def test_failing_sinks_and_appliers_break_nothing(pair, caplog):
    class Failing(RecordingSink):
        def answered(self, link, answer):
            super().answered(link, answer)
            raise RuntimeError("on purpose")

    def fail(op):
        if op.offset == 2:
            raise RuntimeError("on purpose")

    pair.applier.on_apply = fail
    link = await pair.up()
    sinks = [Failing() for _ in range(3)]
    for number, sink in enumerate(sinks, 1):
        link.send(*write(number), sink)
    await until(lambda: link.outstanding == 0, "all are answered")
    assert [sink.answer.errno for sink in sinks] == [0, 5, 0]
    assert link.is_up


async def test_refused_by_the_listener(pair):
    pair.applier.refuse = ("this is another volume", "unrelated")
    link = pair.dial(await pair.listen())
    await until(lambda: pair.owner.refusals, "it is refused")
    assert pair.owner.refusals[0].reason == "this is another volume"
    assert pair.owner.refusals[0].code == "unrelated"
    assert link.statistics().state == "refused"
    assert not link.is_up
    pair.applier.refuse = ()
    await until(lambda: link.is_up, "it is accepted later")
    assert pair.owner.events == ["up"]


async def test_refused_by_the_owner(pair):
    pair.owner.refuse = "I do not like it"
    link = pair.dial(await pair.listen())
    await until(lambda: pair.owner.refusals, "it is refused")
    await until(lambda: len(pair.applier.events) >= 2, "the listener knows")
    assert pair.owner.events == []
    assert not link.is_up
    assert link.statistics().last_error == "I do not like it"


async def test_nobody_listens_at_first(pair):
    with TcpProxy("127.0.0.1", 1) as proxy:
        port = proxy.port
    link = pair.dial(f"tcp://127.0.0.1:{port}")
    await until(lambda: link.statistics().last_error, "an attempt has failed")
    assert "refused" in link.statistics().last_error
    with pytest.raises(PeerLost):
        link.send(*write(1), RecordingSink())
    with pytest.raises(PeerLost):
        await link.wait_room()
    await pair.listen(f"tcp://127.0.0.1:{port}")
    await until(lambda: link.is_up, "it found the listener")


async def test_a_nonsensical_endpoint_is_an_error_not_a_crash(pair):
    link = pair.dial("tcp://:::nonsense")
    await until(lambda: link.statistics().last_error, "an attempt has failed")
    assert not link.is_up


async def test_fail_loses_everything_in_order(pair):
    pair.applier.defer = lambda _op: True
    link = await pair.up()
    order: list[int] = []

    class Ordered(RecordingSink):
        def __init__(self, number):
            super().__init__()
            self.number = number

        def lost(self, link):
            super().lost(link)
            order.append(self.number)

    sinks = [Ordered(number) for number in range(20)]
    for sink in sinks:
        link.send(*write(sink.number), sink)
    link.fail("the owner says so")
    assert order == list(range(20))
    assert all(sink.down_before for sink in sinks)
    assert pair.owner.events == ["up", "down: the owner says so"]
    assert link.outstanding == 0
    with pytest.raises(PeerLost):
        link.send(*write(1), RecordingSink())
    await until(lambda: link.is_up, "a new session is up")
    assert len(pair.applier.sessions) == 2
    pair.applier.sessions[0].answer(0, 1, ops.Done(0))  # too late: ignored
    assert not any(sink.answer for sink in sinks)


async def test_failing_from_inside_an_answer(pair):
    link = await pair.up()

    class Fatal(RecordingSink):
        def answered(self, link, answer):
            super().answered(link, answer)
            link.fail("enough")

    sinks = [Fatal(), RecordingSink(), RecordingSink()]
    for number, sink in enumerate(sinks):
        link.send(*write(number), sink)
    await until(lambda: all(sink.calls for sink in sinks), "all are settled")
    assert all(sink.calls == 1 for sink in sinks)
    await until(lambda: link.is_up, "a new session is up")


async def test_stopping_says_goodbye(pair):
    link = await pair.up()
    sink = RecordingSink()
    pair.link_scope.cancel()
    await until(lambda: not link.is_up, "the link is down")
    await until(lambda: len(pair.applier.events) == 2, "the listener knows")
    assert pair.applier.events[1] == "closed: the peer: this node ended the session"
    assert pair.owner.events[1:] == ["down: this node ended the session"]
    assert sink.calls == 0


async def test_a_listener_that_stops_says_goodbye(pair):
    link = await pair.up()
    pair.listener_scope.cancel()
    await until(lambda: len(pair.owner.events) == 2, "the link knows")
    assert pair.owner.events[1] == "down: the peer ended the session: the listener stops"
    assert not link.is_up


async def test_a_restarted_listener_knows_no_old_session(pair):
    with TcpProxy("127.0.0.1", port_of(await pair.listen())) as proxy:
        found = []
        link = await pair.up(proxy.endpoint, on_difference=lambda *what: found.append(what))
        pair.applier.defer = lambda _op: True
        sink = RecordingSink()
        link.send(*write(1), sink)
        await until(lambda: pair.applier.applied, "it has arrived")
        first = link.session
        proxy.refuse()
        endpoint = pair.listener.endpoint
        pair.listener_scope.cancel()
        await until(lambda: pair.applier.events[-1].startswith("closed"), "it has stopped")
        await until_bound(pair, endpoint)
        proxy.accept()
        await until(lambda: link.is_up and link.session != first, "a new session is up")
        assert sink.was_lost
        assert pair.owner.events[0] == "up"
        assert pair.owner.events[1].startswith("down: ")
        assert pair.owner.events[2:] == ["up"]
        assert found == []  # nor what was applied in it


async def until_bound(pair, endpoint):
    """Listen on *endpoint* again; ZeroMQ frees an address only some time after a close."""
    with trio.fail_after(60):
        while True:
            try:
                await pair.listen(endpoint)
            except BaseException:
                await trio.sleep(0.02)
            else:
                return


async def test_the_newest_session_wins(pair):
    endpoint = await pair.listen()
    link = await pair.up(endpoint)
    async with running_pair() as other:
        other.owner.fields["name"] = "other"
        newer = await other.up(endpoint)
        await until(lambda: len(pair.owner.events) >= 2, "the first is told")
    reason = "other began a new session"
    assert pair.owner.events[1] == f"down: the peer ended the session: {reason}"
    assert pair.applier.events[:3] == ["opened", f"closed: {reason}", "opened"]
    assert newer is not link


async def test_what_was_applied_in_a_lost_session_is_held_against_what_was_sent(direct):
    """Also of what the peer had applied and not answered, on either stream, once."""
    found = []
    direct.applier.defer = lambda op: isinstance(op, ops.Sync)
    link = await direct.up(on_difference=lambda *what: found.append(what))

    async def work():
        """Some is answered, some accepted, and of the rest nobody knows."""
        sinks = [RecordingSink() for _ in range(3)]
        session = len(direct.applier.sessions)
        link.send(*write(1), sinks[0])
        link.send(ops.Sync(object_id(1), False), None, sinks[1])
        link.send(ops.List(object_id(1), b""), None, sinks[2], messages.BULK)
        await until(lambda: sinks[0].calls and sinks[2].calls, "it is answered")
        link.send(*write(2), RecordingSink())
        assert len(direct.applier.sessions) == session
        return direct.applier.sessions[-1]

    async def lose():
        lost = link.session
        link.fail("lost")
        await until(lambda: link.is_up and link.session != lost, "a new session is up")

    await work()
    await lose()
    assert found == []
    (await work()).lanes[messages.BULK].checksum ^= 1
    await lose()
    what = "of 1 operations, others were applied than were sent"
    assert found == [(messages.BULK, what)]
    await lose()
    assert len(found) == 1
    live = (await work()).lanes[messages.LIVE]
    await until(lambda: live.applied == 3, "all has arrived")
    live.applied = 0
    await lose()
    (stream, what) = found[1]
    assert stream == messages.LIVE
    assert "3 operations may have been applied, and 0 were" in what


async def test_what_was_in_dispute_in_a_session_is_not_compared_again(direct):
    found = []
    link = await direct.up(on_difference=lambda *what: found.append(what))
    for first in (True, False):
        lost = link.session
        direct.applier.sessions[-1].lanes[messages.LIVE].checksum ^= 1
        (link.disagreed if first else link.fail)("over")
        await until(lambda: link.is_up and link.session != lost, "a new session is up")  # noqa: B023
        assert len(found) == int(not first)


async def test_a_session_closed_by_the_applier(pair):
    link = await pair.up()
    first = link.session
    pair.applier.sessions[0].close("promoted")
    await until(lambda: link.is_up and link.session != first, "a new session is up")
    assert pair.owner.events[1] == "down: the peer ended the session: promoted"


@pytest.mark.parametrize("seed", range(4))
async def test_exactly_once_over_cuts(pair, seed):
    """Connections are torn at arbitrary bytes; still each operation is applied once, in order."""
    rng = random.Random(seed)
    total = 1500
    pair.applier.defer = lambda op: isinstance(op, ops.Sync)
    with TcpProxy("127.0.0.1", port_of(await pair.listen())) as proxy:
        link = await pair.up(proxy.endpoint)
        sinks: list[RecordingSink] = []
        deferred: list[int] = []
        expected: list[tuple[int, int, ops.AnyOp, bytes | None]] = []
        for number in range(1, total + 1):
            await link.wait_room()
            sink = RecordingSink()
            if rng.random() < 0.1:
                op: ops.AnyOp = ops.Locate(object_id(number), object_id(0), b"n")
                link.send(op, None, None)
                expected.append((0, number, op, None))
                continue
            sinks.append(sink)
            if rng.random() < 0.05:
                op = ops.Sync(object_id(number), data_only=False)
                link.send(op, None, sink)
                expected.append((0, number, op, None))
                deferred.append(number)
            else:
                op, payload = write(number, rng.choice([8, 100, 5000, 40000]))
                link.send(op, payload, sink)
                expected.append((0, number, op, payload))
            if rng.random() < 0.02:
                proxy.cut_after(rng.randrange(60000))
            if rng.random() < 0.3:
                await trio.lowlevel.checkpoint()
            if deferred and rng.random() < 0.1:
                applied = pair.applier.sessions[0].lanes[0].applied
                if deferred[0] <= applied:
                    pair.applier.sessions[0].answer(0, deferred.pop(0), ops.Done(0))
        await until(lambda: len(pair.applier.applied) == total, "all have been applied")
        for number in deferred:
            pair.applier.sessions[0].answer(0, number, ops.Done(0))
        await until(lambda: link.outstanding == 0, "all are answered")
        assert pair.applier.applied == expected
        assert all(sink.calls == 1 and sink.answer for sink in sinks)
        assert pair.owner.events == ["up"]
        assert proxy.cuts > 0
        assert link.sent(messages.LIVE) == pair.applier.sessions[0].applied(messages.LIVE)
        assert link.sent(messages.LIVE)[0] == total


async def test_both_streams_over_cuts(pair):
    rng = random.Random(7)
    with TcpProxy("127.0.0.1", port_of(await pair.listen())) as proxy:
        link = await pair.up(proxy.endpoint)
        sinks: list[RecordingSink] = []
        for number in range(1, 200):
            for stream in messages.STREAMS:
                await link.wait_room(stream)
                sink = RecordingSink()
                sinks.append(sink)
                if stream == messages.LIVE:
                    link.send(*write(number), sink)
                else:
                    link.send(ops.Digest(object_id(number), 0, 50, 4096), None, sink, stream)
            if number % 40 == 0:
                proxy.cut_after(rng.randrange(3000))
                await trio.sleep(0.02)
        await until(lambda: all(sink.calls for sink in sinks), "all are answered")
        assert all(sink.calls == 1 and sink.answer for sink in sinks)
        for stream in messages.STREAMS:
            numbers = [seq for where, seq, _, _ in pair.applier.applied if where == stream]
            assert numbers == list(range(1, 200))
            assert link.sent(stream) == pair.applier.sessions[0].applied(stream)


async def test_a_stalled_peer_is_lost_after_the_timeout(hasty):
    with TcpProxy("127.0.0.1", port_of(await hasty.listen())) as proxy:
        link = await hasty.up(proxy.endpoint)
        proxy.stall()
        sink = RecordingSink()
        link.send(*write(1), sink)
        await until(lambda: sink.calls, "it is settled")
        assert sink.was_lost
        assert sink.down_before
        assert hasty.owner.events[1] == "down: no answer for 1.0 s"
        await until(lambda: len(hasty.applier.events) >= 2, "the listener noticed as well")
        proxy.release()
        await until(lambda: link.is_up, "a new session is up")


async def test_an_idle_stalled_peer_is_noticed(hasty):
    with TcpProxy("127.0.0.1", port_of(await hasty.listen())) as proxy:
        await hasty.up(proxy.endpoint)
        proxy.stall()
        await until(lambda: len(hasty.owner.events) >= 2, "it is noticed")
        assert hasty.owner.events[1] == "down: no answer for 1.0 s"


async def test_a_connection_that_does_not_come_back(hasty):
    with TcpProxy("127.0.0.1", port_of(await hasty.listen())) as proxy:
        link = await hasty.up(proxy.endpoint)
        hasty.applier.defer = lambda _op: True
        sink = RecordingSink()
        link.send(*write(1), sink)
        proxy.refuse()
        await until(lambda: sink.calls, "it is settled")
        assert sink.was_lost
        assert not link.is_up
        proxy.accept()
        await until(lambda: link.is_up, "a new session is up")


async def test_while_resuming_operations_queue(pair):
    with TcpProxy("127.0.0.1", port_of(await pair.listen())) as proxy:
        link = await pair.up(proxy.endpoint)
        proxy.stall()
        proxy.cut()  # new connections are accepted, and stall
        await until(lambda: link.statistics().state == "resuming", "it is noticed")
        sinks = [RecordingSink() for _ in range(10)]
        for number, sink in enumerate(sinks, 1):
            link.send(*write(number), sink)
        assert link.is_up
        assert pair.applier.applied == []
        proxy.release()
        await until(lambda: link.outstanding == 0, "all are answered")
        assert [seq for _, seq, _, _ in pair.applier.applied] == list(range(1, 11))
        assert pair.owner.events == ["up"]
        assert link.statistics().resumes >= 1
        assert pair.listener.statistics().resumes >= 1


async def test_heartbeats_measure_the_round_trip(hasty):
    link = await hasty.up()
    await until(lambda: link.statistics().rtt_ns > 0, "a heartbeat was answered")
    assert hasty.owner.events == ["up"]


async def test_over_ipc(pair, tmp_path):
    link = await pair.up(await pair.listen(f"ipc://{tmp_path}/socket"))
    sink = RecordingSink()
    link.send(*write(1), sink)
    await until(lambda: sink.calls, "it is answered")


async def test_an_answer_that_cannot_be(pair):
    """A wrong kind of answer, or one to nothing, ends the session."""
    link = await pair.up()
    pair.applier.defer = lambda _op: True
    sink = RecordingSink()
    link.send(*write(1), sink)
    await until(lambda: pair.applier.applied, "it has arrived")
    pair.applier.sessions[0].answer(0, 1, ops.Placed(complete=True, created=True))
    await until(lambda: sink.calls, "it is settled")
    assert sink.was_lost
    assert "something wrong" in pair.owner.events[1]


async def test_what_need_not_come_before_an_answer_comes_soon_after_it(pair):
    link = await pair.up()
    told = []
    pair.applier.on_answered = lambda: told.append(
        pair.applier.sessions[0].lanes[messages.LIVE].told
    )
    link.send(*write(1), RecordingSink())
    await until(lambda: 1 in told, "nothing else has to come")
