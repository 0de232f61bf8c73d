"""Makes docs/pictures/{demo,watch}.svg anew: `./dev pictures`, as root."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from helpers.nodes import REPLFS, Pair, environment

from pictures.terminal import Program, picture

PICTURES: Final = Path(__file__).parents[2] / "docs" / "pictures"
COLUMNS: Final = 120
FILES: Final = 400
RATE: Final = "8MiB"
"""Of the resync, so that it is still at work when the status is looked at again."""


def demo() -> str:
    """The screen after `replfs demo`."""
    program = Program([*REPLFS, "demo"], COLUMNS, environment())
    lines = program.read_until(lambda _: False, 300)
    if program.process.wait(60):
        raise RuntimeError("\n".join(lines))
    program.close()
    return picture([("$ replfs demo", lines)])


def watch() -> str:
    """`replfs status --watch` while the peer is killed, and started again."""
    with Pair(mount_arguments=("--resync-rate", RATE)) as pair:
        tree = pair.mountpoint / "tree"
        tree.mkdir()
        command = [*REPLFS, "status", str(pair.mountpoint), "--rundir", str(pair.rundir), "--watch"]
        program = Program(command, COLUMNS, environment())
        frames = []

        def see(title: str, word: str) -> None:
            seen = program.read_until(lambda lines: any(word in line for line in lines), 60)
            if not any(word in line for line in seen):
                raise RuntimeError("\n".join(seen))
            frames.append((f"$ replfs status /mnt --watch      # {title}", seen))

        see("in sync", "  in-sync")
        pair.agent.kill9()
        for number in range(FILES):
            (tree / str(number)).write_bytes(bytes(200_000))
        see("the peer was killed, and work goes on", f"{FILES} files")
        pair.agent.start()
        see(f"it is back: what it lacks is carried, at {RATE}/s here", "  incremental")
        pair.wait_in_sync()
        see("in sync again", "  in-sync")
        program.close()
        pair.assert_equal()
    return picture(frames)


def main() -> int:
    """Write both."""
    for name, make in (("demo", demo), ("watch", watch)):
        path = PICTURES / f"{name}.svg"
        path.write_text(make())
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
