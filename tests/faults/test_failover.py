"""Roles that change: promotion, fencing, the old primary's return."""

from __future__ import annotations

import errno
import os
import random
from pathlib import Path

import pytest
from helpers import acl
from helpers.children import spawn
from helpers.group import Group, Member
from helpers.nodes import Node, Pair, wait_for
from helpers.states import opened

from replfs.store.state import UNSTABLE

pytestmark = pytest.mark.mounted


def promote(node: Node, *arguments: str) -> str:
    return node.replfs("promote", node.store, *arguments).stdout


def refusal(node: Node, *arguments: str | Path, code: int) -> str:
    """What the node says when it refuses a command."""
    done = node.replfs(*arguments, check=False)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done.stderr


def work(mountpoint: Path, report: Path, seed: int) -> None:
    """Write records until it fails; the report, outside of replfs, holds what was acknowledged."""
    rng = random.Random(seed)
    with report.open("wb", buffering=0) as out:
        for number in range(1_000_000):
            name = f"file-{number % 20}"
            line = b"%d-%d\n" % (seed, number)
            try:
                with (mountpoint / name).open("ab", buffering=0) as file:
                    file.write(line)
                if rng.random() < 0.1:
                    os.rename(mountpoint / name, mountpoint / f"kept-{seed}-{number}")
                    name = f"kept-{seed}-{number}"
                if rng.random() < 0.05:
                    os.mkdir(mountpoint / f"dir-{seed}-{number}")
            except OSError:
                return
            out.write(line)


def assert_all_there(store: Path, report: Path) -> int:
    """Every acknowledged line is in some file of the store; how many there are."""
    present = set()
    for path in store.iterdir():
        if path.is_file():
            present |= set(path.read_bytes().splitlines())
    wanted = report.read_bytes().splitlines()
    missing = [line for line in wanted if line not in present]
    assert not missing, f"{len(missing)} of {len(wanted)}, {missing[:3]}"
    return len(wanted)


def test_the_primary_dies_under_load_and_returns():
    """Promotion in place, everything acknowledged there, the old one fenced and resynchronised."""
    with Group(2) as group:
        a, b = group.nodes
        big = os.urandom(1 << 20)
        for number in range(16):
            (a.top / f"big-{number}").write_bytes(big)
        group.wait_in_sync(a)
        report = group.base / "report"
        worker = spawn(work, a.top, report, 1)
        wait_for(lambda: report.exists() and report.stat().st_size > 4000)
        a.kill9()
        worker.result()

        with pytest.raises(OSError, match="Read-only") as raised:
            (b.top / "new").write_bytes(b"x")
        assert raised.value.errno == errno.EROFS
        assert "this node is the primary now" in promote(b)
        assert assert_all_there(b.top, report) > 100
        (b.top / "new").write_bytes(b"by the new primary")
        (b.top / "big-3").unlink()

        # By the same command line as before; it is the one in its fstab.
        a.start()
        assert a.status()["role"] == "secondary"
        with pytest.raises(OSError, match="Read-only"):
            (a.top / "other").write_bytes(b"x")
        group.wait_in_sync(b)
        sent = group.peer(b, "a")["sent_bytes"]
        assert sent < 8 << 20, "a full copy would be 16 MiB"
        group.assert_equal()
        assert (a.top / "new").read_bytes() == b"by the new primary"
        assert_all_there(a.store, report)


def test_a_promotion_that_is_refused_says_why_and_changes_nothing():
    with Group(2) as group:
        a, b = group.nodes
        (a.top / "f").write_bytes(b"x")
        before = b.status()
        said = refusal(b, "promote", b.store, "--force", code=2)
        assert "the primary a is connected: use 'replfs switchover'" in said
        said = refusal(a, "promote", a.store, code=2)
        assert "is the primary already" in said
        after = b.status()
        assert (after["role"], after["generation"]) == ("secondary", before["generation"])
        (a.top / "f").write_bytes(b"y")
        group.assert_equal()


