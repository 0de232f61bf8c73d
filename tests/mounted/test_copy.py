"""Ordinary tools on a mount: they finish without a word, and both stores hold what they made."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers import real_tree
from helpers.compare import compare_trees, describe
from helpers.nodes import Pair, make_base, remove_base, wait_for
from helpers.programs import TIMEOUT_S, run

pytestmark = pytest.mark.mounted

FILES = 3100
FEWER_FILES = 900
BLOCK = 4096


@pytest.fixture(scope="module")
def source(nothing_left_behind):
    """A real tree in a plain directory."""
    base = make_base()
    assert real_tree.make(base / "tree", FILES) > FILES
    yield base / "tree"
    remove_base(base)


@pytest.fixture(scope="module")
def smaller_source(nothing_left_behind):
    """A smaller one, for what takes several passes."""
    base = make_base()
    real_tree.make(base / "tree", FEWER_FILES)
    yield base / "tree"
    remove_base(base)


@pytest.fixture
def replicated():
    """A pair in sync whose replica is mounted, too."""
    with Pair(replica_mounted=True) as fresh:
        yield fresh


def assert_same(expected: Path, actual: Path, *, holes: int = 0) -> None:
    """Two trees are equal."""
    found = compare_trees(expected, actual, holes=holes)
    assert not found, describe(expected, actual, found)


def check(pair: Pair) -> None:
    """Nothing was left to a resync: the peer was in sync all the time, and is equal."""
    peer = pair.peer()
    assert peer["state"] == "in-sync", peer
    assert "last_error" not in peer, peer
    pair.assert_equal(holes=BLOCK)


def test_cp_of_a_real_tree(pair, source):
    run("cp", "-a", source, pair.mountpoint / "copy")
    check(pair)
    assert_same(source, pair.secondary_store / "copy", holes=BLOCK)
    # Through the mount it is the same, too: rsync(1) finds nothing to do.
    assert_rsync_does_nothing(pair, source)


def test_rsync_of_a_real_tree_and_again(pair, smaller_source):
    source = smaller_source
    run("rsync", "-aHAX", f"{source}/", f"{pair.mountpoint}/copy/")
    check(pair)
    assert_same(source, pair.mountpoint / "copy")
    assert_same(source, pair.secondary_store / "copy")
    assert_rsync_does_nothing(pair, source)


def assert_rsync_does_nothing(pair: Pair, source: Path) -> None:
    """Another transfer finds nothing to transfer, and changes nothing on the way."""
    before = pair.mount.status()["operations"]
    rsync = "rsync", "-aHAX", "--itemize-changes", "--delete"
    assert run(*rsync, f"{source}/", f"{pair.mountpoint}/copy/") == ""
    after = pair.mount.status()["operations"]
    assert {name: row["count"] for name, row in before.items()} == {
        name: row["count"] for name, row in after.items()
    }


def test_rsync_out_of_the_mount_and_deleting(pair, smaller_source, tmp_path):
    """The way back, and a copy that shrinks."""
    source = smaller_source
    run("rsync", "-aHAX", f"{source}/special/", f"{pair.mountpoint}/copy/")
    run("rsync", "-aHAX", f"{pair.mountpoint}/copy/", f"{tmp_path}/back/")
    assert_same(source / "special", tmp_path / "back")
    (tmp_path / "empty").mkdir()
    run("rsync", "-aHAX", "--delete", f"{tmp_path}/empty/", f"{pair.mountpoint}/copy/")
    assert os.listdir(pair.secondary_store / "copy") == []
    check(pair)


def test_tar_in_and_out(pair, smaller_source):
    source = smaller_source
    options = ("--acls", "--xattrs", "--xattrs-include=*", "--numeric-owner", "--sparse",
               "--warning=no-timestamp")  # fmt: skip
    archive = pair.mountpoint / "archive.tar"
    out = pair.mountpoint / "out"
    out.mkdir()
    # tar(1) says of sockets that it leaves them out.
    run("tar", *options, "--exclude=socket", "-cf", archive, "-C", source, "special")
    run("tar", *options, "-xpf", archive, "-C", out)
    os.mknod(out / "special/special_files/socket", 0o140700)
    for name in ("special/special_files", "special"):
        status = (source / name).stat()
        os.utime(out / name, ns=(status.st_atime_ns, status.st_mtime_ns))
    check(pair)
    found = [
        difference
        for difference in compare_trees(source / "special", out / "special", limit=10_000)
        if difference.kind != "mtime"  # whole seconds in an archive
    ]
    assert not found, describe(source, out, found)


def test_git(pair, source):
    origin = pair.base / "origin"
    identity = "-c", "user.name=n", "-c", "user.email=e@example.org"
    run("cp", "-r", source / "library" / "json", source / "library" / "asyncio", pair.rundir)
    run("git", "init", "-q", "-b", "main", origin)
    for name in ("json", "asyncio"):
        os.rename(pair.rundir / name, origin / name)
    run("git", "add", "-A", cwd=origin)
    run("git", *identity, "commit", "-q", "-m", "first", cwd=origin)
    clone = pair.mountpoint / "clone"
    run("git", "clone", "-q", f"file://{origin}", clone)
    run("git", "fsck", "--full", "--strict", "--no-progress", cwd=clone)
    assert run("git", "status", "--porcelain", cwd=clone) == ""
    (clone / "json" / "new.py").write_text("print()\n")
    run("git", "mv", "asyncio", "moved", cwd=clone)
    run("git", "add", "-A", cwd=clone)
    run("git", *identity, "commit", "-q", "-m", "second", cwd=clone)
    run("git", "checkout", "-q", "-b", "side", "HEAD~1", cwd=clone)
    run("git", *identity, "merge", "-q", "--no-edit", "main", cwd=clone)
    run("git", "gc", "-q", cwd=clone)
    run("git", "push", "-q", "origin", "side", cwd=clone)
    check(pair)
    # The replica is a repository, too.
    replica = pair.secondary_store / "clone"
    run("git", "-c", "safe.directory=*", "fsck", "--full", "--no-progress", cwd=replica)
    assert run("git", "-c", "safe.directory=*", "status", "--porcelain", cwd=replica) == ""


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite(pair, journal):
    database = pair.mountpoint / "data.db"
    run("sqlite3", database, f"pragma journal_mode={journal}; create table t(n integer, s text);")
    insert = (
        "pragma busy_timeout=60000; begin immediate; with recursive c(n) as (select 1 union all "
        "select n + 1 from c where n < 500) insert into t select n, hex(randomblob(50)) from c; "
        "commit;"
    )
    writers = [
        subprocess.Popen(["sqlite3", str(database), insert * 3], stdout=subprocess.DEVNULL)
        for _ in range(3)
    ]
    assert [writer.wait(TIMEOUT_S) for writer in writers] == [0, 0, 0]
    run("sqlite3", database, "delete from t where n % 3 = 0; vacuum;")
    check(pair)
    for place in (pair.mountpoint, pair.secondary_store):
        question = "pragma integrity_check; select count(*) from t;"
        assert run("sqlite3", "-readonly", place / "data.db", question) == "ok\n3006\n"


def test_make_of_a_small_program(replicated):
    pair = replicated
    place = pair.mountpoint / "program"
    place.mkdir()
    units = [f"unit{number}" for number in range(6)]
    for unit in units:
        (place / f"{unit}.c").write_text(f'#include "all.h"\nint {unit}(void) {{ return 7; }}\n')
    (place / "all.h").write_text("".join(f"int {unit}(void);\n" for unit in units))
    calls = " + ".join(f"{unit}()" for unit in units)
    (place / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\n'
        f'int main(void) {{ printf("%d\\n", {calls}); return 0; }}\n'
    )
    objects = " ".join(f"{unit}.o" for unit in [*units, "main"])
    (place / "Makefile").write_text(
        f"CFLAGS = -g -O1\nprogram: libunits.a main.o\n\t$(CC) -o $@ main.o -L. -lunits\n"
        f"libunits.a: {objects.replace(' main.o', '')}\n\t$(AR) rcs $@ $^\n"
        f"{objects}: all.h\nclean:\n\trm -f *.o *.a program\n"
    )
    run("make", "-s", "-j2", cwd=place)
    assert run(place / "program") == "42\n"
    assert "up to date" in run("make", cwd=place)
    (place / "unit3.c").write_text('#include "all.h"\nint unit3(void) { return 8; }\n')
    run("make", "-s", cwd=place)
    assert run(place / "program") == "43\n"
    check(pair)
    wait_for(lambda: run(pair.replica / "program" / "program") == "43\n")
    run("make", "-s", "clean", cwd=place)
    check(pair)


def test_pip_install_with_a_target(pair):
    wheel = pair.base / "sample-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        record = ["sample-1.0.dist-info/RECORD,,"]
        members = {f"sample/part{number}.py": f"VALUE = {number}\n" for number in range(20)}
        members |= {
            "sample/__init__.py": "",
            "sample-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: sample\nVersion: 1.0\n",
            "sample-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n"
            "Tag: py3-none-any\n",
        }
        for name, text in members.items():
            archive.writestr(name, text)
            record.append(f"{name},,")
        archive.writestr("sample-1.0.dist-info/RECORD", "\n".join(record) + "\n")
    target = pair.mountpoint / "packages"
    options = "--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "-q"
    root = "--root-user-action=ignore"
    run(sys.executable, "-m", "pip", "install", *options, root, "--target", target, wheel)
    check(pair)
    for place in (pair.mountpoint, pair.secondary_store):
        script = f"import sys; sys.path.insert(0, {str(place / 'packages')!r}); "
        script += "import sample.part7; print(sample.part7.VALUE)"
        assert run(sys.executable, "-I", "-B", "-c", script) == "7\n"
    check(pair)
