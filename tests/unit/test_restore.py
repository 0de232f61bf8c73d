"""A store that lost part of what was done, and a peer that has all: both are equal in the end.

Any part may be lost: operations are applied on the peer in order, and on the other side each with a
probability, where it can be applied at all.
"""

from __future__ import annotations

import os
import random
import stat

import pytest
import trio
from helpers.compare import compare_trees
from helpers.replicas import DIRECTORY, FILE, Store, object_id

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.policy import Policy
from replfs.core.regions import REGION_SIZE
from replfs.node.asking import suspects
from replfs.node.recovery.restore import Restore
from replfs.store import locators
from replfs.store.inode import Inode
from replfs.store.record import ROOT_ID

NAMES = [b"a", b"b", b"c", b"d"]
SYMLINK = stat.S_IFLNK | 0o777


class Everything:
    """All names are replicated, but of what has policy `none` itself."""

    def is_replicated_name(self, _directory: Inode, _name: bytes, inode: Inode) -> bool:
        return inode.policy != Policy.NONE

    def changed(self) -> None:
        """Nothing is kept that could be wrong then."""


class Source:
    """The peer, asked directly."""

    def __init__(self, store: Store) -> None:
        self.replica = store.replica

    async def ask(self, op: ops.AnyOp) -> ops.AnyAnswer:
        done = trio.Event()
        later: list[ops.AnyAnswer] = []

        def reply(answer: ops.AnyAnswer) -> None:
            later.append(answer)
            done.set()

        answer = self.replica.apply(1, op, None, reply)
        if answer is None:
            await done.wait()
            answer = later[0]
        return answer

    def tell(self, op: ops.AnyOp) -> None:
        self.replica.apply(1, op, None, lambda _: None)