def test_the_secondary_that_followed_less_far_is_not_promoted_unawares():
    """What the other one has besides was acknowledged (`async`), and is not thrown away."""
    with Group(3, mounted=False) as group:
        a, b, c = group.nodes
        (a.top / "file").write_bytes(b"old")
        os.setxattr(a.top / "file", "user.replfs.policy", b"async")
        group.wait_in_sync(a)
        c.freeze()
        (a.top / "file").write_bytes(b"acknowledged")
        wait_for(lambda: (b.store / "file").read_bytes() == b"acknowledged", 30, "b to have it")
        a.kill9()
        c.kill9()
        c.start()

        said = refusal(c, "promote", c.store, code=6)
        assert "b has 2 changes that this node lacks: promote that one" in said
        assert "nothing speaks against it" in promote(b, "--tentative")
        assert "they are kept beside there" in promote(c, "--force")
        group.wait_in_sync(c, "b")
        group.assert_equal(b, c)
        assert (c.store / "file").read_bytes() == b"old"
        kept = [path.read_bytes() for path in (b.store / ".replfs/kept").glob("*/file")]
        assert kept == [b"acknowledged"]


# Switchover --------------------------------------------------------------------------------------


def switchover(node: Node, *arguments: str) -> str:
    return node.replfs("switchover", node.store, *arguments).stdout


def is_writable(top: Path) -> bool:
    try:
        with (top / "writable?").open("ab", buffering=0) as file:
            file.write(b"x")
    except OSError:
        return False
    return True


def test_there_and_back():
    """Nothing is lost, nothing copied in full, and what is open for reading stays open."""
    with Group(2) as group:
        a, b = group.nodes
        (a.top / "dir").mkdir()
        (a.top / "dir" / "big").write_bytes(os.urandom(8 << 20))
        (a.top / "old").write_bytes(b"old")
        assert not (a.top / "later").exists()  # the kernel now knows that it is not there
        with (a.top / "dir" / "big").open("rb") as reader:
            head = reader.read(4096)
            said = switchover(a, "--tentative")
            assert (
                said
                == "b would be the primary, and this node follow it: nothing speaks against it\n"
            )
            with (a.top / "old").open("ab"):
                assert "it would be refused: files on" in switchover(a, "--tentative")
            assert [a.status()["role"], b.status()["role"]] == ["primary", "secondary"]
            assert "b is the primary now, and this node follows it" in switchover(a)
            reader.seek(0)
            assert reader.read(4096) == head
        assert [a.status()["role"], b.status()["role"]] == ["secondary", "primary"]
        assert [is_writable(a.top), is_writable(b.top)] == [False, True]
        (b.top / "later").write_bytes(b"by b")
        (b.top / "old").write_bytes(b"new")
        os.rename(b.top / "dir", b.top / "moved")
        wait_for(lambda: (a.top / "later").read_bytes() == b"by b", what="the replica to follow")
        wait_for(lambda: (a.top / "old").read_bytes() == b"new" and (a.top / "moved").is_dir())
        assert not (a.top / "dir").exists()
        group.wait_in_sync(b)
        assert group.peer(b, "a")["sent_bytes"] < 1 << 20
        group.assert_equal()

        switchover(b)
        assert [is_writable(a.top), is_writable(b.top)] == [True, False]
        (a.top / "old").write_bytes(b"again")
        with pytest.raises(OSError, match="Read-only"):
            (b.top / "old").write_bytes(b"x")
        group.wait_in_sync(a)
        group.assert_equal()


def test_a_switchover_that_is_refused_changes_nothing():
    with Group(2) as group:
        a, b = group.nodes
        assert "ask its primary" in refusal(b, "switchover", b.store, code=2)
        assert "there is no peer named x" in refusal(
            a, "switchover", a.store, "--peer", "x", code=2
        )
        with (a.top / "f").open("wb", buffering=0) as file:
            file.write(b"1")
            said = refusal(a, "switchover", a.store, code=2)
            assert "are open for writing (/f)" in said
            file.write(b"2")
        a.replfs("pause", a.store)
        assert "b is not in sync" in refusal(a, "switchover", a.store, code=6)
        a.replfs("resume", a.store)
        group.wait_in_sync(a)
        (a.top / "f").write_bytes(b"3")
        assert [a.status()["role"], b.status()["role"]] == ["primary", "secondary"]
        group.assert_equal()


CRASHES = [
    (0, "replfs.node.failover.switchover:Switchover._prepare:after:1"),
    (0, "replfs.node.mounted.frontend:FrontEnd.freeze:after:1"),
    (0, "replfs.node.failover.switchover:Switchover._hand_over:before:1"),
    (0, "replfs.node.failover.switchover:_ask:before:2"),
    (0, "replfs.node.failover.switchover:_ask:after:2"),
    (0, "replfs.node.roles.reign:give_up:after:1"),
    (1, "replfs.node.roles.roles:Roles._take_over_from:before:1"),
    (1, "replfs.node.roles.reign:begin_logs:after:1"),
    (1, "replfs.node.roles.reign:promote:after:1"),
    (1, "replfs.node.roles.roles:Roles._start_role:before:2"),
    (1, "replfs.node.mounted.frontend:FrontEnd.thaw:before:1"),
]
"""(whose process dies, where)."""


