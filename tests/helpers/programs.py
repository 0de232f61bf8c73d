"""Run the programs that people use, and expect them to succeed and to complain of nothing."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

TIMEOUT_S = 150.0


def run(
    *command: str | Path,
    cwd: Path | None = None,
    user: int | None = None,
    environ: dict[str, str] | None = None,
    complains: bool = False,
) -> str:
    """Run a program to its end; what it prints.

    Args:
        command: the program and its arguments.
        cwd: where.
        user: the user and group it runs as, without further groups.
        environ: on top of an environment that no configuration of the machine gets into.
        complains: it may print to standard error, too.

    Raises:
        AssertionError: it fails, or complains.
    """
    plain = {
        "HOME": "/nonexistent", "LC_ALL": "C.UTF-8", "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_PROGRESS_DELAY": "100000",  # on a slow machine it is no complaint
    }  # fmt: skip
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="surrogateescape",
        timeout=TIMEOUT_S,
        check=False,
        env=os.environ | plain | (environ or {}),
        user=user,
        group=user,
        extra_groups=None if user is None else [],
    )
    said = f"{done.stdout}{done.stderr}"
    assert done.returncode == 0, f"{command}: {done.returncode}\n{said}"
    assert complains or done.stderr == "", f"{command} complains: {done.stderr}"
    return done.stdout
