"""The end of a node: what is waited for, for how long, and what whoever asked is told."""

from __future__ import annotations

import errno
import os
import time

import pytest
import trio

from replfs.errors import NotInSync
from replfs.node.operating.ending import Ending


class Scripted:
    """Something to be drained that does as it is told."""

    def __init__(self, *, drains_s: float = 0.0, after_cut_s: float = 0.0, error=None) -> None:
        self.drains_s = drains_s
        self.after_cut_s = after_cut_s
        self.error = error
        self.was_cut = trio.Event()

    async def drained(self) -> None:
        with trio.move_on_after(self.drains_s):
            await self.was_cut.wait()
            await trio.sleep(self.after_cut_s)

    async def flushed(self) -> str:
        if self.error is not None:
            raise self.error
        return "both sides are flushed"

    def cut_off(self) -> None:
        self.was_cut.set()

    def left(self) -> str:
        return "3 operations in flight"


async def end(node: Scripted, drain_s: float = 60.0) -> str:
    """What somebody who asks for the end is told."""
    ending = Ending()
    told = ""

    async def ask() -> None:
        nonlocal told
        try:
            told = (await ending.ask(drain_s))["message"]
        except NotInSync as error:
            told = f"no: {error}"

    async with trio.open_nursery() as nursery:
        nursery.start_soon(ask)
        await ending.wanted.wait()
        await ending.drain(node, time.monotonic())
        assert told == ""
        await ending.tell()
        assert told
    return told


async def test_it_says_what_was_done(autojump_clock):
    assert await end(Scripted(drains_s=30)) == "drained, both sides are flushed"


async def test_who_does_not_answer_in_time_is_cut_off(autojump_clock):
    node = Scripted(drains_s=1000, after_cut_s=2)
    began = trio.current_time()
    assert await end(node, 20) == "drained, both sides are flushed"
    assert node.was_cut.is_set()
    assert 21 < trio.current_time() - began < 23


async def test_what_cannot_be_drained_is_said(autojump_clock):
    told = await end(Scripted(drains_s=1000, after_cut_s=1000), 20)
    assert told.startswith("no: not ended cleanly: it ended with 3 operations in flight; ")


@pytest.mark.parametrize(
    ("error", "words"),
    [(OSError(errno.EIO, "Input/output error"), "Input/output error"), (NotInSync("full"), "full")],
)
async def test_what_cannot_be_flushed_is_said(autojump_clock, error, words):
    told = await end(Scripted(error=error))
    assert f"it is drained, but could not be flushed: {words}; " in told


async def test_a_clean_end_that_cannot_be_noted_is_none(autojump_clock):
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    ending = Ending()
    ending.note(fail)  # nobody asks for that where the end is not clean
    await ending.drain(Scripted(), time.monotonic())
    assert ending.is_clean
    ending.note(fail)
    assert not ending.is_clean
    assert "it is flushed, but that cannot be noted: Input/output error; " in ending.message


async def test_an_end_that_fails_otherwise_is_no_clean_end(autojump_clock):
    ending = Ending()
    with pytest.RaisesGroup(RuntimeError):
        await ending.drain(Scripted(error=RuntimeError("a defect")), time.monotonic())
    assert not ending.is_clean
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ending.tell)
        with pytest.raises(NotInSync, match="the log says why"):
            await ending.ask(1.0)


async def test_who_is_still_at_the_unmounting_is_told_too(autojump_clock):
    """umount(2) of a mount with many known inodes returns after the session has ended."""
    ending = Ending()
    told = ""

    async def umount() -> None:
        nonlocal told
        with ending.asking():
            await trio.sleep(2)
            told = (await ending.ask(60.0))["message"]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(umount)
        await ending.drain(Scripted(), time.monotonic())
        await ending.tell()
        assert told == "drained, both sides are flushed"
