"""Programs at work on a mount, several processes at a time; after each, both stores are equal.

What copies and archives is in test_copy. What a program that is not installed would show is
skipped, and says so.
"""

from __future__ import annotations

import ctypes
import itertools
import logging.handlers
import mailbox
import os
import shutil
import signal
import sqlite3
import stat
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
from helpers import acl, real_tree
from helpers.children import GROUP, USER, spawn, together
from helpers.compare import compare_trees, describe, wait_equal
from helpers.libc import RENAME_EXCHANGE, renameat2
from helpers.nodes import has_command, unmount_all, wait_for
from helpers.programs import run

pytestmark = pytest.mark.mounted

BLOCK = 4096
KIB, MIB = 1 << 10, 1 << 20
EQUAL_S = 30.0

_numbers = itertools.count()
_libc = ctypes.CDLL(None, use_errno=True)


class Place:
    """A fresh directory on the mount, and the same one in the two stores."""

    def __init__(self, pair, name):
        self.pair = pair
        self.path = pair.mountpoint / name
        self.store = pair.primary_store / name
        self.replica = pair.secondary_store / name
        self.outside = pair.base / name
        """A directory on the filesystem beneath."""

    def __truediv__(self, name):
        return self.path / name

    def check(self):
        """Nothing was left to a resync: the peer was in sync all the time, and is equal."""
        peer = self.pair.peer()
        assert peer["state"] == "in-sync", peer
        assert "last_error" not in peer, peer
        wait_equal(self.store, self.replica, timeout_s=EQUAL_S, holes=BLOCK)


@pytest.fixture
def place(shared_pair):
    """A place; afterwards it must be equal in both stores, holes included."""
    found = Place(shared_pair, f"programs-{os.getpid()}-{next(_numbers)}")
    found.path.mkdir()
    found.outside.mkdir()
    yield found
    found.check()
    shutil.rmtree(found.path)
    shutil.rmtree(found.outside)


def assert_same(expected, actual, *, but=()):
    """Two trees are equal, but for differences of these kinds."""
    found = [one for one in compare_trees(expected, actual, limit=10_000) if one.kind not in but]
    assert not found, describe(expected, actual, found)


# git ---------------------------------------------------------------------------------------------

IDENTITY = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")


def git(place, *arguments):
    return run("git", *IDENTITY, "-c", "gc.auto=0", *arguments, cwd=place)


def commit(repository, name, text):
    (repository / name).write_text(text)
    git(repository, "add", "-A")
    git(repository, "commit", "-q", "-m", name)


def test_git_worktrees_at_the_same_time_and_gc(place):
    main = place / "main"
    git(place.path, "init", "-q", "-b", "main", main)
    real_tree.library(main / "library", 60)
    commit(main, "first", "1\n")
    branches = [f"side{number}" for number in range(3)]
    for branch in branches:
        git(main, "worktree", "add", "-q", "-b", branch, place / branch)

    def work(branch):
        for number in range(4):
            commit(place / branch, f"{branch}-{number}", f"{number}\n" * 100)

    together(*[lambda branch=branch: work(branch) for branch in branches])
    for branch in branches:
        git(main, "merge", "-q", "--no-edit", branch)
    git(main, "gc", "-q", "--aggressive", "--prune=now")
    git(main, "worktree", "remove", branches[0])
    git(main, "fsck", "--full", "--strict", "--no-progress")
    assert git(main, "status", "--porcelain") == ""
    assert len(list(main.glob("side*"))) == 12
    # A clone within the mount shares its objects by hard links, one through a URL does not.
    git(place.path, "clone", "-q", main, place / "linked")
    git(place.path, "clone", "-q", f"file://{main}", place / "copied")
    for clone in ("linked", "copied"):
        git(place / clone, "fsck", "--full", "--no-progress")
        assert git(place / clone, "rev-parse", "HEAD") == git(main, "rev-parse", "HEAD")
    packs = list((place / "linked" / ".git/objects/pack").glob("*.pack"))
    assert packs[0].stat().st_nlink == 2
    # Rewriting what is checked out: rebase, stash, reset, clean.
    commit(place / "linked", "own", "own\n")
    commit(main, "later", "later\n")
    git(place / "linked", "fetch", "-q")
    git(place / "linked", "rebase", "-q", "origin/main")
    (place / "linked" / "own").write_text("changed\n")
    git(place / "linked", "stash", "-q")
    git(place / "linked", "stash", "pop", "-q")
    git(place / "linked", "reset", "-q", "--hard", "HEAD~5")
    git(place / "linked", "clean", "-qfdx")
    assert git(place / "linked", "status", "--porcelain") == ""
    git(place / "linked", "repack", "-q", "-a", "-d", "-f")
    git(place / "linked", "fsck", "--full", "--no-progress")
    place.check()
    git(place.replica / "main", "-c", "safe.directory=*", "fsck", "--full", "--no-progress")


# sqlite ------------------------------------------------------------------------------------------

ACCOUNTS = 50
TRANSFERS = 12


def connect(path):
    return sqlite3.connect(path, timeout=60, isolation_level=None)