class Changes:
    """Random operations, as a primary would send them: a model knows what stands where."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.next = 2
        self.clock = 10**18
        self.children: dict[bytes, dict[bytes, bytes]] = {ROOT_ID: {}}
        """Names in each directory that has one."""
        self.modes: dict[bytes, int] = {ROOT_ID: DIRECTORY}

    def now(self) -> int:
        self.clock += 1_000_000
        return self.clock

    def directories(self) -> list[bytes]:
        """Those that are in the tree."""
        found = [ROOT_ID]
        for one in found:
            found += [child for child in self.children[one].values() if child in self.children]
        return found

    def entries(self) -> list[tuple[bytes, bytes, bytes]]:
        return [
            (above, name, child)
            for above in self.directories()
            for name, child in self.children[above].items()
        ]

    def below(self, top: bytes) -> set[bytes]:
        found = [top]
        for one in found:
            found += self.children.get(one, {}).values()
        return set(found)

    def step(self) -> tuple[ops.AnyOp, bytes | None] | None:
        rng = self.rng
        above = rng.choice(self.directories())
        name = rng.choice(NAMES)
        entries = self.entries()
        files = sorted({one for _, _, one in entries if stat.S_ISREG(self.modes[one])})
        kind = rng.choice(
            ("make", "make", "write", "write", "truncate", "link", "unlink", "rename", "rename",
             "mode", "xattr")
        )  # fmt: skip
        if kind == "make" and name not in self.children[above]:
            return self.make(above, name)
        if kind == "write" and files:
            size = rng.choice((10, REGION_SIZE, 3 * REGION_SIZE))
            offset = rng.choice((0, 5, REGION_SIZE, 4 * REGION_SIZE))
            return ops.Write(rng.choice(files), offset, self.now()), rng.randbytes(size)
        if kind == "truncate" and files:
            size = rng.choice((0, 7, 2 * REGION_SIZE))
            return ops.Truncate(rng.choice(files), size, self.now()), None
        if kind == "link" and files and name not in self.children[above]:
            one = rng.choice(files)
            self.children[above][name] = one
            return ops.Link(one, above, name, self.now()), None
        if kind == "unlink" and entries:
            above, name, one = rng.choice(entries)
            if self.children.get(one):
                return None
            del self.children[above][name]
            return ops.Unlink(one, above, name, one in self.children, self.now()), None
        if kind == "rename" and entries:
            return self.rename(*rng.choice(entries), above, name)
        if kind == "mode" and entries:
            one = rng.choice(entries)[2]
            if self.modes[one] != SYMLINK:
                return ops.SetAttr(one, mode=rng.choice((0o700, 0o640))), None
        if kind == "xattr" and files:
            return ops.SetXattr(rng.choice(files), b"user.k", rng.randbytes(5)), None
        return None

    def make(self, above: bytes, name: bytes) -> tuple[ops.AnyOp, None]:
        one = object_id(self.next)
        self.next += 1
        mode = self.rng.choice((FILE, FILE, DIRECTORY, SYMLINK))
        self.modes[one] = mode
        self.children[above][name] = one
        if mode == DIRECTORY:
            self.children[one] = {}
        target = b"target" if mode == SYMLINK else b""
        now = self.now()
        return ops.Make(one, above, name, mode, 0, 0, 0, target, now, now), None

    def rename(
        self, above: bytes, name: bytes, one: bytes, to: bytes, new: bytes
    ) -> tuple[ops.AnyOp, None] | None:
        there = self.children[to].get(new, b"")
        exchange = bool(there) and self.rng.random() < 0.3
        if there == one or to in self.below(one) or (exchange and above in self.below(there)):
            return None
        if there and not exchange:
            same_kind = (one in self.children) == (there in self.children)
            if not same_kind or self.children.get(there):
                return None
        del self.children[above][name]
        self.children[to][new] = one
        if exchange:
            self.children[above][name] = there
        now = self.now()
        return ops.Rename(one, above, name, to, new, there, exchange, now, now), None


async def restore(
    lost: Store,
    kept: Store,
    *,
    known: bool,
    own: DirtyLog | None = None,
    is_partial: bool = False,
) -> Restore:
    """Give *lost* what *kept* has."""
    source = Source(kept)
    found = None
    lost.replica.forget_all()
    async with trio.open_nursery() as nursery:
        await nursery.start(lost.replica.run)
        await nursery.start(kept.replica.run)
        if known:
            found = await suspects.ask(source.ask, everywhere=False)
            assert found is not None
        kept.replica.forget_all()
        work = Restore(
            lost.tree,
            lost.replica,
            Everything(),
            source,
            found,
            own or DirtyLog(),
            is_partial=is_partial,
        )
        with trio.fail_after(60):
            await work.run()
        nursery.cancel_scope.cancel()
    return work


@pytest.fixture
def two(tmp_path):
    """A store that loses, and one that keeps."""
    stores = Store(tmp_path / "lost"), Store(tmp_path / "kept")
    for store in stores:
        os.utime(store.path, (1, 1))
    yield stores
    for store in stores:
        store.close()


def assert_equal(lost: Store, kept: Store) -> None:
    assert not compare_trees(lost.path, kept.path, holes=0)
    assert not os.listdir(lost.path / ".replfs" / "limbo")


@pytest.mark.parametrize("seed", range(60))
async def test_whatever_was_lost_comes_back(two, seed):
    lost, kept = two
    rng = random.Random(seed)
    changes = Changes(rng)
    share = rng.choice((0.0, 0.3, 0.7, 0.95))
    for number in range(rng.choice((20, 80, 200))):
        if number == 15:
            kept.checkpoint()
        step = changes.step()
        if step is None:
            continue
        kept.apply(*step)
        if number < 15:
            lost.apply(*step)
        elif rng.random() < share:
            lost.try_to(*step)
    known = rng.random() < 0.7
    await restore(lost, kept, known=known)
    assert_equal(lost, kept)


async def test_what_was_changed_here_after_the_peer_had_gone_stays(two):
    lost, kept = two
    for store in two:
        store.make(2, b"both")
        store.write(2, 0, b"x" * 3 * REGION_SIZE)
        store.checkpoint()
    kept.write(2, 0, b"k" * 2 * REGION_SIZE)
    kept.make(3, b"kept")
    lost.write(2, REGION_SIZE, b"l" * REGION_SIZE)
    lost.make(4, b"alone")
    own = DirtyLog()
    own.mark_data(object_id(2), REGION_SIZE, 2 * REGION_SIZE)
    own.mark_name(ROOT_ID, b"alone")
    await restore(lost, kept, known=True, own=own)
    assert (lost.path / "both").read_bytes() == (
        b"k" * REGION_SIZE + b"l" * REGION_SIZE + b"x" * REGION_SIZE
    )
    assert (lost.path / "alone").exists()
    assert (lost.path / "kept").exists()


@pytest.mark.parametrize("is_known", [True, False])
@pytest.mark.parametrize("order", ["unknown first", "changed first"])
async def test_what_was_changed_here_stays_where_it_was_marked_as_unknown_too(two, order, is_known):
    """A peer that a promoted node has not compared yet, or all of which is compared."""
    lost, kept = two
    for store in two:
        for number, name in ((2, b"changed"), (3, b"mode"), (4, b"unknown")):
            store.make(number, name)
        store.checkpoint()
        for number in (2, 3, 4):
            store.write(number, 0, b"x" * 2 * REGION_SIZE)
    kept.write(4, 0, b"acknowledged, and lost here")
    lost.write(2, 5, b"flushed here")
    lost.apply(ops.SetAttr(object_id(3), mode=0o600))
    own = DirtyLog()

    def changed() -> None:
        own.mark_data(object_id(2), 5, 17)
        own.mark_attrs(object_id(3))

    def unknown() -> None:
        if is_known:
            earlier = DirtyLog()
            for number in (2, 3, 4):
                earlier.mark_tail(object_id(number), 0)
            own.absorb(earlier, compare=True)
        else:
            for number in (2, 3, 4):
                own.mark_unknown(object_id(number), directory=False)

    for step in (unknown, changed) if order == "unknown first" else (changed, unknown):
        step()
    await restore(lost, kept, known=is_known, own=own)
    assert (lost.path / "changed").read_bytes()[:17] == b"xxxxxflushed here"
    assert stat.S_IMODE((lost.path / "mode").stat().st_mode) == 0o600
    assert (lost.path / "unknown").read_bytes().startswith(b"acknowledged, and lost here")


@pytest.mark.parametrize("order", ["unknown first", "changed first"])
@pytest.mark.parametrize("is_truncated", [False, True])
async def test_of_a_file_to_be_compared_only_what_was_changed_here_stays(two, order, is_truncated):
    lost, kept = two
    for store in two:
        store.make(2, b"f")
        store.write(2, 0, b"x" * 4 * REGION_SIZE)
        store.checkpoint()
    kept.write(2, 2 * REGION_SIZE, b"acknowledged, and lost here")
    if is_truncated:
        kept.apply(ops.Truncate(object_id(2), 3 * REGION_SIZE - 5, 7))
    lost.write(2, 5, b"flushed here")
    unstable = DirtyLog()
    unstable.mark_tail(object_id(2), 2 * REGION_SIZE)
    own = DirtyLog()
    if order == "unknown first":
        own.absorb(unstable, compare=True)
    own.mark_data(object_id(2), 5, 17)
    if order == "changed first":
        own.absorb(unstable, compare=True)
    await restore(lost, kept, known=True, own=own)
    wanted = bytearray(b"x" * 4 * REGION_SIZE)
    wanted[5:17] = b"flushed here"
    wanted[2 * REGION_SIZE : 2 * REGION_SIZE + 27] = b"acknowledged, and lost here"
    if is_truncated:
        del wanted[3 * REGION_SIZE - 5 :]
    assert (lost.path / "f").read_bytes() == wanted


@pytest.mark.parametrize("is_tail", [False, True])
async def test_a_file_stays_as_long_as_it_was_made_here(two, is_tail):
    lost, kept = two
    for store in two:
        store.make(2, b"f")
        store.write(2, 0, b"x" * REGION_SIZE)
        store.checkpoint()
    kept.apply(ops.Truncate(object_id(2), 10, 7))
    lost.write(2, 2 * REGION_SIZE, b"flushed here")
    own = DirtyLog()
    own.mark_unknown(object_id(2), directory=False)
    if is_tail:
        own.mark_tail(object_id(2), REGION_SIZE)
    else:
        own.mark_data(object_id(2), REGION_SIZE, 2 * REGION_SIZE + 12)
    await restore(lost, kept, known=True, own=own)
    found = (lost.path / "f").read_bytes()
    assert len(found) == 2 * REGION_SIZE + 12
    assert found.endswith(b"flushed here")


@pytest.mark.parametrize("is_directory", [False, True])
async def test_what_was_made_known_to_the_peers_and_is_none_here_again_comes_back(
    two, is_directory
):
    """Its policy was changed, then the power was lost: what it is since then is the peer's."""
    lost, kept = two
    lost.make(2, b"one", mode=DIRECTORY if is_directory else FILE)
    lost.apply(ops.SetPolicy(object_id(2), Policy.NONE, 0))
    for store in two:
        store.checkpoint()
    kept.make(2, b"one", mode=DIRECTORY if is_directory else FILE)
    if is_directory:
        kept.make(3, b"in", object_id(2))
    number = 3 if is_directory else 2
    kept.write(number, 0, b"acknowledged")
    await restore(lost, kept, known=True)
    assert_equal(lost, kept)
    inode = lost.tree.lookup(lost.tree.root, b"one")[0]
    assert (inode.id, inode.policy) == (object_id(2), 0)


