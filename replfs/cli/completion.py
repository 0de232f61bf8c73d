"""`completion`: scripts that make bash, zsh and fish complete replfs commands.

Made from the parsers, so they are never stale. They run nothing, and where a path is wanted the
shell completes paths as it always does.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Final

from replfs.cli.describe import PATHS, Flag, Positional, Shape, shapes
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", metavar="SHELL", choices=tuple(SHELLS), help="bash, zsh or fish")


def _run(args: argparse.Namespace) -> int:
    print(SHELLS[args.shell](shapes()), end="")
    return ExitCode.OK


# bash --------------------------------------------------------------------------------------------

_BASH: Final = """\
# bash completion for replfs; put it into /etc/bash_completion.d/replfs, or:
#   source <(replfs completion bash)
_replfs() {{
    local cur=${{COMP_WORDS[COMP_CWORD]}} prev=${{COMP_WORDS[COMP_CWORD-1]}} key words
    COMPREPLY=()
    if [ "$COMP_CWORD" -eq 1 ]; then
        COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
        return
    fi
    key=${{COMP_WORDS[1]}}
    if [ "$COMP_CWORD" -gt 2 ]; then
        case "$key ${{COMP_WORDS[2]}}" in
{actions}
        esac
    fi
    case "$key $prev" in
{values}
    esac
    if [[ $cur == -* ]]; then
        case "$key" in
{flags}
        esac
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
        return
    fi
    case "$key" in
{positionals}
    esac
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$cur"))
    else
        COMPREPLY=($(compgen -f -- "$cur"))
    fi
}}
complete -o filenames -F _replfs replfs
"""


def _bash(found: list[Shape]) -> str:
    def block(lines: Iterator[str], depth: int) -> str:
        return "\n".join(" " * depth + line for line in lines)

    def values() -> Iterator[str]:
        for shape in found:
            for flag in shape.flags:
                if not flag.metavar:
                    continue
                patterns = "|".join(f'"{shape.name} {name}"' for name in flag.names)
                if flag.words:
                    words = " ".join(flag.words)
                    yield f'{patterns}) COMPREPLY=($(compgen -W "{words}" -- "$cur")); return ;;'
                elif flag.metavar in PATHS:
                    yield f'{patterns}) COMPREPLY=($(compgen -f -- "$cur")); return ;;'
                else:
                    yield f"{patterns}) return ;;"

    return _BASH.format(
        commands=" ".join(shape.name for shape in found if len(shape.path) == 1),
        actions=block(
            (f'"{shape.name}") key="{shape.name}" ;;' for shape in found if len(shape.path) > 1), 12
        ),
        values=block(values(), 8),
        flags=block(
            (
                f'"{shape.name}") words="{" ".join(n for f in shape.flags for n in f.names)}" ;;'
                for shape in found
            ),
            12,
        ),
        positionals=block(
            (
                f'"{shape.name}") words="{" ".join(words)}" ;;'
                for shape in found
                if (words := shape.actions or next((p.words for p in shape.positionals), ()))
            ),
            8,
        ),
    )


# zsh ---------------------------------------------------------------------------------------------


def _zsh(found: list[Shape]) -> str:
    lines = [
        "#compdef replfs",
        "# zsh completion for replfs; put it into a directory of $fpath as _replfs",
        "_replfs() {",
        "  local curcontext=$curcontext state line",
        "  if (( CURRENT == 2 )); then",
        "    local -a commands=(",
        *(f"      {_quoted(f'{s.name}:{s.help}')}" for s in found if len(s.path) == 1),
        "    )",
        "    _describe command commands",
        "    return",
        "  fi",
        '  case "$words[2] $words[3]" in',
    ]
    for shape in sorted(found, key=lambda shape: -len(shape.path)):
        pattern = f"'{shape.name}'" if len(shape.path) > 1 else f"'{shape.name} '*"
        lines += [f"    {pattern})", f"      shift {len(shape.path)} words; (( CURRENT -= "
                  f"{len(shape.path)} ))", "      _arguments -S \\"]  # fmt: skip
        specs = [spec for flag in shape.flags for spec in _zsh_flag(flag)]
        if shape.actions:
            specs.append(f"'1:action:({' '.join(shape.actions)})'")
        else:
            specs += [_zsh_positional(one) for one in shape.positionals]
        lines += [f"        {spec} \\" for spec in specs]
        lines += ["        && return", "      ;;"]
    lines += ["  esac", "}", '_replfs "$@"', ""]
    return "\n".join(lines)


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def _zsh_flag(flag: Flag) -> Iterator[str]:
    text = flag.help.replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
    for name in flag.names:
        value = f":{flag.metavar.replace(':', ' ')}:{_zsh_values(flag)}" if flag.metavar else ""
        yield _quoted(f"*{name}[{text}]{value}")


def _zsh_values(one: Flag | Positional) -> str:
    if one.words:
        return f"({' '.join(one.words)})"
    return "_files" if one.metavar in PATHS else " "


def _zsh_positional(one: Positional) -> str:
    start = "*" if one.repeated else ":" if one.optional else ""
    return _quoted(f"{start}:{one.metavar.replace(':', ' ')}:{_zsh_values(one)}")


# fish --------------------------------------------------------------------------------------------


def _fish(found: list[Shape]) -> str:
    lines = [
        "# fish completion for replfs; put it into ~/.config/fish/completions/replfs.fish",
        "complete -c replfs -f",
    ]
    actions = {shape.name: shape.actions for shape in found}
    for shape in found:
        text = _fish_quoted(shape.help)
        if len(shape.path) == 1:
            condition = f"__fish_seen_subcommand_from {shape.name}"
            lines.append(f"complete -c replfs -n __fish_use_subcommand -a {shape.name} -d {text}")
        else:
            first, action = shape.path
            condition = (
                f"__fish_seen_subcommand_from {first}; and __fish_seen_subcommand_from {action}"
            )
            others = " ".join(actions[first])
            lines.append(
                f"complete -c replfs -n '__fish_seen_subcommand_from {first}; and not "
                f"__fish_seen_subcommand_from {others}' -a {action} -d {text}"
            )
        for flag in shape.flags:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in flag.names
            )
            lines.append(
                f"complete -c replfs -n '{condition}' {names}{_fish_value(flag)} "
                f"-d {_fish_quoted(flag.help)}"
            )
        for one in shape.positionals:
            if one.words:
                value = f"-a '{' '.join(one.words)}'"
            elif one.metavar in PATHS:
                value = "-F"
            else:
                continue
            lines.append(f"complete -c replfs -n '{condition}' {value}")
    return "\n".join([*lines, ""])


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _fish_value(flag: Flag) -> str:
    if not flag.metavar:
        return ""
    if flag.words:
        return f" -x -a '{' '.join(flag.words)}'"
    return " -r -F" if flag.metavar in PATHS else " -x"


SHELLS: Final[dict[str, Callable[[list[Shape]], str]]] = {
    "bash": _bash,
    "zsh": _zsh,
    "fish": _fish,
}

COMMANDS: Final = {"completion": Command(_declare, _run)}
