"""An SQLite database in STORE/.replfs that keeps what it was told through kill -9 and full disks.

WAL mode. What a call has saved survives the death of the process at once (it is in the page cache)
and a power loss after `harden`; a power loss never damages the database, it only makes it older.

The owner's connection makes all changes and never waits for a disk: commits sync nothing. A second
one, the keeper, moves the log into the database and syncs, in whatever thread calls `harden`; it
also makes the first change after that, because that one syncs the head of the log.

Both share the log's index, in this process's memory: where it is a file that SQLite maps, as is
usual, a full disk or one that dies would kill the process by SIGBUS. No other process can read the
database meanwhile.

SQLite resolves the path it is given when it opens a file, `/proc/self/fd` included. So all
connections are opened while STORE can be seen, before a mount may cover it, and nothing is opened
from then on; `close(covered=True)` is for a STORE that is still covered.

Whoever closes the last connection takes the log away: where it has to stay, there is `leave`.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import msgspec

from replfs.errors import NotRecorded, StoreError

FILE: Final = "state.db"
LOG: Final = "state.db-wal"
RESERVE_MIN: Final = 1 << 20
"""Bytes kept back for a full disk: some thousand marks."""

_BUSY_TIMEOUT_S: Final = 30.0
_CHECKPOINT_COMMITS: Final = 1000
"""Commits, some 4 KiB of log each, after which `harden` moves the log into the database."""
_LONG_COMMITS: Final = 32
"""Commits after which emptying the log is worth it on a full disk."""
_LONG_LOG: Final = 48 << 20
"""Bytes of log from which commits may be made to wait."""
_BACKSTOP_PAGES: Final = 16384
"""Pages of log after which a commit does so itself, because nobody hardens."""
_HEAD_SIZE: Final = 100
"""Bytes; see "The Database Header" in https://www.sqlite.org/fileformat2.html."""
_FULL: Final = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE})
_DAMAGE: Final = frozenset(
    {
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_ERROR,  # a table is missing, or a column
        sqlite3.SQLITE_FORMAT,
        sqlite3.SQLITE_MISMATCH,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_SCHEMA,
    }
)
Statement = tuple[str, Sequence[Any]]
"""SQL, and the values for its question marks."""

_ABANDONED: Final[list[sqlite3.Connection]] = []
"""Connections that are never to be closed, since closing takes the log away: those of stores that
are covered, where it would be looked for by path, and of those where it has to stay."""


class DatabaseStatistics(msgspec.Struct, frozen=True):
    """Counters since the database was opened."""

    commits: int
    checkpoints: int
    reserve: int
    """Bytes kept back now."""


