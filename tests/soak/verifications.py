"""Verification again and again beside writers that never stop: nothing is found that is not there.

Then what is broken on the replica, beside the same writers, is found, named and mended.
"""

from __future__ import annotations

import os
import shutil

from helpers.nodes import Pair
from helpers.writer import Report, Writers

from replfs.cli.exit_codes import ExitCode
from soak.story import Story, check_equal, fill, record_directory


def run(
    count: int,
    seed: int,
    story: Story,
    *,
    writers: int = 3,
    rest_s: float = 0.0,
    files: int = 600,
) -> Report:
    """*count* verifications of a healthy pair, then one that finds everything; the writers' report.

    Raises:
        AssertionError: a difference is told that is none, or one is not told or not mended.
    """
    with (
        Pair(prepare=lambda pair: fill(pair, files=files, size=20_000)) as pair,
        record_directory(pair.base) as records,
        Writers(pair.mountpoint, records, count=writers, seed=seed, rest_s=rest_s) as all_writers,
    ):
        all_writers.wait_more()
        for number in range(1, count + 1):
            code, printed = _verify(pair)
            assert code == ExitCode.OK, printed
            story.say(f"{number}: {printed.strip().splitlines()[-1]}")
            all_writers.check_alive()
        expected = _break(pair)
        code, printed = _verify(pair)
        assert code == ExitCode.NOT_IN_SYNC, printed
        _assert_told(printed, expected)
        code, printed = _verify(pair, "--repair")
        _assert_told(printed, expected)
        pair.wait_in_sync()
        code, printed = _verify(pair)
        assert code == ExitCode.OK, printed
        story.say(f"{len(expected)} differences found and mended")
        check_equal(pair, all_writers)
        report = all_writers.stop()
    story.say(f"writers: {report}")
    return report


def _verify(pair: Pair, *arguments: str) -> tuple[int, str]:
    done = pair.mount.replfs("verify", pair.mountpoint, *arguments, check=False, timeout_s=600)
    return done.returncode, done.stdout or done.stderr


def _break(pair: Pair) -> dict[str, str]:
    """Break files that no writer uses, behind the node's back; path to what is to be told."""
    old = pair.secondary_store / "old"
    files = sorted(
        path
        for path in old.rglob("*")
        if path.is_file() and not path.is_symlink() and path.stat().st_nlink == 1
    )
    changed, mode, missing, twin = [path for path in files if path.stat().st_size > 100][:4]
    found = changed.stat()
    with changed.open("r+b") as file:
        byte = file.read(1)
        file.seek(0)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(changed, ns=(found.st_atime_ns, found.st_mtime_ns))
    mode.chmod(0o7)
    missing.unlink()
    extra = twin.with_name("extra")
    shutil.copy(twin, extra)
    told = {changed: "contents", mode: "mode", missing: "missing there", extra: "only there"}
    return {f"/{path.relative_to(pair.secondary_store)}": what for path, what in told.items()}


def _assert_told(printed: str, expected: dict[str, str]) -> None:
    for path, what in expected.items():
        assert f"{path}: {what}" in printed, (path, what, printed)
    told = [line for line in printed.splitlines() if line.startswith("/")]
    touched = {f"{path.rpartition('/')[0]}: mtime" for path in expected}
    strange = [line for line in told if not line.startswith((*expected, *touched))]
    assert not strange, strange
