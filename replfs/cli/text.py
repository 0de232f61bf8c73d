"""How things look on a terminal: quantities, tables, and a progress line.

Progress goes to standard error: one line that is redrawn on a terminal, and elsewhere a line of its
own when the text changed and five seconds have passed.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Final, TextIO

LINE_EVERY_S: Final = 5.0


def size(count: float | None) -> str:
    """Bytes in binary units, `-` if not known."""
    if count is None:
        return "-"
    amount = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(amount) < 1024:
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    return f"{amount:.1f} TiB"


def duration(seconds: float | None) -> str:
    """Seconds in one or two units, `-` if not known."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def moment(when: object) -> str:
    """A point in time, from seconds since the epoch, or as it is; `never` for None."""
    if when is None:
        return "never"
    if isinstance(when, (int, float)) and not isinstance(when, bool):
        local = datetime.fromtimestamp(when, UTC).astimezone()
        return local.strftime("%Y-%m-%d %H:%M:%S")
    return str(when)


def table(rows: Sequence[Sequence[str]], indent: str = "") -> str:
    """Rows in aligned columns; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(indent + line.rstrip() for line in lines)


class Progress:
    """One line about work that goes on."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._drawn = False
        self._last = ""
        self._due = time.monotonic() + LINE_EVERY_S

    def update(self, text: str) -> None:
        """Show *text* in place of what was shown before."""
        if self._is_terminal:
            width = os.get_terminal_size(self._stream.fileno()).columns or 80
            self._stream.write(f"\r\x1b[K{text[: width - 1]}")
            self._stream.flush()
            self._drawn = True
        elif text != self._last and time.monotonic() >= self._due:
            self._stream.write(f"{text}\n")
            self._stream.flush()
            self._last = text
            self._due = time.monotonic() + LINE_EVERY_S

    def clear(self) -> None:
        """Take the line away, before something else is printed."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False


class Screen:
    """Something that is shown again and again, in place on a terminal.

    Each line is drawn over the old one and what is left of that is erased, in one write: nothing
    is ever blank in between, and little travels over a slow line.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self._entered = False

    def show(self, text: str) -> None:
        """Show *text* in place of what was shown before; elsewhere, after it."""
        if not self._is_terminal:
            self._stream.write(f"{text}\n")
            self._stream.flush()
            return
        columns, rows = os.get_terminal_size(self._stream.fileno())
        lines = [line[:columns] for line in text.splitlines()]
        if len(lines) > rows:
            lines = [*lines[: rows - 1], f"... {len(lines) - rows + 1} more lines"]
        start = "\x1b[H" if self._entered else "\x1b[?1049h\x1b[?25l\x1b[H"
        self._entered = True
        # Without a line feed after the last line, which would scroll a full screen.
        self._stream.write(start + "\x1b[K\r\n".join(lines) + "\x1b[K\x1b[J")
        self._stream.flush()

    def leave(self) -> None:
        """Give the terminal back as it was."""
        if self._entered:
            self._stream.write("\x1b[?25h\x1b[?1049l")
            self._stream.flush()
            self._entered = False
