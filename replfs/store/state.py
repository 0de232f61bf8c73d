"""The durable state of one STORE: who it is, its peers, and what each of them is missing.

All of it stands in STORE/.replfs/state.db (see `store.database` for what survives what). One
process has a STORE at a time, by a lock on STORE/.replfs/lock. One thread uses the state, the one
that opened it, except for `harden`.

In the database:

    meta      `identity`: an `Identity`
    peers     `Peer`, and the number by which the three tables below know it
    objects, regions, names
              the peers' dirty region logs: a row for each `SaveObject`, `SaveRegions`, `SaveName`

What is in them is `store.identity` and `store.tables`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Final, TypeVar

import msgspec

from replfs.core.dirty import DirtyLog
from replfs.core.marks import Change, DropAll, SaveName, SaveObject, SaveRegions
from replfs.core.ops import OBJECT_ID_SIZE
from replfs.errors import StoreError
from replfs.store import tables, wal
from replfs.store.binding import Binding, boot_id, mount_id
from replfs.store.database import FILE, LOG, Database, Statement, damaged
from replfs.store.identity import HISTORY_MAX, ROLES, Identity, Peer
from replfs.store.layout import check_layout
from replfs.store.lock import Lock

RESERVED: Final = ".replfs"
"""The directory in STORE that is replfs's own."""
SUSPECTS: Final = "<suspects>"
"""The name under which the log of a store that gave up its role is kept; no peer can have it."""

UNSTABLE: Final = "<unstable>"
"""The name under which a secondary that was stopped keeps what it has, and others may lack."""

_NO_PEERS: Final = frozenset({SUSPECTS, UNSTABLE})
_CREATING: Final = ".replfs.new"
_PENDING_MAX: Final = 1024

_Record = TypeVar("_Record", bound=msgspec.Struct)


class StateStatistics(msgspec.Struct, frozen=True):
    """Counters since the state was opened."""

    commits: int
    checkpoints: int
    reserve: int
    """Bytes kept back now for marks on a full disk."""
    pending: int
    """Changes that will be saved with the next commit."""


class _PeerJournal:
    """One peer's `Journal`."""

    __slots__ = ("_number", "_state", "behind")

    def __init__(self, state: State, number: int) -> None:
        self.behind = False
        self._state = state
        self._number = number

    def __call__(self, changes: Sequence[Change], *, lazily: bool = False) -> None:
        self._state._save(self._number, changes, lazily=lazily)  # noqa: SLF001

    def together(self) -> AbstractContextManager[None]:
        return self._state.batch()