async def test_what_is_none_and_the_peer_is_still_to_lose_stays_as_it_is_here(two):
    lost, kept = two
    for store in two:
        store.make(2, b"file")
        store.checkpoint()
    kept.write(2, 0, b"from before it was none")
    kept.apply(ops.Link(object_id(2), ROOT_ID, b"link", 7))
    kept.apply(ops.Unlink(object_id(2), ROOT_ID, b"file", False, 7))  # noqa: FBT003
    kept.apply(ops.Link(object_id(2), ROOT_ID, b"file", 7))
    lost.apply(ops.SetPolicy(object_id(2), Policy.NONE, 0))
    own = DirtyLog()
    own.mark_name(ROOT_ID, b"file", removal=True)
    await restore(lost, kept, known=True, own=own)
    inode = lost.tree.lookup(lost.tree.root, b"file")[0]
    assert inode.policy == Policy.NONE
    assert (lost.path / "file").read_bytes() == b""


async def test_what_was_changed_here_is_found_before_its_directory_is_looked_into(two):
    """The peer has it under a name that was lost here, and that is placed first."""
    lost, kept = two
    for store in two:
        store.make(2, b"later", mode=DIRECTORY)
        for number, name in ((3, b"file"), (5, b"mode")):
            store.make(number, name, parent=object_id(2))
            store.write(number, 0, b"older")
        store.make(4, b"directory", parent=object_id(2), mode=DIRECTORY)
    for number, name in ((3, b"a"), (5, b"b")):
        kept.apply(ops.Link(object_id(number), ROOT_ID, name, 7))
    kept.apply(
        ops.Rename(object_id(4), object_id(2), b"directory", ROOT_ID, b"d", b"", False, 7, 7)
    )
    lost.write(3, 0, b"flushed here")
    lost.apply(ops.SetAttr(object_id(5), mode=0o600))
    lost.make(6, b"alone", parent=object_id(4))
    own = DirtyLog()
    handles = {
        number: locators.of(lost.tree, lost.tree.table.by_id[object_id(number)])
        for number in (3, 4, 5)
    }
    own.mark_data(object_id(3), 0, 12, handle=handles[3])
    own.mark_name(object_id(4), b"alone", handle=handles[4])
    own.mark_attrs(object_id(5), handle=handles[5])
    restarted = Store(lost.path)
    await restore(restarted, kept, known=False, own=own)
    restarted.close()
    assert (lost.path / "a").read_bytes() == b"flushed here"
    assert (lost.path / "a").samefile(lost.path / "later" / "file")
    assert stat.S_IMODE((lost.path / "b").stat().st_mode) == 0o600
    assert (lost.path / "b").samefile(lost.path / "later" / "mode")
    assert (lost.path / "d" / "alone").exists()
    assert not (lost.path / "later" / "directory").exists()