def transfer(path, seed):
    """Move money between accounts, one transaction at a time."""
    database = connect(path)
    for number in range(TRANSFERS):
        database.execute("begin immediate")
        database.execute("update t set n = n - ? where id = ?", (seed, (seed + number) % ACCOUNTS))
        database.execute(
            "update t set n = n + ? where id = ?", (seed, (7 * seed + 3 * number) % ACCOUNTS)
        )
        database.execute("insert into log values (?, ?)", (seed, os.urandom(3000)))
        database.execute("commit")
    database.close()


def watch(path):
    """The sum never differs, whenever one looks."""
    database = connect(path)
    looks = 0
    while database.execute("select count(*) from log").fetchone()[0] < 3 * TRANSFERS:
        assert database.execute("select sum(n) from t").fetchone() == (0,)
        looks += 1
    database.close()
    return looks


def stop_in_the_middle(path, report):
    """Write a transaction that does not fit the cache, and wait to be killed."""
    database = connect(path)
    database.execute("pragma cache_size=5")
    database.execute("begin immediate")
    database.execute("update t set n = n + 1")
    database.execute("insert into log select 99, randomblob(3000) from log")
    os.write(report, b"x")
    signal.pause()


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
def test_sqlite_from_several_processes(place, journal):
    path = place / "data.db"
    database = connect(path)
    assert database.execute(f"pragma journal_mode={journal}").fetchone() == (journal,)
    database.execute("create table t(id integer primary key, n integer)")
    database.execute("create table log(seed integer, data blob)")
    database.executemany("insert into t values (?, 0)", [(number,) for number in range(ACCOUNTS)])
    database.close()
    together(*[lambda seed=seed: transfer(path, seed) for seed in (1, 2, 3)], lambda: watch(path))
    # A writer is killed in the middle of a transaction, what it has written is rolled back.
    reader, writer = os.pipe()
    child = spawn(stop_in_the_middle, path, writer)
    assert os.read(reader, 1) == b"x"
    child.kill()
    os.close(reader)
    os.close(writer)
    database = connect(path)
    assert database.execute("select sum(n), count(*) from t").fetchone() == (0, ACCOUNTS)
    assert database.execute("select count(*) from log").fetchone() == (3 * TRANSFERS,)
    assert database.execute("pragma integrity_check").fetchone() == ("ok",)
    database.execute("vacuum")
    database.close()
    place.check()
    replica = sqlite3.connect(f"file:{place.replica / 'data.db'}?mode=ro&immutable=1", uri=True)
    assert replica.execute("pragma integrity_check").fetchone() == ("ok",)
    assert replica.execute("select sum(n) from t").fetchone() == (0,)
    replica.close()


# rsync and tar -----------------------------------------------------------------------------------

RSYNC = ("rsync", "-aHAXS", "--delete", "--inplace", "--no-whole-file", "--modify-window=-1")


