"""What `replfs` tells a script by its exit status. Part of the interface: numbers never change."""

from __future__ import annotations

from enum import IntEnum
from typing import Self


class ExitCode(IntEnum):
    """One exit status and its meaning."""

    OK = 0, "done; for status and wait: in sync"
    ERROR = 1, "it failed, for the reason given on standard error"
    USAGE = 2, "what was typed cannot be done: the command line, a file it names, or the command"
    STORE = 3, "STORE cannot be used, or another daemon has it"
    DOWN = 4, "no node answers, the node hangs, or a peer is lost"
    REFUSED = 5, "two stores may not be connected (other data, the same store, split brain)"
    NOT_IN_SYNC = 6, "degraded: not in sync, or not within the time given"
    INTERRUPTED = 130, "ended by Ctrl-C (SIGINT)"
    TERMINATED = 143, "ended by SIGTERM"

    meaning: str

    def __new__(cls, number: int, meaning: str) -> Self:
        """Make a member of a number and a sentence."""
        member = int.__new__(cls, number)
        member._value_ = number
        member.meaning = meaning
        return member