class Database:
    """The open database. Belongs to the thread that made it, but for `harden`."""

    def __init__(
        self,
        directory: int,
        where: str,
        *,
        application: int,
        version: int,
        on_log: Callable[[int], None],
    ) -> None:
        """Open the database in *directory*, which remains the caller's.

        Args:
            directory: a descriptor of STORE/.replfs, open for as long as the database.
            where: STORE, for messages.
            application: what `PRAGMA application_id` must be.
            version: what `PRAGMA user_version` must be.
            on_log: told after each commit how long the log is, in bytes. It becomes no shorter
                before `close`.

        Raises:
            StoreError: the database is damaged, or not of this kind and version.
            OSError: a system call failed.
        """
        self._directory = directory
        self._where = where
        self._on_log = on_log
        self._commits = self._commits_kept = self._checkpoints = 0
        self._keeping = threading.Lock()
        self._log = self._reserve = -1
        self._connections: list[sqlite3.Connection] = []
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            self._reserve = os.open("reserve", flags, 0o600, dir_fd=directory)
            self._check(application, version)
            self._db = self._connect(keeps=False)
            self._keeper = self._connect(keeps=True)
            self._check_pages()
            self._log = os.open(LOG, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
            os.fsync(directory)
        except sqlite3.DatabaseError as error:
            self.abandon()
            raise self._translated(error) from error
        except BaseException:
            self.abandon()
            raise
        self.reserve_space()

    def _connect(self, *, keeps: bool) -> sqlite3.Connection:
        # Source: https://www.sqlite.org/vfs.html, "unix-excl": the index is on the heap, for all
        # connections of the process.
        db = sqlite3.connect(
            f"file:/proc/self/fd/{self._directory}/{FILE}?vfs=unix-excl",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=not keeps,
        )
        self._connections.append(db)
        if db.execute("PRAGMA journal_mode = WAL").fetchone()[0] != "wal":
            raise StoreError(f"the filesystem of {self._where} cannot hold a write-ahead log")
        # NORMAL syncs nothing at a commit, but enough around a checkpoint that a power loss
        # cannot mix old pages with new ones; OFF would not.
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute(f"PRAGMA wal_autocheckpoint = {0 if keeps else _BACKSTOP_PAGES}")
        db.execute("PRAGMA temp_store = MEMORY")
        # Relies on: without a limit a log that starts anew keeps its length; see `Lock.log_size`.
        db.execute("PRAGMA journal_size_limit = -1")
        # Nor is a frame of the log ever written twice: see `wal.problem`.
        db.execute("PRAGMA cache_spill = OFF")
        return db

    def _check(self, application: int, version: int) -> None:
        """Look at the file's head first: SQLite would make a database of an empty one."""
        file = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory)
        try:
            head = os.pread(file, _HEAD_SIZE, 0)
        finally:
            os.close(file)
        if len(head) < _HEAD_SIZE or not head.startswith(b"SQLite format 3\0"):
            raise self.damaged("it is not a database")
        if int.from_bytes(head[68:72]) != application:
            raise self.damaged("it is not a replfs state")
        found = int.from_bytes(head[60:64])
        if found != version:
            raise StoreError(
                f"the state of {self._where} has format {found}, this replfs reads {version}; "
                "use the version of replfs that wrote it"
            )

    def _check_pages(self) -> None:
        problem = self._db.execute("PRAGMA quick_check(1)").fetchone()[0]
        if problem != "ok":
            raise self.damaged(problem)

    def close(self, *, covered: bool = False) -> None:
        """Move the log into the database, durably, and close.

        *covered*: a mount of this process hides STORE. The files are then left open until the
        process ends.

        Raises:
            OSError: the disk failed.
        """
        try:
            self.empty_log()
        finally:
            if covered:
                self.leave()
            self.abandon()

    def leave(self) -> None:
        """Leave log and database as they are, open until the process ends."""
        _ABANDONED.extend(self._connections)
        self._connections = []
        self.abandon()

    def empty_log(self) -> None:
        """Move the log into the database, durably, and cut it off where there is room for that.

        Raises:
            OSError: the disk failed.
        """
        try:
            os.fsync(self._log)
            self._keeper.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        except sqlite3.DatabaseError as error:
            # A full disk costs nothing but the log's staying where it is.
            if error.sqlite_errorcode not in _FULL:
                raise self._unsaved(error) from error

    def abandon(self) -> None:
        """Close without saving anything further."""
        for connection in self._connections:
            connection.close()
        self._connections = []
        for descriptor in (self._log, self._reserve):
            if descriptor >= 0:
                os.close(descriptor)
        self._log = self._reserve = -1

    # Reading and writing -------------------------------------------------------------------------

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """All rows that *query* gives.

        Raises:
            StoreError: the database is damaged.
            OSError: it cannot be read.
        """
        try:
            return self._db.execute(query, values).fetchall()
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error

    def each(self, query: str, values: Sequence[Any] = ()) -> Iterator[tuple[Any, ...]]:
        """The rows that *query* gives, one by one; raises as `rows`."""
        try:
            yield from self._db.execute(query, values)
        except sqlite3.DatabaseError as error:
            raise self._translated(error) from error

    def execute(self, changes: Sequence[Statement]) -> None:
        """Make all changes or none; they survive this process when the call returns.

        On a full disk the reserve is given up, then the log emptied, before the call fails.

        Raises:
            OSError: they could not be made (ENOSPC), and have not been.
        """
        remedies = iter((self._empty_long_log, self._use_reserve, self._use_all_reserve))
        while True:
            try:
                if len(changes) == 1:
                    self._db.execute(*changes[0])
                else:
                    self._transaction(changes)
            except sqlite3.DatabaseError as error:
                if error.sqlite_errorcode not in _FULL or not any(cure() for cure in remedies):
                    raise self._unsaved(error) from error
            else:
                self._commits += 1
                self._on_log(os.fstat(self._log).st_size)
                return

    def _transaction(self, changes: Sequence[Statement]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for statement, values in changes:
                self._db.execute(statement, values)
            self._db.execute("COMMIT")
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")

    # Disk ----------------------------------------------------------------------------------------

    def harden(self) -> None:
        """Make all that is committed survive a power loss. Waits for the disk; any thread may call.

        Raises:
            OSError: the disk failed.
        """
        with self._keeping:
            # Relies on: fsync(2) of a file makes its size durable too, so that the log's new
            # frames can be read back. Its directory entry is durable since it was opened.
            os.fsync(self._log)
            if self._commits - self._commits_kept >= _CHECKPOINT_COMMITS:
                self._checkpoint()

    def _checkpoint(self) -> bool:
        """Move the log into the database, so that the log starts anew. True if it did."""
        commits = self._commits
        try:
            mode = "PASSIVE"
            if os.fstat(self._log).st_size > _LONG_LOG:
                # Commits never paused long enough for the log to start anew: let them wait once.
                mode = "RESTART"
            _, log, moved = self._keeper.execute(f"PRAGMA wal_checkpoint({mode})").fetchone()
            if log != moved:
                return False
            # The first commit after a full checkpoint starts the log anew and syncs its head:
            # here, not where an application waits. A commit that came between was first, and
            # then the log goes on.
            salt = self._salt()
            self._keeper.execute(f"PRAGMA user_version = {self._version()}")
        except sqlite3.DatabaseError as error:
            if error.sqlite_errorcode in _FULL | {sqlite3.SQLITE_BUSY}:
                # Nothing is lost: all of it is in the log.
                return False
            raise self._unsaved(error) from error
        if self._salt() == salt:
            return False
        self._checkpoints += 1
        self._commits_kept = commits
        return True

    def _salt(self) -> bytes:
        """What a log has in its head; another for each time that it started anew."""
        return os.pread(self._log, 8, 16)

    def _version(self) -> int:
        return int(self._keeper.execute("PRAGMA user_version").fetchone()[0])

    def reserve_space(self) -> bool:
        """Keep space back for a full disk; True if all of it is there. Call it now and then."""
        wanted = max(RESERVE_MIN, os.stat(FILE, dir_fd=self._directory).st_size // 8)
        if os.fstat(self._reserve).st_size >= wanted:
            return True
        try:
            os.posix_fallocate(self._reserve, 0, wanted)
        except OSError as error:
            if error.errno not in {errno.ENOSPC, errno.EDQUOT}:
                raise
            # Part of it may have been allocated: keep that.
            return False
        return True

    def _empty_long_log(self) -> bool:
        return self._commits - self._commits_kept >= _LONG_COMMITS and self._empty_log()

    def _use_reserve(self) -> bool:
        # By halves: a full log takes what it gets, but emptying it needs little.
        if not self._shrink_reserve(os.fstat(self._reserve).st_size // 2):
            return False
        self._empty_long_log()
        return True

    def _use_all_reserve(self) -> bool:
        if not self._shrink_reserve(0):
            return False
        self._empty_long_log()
        return True

    def _shrink_reserve(self, size: int) -> bool:
        if os.fstat(self._reserve).st_size <= size:
            return False
        os.ftruncate(self._reserve, size)
        # Relies on: blocks that a truncation frees can be used at the latest when it is durable.
        os.fsync(self._reserve)
        return True

    def _empty_log(self) -> bool:
        with self._keeping:
            return self._checkpoint()

    def statistics(self) -> DatabaseStatistics:
        """What it did since it was opened."""
        reserve = os.fstat(self._reserve).st_size
        return DatabaseStatistics(self._commits, self._checkpoints, reserve)

    # Errors --------------------------------------------------------------------------------------

    def damaged(self, problem: str) -> StoreError:
        """The sentence for a database that cannot be believed."""
        return damaged(self._where, problem)

    def _translated(self, error: sqlite3.DatabaseError) -> Exception:
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGE:
            return self.damaged(str(error))
        return self._unsaved(error)

    def _unsaved(self, error: sqlite3.DatabaseError) -> OSError:
        """What saving fails with. A disk that is dead reads like a damaged database.

        Whether it is one the next start finds out, which looks at all of it.
        """
        code = getattr(error, "sqlite_errorcode", 0)
        path = f"{self._where}/.replfs/{FILE}"
        if code in _FULL:
            return NotRecorded(errno.ENOSPC, f"no space for the state ({error})", path)
        if code & 0xFF == sqlite3.SQLITE_READONLY:
            return NotRecorded(errno.EROFS, f"the state cannot be written ({error})", path)
        return NotRecorded(errno.EIO, f"the state cannot be used ({error})", path)


def damaged(where: str, problem: str) -> StoreError:
    """The sentence for a state of the store *where* that cannot be believed."""
    return StoreError(
        f"the state of {where}, .replfs/{FILE}, is damaged ({problem.splitlines()[-1]}); "
        "put a good copy back, or move .replfs away to have the store compared in full"
    )