def change(top):
    """What happens to a tree between two runs: change in the middle, growth, moves, removals."""
    for path in (top / "holes" / "island", top / "links" / "one", top / "holes" / "many"):
        with path.open("r+b") as file:
            file.seek(path.stat().st_size // 2)
            file.write(b"changed here")
            file.seek(0, os.SEEK_END)
            file.write(b"and longer" * 500)
    with (top / "holes" / "tail").open("r+b") as file:
        file.truncate(MIB)
    os.rename(top / "links" / "deep", top / "links" / "moved")
    os.unlink(top / "links" / "two")
    os.unlink(top / "special_files" / "fifo")
    os.mkdir(top / "special_files" / "fifo")
    # Not before that: a new directory with the inode number of a removed one is, to tar(1), the
    # removed one renamed, on any filesystem.
    shutil.rmtree(top / "odd_names")
    os.setxattr(top / "extended_attributes" / "file", "user.comment", b"another")
    os.removexattr(top / "extended_attributes" / "directory", acl.DEFAULT)
    os.chown(top / "modes_and_times" / "old", USER, GROUP)
    os.chmod(top / "modes_and_times" / "exact", 0o600)


def test_rsync_in_place_both_ways(place):
    source, copy, back = place.outside / "source", place / "copy", place.outside / "back"
    real_tree.special(source)
    run(*RSYNC, f"{source}/", f"{copy}/")
    assert_same(source, copy)
    place.check()
    run(*RSYNC, f"{copy}/", f"{back}/")
    assert_same(source, back)
    change(source)
    run(*RSYNC, f"{source}/", f"{copy}/")
    assert_same(source, copy)
    place.check()
    # And the other way: what is changed on the mount.
    (copy / "new").mkdir()
    (copy / "new" / "file").write_bytes(b"new")
    with (copy / "holes" / "island").open("r+b") as file:
        file.write(b"on the mount")
    os.link(copy / "holes" / "island", copy / "new" / "island")
    run(*RSYNC, f"{copy}/", f"{back}/")
    assert_same(copy, back)
    assert run(*RSYNC, "--itemize-changes", f"{copy}/", f"{back}/") == ""


def test_incremental_archives(place):
    """tar(1) decides by device, inode number and both times what is new."""
    live, restored = place / "live", place / "restored"
    real_tree.special(live)
    os.unlink(live / "special_files" / "socket")  # tar(1) says that it leaves sockets out
    options = ("--acls", "--xattrs", "--xattrs-include=*", "--sparse", "--numeric-owner",
               "--warning=no-timestamp", "--format=posix")  # fmt: skip
    snapshot = place / "snapshot"
    sizes = []
    for level in (0, 1, 2):
        archive = place / f"{level}.tar"
        run("tar", *options, "-g", snapshot, "-cf", archive, "-C", live, ".")
        sizes.append(archive.stat().st_size)
        if level == 0:
            change(live)
    run("tar", *options, "-tf", place / "1.tar")
    restored.mkdir()
    for level in (0, 1, 2):
        run("tar", *options, "-g", "/dev/null", "-xpf", place / f"{level}.tar", "-C", restored)
    assert_same(live, restored)
    names = run("tar", "-tf", place / "2.tar").splitlines()
    # Nothing has changed since, but what is newer than any snapshot.
    assert [name for name in names if not name.endswith("/")] == ["./modes_and_times/new"]


# A build -----------------------------------------------------------------------------------------


def test_a_build_with_make_j4(place):
    units = 16
    (place / "include").mkdir()
    (place / "src").mkdir()
    (place / "include" / "all.h").write_text(
        "#define STEP 1\n" + "".join(f"int unit{number}(int);\n" for number in range(units))
    )
    for number in range(units):
        (place / "src" / f"unit{number}.c").write_text(
            f'#include <stdlib.h>\n#include "all.h"\n'
            f"int unit{number}(int n) {{ return abs(n) + STEP; }}\n"
        )
    calls = "".join(f"  n = unit{number}(n);\n" for number in range(units))
    (place / "src" / "main.c").write_text(
        f'#include <stdio.h>\n#include "all.h"\nint main(void) {{\n  int n = 0;\n{calls}'
        f'  printf("%d\\n", n);\n  return 0;\n}}\n'
    )
    (place / "Makefile").write_text(
        "CFLAGS = -O1 -g -fPIC -Iinclude -MMD -MP\n"
        "UNITS = $(patsubst src/%.c,obj/%.o,$(filter-out src/main.c,$(wildcard src/*.c)))\n"
        "all: bin/static bin/shared\n"
        "obj bin:\n\tmkdir -p $@\n"
        "obj/%.o: src/%.c | obj\n\t$(CC) $(CFLAGS) -c -o $@ $<\n"
        "bin/libunits.a: $(UNITS) | bin\n\t$(AR) rcs $@ $^\n"
        "bin/libunits.so: $(UNITS) | bin\n\t$(CC) -shared -o $@ $^\n"
        "bin/static: obj/main.o bin/libunits.a\n\t$(CC) -o $@ $^\n"
        "bin/shared: obj/main.o bin/libunits.so\n"
        "\t$(CC) -o $@ $< -Lbin -lunits '-Wl,-rpath,$$ORIGIN'\n"
        "install: all\n\tinstall -D -m 0755 -s bin/static $(DESTDIR)/usr/bin/program\n"
        "\tinstall -D -m 0644 bin/libunits.so $(DESTDIR)/usr/lib/libunits.so\n"
        "clean:\n\trm -rf obj bin\n"
        "-include $(wildcard obj/*.d)\n"
    )
    run("make", "-s", "-j4", cwd=place.path)
    for program in ("static", "shared"):
        assert run(place / "bin" / program) == f"{units}\n"
    run("make", "-q", cwd=place.path)  # fails if anything is out of date
    header = (place / "include" / "all.h").read_text()
    (place / "include" / "all.h").write_text(header.replace("STEP 1", "STEP 3"))
    assert run("make", "-j4", cwd=place.path).count(" -c -o ") == units + 1
    for program in ("static", "shared"):
        assert run(place / "bin" / program) == f"{3 * units}\n"
    run("make", "-s", "install", f"DESTDIR={place / 'root'}", cwd=place.path)
    assert run(place / "root" / "usr/bin/program") == f"{3 * units}\n"
    place.check()
    run("make", "-s", "clean", cwd=place.path)


# Mail --------------------------------------------------------------------------------------------

MESSAGES = 25


def test_delivery_into_a_maildir(place):
    """tmp, fsync, link to new; readers move what is new to cur; nothing is lost or seen twice."""
    box = place / "Maildir"
    for name in ("tmp", "new", "cur"):
        (box / name).mkdir(parents=True)

    def deliver(sender):
        for number in range(MESSAGES):
            name = f"{time.time_ns()}.{sender}_{number}.host"
            with (box / "tmp" / name).open("xb") as file:
                file.write(f"From: {sender}\n\nmessage {number} of {sender}\n".encode() * 20)
                file.flush()
                os.fsync(file.fileno())
            os.link(box / "tmp" / name, box / "new" / name)
            os.unlink(box / "tmp" / name)

    def collect():
        mine = []
        while len(os.listdir(box / "cur")) < 3 * MESSAGES:
            for name in os.listdir(box / "new"):
                try:
                    os.rename(box / "new" / name, box / "cur" / f"{name}:2,S")
                except FileNotFoundError:
                    continue  # the other one was faster
                mine.append(name)
        return mine

    results = together(*[lambda sender=sender: deliver(sender) for sender in range(3)],
                       collect, collect)  # fmt: skip
    assert max(Counter(results[3] + results[4]).values()) == 1
    assert len(results[3]) + len(results[4]) == 3 * MESSAGES
    assert (os.listdir(box / "tmp"), os.listdir(box / "new")) == ([], [])
    found = Counter(message.get_payload() for message in mailbox.Maildir(box, create=False))
    expected = {
        f"message {number} of {sender}\n" + f"From: {sender}\n\nmessage {number} of {sender}\n" * 19
        for sender in range(3)
        for number in range(MESSAGES)
    }
    assert found == dict.fromkeys(expected, 1)
    place.check()


def test_delivery_into_one_mailbox(place):
    """All append to one file, under a dot lock and a POSIX lock."""
    path = place / "mbox"
    path.touch()

    def deliver(sender):
        box = mailbox.mbox(path, create=False)
        for number in range(8):
            while True:
                try:
                    box.lock()
                except mailbox.ExternalClashError:
                    time.sleep(0.002)
                    continue
                break
            message = mailbox.mboxMessage(f"From: {sender}\n\n{sender} {number}\n")
            box.add(message)
            box.flush()
            box.unlock()
        box.close()

    together(*[lambda sender=sender: deliver(sender) for sender in range(3)])
    box = mailbox.mbox(path, create=False)
    found = Counter(message.get_payload() for message in box)
    box.close()
    assert found == {f"{sender} {number}\n": 1 for sender in range(3) for number in range(8)}
    assert os.listdir(place.path) == ["mbox"]


# Logs --------------------------------------------------------------------------------------------


def test_rotation_of_a_log_that_is_written(place):
    """Rename and create, the way of logrotate(8): no line is lost, cut or doubled."""
    log = place / "log"
    log.touch()
    lines, rotations = 300, 5

    def write(writer):
        handler = logging.handlers.WatchedFileHandler(log)
        for number in range(lines):
            handler.emit(logging.makeLogRecord({"msg": f"{writer} {number}"}))
        handler.close()

    def rotate():
        for _ in range(rotations):
            wait_for(lambda: log.stat().st_size > 2000 or finished(), interval_s=0.001)
            for age in range(rotations, 0, -1):
                if (place / f"log.{age}").exists():
                    os.rename(place / f"log.{age}", place / f"log.{age + 1}")
            os.rename(log, place / "log.1")
            os.close(os.open(log, os.O_CREAT | os.O_EXCL, 0o640))

    def finished():
        texts = [path.read_text() for path in place.path.iterdir()]
        return sum(text.count("\n") for text in texts) == 3 * lines

    together(*[lambda writer=writer: write(writer) for writer in range(3)], rotate)
    found = Counter(line for path in place.path.iterdir() for line in path.read_text().splitlines())
    assert found == {f"{writer} {number}": 1 for writer in range(3) for number in range(lines)}
    assert len(os.listdir(place.path)) == rotations + 1


def test_rotation_by_copying_and_truncating(place):
    """Who appends goes on at the new end: no hole appears before it."""
    log = place / "log"
    log.touch()
    done = place / "done"

    def write():
        fd = os.open(log, os.O_WRONLY | os.O_APPEND)
        number = 0
        while not done.exists():
            os.write(fd, f"line {number}\n".encode())
            number += 1
        os.write(fd, b"the last line\n")
        os.close(fd)

    def rotate():
        for age in range(5):
            wait_for(lambda: log.stat().st_size > 500, interval_s=0.001)
            shutil.copyfile(log, place / f"log.{age}")
            os.truncate(log, 0)
        done.touch()

    together(write, rotate)
    for path in (log, *place.path.glob("log.*")):
        data = path.read_bytes()
        assert b"\0" not in data, path
        assert data.endswith(b"\n"), path
    assert log.read_text().endswith("the last line\n")
    done.unlink()


@pytest.mark.skipif(not has_command("logrotate"), reason="logrotate is not installed")
def test_logrotate(place):
    rules = place.outside / "rules"
    state = place.outside / "state"
    rules.write_text(
        f'"{place.path}/*.log" {{\n  rotate 3\n  compress\n  delaycompress\n  missingok\n'
        f"  create 0640 daemon daemon\n}}\n"
        f'"{place.path}/*.copy" {{\n  rotate 2\n  copytruncate\n}}\n'
    )
    for name in ("a.log", "b.log", "c.copy"):
        (place / name).write_text("line\n" * 1000)
    for _ in range(4):
        run("logrotate", "-f", "-s", state, rules)
        for name in ("a.log", "b.log", "c.copy"):
            with (place / name).open("a") as log:
                log.write("line\n" * 10)
    assert sorted(os.listdir(place.path)) == [
        "a.log", "a.log.1", "a.log.2.gz", "a.log.3.gz", "b.log", "b.log.1", "b.log.2.gz",
        "b.log.3.gz", "c.copy", "c.copy.1", "c.copy.2",
    ]  # fmt: skip
    run("gzip", "-t", place / "a.log.3.gz")


# Editors -----------------------------------------------------------------------------------------


def write_synced(path, data, mode=0o600):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path):
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def like(model, path):
    """Give a new file what editors keep: owner, mode, extended attributes and with them ACLs."""
    status = model.stat()
    os.chown(path, status.st_uid, status.st_gid)
    os.chmod(path, status.st_mode & 0o7777)
    shutil.copystat(model, path)
    os.utime(path)