async def test_what_was_changed_here_and_is_gone_comes_back_as_the_peer_has_it(two):
    lost, kept = two
    for store in two:
        store.make(2, b"later", mode=DIRECTORY)
        store.make(3, b"file", parent=object_id(2))
        store.make(4, b"d", parent=object_id(2), mode=DIRECTORY)
        store.make(5, b"in it", parent=object_id(4))
    kept.write(3, 0, b"k" * 2 * REGION_SIZE)
    kept.apply(ops.SetAttr(object_id(3), mode=0o600))
    own = DirtyLog()
    own.mark_data(object_id(3), 0, REGION_SIZE)
    own.mark_name(object_id(4), b"in it")
    lost.apply(ops.Unlink(object_id(3), object_id(2), b"file", False, 7))
    lost.apply(ops.Unlink(object_id(5), object_id(4), b"in it", False, 7))
    lost.apply(ops.Unlink(object_id(4), object_id(2), b"d", True, 7))
    await restore(lost, kept, known=False, own=own)
    assert_equal(lost, kept)


async def test_only_what_differs_is_fetched_and_holes_stay_holes(two):
    lost, kept = two
    for store in two:
        store.make(2, b"large")
        store.write(2, 0, b"x" * (1 << 20))
        store.checkpoint()
    kept.write(2, 0, b"x" * (1 << 20))
    kept.write(2, 3 * REGION_SIZE, b"y")
    kept.write(2, 40 << 20, b"z")
    work = await restore(lost, kept, known=True)
    assert_equal(lost, kept)
    assert work.bytes <= 2 * REGION_SIZE
    assert (lost.path / "large").stat().st_blocks * 512 < 2 << 20


