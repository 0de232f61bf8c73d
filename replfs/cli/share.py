"""`dashboard`: what other programs need, as it is installed with replfs."""

from __future__ import annotations

import argparse
from importlib import resources
from typing import Final

from replfs.cli.exit_codes import ExitCode
from replfs.cli.parse import Command


def shared(name: str) -> str:
    """The text of a file of `replfs/share`."""
    return resources.files("replfs").joinpath("share", name).read_text(encoding="utf-8")


def _declare_dashboard(parser: argparse.ArgumentParser) -> None:
    del parser


def _run_dashboard(args: argparse.Namespace) -> int:
    del args
    print(shared("grafana.json"), end="")
    return ExitCode.OK


COMMANDS: Final = {"dashboard": Command(_declare_dashboard, _run_dashboard)}