def save_by_rename(file, data):
    """The way of most: a temporary file, fsync, rename over, fsync of the directory."""
    fd, name = tempfile.mkstemp(dir=file.parent, prefix=".save")
    os.write(fd, data)
    like(file, Path(name))
    os.fsync(fd)
    os.close(fd)
    os.rename(name, file)
    sync_directory(file.parent)


def save_with_a_backup_by_rename(file, data):
    """vim with backupcopy=no: the old one becomes the backup, a new one is written."""
    swap = file.with_name(f".{file.name}.swp")
    write_synced(swap, b"swap" * 1024)
    probe = file.parent / "4913"  # it tries whether it could make a file
    write_synced(probe, b"")
    os.unlink(probe)
    backup = file.with_name(file.name + "~")
    os.rename(file, backup)
    write_synced(file, data)
    like(backup, file)
    os.unlink(backup)
    os.unlink(swap)


def save_in_place_with_a_backup(file, data):
    """vim with backupcopy=yes: a copy is the backup, the file itself is truncated and written."""
    backup = file.with_name(file.name + "~")
    write_synced(backup, file.read_bytes())
    like(file, backup)
    fd = os.open(file, os.O_WRONLY | os.O_TRUNC)
    os.write(fd, data)
    os.fsync(fd)
    os.close(fd)
    os.unlink(backup)