@pytest.mark.parametrize(
    ("victim", "where"), CRASHES, ids=lambda value: str(value).split(":")[-3:][0]
)
def test_a_crash_in_a_switchover_never_gives_two_primaries(victim, where):
    with Group(2, crash=(victim, where)) as group:
        a, b = group.nodes
        (a.top / "f").write_bytes(b"acknowledged")
        dying = group.nodes[victim]
        a.replfs("switchover", a.store, "--timeout", "20", check=False)
        wait_for(lambda: not dying.is_running, what="the crash")
        dying.kill9()
        dying.environ = {}
        dying.start()
        primaries = [node for node in group.nodes if node.status()["role"] == "primary"]
        assert len(primaries) <= 1
        # The role is durable before the mount is what the role wants.
        wait_for(
            lambda: (
                [node for node in group.nodes if is_writable(node.top)] == primaries
                or not primaries
            ),
            what="the primary's mount",
        )
        assert sum(is_writable(node.top) for node in group.nodes) == len(primaries)
        if not primaries:
            # Either may be promoted: they were equal when they stopped.
            promote(group.nodes[1 - victim])
            primaries = [group.nodes[1 - victim]]
        group.wait_in_sync(primaries[0])
        (primaries[0].top / "g").write_bytes(b"later")
        assert (primaries[0].top / "f").read_bytes() == b"acknowledged"
        group.assert_equal()


# What the old primary had alone ------------------------------------------------------------------


def kept_by(node: Node, which: str = "*") -> dict[str, bytes]:
    """What was kept beside in the directories *which*, by its path."""
    found = {}
    for top in (node.store / ".replfs" / "kept").glob(which):
        for path in top.rglob("*"):
            if path.is_file():
                found[str(path.relative_to(top))] = path.read_bytes()
    return found


def test_an_async_queue_that_died_with_the_primary_is_listed_and_kept():
    with Group(2, arguments=["--policy", "async"], timeout_s=6.0) as group:
        a, b = group.nodes
        (a.top / "log").write_bytes(b"first\n" * 1000)
        (a.top / "untouched").write_bytes(os.urandom(100_000))
        a.replfs("sync", a.store)
        before = (b.store / "log").read_bytes()
        b.freeze()
        queued = {}
        for number in range(30):
            queued[f"new-{number}"] = os.urandom(1 << 20)
            (a.top / f"new-{number}").write_bytes(queued[f"new-{number}"])
        with (a.top / "log").open("ab") as file:
            file.write(b"last\n")
        a.kill9()
        b.thaw()
        promote(b)
        # It got what was on its way; the rest died in the queue.
        lacking = [
            name
            for name, data in queued.items()
            if not (b.top / name).exists() or (b.top / name).read_bytes() != data
        ]
        assert lacking
        assert (b.top / "log").read_bytes() == before
        a.start()
        group.wait_in_sync(b)
        group.assert_equal()
        kept = kept_by(a)
        assert set(lacking) | {"log"} == set(kept)
        for name in lacking:
            assert kept[name] == queued[name]
        assert kept["log"] == before + b"last\n"
        listed = a.status()["kept"]
        assert sorted(path.rpartition("/")[2] for path in listed) == sorted(kept)


def hold_open(path: Path, base: Path) -> None:
    """Write, and again when told to; the file stays open for as long as that takes."""
    with path.open("wb", buffering=0) as file:
        file.write(b"by a\n")
        (base / "opened").touch()
        wait_for((base / "go on").exists, what="the word")
        with pytest.raises(OSError, match="Read-only"):
            file.write(b"too late\n")


def test_a_primary_that_was_frozen_steps_down_in_place():
    """It comes to and learns that it is outdated; what is open for writing fails from then on."""
    with Group(2) as group:
        a, b = group.nodes
        holder = spawn(hold_open, a.top / "f", group.base)
        wait_for((group.base / "opened").exists)
        a.freeze()
        promote(b)
        (b.top / "f").write_bytes(b"by b\n")
        a.thaw()
        group.wait_role(a, "secondary")
        (group.base / "go on").touch()
        holder.result()
        group.wait_in_sync(b)
        wait_for(lambda: (a.top / "f").read_bytes() == b"by b\n", what="the replica to follow")
        assert not is_writable(a.top)
        group.assert_equal()


