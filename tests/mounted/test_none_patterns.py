"""Names that are never replicated, by the configuration."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from helpers.cases import exists, fails
from helpers.compare import compare_trees
from helpers.nodes import Pair, wait_for

pytestmark = pytest.mark.mounted

PATTERNS = ("--none", "*.tmp:cache/", "--none", "core")


@pytest.fixture(scope="module")
def pair():
    """A pair with patterns."""
    with Pair(mount_arguments=PATTERNS) as made:
        yield made


@pytest.fixture
def top(pair, request):
    """A directory of the test's own."""
    made = pair.mountpoint / request.node.name
    made.mkdir()
    return made


def there(pair: Pair, path: Path) -> Path:
    return pair.secondary_store / path.relative_to(pair.mountpoint)


def get(path: Path, name: str) -> str:
    return os.getxattr(path, f"user.replfs.{name}").decode()


def assert_only_here(pair: Pair, *paths: Path) -> None:
    """The replica lacks these, and nothing else."""
    pair.wait_in_sync()
    expected = {os.fsencode(path.relative_to(pair.mountpoint)) for path in paths}
    found = compare_trees(
        pair.mountpoint / paths[0].relative_to(pair.mountpoint).parts[0],
        pair.secondary_store / paths[0].relative_to(pair.mountpoint).parts[0],
    )
    prefix = paths[0].relative_to(pair.mountpoint).parts[0].encode() + b"/"
    missing = {prefix + one.path for one in found if (one.left, one.right) == (True, False)}
    assert missing == expected
    assert len(found) == len(missing), [str(one) for one in found]


def test_what_matches_stays_here_and_all_else_is_replicated(pair, top):
    (top / "a.tmp").write_bytes(b"x")
    (top / "a.TMP").write_bytes(b"x")
    (top / "core").mkdir()
    (top / "core/file").write_bytes(b"x")
    (top / "cache").mkdir()
    (top / "cache/file").write_bytes(b"x")
    (top / "d").mkdir()
    (top / "d/cache").write_bytes(b"a file of this name is replicated")
    (top / "d/core").symlink_to("x")
    (top / "d/b.tmp").mkdir()
    (top / "d/b.tmp/deep").write_bytes(b"x")
    assert_only_here(pair, top / "a.tmp", top / "core", top / "cache", top / "d/core",
                     top / "d/b.tmp")  # fmt: skip


def test_what_it_says_of_itself(top):
    (top / "cache").mkdir()
    for path in (top / "a.tmp", top / "cache/file", top / "file"):
        path.write_bytes(b"x")
    assert get(top / "a.tmp", "policy.effective") == "none"
    assert get(top / "a.tmp", "policy.source") == "pattern:*.tmp"
    assert get(top / "a.tmp", "state") == "local"
    with fails(errno.ENODATA):
        get(top / "a.tmp", "policy")
    assert get(top / "cache", "policy.source") == "pattern:cache/"
    assert get(top / "cache/file", "policy.effective") == "none"
    assert get(top / "cache/file", "policy.source") == f"inherited:/{top.name}/cache"
    assert get(top / "file", "policy.effective") == "sync"


def test_an_own_policy_counts_more_than_a_pattern(pair, top):
    path = top / "a.tmp"
    path.write_bytes(b"x")
    assert not exists(there(pair, path))
    os.setxattr(path, "user.replfs.policy", b"sync")
    wait_for(lambda: there(pair, path).read_bytes() == b"x", what="the file there")
    pair.wait_in_sync()
    path.write_bytes(b"y")
    assert there(pair, path).read_bytes() == b"y"
    os.setxattr(path, "user.replfs.policy", b"inherit")
    wait_for(lambda: not exists(there(pair, path)), what="the file gone there")
    pair.wait_in_sync()


def test_a_rename_out_of_a_pattern_brings_it_over_and_back(pair, top):
    path = top / "work.tmp"
    path.write_bytes(b"x" * 100_000)
    os.rename(path, top / "done")
    wait_for(lambda: there(pair, top / "done").read_bytes() == b"x" * 100_000)
    pair.wait_in_sync()
    (top / "done").write_bytes(b"y")
    assert there(pair, top / "done").read_bytes() == b"y"
    os.rename(top / "done", path)
    wait_for(lambda: not exists(there(pair, top / "done")))
    assert_only_here(pair, path)
    # Over something that is replicated.
    (top / "done").write_bytes(b"z")
    os.rename(path, top / "done")
    wait_for(lambda: there(pair, top / "done").read_bytes() == b"y")
    pair.wait_in_sync()
    pair.assert_equal(top.name)


def test_a_directory_renamed_into_a_pattern_vanishes_there(pair, top):
    (top / "tree").mkdir()
    (top / "tree/file").write_bytes(b"x")
    os.rename(top / "tree", top / "cache")
    wait_for(lambda: not exists(there(pair, top / "tree")))
    assert_only_here(pair, top / "cache")
    (top / "cache/more").write_bytes(b"y")
    os.rename(top / "cache", top / "tree")
    wait_for(lambda: exists(there(pair, top / "tree/more")))
    pair.wait_in_sync()
    pair.assert_equal(top.name)


def test_no_link_between_the_two_kinds(top):
    (top / "a.tmp").write_bytes(b"x")
    (top / "b").write_bytes(b"x")
    with fails(errno.EXDEV):
        os.link(top / "a.tmp", top / "a")
    with fails(errno.EXDEV):
        os.link(top / "b", top / "b.tmp")
    os.link(top / "a.tmp", top / "c.tmp")
    os.link(top / "b", top / "c")


def test_verify_knows_them(pair, top):
    (top / "a.tmp").write_bytes(b"x")
    (top / "cache").mkdir()
    (there(pair, top) / "b.tmp").write_bytes(b"the peer's own")
    mine = os.stat(top)
    os.utime(there(pair, top), ns=(mine.st_atime_ns, mine.st_mtime_ns))
    assert "no differences" in pair.mount.replfs("verify", pair.mountpoint).stdout
    (there(pair, top) / "a.tmp").write_bytes(b"x")
    done = pair.mount.replfs("verify", pair.mountpoint, check=False)
    assert f"/{top.name}/a.tmp: only there" in done.stdout
    os.unlink(there(pair, top) / "a.tmp")
    os.utime(there(pair, top), ns=(mine.st_atime_ns, mine.st_mtime_ns))


def test_other_patterns_after_a_restart_are_followed():
    with Pair(mount_arguments=("--none", "*.tmp")) as pair:
        (pair.mountpoint / "a.tmp").write_bytes(b"x")
        (pair.mountpoint / "b.bak").write_bytes(b"x")
        pair.wait_in_sync()
        assert sorted(os.listdir(pair.secondary_store)) == [".replfs", "b.bak"]
        pair.mount.command[pair.mount.command.index("*.tmp")] = "*.bak"
        pair.mount.restart()
        pair.wait_in_sync()
        assert sorted(os.listdir(pair.secondary_store)) == [".replfs", "a.tmp"]
        (pair.mountpoint / "a.tmp").write_bytes(b"y")
        assert (pair.secondary_store / "a.tmp").read_bytes() == b"y"