def save_with_a_lock_and_a_hard_link(file, data):
    """emacs: a lock that is a dangling symlink, an autosave file, the backup is a hard link."""
    lock = file.with_name(f".#{file.name}")
    os.symlink("user@host.1234:1700000000", lock)
    autosave = file.with_name(f"#{file.name}#")
    write_synced(autosave, data)
    backup = file.with_name(file.name + "~")
    backup.unlink(missing_ok=True)
    os.link(file, backup)
    new = file.with_name(file.name + ".new")
    write_synced(new, data)
    like(backup, new)
    os.rename(new, file)
    sync_directory(file.parent)
    os.unlink(backup)
    os.unlink(autosave)
    os.unlink(lock)


def save_by_exchange(file, data):
    """The old and the new one change places in one step."""
    new = file.with_name("." + file.name)
    write_synced(new, data)
    like(file, new)
    renameat2(file, new, RENAME_EXCHANGE)
    os.unlink(new)


SAVES = (
    save_by_rename, save_with_a_backup_by_rename, save_in_place_with_a_backup,
    save_with_a_lock_and_a_hard_link, save_by_exchange,
)  # fmt: skip


@pytest.mark.parametrize("save", SAVES, ids=lambda save: save.__name__)
def test_the_ways_in_which_editors_save(place, save):
    file = place / "text"
    file.write_bytes(b"old " * 5000)
    os.chown(file, USER, GROUP)
    os.chmod(file, 0o640)
    os.setxattr(file, "user.comment", b"kept")
    os.setxattr(file, acl.ACCESS, acl.pack(6, 4, 0, users={USER + 1: 4}))
    mode = file.stat().st_mode
    with file.open("rb") as before:
        for number in range(5):
            inode = file.stat().st_ino
            save(file, b"%d " % number * (5000 - number))
            assert file.read_bytes() == b"%d " % number * (5000 - number)
            # Only one of them keeps the file; who has the old one open goes on to see it.
            assert (file.stat().st_ino == inode) is (save is save_in_place_with_a_backup)
            if save is not save_in_place_with_a_backup:
                before.seek(0)
                assert before.read() == b"old " * 5000
    status = file.stat()
    assert (status.st_mode, status.st_uid, status.st_gid) == (mode, USER, GROUP)
    assert status.st_nlink == 1
    assert os.getxattr(file, "user.comment") == b"kept"
    assert os.listdir(place.path) == ["text"]


