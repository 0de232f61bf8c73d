"""What the targets need from the distribution: installed, or compiled from its source.

Only Debian and its descendants are known. Nothing that is installed here is started as a service.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from benchmarks.errors import BenchmarkError
from benchmarks.processes import run

BUILD: Final = Path(__file__).resolve().parent.parent / "build" / "benchmarks"
_EXAMPLE: Final = Path("usr/share/doc/libfuse3-dev/examples/passthrough_ll.c")


def version(package: str) -> str | None:
    """Of an installed package; None if it is not installed."""
    done = subprocess.run(
        ["dpkg-query", "-W", "-f=${db:Status-Status} ${Version}", package],
        capture_output=True,
        text=True,
        check=False,
    )
    state, _, number = done.stdout.partition(" ")
    return number if done.returncode == 0 and state == "installed" else None


def install(packages: tuple[str, ...]) -> None:
    """Install those that are missing.

    Raises:
        BenchmarkError: they cannot be installed.
    """
    missing = [package for package in packages if version(package) is None]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        raise BenchmarkError(f"install {', '.join(missing)}, or leave out the targets that need it")
    # invoke-rc.d starts no service in runlevel 1.
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    run("apt-get", "-qq", "update")
    run("apt-get", "-qq", "-y", "install", "--no-install-recommends", *missing, **quiet)


def passthrough_ll() -> Path:
    """libfuse's example of that name, compiled from the source that the distribution ships.

    Raises:
        BenchmarkError: there is no source or it does not compile.
    """
    program = BUILD / f"passthrough_ll-{version('libfuse3-dev')}"
    if program.exists():
        return program
    BUILD.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="passthrough-", dir=BUILD) as name:
        source = Path("/", _EXAMPLE)
        if not source.exists():  # images of containers leave documentation out
            # Where apt drops its privileges, it could not write here.
            run(
                "sh",
                "-c",
                'cd "$0" && apt-get -o APT::Sandbox::User=root -qq download libfuse3-dev',
                name,
            )
            run("dpkg-deb", "-x", *Path(name).glob("*.deb"), name)
            source = Path(name) / _EXAMPLE
        flags = run("pkg-config", "--cflags", "--libs", "fuse3").split()
        compiled = Path(name) / "passthrough_ll"
        run("gcc", "-O2", "-o", compiled, source, *flags)
        compiled.rename(program)
    return program
