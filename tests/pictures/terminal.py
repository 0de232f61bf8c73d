"""A terminal as far as replfs uses one: what is on its screen, and that as a picture."""

from __future__ import annotations

import os
import pty
import re
import select
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from fcntl import ioctl
from html import escape
from typing import Final

_CONTROL: Final = re.compile(r"\x1b\[(\??[0-9;]*)([A-Za-z])|[\r\n]|[^\x1b\r\n]+")
_LINE: Final = 18
_WIDE: Final = 8.1
_EDGE: Final = 14
_BAR: Final = 26


class Screen:
    """Lines of text and a cursor; it never scrolls, so that all that was printed is there."""

    def __init__(self) -> None:
        self.lines = [""]
        self._row = self._column = 0

    def write(self, text: str) -> None:
        """Text with the control sequences that `replfs.cli.text` knows."""
        for found in _CONTROL.finditer(text):
            if found[2]:
                self._control(found[1], found[2])
            elif found[0] == "\r":
                self._column = 0
            elif found[0] == "\n":
                self._row += 1
                self._column = 0
                while len(self.lines) <= self._row:
                    self.lines.append("")
            else:
                line = self.lines[self._row].ljust(self._column)
                end = self._column + len(found[0])
                self.lines[self._row] = line[: self._column] + found[0] + line[end:]
                self._column = end

    def _control(self, argument: str, word: str) -> None:
        match word:
            case "K":
                self.lines[self._row] = self.lines[self._row][: self._column]
            case "J":
                del self.lines[self._row + 1 :]
            case "H":
                self._row = self._column = 0
            case "h" | "l":
                pass  # another screen, or the cursor: neither is in the picture
            case _:
                raise ValueError(f"ESC [ {argument} {word} is not known")

    def shown(self) -> list[str]:
        """The lines, without empty ones at the end."""
        lines = [line.rstrip() for line in self.lines]
        while lines and not lines[-1]:
            lines.pop()
        return lines


class Program:
    """A command with a terminal of its own."""

    def __init__(self, argv: Sequence[str], columns: int, env: dict[str, str]) -> None:
        self.screen = Screen()
        self._fd, terminal = pty.openpty()
        ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
        self.process = subprocess.Popen(
            argv, stdin=terminal, stdout=terminal, stderr=terminal, env=env, cwd="/",
            start_new_session=True,
        )  # fmt: skip
        os.close(terminal)

    def read_until(self, is_there: Callable[[list[str]], bool], timeout_s: float) -> list[str]:
        """The screen as soon as it is as wanted, or the program has ended."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if is_there(self.screen.shown()):
                return self.screen.shown()
            if select.select([self._fd], [], [], 0.2)[0]:
                try:
                    chunk = os.read(self._fd, 1 << 16)
                except OSError:  # all of the terminal's other end is closed
                    break
                self.screen.write(chunk.decode())
        return self.screen.shown()

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(20)
        os.close(self._fd)


def picture(frames: Sequence[tuple[str, list[str]]], *, seconds: float = 3.0) -> str:
    """An SVG of a terminal: one frame after the other, each with a title; a single one stands."""
    columns = max(max(map(len, lines), default=0) for _, lines in frames)
    rows = max(len(lines) for _, lines in frames)
    width, height = round(columns * _WIDE + 2 * _EDGE), rows * _LINE + 2 * _EDGE + _BAR
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape("; ".join(title for title, _ in frames), quote=True)}">',
        "<style>text{font:13.5px ui-monospace,'DejaVu Sans Mono',Menlo,Consolas,monospace;"
        "fill:#e6e6e6;white-space:pre}.t{fill:#9fa8da}"
        + _moving(len(frames), seconds)
        + "</style>",
        f'<rect width="{width}" height="{height}" rx="8" fill="#1e1e2e"/>',
    ]
    for number, (title, lines) in enumerate(frames):
        parts.append(f'<g class="f" id="f{number}">')
        parts.append(f'<text class="t" x="{_EDGE}" y="{_EDGE + 10}">{escape(title)}</text>')
        for row, line in enumerate(lines):
            if line:
                y = _EDGE + _BAR + row * _LINE + 12
                length = f'textLength="{round(len(line) * _WIDE)}" lengthAdjust="spacing"'
                parts.append(
                    f'<text xml:space="preserve" x="{_EDGE}" y="{y}" {length}>{escape(line)}</text>'
                )
        parts.append("</g>")
    return "\n".join([*parts, "</svg>\n"])


def _moving(frames: int, seconds: float) -> str:
    if frames == 1:
        return ""
    share = 100 / frames
    rules = [
        f"@keyframes show{{0%,{share:.2f}%{{visibility:visible}}{share + 0.01:.2f}%,100%"
        "{visibility:hidden}}",
        f".f{{visibility:hidden;animation:show {frames * seconds:g}s step-end infinite}}",
    ]
    rules += [f"#f{number}{{animation-delay:{number * seconds:g}s}}" for number in range(1, frames)]
    still = f".f{{animation:none}}#f{frames - 1}{{visibility:visible}}"
    rules.append(f"@media (prefers-reduced-motion){{{still}}}")
    return "".join(rules)