def test_tools_that_rewrite_files(place):
    file = place / "text"
    file.write_text("".join(f"{number}\n" for number in range(1000)))
    run("sed", "-i", "s/^9/nine/", file)
    run("sed", "-i.bak", "1d", file)
    run("sort", "-r", "-o", file, file)
    run("cp", "--backup=numbered", place / "text.bak", file)
    run("cp", "--backup=numbered", place / "text.bak", file)
    run("mv", "-b", place / "text.bak", file)
    assert sorted(os.listdir(place.path)) == ["text", "text.~1~", "text.~2~", "text.~3~"]
    assert file.read_text().startswith("0\n1\n2\n")
    run("dd", f"of={file}", "if=/dev/zero", "bs=7", "seek=3", "count=2", "conv=notrunc,fsync",
        "status=none")  # fmt: skip
    assert file.read_bytes()[21:35] == bytes(14)
    run("truncate", "-s", "1M", file)
    run("cp", "--sparse=always", file, place / "sparse")
    run("cp", "--reflink=auto", file, place / "copied")
    run("cmp", file, place / "sparse")
    run("split", "-b", "100k", file, place / "part")
    assert len(list(place.path.glob("part*"))) == 11
    run("install", "-m", "4711", "-o", str(USER), "-g", str(GROUP), file, place / "installed")
    assert (place / "installed").stat().st_mode & 0o7777 == 0o4711
    run("ln", "-sfn", "sparse", place / "link")
    run("ln", "-sfn", "copied", place / "link")
    assert os.readlink(place / "link") == "copied"
    run("shred", "-n", "1", "-u", place / "sparse")
    run("mkdir", "-p", place / "a/b/c")
    run("rmdir", "-p", "a/b/c", cwd=place.path)
    run("chmod", "-R", "u=rwX,go=", place.path)
    run("chown", "-R", f"{USER}:{GROUP}", place.path)
    run("setfacl", "-R", "-m", "u:1234:rwX", place.path)
    run("touch", "-r", place / "text.~3~", place / "copied")
    assert (place / "copied").stat().st_mtime_ns == (place / "text.~3~").stat().st_mtime_ns


# Watching ----------------------------------------------------------------------------------------

IN_ALL_EVENTS = 0xFFF
IN_NAMES = {
    0x1: "access", 0x2: "modify", 0x4: "attrib", 0x8: "close_write", 0x10: "close_nowrite",
    0x20: "open", 0x40: "moved_from", 0x80: "moved_to", 0x100: "create", 0x200: "delete",
    0x400: "delete_self", 0x800: "move_self", 0x8000: "ignored",
}  # fmt: skip
IN_ISDIR = 0x40000000


class Watch:
    """inotify(7), which Python does not offer."""

    def __init__(self, **paths):
        self.fd = _libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.paths = {
            _libc.inotify_add_watch(self.fd, os.fsencode(path), IN_ALL_EVENTS): name
            for name, path in paths.items()
        }
        assert -1 not in self.paths

    def events(self):
        """All so far, as (watched, event, name, number of the move)."""
        found = []
        cookies = {0: 0}
        while True:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return found
            while data:
                watched, mask, cookie, length = struct.unpack_from("iIII", data)
                name = data[16 : 16 + length].rstrip(b"\0").decode()
                kind = IN_NAMES[mask & 0xFFFF] + ("/" if mask & IN_ISDIR else "")
                move = cookies.setdefault(cookie, len(cookies))
                found.append((self.paths[watched], kind, name, move))
                data = data[16 + length :]

    def close(self):
        os.close(self.fd)


def watched_work(top):
    """Do something of each kind below `top`; what watchers of it are told."""
    (top / "sub").mkdir()
    (top / "victim").write_bytes(b"x")
    watch = Watch(top=top, sub=top / "sub", victim=top / "victim")
    (top / "new").write_bytes(b"data")
    (top / "new").read_bytes()
    with (top / "new").open("ab") as file:
        file.write(b"more")
    os.truncate(top / "new", 1)
    os.chmod(top / "new", 0o600)
    os.chown(top / "new", USER, GROUP)
    os.utime(top / "new", (1, 2))
    os.setxattr(top / "new", "user.x", b"1")
    os.removexattr(top / "new", "user.x")
    os.rename(top / "new", top / "renamed")
    os.rename(top / "renamed", top / "sub" / "moved")
    os.link(top / "sub" / "moved", top / "linked")
    os.symlink("linked", top / "symbolic")
    os.mkfifo(top / "fifo")
    (top / "directory").mkdir()
    os.listdir(top / "sub")
    os.rename(top / "linked", top / "victim")
    os.unlink(top / "symbolic")
    os.unlink(top / "fifo")
    os.rmdir(top / "directory")
    os.unlink(top / "victim")
    os.unlink(top / "sub" / "moved")
    os.rename(top / "sub", top / "sub2")
    os.rmdir(top / "sub2")
    found = watch.events()
    watch.close()
    return found


def test_inotify_tells_what_it_tells_on_the_disk_beneath(place):
    expected = watched_work(place.outside)
    assert len(expected) > 40
    assert watched_work(place.path) == expected


def test_a_watcher_in_another_process(place):
    watch = Watch(top=place.path)
    together(lambda: (place / "file").write_bytes(b"x"))
    assert [event[1] for event in watch.events()] == ["create", "open", "modify", "close_write"]
    watch.close()


# Looking at it -----------------------------------------------------------------------------------


def both(place, *command):
    """A command's output on the mount, which must be the same in the store."""
    outputs = [run(*command, cwd=path) for path in (place.path, place.store)]
    assert outputs[0] == outputs[1]
    return outputs[0]


