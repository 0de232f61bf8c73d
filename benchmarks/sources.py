"""What is copied onto the targets: a tree, the same as an archive, the same as a repository."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.processes import run

_FILES_PER_DIRECTORY: Final = 24
_LINE_BYTES: Final = 64
_MEDIAN_LINES: Final = 50
_SIGMA: Final = 1.3
_MOST_LINES: Final = 4096


@dataclass(frozen=True)
class Sources:
    """In memory, so that reading them costs the same for every target."""

    tree: Path
    archive: Path
    repository: Path
    """Two branches, `main` and `next`, between which half of the files differ."""
    files: int

    @property
    def git(self) -> tuple[str, ...]:
        """The command, whatever the user has configured."""
        settings = ("gc.auto=0", "user.name=bench", "user.email=bench@localhost")
        return ("git", *(word for setting in settings for word in ("-c", setting)))


def make(base: Path, files: int) -> Sources:
    """The same sources every time for the same number of files."""
    sources = Sources(base / "tree", base / "tree.tar", base / "repository", files)
    make_tree(sources.tree, files)
    run("tar", "-C", base, "-cf", sources.archive, "tree")
    repository = sources.repository
    run("cp", "-a", sources.tree, repository)
    in_it: tuple[str | Path, ...] = (*sources.git, "-C", repository)
    run(*in_it, "init", "-q", "-b", "main")
    run(*in_it, "add", ".")
    run(*in_it, "commit", "-q", "-m", "first")
    run(*in_it, "checkout", "-q", "-b", "next")
    for path in sorted(repository.glob("d*/*"))[::2]:
        path.write_bytes(path.read_bytes()[::-1])
    run(*in_it, "commit", "-q", "-a", "-m", "second")
    run(*in_it, "checkout", "-q", "main")
    return sources


def make_tree(tree: Path, files: int) -> None:
    """Directories of 24 files of 64 bytes to 256 KiB, most of them a few KiB, as in source code."""
    choice = random.Random(files)
    text = choice.randbytes(_MOST_LINES * _LINE_BYTES // 2).hex().encode()
    tree.mkdir()
    for index in range(files):
        directory = tree / f"d{index // _FILES_PER_DIRECTORY:05}"
        if index % _FILES_PER_DIRECTORY == 0:
            directory.mkdir()
        lines = min(_MOST_LINES, 1 + int(choice.lognormvariate(0, _SIGMA) * _MEDIAN_LINES))
        start = choice.randrange(_LINE_BYTES)
        body = text[start : start + lines * _LINE_BYTES]
        (directory / f"source_{index:06}.txt").write_bytes(b"%d\n" % index + body)
