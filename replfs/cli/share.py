"""`dashboard`, and what other programs need: as it comes with replfs, and as it is installed."""

from __future__ import annotations

import argparse
import os
from importlib import resources
from typing import Final

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command
from replfs.errors import UsageError


def shared(name: str) -> str:
    """The text of a file of `replfs/share`."""
    return resources.files("replfs").joinpath("share", name).read_text(encoding="utf-8")


def install_text(path: str, text: str) -> None:
    """Write a file of replfs's where other programs look for it; its directory is made.

    Raises:
        UsageError: it cannot be written.
    """
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from None


def _declare_dashboard(parser: argparse.ArgumentParser) -> None:
    del parser


def _run_dashboard(args: argparse.Namespace) -> int:
    del args
    print(shared("grafana.json"), end="")
    return ExitCode.OK


COMMANDS: Final = {"dashboard": Command(_declare_dashboard, _run_dashboard)}
