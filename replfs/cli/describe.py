"""The whole command line as data, read from the parsers: for completion and the manual.

Nothing is written down twice: what a parser does not know, neither of them can say.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Final, NamedTuple

from replfs.cli import main
from replfs.node.settings.options import OPTIONS
from replfs.node.settings.values import Choice

PATHS: Final = frozenset(
    ("DIR", "FILE", "MOUNTPOINT", "PATH", "PROGRAM", "STORE", "TARGET")
)  # fmt: skip
"""Metavariables that stand for a path."""


class Flag(NamedTuple):
    """An option: `-f`, `--peer NAME`."""

    names: tuple[str, ...]
    metavar: str
    """Empty: it takes no value."""
    words: tuple[str, ...]
    """The values it takes, if they are a few words."""
    help: str

    @property
    def long(self) -> str:
        """Its long name without the dashes, or empty."""
        return next((name[2:] for name in self.names if name.startswith("--")), "")


class Positional(NamedTuple):
    """An argument without a name."""

    metavar: str
    words: tuple[str, ...]
    help: str
    optional: bool
    repeated: bool


class Shape(NamedTuple):
    """One command, or one action of a command."""

    path: tuple[str, ...]
    help: str
    flags: tuple[Flag, ...]
    positionals: tuple[Positional, ...]
    actions: tuple[str, ...]
    """What may come next, where the command has actions."""

    @property
    def name(self) -> str:
        """As it is typed."""
        return " ".join(self.path)


def shapes() -> list[Shape]:
    """All commands in the order of `replfs --help`, each followed by its actions."""
    found: list[Shape] = []
    for name in main.MODULES:
        command, help_text = main.find(name)
        found += _walk(command.parser(name, help_text), (name,), help_text)
    return found


def _walk(
    parser: argparse.ArgumentParser, path: tuple[str, ...], help_text: str
) -> Iterator[Shape]:
    flags, positionals = [], []
    inner: argparse._SubParsersAction[argparse.ArgumentParser] | None = None
    for action in parser._actions:  # noqa: SLF001 - argparse has no other way to ask
        if isinstance(action, argparse._SubParsersAction):  # noqa: SLF001
            inner = action
        elif action.option_strings:
            if action.help != argparse.SUPPRESS:
                flags.append(_flag(action))
        else:
            positionals.append(_positional(action))
    actions = tuple(inner.choices) if inner is not None else ()
    yield Shape(path, help_text, tuple(flags), tuple(positionals), actions)
    if inner is not None:
        helps = {one.dest: one.help or "" for one in inner._choices_actions}  # noqa: SLF001
        for name, each in inner.choices.items():
            yield from _walk(each, (*path, name), helps.get(name, ""))


def _flag(action: argparse.Action) -> Flag:
    metavar = "" if action.nargs == 0 else _metavar(action)
    words = tuple(map(str, action.choices or ()))
    if not words and metavar:
        readers = {option.name: option.read for option in OPTIONS}
        read = readers.get(action.dest)
        words = read.words if isinstance(read, Choice) else ()
    return Flag(tuple(action.option_strings), metavar, words, (action.help or "") % {})


def _positional(action: argparse.Action) -> Positional:
    return Positional(
        _metavar(action),
        tuple(map(str, action.choices or ())),
        (action.help or "") % {},
        action.nargs in {"?", "*"},
        action.nargs in {"+", "*"},
    )


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()