def test_du_df_and_find_agree_with_the_store(place):
    real_tree.library(place / "library", 200)
    real_tree.special(place / "special")
    (place / "reference").write_bytes(b"x")
    os.utime(place / "reference", ns=(real_tree.OLD_NS, real_tree.OLD_NS + 100 * 1_000_003))
    os.sync()  # what is not yet allocated has no blocks
    assert int(both(place, "du", "-s", "--block-size=1", ".").split()[0]) > 400 * BLOCK
    both(place, "du", "-a", "--apparent-size", "--block-size=1", ".")
    both(place, "du", "-al", ".")
    both(place, "find", ".", "-printf", "%p %i %y %l %m %n %U %G %s %b %T@ %C@\\n")
    newer = both(place, "find", ".", "-type", "f", "-newer", "reference").splitlines()
    assert 100 <= len(newer) < 600
    assert len(both(place, "find", "special/links", "-samefile", "special/links/one").split()) == 3
    for question in (("-links", "+1"), ("-size", "+100k"), ("-perm", "/6000"), ("-empty",),
                     ("-newermt", "2030-01-01"), ("-lname", "*one*"), ("-uid", "1001"),
                     ("!", "-readable"), ("-name", "n*")):  # fmt: skip
        assert both(place, "find", ".", *question)
    both(place, "ls", "-lanR", "--time-style=full-iso")
    both(place, "getfacl", "-R", "-n", ".")
    columns = "--output=size,itotal"
    both(place, "df", "-B1", columns, ".")


# Overlay -----------------------------------------------------------------------------------------


@pytest.fixture
def overlay(place):
    """A mount point beside the mount, and a function that mounts an overlay on it."""
    point = place.outside / "overlay"
    point.mkdir()

    def mount(lower, upper, work):
        options = f"lowerdir={lower},upperdir={upper},workdir={work}"
        run("mount", "-t", "overlay", "-o", options, "overlay", point)
        return point

    yield mount
    unmount_all(point)


def overlaid_work(top):
    """Change what is below: copy up, cover, rename."""
    assert (top / "file").read_bytes() == b"below"
    with (top / "file").open("ab") as file:
        file.write(b" and above")
    os.unlink(top / "directory" / "gone")
    (top / "directory" / "new").write_bytes(b"new")
    shutil.rmtree(top / "tree")
    (top / "tree").mkdir()
    os.rename(top / "name", top / "other name")
    os.chmod(top / "mode", 0o711)
    assert (top / "file").read_bytes() == b"below and above"
    assert os.listdir(top / "directory") == ["new"]
    assert os.listdir(top / "tree") == []
    assert sorted(os.listdir(top)) == ["directory", "file", "mode", "other name", "tree"]


def make_lower(top):
    top.mkdir()
    for name in ("directory", "tree"):
        (top / name).mkdir()
    for name in ("file", "directory/gone", "tree/leaf", "name", "mode"):
        (top / name).write_bytes(b"below")


def test_an_overlay_above_the_mount(place, overlay):
    lower, upper, work = place / "lower", place.outside / "upper", place.outside / "work"
    make_lower(lower)
    upper.mkdir()
    work.mkdir()
    overlaid_work(overlay(lower, upper, work))
    names = {"directory", "file", "mode", "name", "tree"}
    assert set(os.listdir(lower)) == names
    assert (lower / "file").read_bytes() == b"below"
    assert (lower / "tree" / "leaf").exists()


def test_an_overlay_that_keeps_its_changes_on_the_mount(place, overlay):
    """The kernel takes a FUSE mount for it only where RENAME_WHITEOUT and xattrs work."""
    lower, upper, work = place.outside / "lower", place / "upper", place / "work"
    make_lower(lower)
    upper.mkdir()
    work.mkdir()
    top = overlay(lower, upper, work)
    overlaid_work(top)
    with (top / "file").open("rb") as file:
        os.rename(top / "file", top / "tree" / "file")
        assert file.read() == b"below and above"
    os.rename(top / "tree", top / "moved")
    os.link(top / "moved" / "file", top / "link")
    os.unlink(top / "mode")
    (top / "mode").mkdir()
    place.check()
    unmount_all(top)
    assert stat.S_ISCHR((upper / "name").lstat().st_mode)
    # Mounted again, it is what it was.
    top = overlay(lower, upper, work)
    assert sorted(os.listdir(top)) == ["directory", "link", "mode", "moved", "other name"]
    assert (top / "link").read_bytes() == b"below and above"
    assert os.listdir(top / "moved") == ["file"]
    assert os.listdir(top / "mode") == []
    unmount_all(top)


# Packages ----------------------------------------------------------------------------------------