class State:
    """The open state of one STORE."""

    def __init__(self, dirfd: int) -> None:
        """Open the state of the STORE that *dirfd*, which remains the caller's, is open on.

        A state is made where there is none.

        Raises:
            StoreBusy: another process has the STORE.
            StoreError: there is a state but it cannot be believed; it is left as it is.
            OSError: a system call failed.
        """
        self._pending: dict[tuple[object, ...], tuple[int, Change]] = {}
        self._journals: dict[str, _PeerJournal] = {}
        self._batches = 0
        self._is_open = True
        self._is_behind = False
        self._hardened: Identity | None = None
        """The identity that is known to be on the disk; None: what was read may not be, yet."""
        self.are_clears_lost = False
        """A full disk kept clears from being saved: logs say more on the disk than in memory."""
        with contextlib.ExitStack() as cleanup:
            self._root = _opened(".", dirfd, cleanup)
            self._where = os.readlink(f"/proc/self/fd/{self._root}")
            self._directory = self._enter(cleanup)
            check_layout(self._directory, self._where)
            run = f"{boot_id()} {mount_id(self._root)}"
            self._lock = Lock(self._directory, self._where, run)
            cleanup.callback(self._lock.close)
            if not _exists(FILE, self._directory):
                raise StoreError(
                    f"{self._where} has a {RESERVED} without a {FILE}; put it back, or move "
                    f"{RESERVED} away to have the store compared in full with its peers"
                )
            if self._lock.is_killed:
                self._check_log()
            self._database = Database(
                self._directory,
                self._where,
                application=tables.APPLICATION,
                version=tables.FORMAT,
                on_log=self._lock.note_log,
            )
            cleanup.callback(self._database.abandon)
            self._identity = self._read("identity", Identity)
            if self._lock.is_unended and self._identity.clean:
                raise self._database.damaged(
                    f"it is older than the last run, which has not ended: {LOG} is not its log"
                )
            if self._lock.is_unended and not self._lock.is_killed:
                # What a loss of power left of the log is not what a kill may leave of this run's.
                self._database.empty_log()
            self.has_acls = _has_acls(self._root)
            self._cleanup = cleanup.pop_all()
        previous = self._identity
        self.unclean = not previous.clean
        """The run before this one did not end with a drain and a checkpoint."""
        self.memory_lost = previous.memory_lost or (
            self.unclean
            and (previous.boot_id != boot_id() or previous.mount_id != mount_id(self._root))
        )
        """And since then the kernel that had its writes in memory, or the mount, has gone. Or the
        disk did not take them."""

    def _enter(self, cleanup: contextlib.ExitStack) -> int:
        # Held for a moment: it keeps two first starts apart.
        fcntl.flock(self._root, fcntl.LOCK_EX)
        try:
            if not _exists(RESERVED, self._root):
                self._create()
            return _opened(RESERVED, self._root, cleanup)
        except NotADirectoryError:
            raise StoreError(
                f"{self._where}/{RESERVED} is not a directory, and that name is reserved; rename it"
            ) from None
        finally:
            fcntl.flock(self._root, fcntl.LOCK_UN)

    def _create(self) -> None:
        """Make the state aside and put it in place at once: a half-made one is never seen."""
        aside = f"/proc/self/fd/{self._root}/{_CREATING}"
        shutil.rmtree(aside, ignore_errors=True)
        for name in ("", "limbo", "kept"):
            os.mkdir(f"{_CREATING}/{name}", 0o700, dir_fd=self._root)
        identity = Identity(node=os.urandom(OBJECT_ID_SIZE), binding=Binding.of(self._root))
        try:
            with contextlib.closing(sqlite3.connect(f"{aside}/{FILE}")) as db, db:
                db.executescript(f"BEGIN; {tables.SCHEMA}")
                db.execute(*_meta("identity", identity))
        except sqlite3.Error as error:
            raise StoreError(f"cannot make the state of {self._where}: {error}") from error
        os.rename(_CREATING, RESERVED, src_dir_fd=self._root, dst_dir_fd=self._root)
        os.fsync(self._root)

    def _check_log(self) -> None:
        """The last process was killed, and no memory was lost since: all that it saved is there."""
        try:
            log = os.open(LOG, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._directory)
        except FileNotFoundError:
            raise damaged(self._where, f"its log, {LOG}, is missing") from None
        try:
            problem = wal.problem(log, self._lock.log_size)
        finally:
            os.close(log)
        if problem:
            raise damaged(self._where, problem)

    def close(self, *, covered: bool = False) -> None:
        """Save what is pending and give the STORE up; closing twice is harmless.

        *covered*: a mount of this process still hides STORE. The database files then stay open
        until the process ends, because SQLite would look for them by path.

        Raises:
            OSError: marks could not be saved.
        """
        with self._cleanup.pop_all():
            if not self._is_open:
                return
            self._is_open = False
            try:
                self._commit()
            except OSError:
                # Clears that are lost cost a transfer.
                if self._is_behind:
                    raise
            finally:
                try:
                    self._lock.end()
                except OSError:
                    # What says that the run goes on says how long the log is: it has to stay.
                    self._database.leave()
                else:
                    self._database.close(covered=covered)

    # Who -----------------------------------------------------------------------------------------

    def identity(self) -> Identity:
        """Who this STORE is."""
        return self._identity

    def update(self, **changes: Any) -> Identity:
        """Change fields of the identity; saved when it returns.

        Raises:
            ValueError: a value is not one the field can have.
            OSError: it cannot be saved (ENOSPC); nothing is changed.
        """
        if "history" in changes:
            changes["history"] = tuple(changes["history"])[:HISTORY_MAX]
        if "discarded" in changes:
            changes["discarded"] = tuple(changes["discarded"])[:HISTORY_MAX]
        identity = msgspec.structs.replace(self._identity, **changes)
        ids = (identity.volume, identity.generation, *identity.history)
        if any(len(value) not in {0, OBJECT_ID_SIZE} for value in ids):
            raise ValueError("a volume or generation is 16 bytes long, or empty")
        if len(identity.node) != OBJECT_ID_SIZE or identity.role not in ROLES:
            raise ValueError(f"impossible node {identity.node!r} or role {identity.role!r}")
        if identity.clean:
            self._lock.end()
        if identity != self._identity:
            self._write("identity", identity)
            self._identity = identity
        return identity

    def new_generation(self, **changes: Any) -> bytes:
        """Begin a generation; the one before goes into the history. Arguments as of `update`.

        Raises:
            OSError: as `update`.
        """
        old = self._identity
        history = (old.generation, *old.history) if old.generation else old.history
        generation = os.urandom(OBJECT_ID_SIZE)
        return self.update(generation=generation, history=history, **changes).generation

    def started(self) -> None:
        """A run begins, and the store is not clean until it ends. Durable when it returns."""
        self.update(
            clean=False,
            runs=self._identity.runs + 1,
            memory_lost=self.memory_lost,
            boot_id=boot_id(),
            mount_id=mount_id(self._root),
            stopped_ns=self._identity.stopped_ns or time.time_ns(),
        )
        self.flush(durable=True)
        self._lock.begin()

    def compared(self) -> None:
        """What a power loss may have taken is known now, or marked to be compared."""
        if self.memory_lost or self._identity.disk_failed:
            self.memory_lost = False
            self.update(memory_lost=False, disk_failed=False)

    def disk_failed(self) -> None:
        """A flush failed: the next start is as after a loss of power. Durable when it returns.

        Raises:
            OSError: that cannot be saved.
        """
        self.update(memory_lost=True, disk_failed=True)
        self.flush(durable=True)

    def stopped_cleanly(self, progress: int = 0) -> None:
        """The run ends, with a drain and a checkpoint. Durable when it returns.

        *progress*: up to which change of its primary a secondary has everything.
        """
        self.update(clean=True, stopped_ns=time.time_ns(), progress=progress)
        self.flush(durable=True)

    def place(self) -> Binding:
        """Where STORE stands now; `update(binding=state.place())` adopts it."""
        return Binding.of(self._root)

    def is_in_place(self) -> bool:
        """STORE stands where it got its node id; False: it is a copy, or was moved."""
        return self._identity.binding.is_same_place(self.place())

    # Peers ---------------------------------------------------------------------------------------

    def peers(self) -> list[Peer]:
        """All peers, by name.

        Raises:
            StoreError: the state is damaged.
        """
        return [peer for peer in self._rows() if peer.name not in _NO_PEERS]

    def _rows(self) -> list[Peer]:
        rows = self._database.rows("SELECT value, sum FROM peers ORDER BY name")
        return [self._decoded(value, checksum, Peer) for value, checksum in rows]

    def save_peer(self, name: str, **changes: Any) -> Peer:
        """Add the peer, or change fields of it; saved when it returns.

        Raises:
            OSError: it cannot be saved (ENOSPC); nothing is changed.
        """
        found = self.peer(name)
        peer = msgspec.structs.replace(found or Peer(name=name), **changes)
        if peer != found:
            value = msgspec.msgpack.encode(peer)
            statement = (
                "INSERT INTO peers (name, value, sum) VALUES (?, ?, ?) ON CONFLICT (name) "
                "DO UPDATE SET value = excluded.value, sum = excluded.sum"
            )
            self._database.execute([(statement, (name, value, zlib.crc32(value)))])
        return peer

    def remove_peer(self, name: str) -> None:
        """Forget the peer and its log, which must not be marked any more.

        Raises:
            OSError: that cannot be saved; nothing is removed.
        """
        number = self._number(name)
        work: list[Statement] = [
            (f"DELETE FROM {table} WHERE peer = ?", (number,))  # noqa: S608
            for table in tables.TABLES
        ]
        self._database.execute([*work, ("DELETE FROM peers WHERE id = ?", (number,))])
        self._pending = {key: each for key, each in self._pending.items() if each[0] != number}
        self._journals.pop(name, None)

    def peer(self, name: str) -> Peer | None:
        """One peer, or what is kept under a reserved name."""
        return {peer.name: peer for peer in self._rows()}.get(name)

    def forget_peer(self, name: str) -> None:
        """As `remove_peer`, where there is such a peer."""
        if self.peer(name) is not None:
            self.remove_peer(name)

    def forget_log(self, name: str) -> None:
        """Forget all that is known of what the peer has, and its log; an operator's words stay.

        Raises:
            OSError: that cannot be saved.
        """
        found = self.peer(name)
        if found is None:
            return
        self.remove_peer(name)
        self.save_peer(
            name,
            endpoint=found.endpoint,
            settings=found.settings,
            paused_by=found.paused_by,
            last_in_sync_ns=found.last_in_sync_ns,
        )

    def _number(self, name: str) -> int:
        rows = self._database.rows("SELECT id FROM peers WHERE name = ?", (name,))
        if not rows:
            raise StoreError(f"{self._where} has no peer named {name}; add it first")
        return int(rows[0][0])

    # Logs ----------------------------------------------------------------------------------------

    def journal(self, peer: str) -> _PeerJournal:
        """Where the log of *peer* is kept.

        Raises:
            StoreError: there is no such peer.
        """
        found = self._journals.get(peer)
        if found is None:
            found = self._journals[peer] = _PeerJournal(self, self._number(peer))
        return found

    def load_log(self, peer: str) -> DirtyLog:
        """The log of *peer* as it was saved, kept from here on.

        Raises:
            StoreError: there is no such peer, or the log is damaged.
        """
        journal = self.journal(peer)
        number = self._number(peer)
        log = DirtyLog()
        # Objects first: regions that a tail covers are not taken in again.
        for kind, table in ((SaveObject, "objects"), (SaveRegions, "regions"), (SaveName, "names")):
            query = f"SELECT * FROM {table} WHERE peer = ?"  # noqa: S608
            for row in self._database.each(query, (number,)):
                try:
                    change = kind(*row[1:-1])
                    if tables.row_of(number, change) != row:
                        raise ValueError("a checksum is wrong")
                    log.restore(change)
                except (TypeError, ValueError, OverflowError) as error:
                    raise self._database.damaged(f"in table {table}, {error}") from error
        log.attach(journal)
        return log

    def save_logs(self, logs: dict[str, DirtyLog]) -> None:
        """Save all marks of these peers anew, and no others: nothing that was cleared is left.

        Raises:
            OSError: they cannot be saved (ENOSPC); nothing is changed.
        """
        changes: list[tuple[int, Change]] = []
        for name, log in logs.items():
            number = self._number(name)
            changes.append((number, DropAll()))
            changes += ((number, change) for change in log.saved())
        self._commit(changes)
        self.are_clears_lost = False

    @contextlib.contextmanager
    def batch(self) -> Iterator[None]:
        """Marks made inside are saved together, at the end: for scans, not for applications.

        A mark made inside is not safe before the end, and counts in memory even if the end
        fails; every later mark then fails until all of them could be saved.

        Raises:
            OSError: they cannot be saved (ENOSPC).
        """
        self._batches += 1
        try:
            yield
        finally:
            self._batches -= 1
            if not self._batches:
                self._commit()

    def flush(self, *, durable: bool = False) -> None:
        """Save what is pending. With *durable* it survives a power loss too, see `harden`.

        Raises:
            OSError: it cannot be saved.
        """
        self._commit()
        if durable:
            self.harden()

    def harden(self) -> None:
        """Make what is saved survive a power loss. Waits for the disk; any thread may call it.

        Raises:
            OSError: the disk failed.
        """
        identity = self._identity  # which was saved before it was put there
        self._database.harden()
        self._hardened = identity

    @property
    def is_generation_durable(self) -> bool:
        """Whether no loss of power takes this generation back: only then may others hear of it."""
        known = self._hardened
        return known is not None and known.generation == self._identity.generation

    def reserve_space(self) -> bool:
        """Keep space back for marks on a full disk; True if there is. To be called at times."""
        return self._database.reserve_space()

    def statistics(self) -> StateStatistics:
        """What it did since it was opened."""
        counters = self._database.statistics()
        return StateStatistics(
            counters.commits, counters.checkpoints, counters.reserve, len(self._pending)
        )

    def _save(self, number: int, changes: Sequence[Change], *, lazily: bool) -> None:
        if lazily or self._batches:
            self._put_off(number, changes, lazily=lazily)
        elif not self._pending and len(changes) == 1:
            self._database.execute(tables.statements(number, changes[0]))
        else:
            self._commit([(number, change) for change in changes])

    def _put_off(self, number: int, changes: Sequence[Change], *, lazily: bool) -> None:
        if len(self._pending) >= _PENDING_MAX and not (lazily and self._is_behind):
            try:
                self._commit()
            except OSError:
                if not lazily:
                    raise
                self._pending.clear()  # all are clears, which may be lost
                self.are_clears_lost = True
        for change in changes:
            # The last change of a key stands for all of them, and takes its place at the end.
            key = (number, *tables.key_of(change))
            self._pending.pop(key, None)
            self._pending[key] = (number, change)
        if not lazily:
            self._set_behind(behind=True)

    def _commit(self, more: Sequence[tuple[int, Change]] = ()) -> None:
        work = [*self._pending.values(), *more]
        if work:
            self._database.execute([one for each in work for one in tables.statements(*each)])
            self._pending.clear()
            self._set_behind(behind=False)

    def _set_behind(self, *, behind: bool) -> None:
        if behind != self._is_behind:
            self._is_behind = behind
            for journal in self._journals.values():
                journal.behind = behind

    # Records -------------------------------------------------------------------------------------

    def _read(self, key: str, kind: type[_Record]) -> _Record:
        rows = self._database.rows("SELECT value, sum FROM meta WHERE key = ?", (key,))
        if not rows:
            raise self._database.damaged(f"it has no {key}")
        return self._decoded(rows[0][0], rows[0][1], kind)

    def _write(self, key: str, record: msgspec.Struct) -> None:
        self._database.execute([_meta(key, record)])

    def _decoded(self, value: bytes, checksum: int, kind: type[_Record]) -> _Record:
        try:
            if zlib.crc32(value) != checksum:
                raise ValueError("a checksum is wrong")
            return msgspec.msgpack.decode(value, type=kind)
        except (TypeError, ValueError) as error:
            raise self._database.damaged(f"{kind.__name__.lower()}: {error}") from error


def _has_acls(directory: int) -> bool:
    """Whether the file system keeps POSIX ACLs: it says so by what it answers (acl(5))."""
    try:
        os.getxattr(directory, "system.posix_acl_access")
    except OSError as error:
        return error.errno != errno.EOPNOTSUPP
    return True


def _exists(name: str, directory: int) -> bool:
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


def _opened(name: str, directory: int, cleanup: contextlib.ExitStack) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(name, flags, dir_fd=directory)
    cleanup.callback(os.close, descriptor)
    return descriptor


def _meta(key: str, record: msgspec.Struct) -> Statement:
    value = msgspec.msgpack.encode(record)
    return "INSERT OR REPLACE INTO meta VALUES (?, ?, ?)", (key, value, zlib.crc32(value))
