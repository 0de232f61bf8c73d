"""`man`: the manual pages, made from the parsers and the table of options.

replfs man                       replfs(1)
replfs man replfs.toml           replfs.toml(5)
replfs man --install /usr/local/share/man
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import replfs
from replfs.cli.configuration import literal_default
from replfs.cli.describe import Flag, Shape, shapes
from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command
from replfs.cli.share import install_text
from replfs.node.settings import config
from replfs.node.settings.options import OPTIONS


class Page(NamedTuple):
    """One manual page."""

    section: int
    summary: str
    body: Callable[[], Iterator[str]]


def _declare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("page", metavar="PAGE", nargs="?", choices=tuple(PAGES), default="replfs",
                        help="replfs (default), mount.replfs or replfs.toml")  # fmt: skip
    parser.add_argument("--install", metavar="DIR",
                        help="write all pages below this directory, as man1/replfs.1")  # fmt: skip


def _run(args: argparse.Namespace) -> int:
    if args.install is not None:
        for name, page in PAGES.items():
            path = os.path.join(args.install, f"man{page.section}", f"{name}.{page.section}")
            install_text(path, render(name))
            print(path)
        return ExitCode.OK
    text = render(args.page)
    if sys.stdout.isatty():
        # Whatever the pager's exit status: the page was shown.
        try:
            subprocess.run(["man", "-l", "-"], input=text, text=True, check=False)
        except FileNotFoundError:
            print(text, end="")
    else:
        print(text, end="")
    return ExitCode.OK


# man(7) ------------------------------------------------------------------------------------------


def render(name: str) -> str:
    """A page as man(7) source."""
    page = PAGES[name]
    lines = [
        f'.TH {name.upper()} {page.section} "" "replfs {replfs.__version__}"',
        ".SH NAME",
        f"{_text(name)} \\- {_text(page.summary)}",
        *page.body(),
    ]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    """Text that means itself."""
    text = text.replace("\\", "\\e").replace("-", "\\-").replace("^", "\\(ha").replace("~", "\\(ti")
    return "\\&" + text if text.startswith((".", "'")) else text


def _entry(tag: str, text: str) -> Iterator[str]:
    yield from (
        ".TP",
        tag,
        _text(text[:1].upper() + text[1:]) + ("" if text.endswith(".") else "."),
    )


def _flag_tag(flag: Flag) -> str:
    names = ", ".join(f"\\fB{_text(name)}\\fR" for name in flag.names)
    return f"{names} \\fI{_text(flag.metavar)}\\fR" if flag.metavar else names


def _usage(shape: Shape) -> str:
    parts = [f"\\fB{_text(shape.name)}\\fR"]
    if shape.actions:
        parts.append("\\fIACTION\\fR ...")
    for one in shape.positionals:
        word = f"\\fI{_text(one.metavar)}\\fR" + ("..." if one.repeated else "")
        parts.append(f"[{word}]" if one.optional else word)
    if any(flag.names != ("-h", "--help") for flag in shape.flags):
        parts.append("[\\fIOPTION\\fR]...")
    return " ".join(parts)


def _replfs() -> Iterator[str]:
    yield from (
        ".SH SYNOPSIS", "\\fBreplfs\\fR \\fICOMMAND\\fR ...",
        ".SH DESCRIPTION",
        "replfs mounts a directory through FUSE and keeps it synchronously replicated on other",
        "machines: a change returns when the peers have it too. STORE is the directory that holds",
        "the data, TARGET a mountpoint or a STORE. Times are written 500ms, 5s, 2m, 1h, or as a",
        "number of seconds.",
        ".SH COMMANDS",
    )  # fmt: skip
    keys = {f"--{option.name}" for option in OPTIONS if option.everywhere}
    for shape in shapes():
        yield from (".TP", _usage(shape), _text(shape.help[:1].upper() + shape.help[1:]) + ".")
        flags = [flag for flag in shape.flags if flag.names != ("-h", "--help")]
        if shape.name in {"mount", "agent"}:
            flags = [flag for flag in flags if not keys & set(flag.names)]
        if flags:
            yield ".RS"
            for flag in flags:
                yield from _entry(_flag_tag(flag), flag.help or "see replfs.toml(5)")
            yield ".RE"
        if shape.name in {"mount", "agent"}:
            yield from (
                ".IP",
                "All options of",
                ".BR replfs.toml (5)",
                "as \\fB\\-\\-\\fINAME\\fR.",
            )
    yield ".SH EXIT STATUS"
    for code in ExitCode:
        yield from _entry(f"\\fB{code.value}\\fR", code.meaning)
    yield from (".SH FILES", *_entry("\\fI/etc/replfs/replfs.toml\\fR", "the configuration"),
                *_entry("\\fI/run/replfs\\fR", "control sockets and logs"),
                *_entry("\\fISTORE/.replfs\\fR", "what replfs keeps with the data"))  # fmt: skip
    yield from _see_also("mount.replfs", "replfs.toml")


def _mount_replfs() -> Iterator[str]:
    yield from (
        ".SH SYNOPSIS",
        "\\fBmount \\-t replfs\\fR [\\fB\\-o\\fR \\fIOPTION\\fR,...] \\fISTORE\\fR "
        "\\fIMOUNTPOINT\\fR",
        ".SH DESCRIPTION",
        "The helper that",
        ".BR mount (8)",
        "and",
        ".BR fstab (5)",
        "use. It does what \\fBreplfs mount\\fR does, in the background, and returns when the",
        "mount is usable. It must be found in /sbin: \\fBreplfs systemd install\\fR links it.",
        ".SH OPTIONS",
        "Those of",
        ".BR replfs.toml (5),",
        "with the same names, separated by commas; \\fBconfig=\\fIFILE\\fR reads the others from a",
        "file. A switch is given as \\fINAME\\fR, \\fBno\\-\\fINAME\\fR or \\fINAME\\fB=no\\fR.",
        "Ignored, because they are not for this filesystem:",
        _text(", ".join(sorted(config.IGNORED_MOUNT_OPTIONS))) + ", and what begins with x\\-.",
        "\\fBremount\\fR changes ro, nosuid, nodev, noexec and noatime, and nothing else.",
        ".SH EXAMPLES",
        ".nf",
        _text("/srv/data  /data  replfs  config=/etc/replfs/replfs.toml,_netdev,nofail  0  0"),
        ".fi",
    )
    yield from _see_also("replfs", "replfs.toml")


def _replfs_toml() -> Iterator[str]:
    yield from (
        ".SH DESCRIPTION",
        f"\\fBreplfs mount\\fR and \\fBreplfs agent\\fR read {config.DEFAULT_FILE}, or the file",
        "of \\fB\\-\\-config\\fR. Every key is also an option of the command line and of",
        "\\fB\\-o\\fR; the command line wins, then \\fB\\-o\\fR, then the file. A key that is not",
        "known is an error. \\fBreplfs config check\\fR looks whether a file is right,",
        "\\fBreplfs config sample\\fR prints one with every key. Relative paths are relative to",
        "the file.",
        ".SH KEYS",
        *_entry("\\fBstore\\fR", "the directory that holds the data"),
        *_entry("\\fBmountpoint\\fR", "where it is mounted; may be the same"),
    )
    for option in OPTIONS:
        if not option.everywhere:
            continue
        tag = f"\\fB{_text(option.name)}\\fR"
        tag += f" = \\fI{_text(option.metavar or 'true|false')}\\fR"
        default = literal_default(option)
        text = option.help
        if default and "default" not in text:
            text += f" (default {default})"
        yield from _entry(tag, text)
    yield from _see_also("replfs", "mount.replfs")


def _see_also(*names: str) -> Iterator[str]:
    yield ".SH SEE ALSO"
    last = len(names) - 1
    for index, name in enumerate(names):
        yield f".BR {_text(name)} ({PAGES[name].section})" + ("," if index < last else "")


PAGES: Final = {
    "replfs": Page(1, "keep a directory synchronously replicated on other machines", _replfs),
    "mount.replfs": Page(8, "mount a replicated directory", _mount_replfs),
    "replfs.toml": Page(5, "configuration of replfs", _replfs_toml),
}

COMMANDS: Final = {"man": Command(_declare, _run)}
