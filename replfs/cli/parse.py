"""Parsing a command line: argparse, but with one-sentence errors and hints."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from replfs.errors import ConfigError, UsageError


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of printing and exiting."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one sentence.

        Raises:
            UsageError: always.
        """
        raise UsageError(f"{self.prog.removeprefix('replfs ')}: {message}; see {self.prog} --help")


class Command(NamedTuple):
    """How a command's arguments are declared, and what runs it."""

    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    prepare: Callable[[list[str]], list[str]] | None = None
    """Rewrites the arguments before they are parsed."""

    def parser(self, name: str, help_text: str) -> Parser:
        """What knows the command's arguments."""
        parser = Parser(
            prog=f"replfs {name}",
            description=help_text[:1].upper() + help_text[1:] + ".",
            allow_abbrev=False,
        )
        self.declare(parser)
        return parser

    def parse(self, name: str, help_text: str, argv: Sequence[str]) -> argparse.Namespace:
        """Parse *argv*, what follows the command's name; `argv` of the result holds both.

        Raises:
            UsageError: it cannot be understood.
        """
        parser = self.parser(name, help_text)
        given = list(argv)
        if self.prepare is not None:
            given = self.prepare(given)
        args, rest = parser.parse_known_intermixed_args(given) if _can_mix(parser) else (
            parser.parse_known_args(given)
        )  # fmt: skip
        if rest:
            parser.error(_unrecognized(parser, rest[0]))
        args.argv = [name, *argv]
        return args


def _can_mix(parser: argparse.ArgumentParser) -> bool:
    # Options between positionals (`mount STORE --peer X MOUNTPOINT`); not with subcommands.
    return not any(isinstance(a, argparse._SubParsersAction) for a in parser._actions)  # noqa: SLF001


def _unrecognized(parser: argparse.ArgumentParser, word: str) -> str:
    option = word.partition("=")[0]
    if not option.startswith("-"):
        return f"{word!r} is one argument too many"
    import difflib

    close = difflib.get_close_matches(option, list(parser._option_string_actions), 1)  # noqa: SLF001
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"there is no option {option}{hint}"


def seconds(text: str) -> float:
    """A duration for argparse: `5s`, `500ms`, `2m`, or a number of seconds."""
    from replfs.node.settings.values import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise ConfigError(f"a time {error}") from None


def add_target(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """TARGET, and where to look for its control socket."""
    parser.add_argument("target", metavar="TARGET", nargs=nargs, help="a MOUNTPOINT or a STORE")
    add_rundir(parser)


def add_rundir(parser: argparse.ArgumentParser) -> None:
    """Where control sockets are."""
    parser.add_argument("--rundir", metavar="DIR", help="directory of the control sockets")