async def test_nothing_is_touched_where_nothing_was_lost(two):
    lost, kept = two
    for store in two:
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"f", object_id(2))
        store.write(3, 0, b"x" * 1000)
    before = (lost.path / "d" / "f").stat()
    work = await restore(lost, kept, known=False)
    after = (lost.path / "d" / "f").stat()
    assert (work.changed, work.bytes) == (0, 0)
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


# What the peer has elsewhere ----------------------------------------------------------------------


def moved_aside(store: Store, name: bytes) -> None:
    """A resync that was cut off has taken aside what was *name*, and placed nothing."""
    store.apply(ops.Gather(ROOT_ID, [name], [ops.NO_OBJECT]))


@pytest.mark.parametrize("is_known", [True, False])
async def test_what_the_peer_has_in_limbo_stays_where_it_is_here(two, is_known):
    lost, kept = two
    for store in two:
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"in it", object_id(2))
        store.make(4, b"f")
        store.make(5, b"removed", object_id(2))
        store.make(6, b"another")
        store.checkpoint()
    if not is_known:
        kept.write(3, 0, b"acknowledged, and lost here")
        kept.write(4, 0, b"as well")
        kept.apply(ops.Unlink(object_id(5), object_id(2), b"removed", False, 7))
        kept.apply(ops.Unlink(object_id(6), ROOT_ID, b"another", False, 7))
    moved_aside(kept, b"d")
    moved_aside(kept, b"f")
    await restore(lost, kept, known=is_known)
    assert (lost.path / "d" / "in it").read_bytes() == (
        b"" if is_known else b"acknowledged, and lost here"
    )
    assert (lost.path / "f").read_bytes() == (b"" if is_known else b"as well")
    assert (lost.path / "d" / "removed").exists() == is_known
    assert (lost.path / "another").exists() == is_known
    assert not os.listdir(lost.path / ".replfs" / "limbo")


async def test_what_the_peer_has_where_this_store_counts_stays_where_it_is_here(two):
    lost, kept = two
    for store in two:
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"in it", object_id(2))
        store.make(4, b"to", mode=DIRECTORY)
        store.checkpoint()
    kept.apply(ops.Rename(object_id(2), ROOT_ID, b"d", object_id(4), b"d", b"", False, 7, 7))
    kept.write(3, 0, b"acknowledged, and lost here")
    own = DirtyLog()
    own.mark_name(object_id(4), b"d")
    await restore(lost, kept, known=True, own=own)
    assert (lost.path / "d" / "in it").read_bytes() == b"acknowledged, and lost here"
    assert not os.listdir(lost.path / "to")