def test_of_three_the_one_that_is_ahead_is_promoted():
    with Group(3) as group:
        a, b, c = group.nodes
        (a.top / "f").write_bytes(b"1")
        c.kill9()
        (a.top / "f").write_bytes(b"2")
        (a.top / "big").write_bytes(os.urandom(4 << 20))
        a.kill9()
        c.start()
        said = refusal(c, "promote", c.store, code=6)
        assert "b is ahead of this node: promote that one" in said
        told = promote(c, "--tentative")
        assert "it would be refused: b is ahead" in told
        assert "a is not reachable" in told
        assert c.status()["role"] == "secondary"
        promote(b)
        assert (b.top / "f").read_bytes() == b"2"
        group.wait_in_sync(b, "c")
        (b.top / "g").write_bytes(b"3")
        a.start()
        assert a.status()["role"] == "secondary"
        group.wait_in_sync(b)
        assert group.peer(b, "a")["sent_bytes"] < 1 << 20
        group.assert_equal()


def test_a_stopped_store_is_promoted_and_mounted():
    with Group(2) as group:
        a, b = group.nodes
        (a.top / "f").write_bytes(b"x")
        wait_for(lambda: b.status()["unstable_objects"] == 0, 30, "a common checkpoint")
        (a.top / "f").write_bytes(b"xx")
        a.kill9()
        assert b.stop() == 0
        # Started and stopped once more, it knows as much as before.
        b.start()
        assert b.stop() == 0
        assert "nothing speaks against it" in promote(b, "--tentative")
        assert "mount it with 'replfs mount'" in promote(b)
        assert "is the primary's already" in refusal(b, "promote", b.store, code=2)
        # By the command it was an agent with, as by the other one.
        b.start()
        (b.top / "f").write_bytes(b"y")
        a.start()
        group.wait_in_sync(b)
        group.assert_equal()
        # Only what may differ was looked at.
        assert b"what it has on its own is known" in b.log_since_start()
        assert b"everything is compared" not in b.log_since_start()


def test_a_node_without_a_mount_gets_one():
    with Group(2, mounted=False) as group:
        a, b = group.nodes
        (a.top / "f").write_bytes(b"x")
        a.kill9()
        top = group.base / "mnt-b"
        promote(b, "--mount", str(top))
        b.mountpoint = top
        assert (top / "f").read_bytes() == b"x"
        (top / "f").write_bytes(b"y")
        assert b.replfs("status", top, check=False).returncode == 6
        a.start()
        group.wait_in_sync(b)
        group.assert_equal()


def test_an_outdated_primary_that_cannot_listen_ends_with_a_sentence():
    with Pair() as pair:
        (pair.mountpoint / "f").write_bytes(b"x")
        pair.mount.kill9()
        promote(pair.agent)
        pair.mount.start(wait=False)
        wait_for(lambda: not pair.mount.is_running, what="the old primary to end")
        assert pair.mount.process is not None
        assert pair.mount.process.returncode == 5
        assert b"start it again with --listen" in pair.mount.log_since_start()
        pair.mount.clean_up()
        pair.mount.start(wait=False)
        wait_for(lambda: not pair.mount.is_running, what="it to be refused")
        assert b"is a secondary now" in pair.mount.log_since_start()


# Split brain -------------------------------------------------------------------------------------


def make_own(node: Member, other: str) -> None:
    """A directory becomes the node's own and is changed; what is the other's own is changed too."""
    top = node.top / f"own-{node.store.name[-1]}"
    os.setxattr(top, "user.replfs.policy", b"none")
    (top / "changed").write_bytes(b"by its node, for itself\n")
    (top / "new").write_bytes(b"of its node alone\n")
    (node.top / f"own-{other}" / "by-the-other").write_bytes(b"changed by the other one\n")


