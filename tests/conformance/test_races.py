"""Several processes at once: what POSIX calls atomic stays so."""

from __future__ import annotations

import os

from helpers.cases import exists, fd_of, outcome, read, write
from helpers.children import as_user, spawn, together

PROCESSES = 4
ROUNDS = 40


def winners(results):
    return [sorted(row) for row in zip(*results, strict=True)]


def test_o_excl_has_one_winner(tree):
    def create():
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
        return [outcome(os.open, tree / str(number), flags) for number in range(ROUNDS)]

    expected = ["EEXIST"] * (PROCESSES - 1) + ["ok"]
    assert winners(together(*[create] * PROCESSES)) == [expected] * ROUNDS


def test_mkdir_has_one_winner(tree):
    def make():
        return [outcome(os.mkdir, tree / str(number)) for number in range(ROUNDS)]

    expected = ["EEXIST"] * (PROCESSES - 1) + ["ok"]
    assert winners(together(*[make] * PROCESSES)) == [expected] * ROUNDS


def test_link_has_one_winner(tree):
    for who in range(PROCESSES):
        write(tree / f"own {who}", b"%d" % who)

    def link(who):
        return [
            outcome(os.link, tree / f"own {who}", tree / str(number)) for number in range(ROUNDS)
        ]

    expected = ["EEXIST"] * (PROCESSES - 1) + ["ok"]
    results = together(*[lambda who=who: link(who) for who in range(PROCESSES)])
    assert winners(results) == [expected] * ROUNDS
    for who in range(PROCESSES):
        assert os.stat(tree / f"own {who}").st_nlink == 1 + results[who].count("ok")


def test_rename_from_one_name_has_one_winner(tree):
    for number in range(ROUNDS):
        write(tree / str(number), b"%d" % number)
    for who in range(PROCESSES):
        os.mkdir(tree / f"own {who}")

    def take(who):
        return [
            outcome(os.rename, tree / str(number), tree / f"own {who}/{number}")
            for number in range(ROUNDS)
        ]

    expected = ["ENOENT"] * (PROCESSES - 1) + ["ok"]
    results = together(*[lambda who=who: take(who) for who in range(PROCESSES)])
    assert winners(results) == [expected] * ROUNDS
    assert sum(len(os.listdir(tree / f"own {who}")) for who in range(PROCESSES)) == ROUNDS


def test_a_replaced_name_is_always_there_and_whole(tree):
    write(tree / "file", b"0" * 5000)

    def replace():
        for number in range(60):
            write(tree / "temporary", b"%d" % (number % 10) * 5000)
            os.rename(tree / "temporary", tree / "file")

    child = spawn(replace)
    reads = 0
    try:
        while reads < 60:
            data = read(tree / "file")
            assert len(data) == 5000
            assert data == data[:1] * 5000
            reads += 1
    finally:
        child.result()


def test_directories_moved_across_each_other_make_no_loop(tree):
    for name in "ab":
        os.makedirs(tree / name / "x")

    def move(source, target):
        return [outcome(os.rename, tree / source, tree / target) for _ in range(ROUNDS)]

    together(lambda: move("a", "b/x/a"), lambda: move("b", "a/x/b"))
    # One of the two may have moved below the other, never both.
    assert exists(tree / "a") or exists(tree / "b")
    assert sum(1 for _ in os.fwalk(tree)) == 5


def test_work_in_one_directory(tree):
    def work(who):
        for number in range(ROUNDS):
            path = tree / f"{who} {number}"
            write(path, b"%d" % number * 100)
            os.chmod(path, 0o600)
            if number % 3 == 0:
                os.rename(path, tree / f"{who} moved {number}")
            elif number % 3 == 1:
                os.unlink(path)
            else:
                os.link(path, tree / f"{who} linked {number}")

    together(*[lambda who=who: work(who) for who in range(PROCESSES)])
    each = [n % 3 for n in range(ROUNDS)]
    assert len(os.listdir(tree)) == PROCESSES * (each.count(0) + 2 * each.count(2))


def test_users_at_work_side_by_side(tree):
    os.chmod(tree.path, 0o1777)

    def work():
        uid = os.getuid()
        os.mkdir(tree / str(uid))
        for number in range(20):
            with fd_of(tree / f"{uid}/{number}", os.O_CREAT | os.O_RDWR) as fd:
                os.write(fd, b"%d" % uid)
        return uid

    children = [spawn(work, uid=30_000 + who, gid=40_000 + who) for who in range(PROCESSES)]
    for child in children:
        uid = child.result()
        for number in range(20):
            status = os.stat(tree / f"{uid}/{number}")
            assert (status.st_uid, status.st_gid) == (uid, uid + 10_000)
    assert as_user(outcome, os.rmdir, tree / "30000") == "EPERM"
