"""What a run that was killed has left: its namespaces, mounts and directories.

Their names carry the process id of the run, so what belongs to a running one is known and left.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from benchmarks import images
from benchmarks.processes import NAMESPACES, PREFIX, Namespace

_NAME: Final = re.compile(rf"{PREFIX}(\d+)-(\w[\w-]*)")


def clear() -> list[str]:
    """Remove all of it, and say what it was."""
    names = [name for name in _names(NAMESPACES) if _is_dead(name)]
    for name in names:
        Namespace(name).__exit__()
    places = [
        directory / name
        for directory in (Path(tempfile.gettempdir()), images.MEMORY)
        for name in _names(directory)
        if _is_dead(name)
    ]
    mounts = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
    for place in places:
        for mount in reversed(mounts):
            if Path(mount).is_relative_to(place):
                images.unmount(Path(mount))
        shutil.rmtree(place)
    return [*names, *map(str, places)]


def _names(directory: Path) -> list[str]:
    return sorted(os.listdir(directory)) if directory.is_dir() else []


def _is_dead(name: str) -> bool:
    match = _NAME.fullmatch(name)
    return match is not None and not Path("/proc", match[1]).exists()
