"""Listing a peer's directory, page by page."""

from __future__ import annotations

import errno

from replfs.core import ops
from replfs.node.asking.question import list_all

DIRECTORY = b"d" * 16
ENTRIES = [ops.Entry(b"n%d" % number, bytes([number]) * 16, True) for number in range(5)]


class Peer:
    """Gives one prepared answer after the other, and remembers what it was asked."""

    def __init__(self, *answers: ops.AnyAnswer) -> None:
        self.answers = list(answers)
        self.asked: list[ops.AnyOp] = []

    async def ask(self, op: ops.AnyOp) -> ops.AnyAnswer:
        self.asked.append(op)
        return self.answers.pop(0)


async def test_all_pages_are_asked_for():
    peer = Peer(ops.Listing(ENTRIES[:2], True), ops.Listing(ENTRIES[2:], False))
    assert await list_all(peer.ask, DIRECTORY) == {entry.name: entry for entry in ENTRIES}
    assert peer.asked == [ops.List(DIRECTORY, b""), ops.List(DIRECTORY, b"n1")]


async def test_what_is_known_is_left_out():
    peer = Peer(ops.Listing(ENTRIES[:2], True), ops.Listing(ENTRIES[2:], False))
    found = await list_all(peer.ask, DIRECTORY, {b"n0", b"n1", b"n4"})
    assert isinstance(found, dict)
    assert list(found) == [b"n2", b"n3"]
    assert peer.asked[1] == ops.List(DIRECTORY, b"n1")


async def test_a_refusal_is_told():
    peer = Peer(ops.Listing(ENTRIES[:2], True), ops.Done(errno.ESTALE))
    assert await list_all(peer.ask, DIRECTORY) == ops.Done(errno.ESTALE)


async def test_an_empty_page_that_is_not_the_last_is_no_listing():
    peer = Peer(ops.Listing([], True))
    assert await list_all(peer.ask, DIRECTORY) == ops.Done(errno.EPROTO)
