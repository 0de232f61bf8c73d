"""A user without root mounts and serves their own files: as uid 65534, with fusermount3.

The interpreter may lie where that user cannot reach it, and /dev/fuse may be closed to them. A
mount namespace of the test's own opens both: the rest of the machine is as it was.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from helpers.compare import wait_equal
from helpers.nodes import REPOSITORY, make_base, remove_base, run_replfs

from replfs.cli.exit_codes import ExitCode

pytestmark = [
    pytest.mark.mounted,
    pytest.mark.skipif(
        not (shutil.which("fusermount3") and shutil.which("setpriv") and shutil.which("git")),
        reason="needs fusermount3, setpriv and git",
    ),
]

USER = 65534


@pytest.fixture
def base():
    path = make_base()
    for name in ("a", "b", "m", "open", "r"):
        (path / name).mkdir()
        os.chown(path / name, USER, USER)
    os.chown(path, USER, USER)
    yield path
    remove_base(path)


def as_user(base: Path, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script as that user, in a mount namespace that ends with it."""
    opened = "".join(
        f"""
            mount -t tmpfs tmpfs {base}/open
            {"".join(_moved(closed, f"{base}/open", child, "--bind") for child in children)}
            mount -t tmpfs -o mode=755 tmpfs {closed}
            {"".join(_moved(f"{base}/open", closed, child, "--move") for child in children)}
            umount {base}/open
        """
        for closed, children in closed_directories().items()
    )
    setup = f"""
        set -e
        {opened}
        mknod -m 666 {base}/fuse c 10 229
        mount --bind {base}/fuse /dev/fuse
        exec setpriv --reuid {USER} --regid {USER} --clear-groups sh -euc "$1"
    """
    replfs = f"{sys.executable} -P -m replfs"
    begin = f'cd {base}; replfs() {{ {replfs} "$@"; }}; export HOME={base}\n'
    try:
        return subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "sh", "-c", setup, "sh",
             begin + textwrap.dedent(script)],
            env=os.environ | {"PYTHONPATH": str(REPOSITORY), "REPLFS_RUNDIR": str(base / "run")},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
    finally:
        (base / "fuse").unlink(missing_ok=True)


def _moved(source: Path | str, target: Path | str, child: str, how: str) -> str:
    return f"""
            mkdir {target}/{child}
            mount {how} {source}/{child} {target}/{child}
    """


def closed_directories() -> dict[Path, list[str]]:
    """Directories that others cannot look into, outermost first, and what they need there."""
    found: dict[Path, set[str]] = {}
    executable = Path(sys.executable)
    for needed in (executable, executable.resolve(), REPOSITORY / "replfs"):
        for above in needed.parents:
            if not above.stat().st_mode & 0o001:
                found.setdefault(above, set()).add(needed.relative_to(above).parts[0])
    return {above: sorted(found[above]) for above in sorted(found)}


SCRIPT = """
    agent() { replfs agent b --listen tcp://127.0.0.1:"$1" --name b --no-foreground; }
    mount_it() { replfs mount a m --peer b="$endpoint" --name a; }
    field() { sed -n 's/.*"'"$1"'": "\\(.*\\)",/\\1/p'; }
    agent 0 2>/dev/null
    endpoint=$(replfs status b --json | field listen)
    mount_it
    replfs wait m --timeout 60s
    cd m
    echo hello > file; chmod 640 file; setfattr -n user.x -v 1 file; ln file hard
    echo ro > ro; chmod 444 ro; ln -s file link; mv link link2; mkfifo fifo
    mkdir scratch; setfattr -n user.replfs.policy -v none scratch; echo x > scratch/x
    git init -q g; cd g; echo 1 > 1; git add 1
    git -c user.name=a -c user.email=b commit -qm 1; cd ../..
    replfs verify m
    # The peer goes away, and so does this node, before it is back.
    replfs stop b
    cd m
    echo more >> file; chmod 600 ro; echo rw > ro; chmod 400 ro; rm fifo; ln -sf elsewhere link2
    mkdir -m 755 closed; echo in > closed/file; chmod 444 closed/file; chmod 555 closed
    mv g h; cd ..
    if (exec 9< m/file; replfs umount m); then exit 99; fi
    replfs umount m
    agent "${endpoint##*:}"
    mount_it
    replfs wait m --timeout 60s
    replfs verify m
    chmod 755 m/closed; rm m/closed/file; rmdir m/closed
    replfs umount m
    replfs stop b
"""


def test_own_files_are_replicated(base):
    done = as_user(base, SCRIPT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("no differences") == 2, done.stdout
    assert done.stdout.count("drained, both sides are flushed") == 1
    assert "in use: close what is open there" in done.stderr
    assert "without root only your own files are replicated" in done.stderr
    wait_equal(base / "a" / "h", base / "b" / "h")
    assert (base / "b" / "ro").read_text() == "rw\n"
    assert (base / "b" / "ro").stat().st_mode & 0o777 == 0o400
    assert os.readlink(base / "b" / "link2") == "elsewhere"
    assert (base / "b" / "hard").stat().st_ino == (base / "b" / "file").stat().st_ino
    assert not (base / "b" / "scratch").exists()
    assert not (base / "b" / "fifo").exists()


PROMOTION = """
    replfs agent b --mount r --listen tcp://127.0.0.1:0 --name b --no-foreground 2>/dev/null
    field() { sed -n 's/.*"'"$1"'": "\\(.*\\)",/\\1/p'; }
    endpoint=$(replfs status b --json | field listen)
    replfs mount a m --peer b="$endpoint" --name a --listen tcp://127.0.0.1:0
    replfs wait m --timeout 60s
    echo hello > m/file
    if replfs switchover m; then exit 98; fi
    replfs umount m
    if replfs promote b; then exit 99; fi
    replfs umount r
    replfs promote b --mount r
    cat r/file
    echo more >> r/file
    replfs umount r
"""


def test_a_mount_that_cannot_be_remounted_is_made_anew(base):
    done = as_user(base, PROMOTION)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cannot be made read-only: stop this node, then promote the other" in done.stderr
    assert "cannot be made read-write: unmount it with 'replfs umount'" in done.stderr
    assert "hello" in done.stdout
    assert (base / "b" / "file").read_text() == "hello\nmore\n"


def test_a_users_store_is_not_served_as_root(base):
    done = as_user(base, "replfs agent b --listen tcp://127.0.0.1:0 --no-foreground; replfs stop b")
    assert done.returncode == 0, done.stdout + done.stderr
    refused = run_replfs(
        "agent", base / "b", "--listen", "tcp://127.0.0.1:0", "--rundir", base / "root-run",
        check=False,
    )  # fmt: skip
    assert refused.returncode == ExitCode.STORE
    assert "is a store of nobody's: serve it as nobody, as before" in refused.stderr