@pytest.fixture
def apart():
    """Two stores that were changed apart: a's, and b's that was promoted while a was dead."""
    with Group(2) as group:
        a, b = group.nodes
        (a.top / "dir").mkdir()
        for own in ("own-a", "own-b"):
            (a.top / own).mkdir()
            for name in ("changed", "by-the-other", "same"):
                (a.top / own / name).write_bytes(b"before\n")
        for name in ("both", "same", "gone-on-b", "dir/deep"):
            (a.top / name).write_bytes(b"before\n" * 10)
        a.kill9()
        promote(b)
        (b.top / "both").write_bytes(b"changed on b\n")
        (b.top / "only-b").write_bytes(b"b\n")
        (b.top / "gone-on-b").unlink()
        (b.top / "new-on-b").mkdir()
        (b.top / "new-on-b" / "inside").write_bytes(b"in a new directory\n")
        (b.top / "kind").mkdir()
        (b.top / "kind" / "inside").write_bytes(b"in what is a file on a\n")
        make_own(b, "a")
        b.kill9()
        # Nobody is there who could tell it.
        a.start()
        assert a.status()["role"] == "primary"
        (a.top / "both").write_bytes(b"changed on a\n")
        (a.top / "only-a").write_bytes(b"a\n")
        (a.top / "kind").write_bytes(b"a file\n")
        (a.top / "dir" / "deep").write_bytes(b"changed on a\n")
        make_own(a, "b")
        b.start()
        wait_for(lambda: group.peer(a, "b")["state"] == "split-brain", what="a to see it")
        wait_for(lambda: group.peer(b, "a")["state"] == "split-brain", what="b to see it")
        yield group


DIFFERENT = {
    "/both": "contents differ",
    "/dir/deep": "contents differ",
    "/gone-on-b": "only here",
    "/kind": "type",
    "/kind/inside": "only on b",
    "/new-on-b": "only on b",
    "/new-on-b/inside": "only on b",
    "/only-a": "only here",
    "/only-b": "only on b",
    "/own-a": "only on b",
    "/own-a/by-the-other": "only on b",
    "/own-a/changed": "only on b",
    "/own-a/same": "only on b",
    "/own-b": "only here",
    "/own-b/by-the-other": "only here",
}
PERHAPS = {"/own-b/changed", "/own-b/same"}
"""Told besides, if they had been made so shortly before that they may have been changed."""


def test_a_split_brain_is_listed_and_changes_nothing(apart):
    a, b = apart.nodes
    out = a.replfs("split-brain", a.store, "list").stdout
    lines = dict(line.split(": ", 1) for line in out.splitlines() if line.startswith("/"))
    assert set(lines) - PERHAPS == set(DIFFERENT)
    for path, words in DIFFERENT.items():
        assert words in lines[path]
    assert f"{len(lines)} names differ" in out
    there = b.replfs("split-brain", b.store, "list").stdout
    assert "/only-b: only here" in there
    for action in ("keep-mine", "keep-theirs", "keep-both"):
        assert "would step down" in a.replfs("split-brain", a.store, action, "--tentative").stdout
    assert [node.status()["role"] for node in apart.nodes] == ["primary", "primary"]
    assert (a.top / "both").read_bytes() == b"changed on a\n"
    assert (b.top / "both").read_bytes() == b"changed on b\n"
    said = refusal(a, "promote", a.store, code=2)
    assert "is the primary already" in said


OWN = ("changed", "by-the-other", "same", "new")
ATTRIBUTES = {"user.of": b"the loser", acl.ACCESS: acl.pack(6, 4, 4, users={1: 6})}


def attributes_of(path: Path) -> dict[str, bytes]:
    return {name: os.getxattr(path, name) for name in ATTRIBUTES if name in os.listxattr(path)}


