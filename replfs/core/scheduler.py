"""Which operation may run now: one rule, footprint conflict.

An operation claims what it touches (its footprint): whole objects, byte ranges, directory entries.
It waits for the earlier operations in flight that conflict with it, first in first out, and for
nothing else. What the classes of operation claim stands in `core.footprint`.

Two claims on the same key conflict as this table says:

    |           | SHARED | RANGE      | EXCLUSIVE |
    | SHARED    | no     | no         | yes       |
    | RANGE     | no     | if overlap | yes       |
    | EXCLUSIVE | yes    | yes        | yes       |

A key is anything hashable; the scheduler compares keys and nothing more. All claims of an operation
are made at once, so no operation ever waits while a later one waits for it: there is no deadlock.
One that runs may claim more, ahead of those that wait, but only what it need not wait for.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final

SHARED: Final = 0
RANGE: Final = 1
EXCLUSIVE: Final = 2

END: Final = 1 << 63
"""One past the largest byte offset: a range that runs to the end of a file, wherever that is."""

Claim = tuple[Hashable, int, int, int]
"""(key, mode, start, stop); start and stop count only for `RANGE`, half open, in bytes."""


class Ticket:
    """One operation's place in the queue: it may run when `waits` is 0."""

    __slots__ = ("blocks", "claims", "kind", "owner", "waits")

    def __init__(self, claims: tuple[Claim, ...], kind: str) -> None:
        self.claims = claims
        self.kind = kind
        self.waits = 0
        """Number of earlier operations in flight that conflict with this one."""
        self.blocks: list[Ticket] | None = None
        self.owner: object = None
        """Whatever the caller wants to find again when the ticket becomes ready."""


class Scheduler:
    """Admits operations in the order they come, and holds those that conflict.

    Invariant: two tickets with `waits == 0` that are not yet complete never conflict.
    Invariant: conflicting operations become ready in the order of their admission, but for what
    `extend` lets one that runs have before its turn.
    """

    def __init__(self) -> None:
        self._lines: dict[Hashable, list[Ticket]] = {}
        self._claims: dict[Hashable, list[Claim]] = {}
        self.admitted = 0
        self.in_flight = 0
        self.held: dict[str, int] = {}
        """How many operations were held, by "kind behind kind"."""

    def admit(self, claims: tuple[Claim, ...], kind: str) -> Ticket:
        """Take a place. The ticket is ready if `waits` is 0, else when `complete` returns it."""
        ticket = Ticket(claims, kind)
        lines = self._lines
        for claim in claims:
            key, mode, start, stop = claim
            line = lines.get(key)
            if line is None:
                lines[key] = [ticket]
                self._claims[key] = [claim]
                continue
            for earlier, theirs in zip(line, self._claims[key], strict=True):
                if earlier is ticket:
                    continue
                other = theirs[1]
                if mode == EXCLUSIVE or other == EXCLUSIVE:
                    pass
                elif mode == RANGE and other == RANGE and start < theirs[3] and theirs[2] < stop:
                    pass
                else:
                    continue
                self._hold(ticket, earlier)
            line.append(ticket)
            self._claims[key].append(claim)
        self.admitted += 1
        self.in_flight += 1
        return ticket

    def extend(self, ticket: Ticket, keys: tuple[Hashable, ...]) -> bool:
        """Claim *keys* exclusively, too, for a ticket that is ready.

        False, and nothing changed, where another ready ticket has one of them, or this one has it
        otherwise. Those that wait for one of them wait for this ticket from here on.
        """
        lines = self._lines
        for key, mode, _, _ in ticket.claims:
            if key in keys and mode != EXCLUSIVE:
                return False
        owned = {claim[0] for claim in ticket.claims}
        wanted = [key for key in keys if key not in owned]
        if any(not other.waits for key in wanted for other in lines.get(key, ())):
            return False
        blocks = ticket.blocks or []
        for key in wanted:
            claim = (key, EXCLUSIVE, 0, 0)
            for later in lines.setdefault(key, []):
                if later not in blocks:
                    blocks.append(later)
                    later.waits += 1
            lines[key].append(ticket)
            self._claims.setdefault(key, []).append(claim)
            ticket.claims += (claim,)
        ticket.blocks = blocks or None
        return True

    def _hold(self, ticket: Ticket, earlier: Ticket) -> None:
        if earlier.blocks is None:
            earlier.blocks = [ticket]
        elif earlier.blocks[-1] is ticket:
            return  # counted already, through another claim of the same two operations
        else:
            earlier.blocks.append(ticket)
        if not ticket.waits:
            reason = f"{ticket.kind} behind {earlier.kind}"
            self.held[reason] = self.held.get(reason, 0) + 1
        ticket.waits += 1

    def complete(self, ticket: Ticket) -> list[Ticket] | tuple[()]:
        """Give the place back, and return the tickets that became ready, in their order."""
        lines = self._lines
        for claim in ticket.claims:
            key = claim[0]
            line = lines[key]
            if len(line) == 1:
                del lines[key]
                del self._claims[key]
            else:
                place = line.index(ticket)
                del line[place]
                del self._claims[key][place]
        self.in_flight -= 1
        if ticket.blocks is None:
            return ()
        ready = []
        for later in ticket.blocks:
            later.waits -= 1
            if not later.waits:
                ready.append(later)
        ticket.blocks = None
        return ready