@pytest.mark.skipif(not has_command("npm"), reason="npm is not installed")
def test_npm_install(place):
    package = place.outside / "package"
    (package / "lib").mkdir(parents=True)
    (package / "package.json").write_text(
        '{"name": "sample", "version": "1.0.0", "main": "lib/index.js",'
        ' "bin": {"sample": "run.js"}}'
    )
    for number in range(30):
        (package / "lib" / f"part{number}.js").write_text(f"module.exports = {number};\n")
    (package / "lib" / "index.js").write_text("module.exports = require('./part7.js');\n")
    (package / "run.js").write_text("#!/usr/bin/env node\nconsole.log(require('sample'));\n")
    environ = {"HOME": str(place.outside), "npm_config_cache": str(place / "cache"),
               "npm_config_update_notifier": "false", "NO_COLOR": "1"}  # fmt: skip
    run("npm", "pack", "--silent", package, cwd=place.outside, environ=environ, complains=True)
    project = place / "project"
    project.mkdir()
    (project / "package.json").write_text('{"name": "project", "version": "1.0.0"}')
    tarball = place.outside / "sample-1.0.0.tgz"
    options = ("--offline", "--no-audit", "--no-fund")
    run("npm", "install", *options, tarball, cwd=project, environ=environ, complains=True)
    assert run(project / "node_modules/.bin/sample", cwd=project) == "7\n"
    run("npm", "ci", *options, cwd=project, environ=environ, complains=True)
    assert run("node", "-e", "console.log(require('sample'))", cwd=project) == "7\n"
    run("npm", "uninstall", *options, "sample", cwd=project, environ=environ, complains=True)
    assert not (project / "node_modules/sample").exists()


def make_wheel(directory, version, parts):
    wheel = directory / f"sample-{version}-py3-none-any.whl"
    info = f"sample-{version}.dist-info"
    members = {f"sample/part{number}.py": f"VALUE = {number}\n" for number in range(parts)}
    members |= {
        "sample/__init__.py": f"def main():\n    print({version!r})\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: sample\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nsample = sample:main\n",
    }
    record = "".join(f"{name},,\n" for name in members)
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in (members | {f"{info}/RECORD": record}).items():
            archive.writestr(name, text)
    return wheel


def test_a_python_environment_with_pip(place):
    """venv installs pip itself, a thousand files; then a package comes, is replaced, and goes."""
    environment = place / "environment"
    run(sys.executable, "-m", "venv", environment)
    pip = (environment / "bin" / "pip", "--disable-pip-version-check", "--no-cache-dir", "-q")
    for version, parts in (("1.0", 30), ("2.0", 10)):
        wheel = make_wheel(place.outside, version, parts)
        run(*pip, "install", "--no-index", wheel)
        assert run(environment / "bin" / "sample") == f"{version}\n"
    run(*pip, "check")
    packages = next(environment.glob("lib/python*/site-packages"))
    assert len(list((packages / "sample").glob("part*.py"))) == 10
    run(*pip, "uninstall", "-y", "sample")
    assert not (packages / "sample").exists()
    place.check()


# PostgreSQL --------------------------------------------------------------------------------------


def postgresql():
    """The directory of the server's programs, of the newest version there is."""
    found = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: float(p.parts[-3])
    )
    return found[-1].parent if found else None


@pytest.mark.skipif(postgresql() is None, reason="PostgreSQL's server is not installed")
def test_postgresql_with_a_crash(place):
    """initdb, pgbench, a kill of the whole server in the middle, recovery, and the sums agree."""
    programs = postgresql()
    user = 65534  # the server refuses root, and wants a user with a name
    data, sockets = place / "data", place.outside / "sockets"
    for path in (data, sockets):
        path.mkdir(mode=0o700)
        os.chown(path, user, user)
    where = {"PGHOST": str(sockets), "PGUSER": "u", "PGDATABASE": "postgres"}

    def pg(name, *arguments):
        return run(programs / name, *arguments, cwd=sockets, user=user, environ=where,
                   complains=True)  # fmt: skip

    options = f"-k {sockets} -c listen_addresses='' -c shared_buffers=8MB -c max_connections=20"
    start = ("pg_ctl", "-D", data, "-s", "-w", "-o", options, "-l", sockets / "log", "start")
    pg("initdb", "-D", data, "-U", "u", "-A", "trust", "--no-locale", "-E", "UTF8")
    pg(*start)
    try:
        pg("pgbench", "-i", "-q", "-s", "1")
        pg("pgbench", "-n", "-c", "4", "-t", "40")
        bench = subprocess.Popen(
            [programs / "pgbench", "-n", "-c", "4", "-T", "60"], cwd=sockets, user=user,
            group=user, extra_groups=[], env=os.environ | where, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        count = "select count(*) from pgbench_history"
        wait_for(lambda: int(pg("psql", "-Atc", count)) > 220, 60.0, "transactions")
        pg("pg_ctl", "-D", data, "-s", "-w", "-m", "immediate", "stop")
        assert bench.wait(60) != 0
        pg(*start)
        sums = ("select (select sum(delta) from pgbench_history) - (select sum(abalance) from "
                "pgbench_accounts), (select sum(abalance) from pgbench_accounts) - (select "
                "sum(bbalance) from pgbench_branches)")  # fmt: skip
        assert pg("psql", "-Atc", sums) == "0|0\n"
        assert int(pg("psql", "-Atc", count)) > 220
    finally:
        pg("pg_ctl", "-D", data, "-s", "-w", "-m", "fast", "stop")
    place.check()