@pytest.mark.parametrize("is_known", [True, False])
async def test_what_the_peer_has_in_limbo_is_kept_where_its_name_is_taken(two, is_known):
    lost, kept = two
    for store in two:
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"in it", object_id(2))
        store.make(4, b"linked")
        store.apply(ops.Link(object_id(4), ROOT_ID, b"link", 7))
        store.checkpoint()
    for number, name in ((5, b"d"), (6, b"link")):
        moved_aside(kept, name)
        kept.make(number, name)
    await restore(lost, kept, known=is_known)
    assert (lost.path / "d").is_file()
    assert (lost.path / "linked").stat().st_nlink == 1
    (beside,) = (lost.path / ".replfs" / "kept").iterdir()
    assert (beside / "in it").exists()
    assert lost.kept == [f".replfs/kept/{beside.name}"]
    assert not os.listdir(lost.path / ".replfs" / "limbo")


# A first copy that was not finished ---------------------------------------------------------------


async def test_of_a_first_copy_what_was_carried_comes_back_and_nothing_else_is_touched(two):
    lost, kept = two
    for store in two:
        store.make(2, b"d", mode=DIRECTORY)
        store.make(3, b"carried", object_id(2))
        store.write(3, 0, b"x" * 2 * REGION_SIZE)
        store.make(4, b"half", object_id(2))
        store.write(4, 0, b"h" * 2 * REGION_SIZE)
    # Acknowledged by both, and lost here.
    kept.write(3, 5, b"acknowledged")
    kept.make(5, b"new", object_id(2))
    kept.write(5, 0, b"new")
    # Not there yet, or an older version of it.
    lost.write(4, REGION_SIZE, b"l" * REGION_SIZE)
    lost.make(6, b"not yet", object_id(2))
    lost.make(7, b"e", mode=DIRECTORY)
    lost.make(8, b"in it", object_id(7))
    kept.make(9, b"seeded long ago")
    own = DirtyLog()
    own.mark_tail(object_id(4), REGION_SIZE, compare=True)
    own.mark_name(object_id(2), b"not yet")
    own.mark_name(ROOT_ID, b"e")
    own.mark_name(ROOT_ID, b"seeded long ago")
    await restore(lost, kept, known=False, own=own, is_partial=True)
    assert (lost.path / "d/carried").read_bytes()[:17] == b"xxxxxacknowledged"
    assert (lost.path / "d/new").read_bytes() == b"new"
    assert (lost.path / "d/half").read_bytes() == b"h" * REGION_SIZE + b"l" * REGION_SIZE
    assert (lost.path / "d/not yet").exists()
    assert (lost.path / "e/in it").exists()
    assert not (lost.path / "seeded long ago").exists()


async def test_of_a_first_copy_a_directory_that_was_not_looked_at_is_left_alone(two):
    lost, kept = two
    lost.make(2, b"here")
    kept.make(3, b"there")
    own = DirtyLog()
    own.mark_names_all(ROOT_ID)
    work = await restore(lost, kept, known=False, own=own, is_partial=True)
    assert [path.name for path in lost.path.iterdir() if path.name != ".replfs"] == ["here"]
    assert work.changed == 0


async def test_a_size_comes_back_also_where_the_attributes_here_are_the_later_ones(two):
    lost, kept = two
    for store in two:
        store.make(2, b"f")
        store.write(2, 0, b"x" * 100)
        store.checkpoint()
    kept.apply(ops.Truncate(object_id(2), 10, 7))
    lost.apply(ops.SetAttr(object_id(2), mode=0o600))
    own = DirtyLog()
    own.mark_attrs(object_id(2))
    await restore(lost, kept, known=True, own=own)
    found = (lost.path / "f").stat()
    assert (found.st_size, stat.S_IMODE(found.st_mode)) == (10, 0o600)