@pytest.mark.parametrize("decision", ["keep-mine", "keep-theirs", "keep-both"])
def test_a_split_brain_is_decided(apart, decision):
    a, b = apart.nodes
    winner, loser = (b, a) if decision == "keep-theirs" else (a, b)
    versions = {
        name: (loser.top / name).read_bytes()
        for name in (
            "both",
            "dir/deep",
            "only-a",
            "only-b",
            "gone-on-b",
            "new-on-b/inside",
            "kind",
            "kind/inside",
        )
        if (loser.top / name).is_file()
    }
    for name, value in ATTRIBUTES.items():
        os.setxattr(loser.top / "both", name, value)
    own_won, own_lost = ("own-a", "own-b") if winner is a else ("own-b", "own-a")
    gone = [f"{own_won}/{name}" for name in ("changed", "by-the-other", "same")]
    versions |= {name: (loser.top / name).read_bytes() for name in gone}
    own = {name: (loser.top / own_lost / name).read_bytes() for name in OWN}
    a.replfs("split-brain", a.store, decision)
    apart.wait_role(loser, "secondary")
    apart.wait_in_sync(winner)
    # What is `none` on the winner is nowhere else, and what was so on the loser is as there.
    assert not (loser.store / own_won).exists()
    assert (winner.top / own_won / "changed").read_bytes() == b"by its node, for itself\n"
    os.setxattr(winner.top / own_won, "user.replfs.policy", b"inherit")
    apart.wait_in_sync(winner)
    apart.assert_equal()
    assert (loser.store / own_lost / "changed").read_bytes() == b"before\n"
    assert kept_by(loser, own_lost) == own
    assert f".replfs/kept/{own_lost}" in loser.status()["kept"]
    assert winner.status()["role"] == "primary"
    mark = b"changed on b\n" if winner is b else b"changed on a\n"
    assert (winner.top / "both").read_bytes() == mark
    assert (winner.top / "gone-on-b").exists() == (winner is a)
    assert (winner.top / "same").read_bytes() == b"before\n" * 10
    kept = kept_by(loser, f"{loser.store.name[-1]}-*")
    assert set(kept) <= versions.keys(), "what the winner made is no version of the loser's"
    alone = {f"{own_won}/by-the-other"} | (
        {"both", "only-b", "new-on-b/inside", "kind/inside"}
        if loser is b
        else {"both", "only-a", "dir/deep", "kind"}
    )
    assert {name: kept[name] for name in alone} == {name: versions[name] for name in alone}
    brought = {
        "/".join(part.partition(".b-")[0] for part in path.relative_to(winner.top).parts): path
        for path in winner.top.rglob("*")
        if ".b-" in path.name and path.is_file()
    }
    (of_both,) = (loser.store / ".replfs/kept").glob(f"{loser.store.name[-1]}-*/both")
    assert attributes_of(of_both) == ATTRIBUTES
    if decision == "keep-both":
        assert attributes_of(brought["both"]) == ATTRIBUTES
        # It was made so shortly before that b may have changed it, for all that is known.
        brought.pop("own-a/changed", None)
        assert {name: path.read_bytes() for name, path in brought.items()} == {
            name: versions[name] for name in alone | {"dir/deep"}
        }
        assert (winner.top / "kind").read_bytes() == b"a file\n"
    else:
        assert brought == {}
    (winner.top / "both").write_bytes(b"and on\n")
    apart.assert_equal()


def test_a_secondary_that_was_changed_apart_can_be_looked_at_and_gives_up_what_it_has():
    """It followed another primary, which is gone for good: nobody else has what it has."""
    with Group(2, mounted=False) as group:
        a, b = group.nodes
        for name in ("both", "same"):
            (a.top / name).write_bytes(b"before\n")
        group.wait_in_sync(a)
        b.stop()
        (a.top / "both").write_bytes(b"changed on a\n")
        with opened(b.store) as state:
            mine = state.identity()
            other, generation = os.urandom(16), os.urandom(16)
            history = (mine.generation, *mine.history)
            state.update(generation=generation, history=history, follows=generation, leader=other)
            # What it has of that one is not what it remembers of this one, by its last checkpoint.
            state.forget_peer(UNSTABLE)
        (b.store / "both").write_bytes(b"followed there\n")
        (b.store / "only-b").write_bytes(b"b\n")
        b.start()
        wait_for(lambda: group.peer(a, "b")["state"] == "split-brain", what="a to see it")
        out = a.replfs("split-brain", a.store, "list").stdout
        assert "/both: contents differ" in out
        assert "/only-b: only on b" in out
        assert "'replfs split-brain TARGET list --peer b' on a" in refusal(
            b, "split-brain", b.store, "list", code=2
        )
        said = b.replfs("split-brain", b.store, "keep-theirs", "--tentative").stdout
        assert "would follow it" in said
        assert (
            "would follow this node"
            in a.replfs("split-brain", a.store, "keep-both", "--tentative").stdout
        )
        assert (
            "would be refused"
            in a.replfs("split-brain", a.store, "keep-theirs", "--tentative").stdout
        )
        assert group.peer(a, "b")["state"] == "split-brain"
        assert "follows it" in b.replfs("split-brain", b.store, "keep-theirs").stdout
        group.wait_in_sync(a)
        group.assert_equal()
        assert (a.top / "both").read_bytes() == b"changed on a\n"
        kept = kept_by(b)
        assert kept == {"both": b"followed there\n", "only-b": b"b\n"}
