"""What stores are held against: no less than what must hold, and no more."""

from __future__ import annotations

import os

import pytest
from simulation.harness.check import Snapshot, not_covered
from simulation.harness.ledger import Ledger

from replfs.core.dirty import DirtyLog
from replfs.store import record

DIRECTORY, FILE = b"\7" * 16, b"\x08" * 16


def give_id(path, identity):
    own = record.Record(identity, 0, 0, 0)
    os.setxattr(path, record.XATTR, record.pack(own, os.lstat(path).st_ino))


def directory(path):
    path.mkdir()
    give_id(path, DIRECTORY)


def file(path):
    path.touch()
    give_id(path, FILE)
    os.utime(path, (0, 0))


class TestWhatWasMadeAnew:
    """Of a directory that stands twice, because its old self was not found, the new one counts."""

    @pytest.fixture
    def stores(self, tmp_path):
        """The primary's has it at `new`; the replica's, whose old one is met first, at both."""
        stores = tmp_path / "ours", tmp_path / "theirs"
        for store in stores:
            store.mkdir()
            directory(store / "new")
        directory(stores[1] / "away")
        return stores

    def uncovered(self, stores):
        log = DirtyLog()
        log.mark_name(record.ROOT_ID, b"away")
        log.mark_attrs(DIRECTORY)
        primary, replica = (os.fsencode(store) for store in stores)
        ours = Snapshot(primary, primary=True)
        return not_covered(ours, ours.of_replica(replica, was_primary=False), log)

    def test_what_was_carried_into_it_is_looked_for_there(self, stores):
        for store in stores:
            file(store / "new" / "file")
        assert self.uncovered(stores) == []

    def test_what_only_the_old_one_has_is_missing(self, stores):
        ours, theirs = stores
        file(ours / "new" / "file")
        file(theirs / "away" / "file")
        [found] = self.uncovered(stores)
        assert "nothing there, no mark" in found


class TestAPromiseOfWhatHadNoId:
    """An fsync of what had no id yet is kept; the id that it got later is not promised."""

    @pytest.fixture
    def store(self, tmp_path):
        (tmp_path / "file").write_bytes(b"flushed")
        return tmp_path

    def broken(self, ledger, store):
        return ledger.broken(Snapshot(os.fsencode(store), primary=False), "a")

    def flushed(self, store):
        ledger = Ledger(os.fsencode(store))
        ledger.flush_begins(ledger.things())([("a", 0)])
        return ledger

    def named(self, ledger, store):
        give_id(store / "file", FILE)
        ledger.read(os.fsencode(store))
        assert self.broken(ledger, store) == []

    def test_the_id_may_be_lost(self, store):
        ledger = self.flushed(store)
        self.named(ledger, store)
        os.removexattr(store / "file", record.XATTR)
        assert self.broken(ledger, store) == []

    def test_the_bytes_may_not(self, store):
        ledger = self.flushed(store)
        self.named(ledger, store)
        os.removexattr(store / "file", record.XATTR)
        (store / "file").write_bytes(b"changed")
        [found] = self.broken(ledger, store)
        assert "other data" in found

    def test_nor_an_id_that_was_there(self, store):
        give_id(store / "file", FILE)
        ledger = self.flushed(store)
        os.removexattr(store / "file", record.XATTR)
        [found] = self.broken(ledger, store)
        assert "is not there" in found
