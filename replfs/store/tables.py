"""The tables of the state's database, and how the marks of a peer's log stand in them.

Every row carries a checksum of itself, because SQLite checks its pages' structure and not what is
in them.
"""

from __future__ import annotations

import zlib
from typing import Any, Final

from replfs.core.marks import (
    Change,
    DropAll,
    DropName,
    DropObject,
    SaveName,
    SaveObject,
    SaveRegions,
)
from replfs.store.database import Statement

FORMAT: Final = 1
APPLICATION: Final = 0x7265706C
SCHEMA: Final = f"""
    CREATE TABLE meta (key TEXT PRIMARY KEY, value BLOB NOT NULL, sum INT NOT NULL) WITHOUT ROWID;
    CREATE TABLE peers (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name TEXT NOT NULL UNIQUE, value BLOB NOT NULL, sum INT NOT NULL
    );
    CREATE TABLE objects (
        peer INT NOT NULL, object BLOB NOT NULL, flags INT NOT NULL, tail INT NOT NULL,
        extent INT NOT NULL, handle BLOB NOT NULL, sum INT NOT NULL, PRIMARY KEY (peer, object)
    ) WITHOUT ROWID;
    CREATE TABLE regions (
        peer INT NOT NULL, object BLOB NOT NULL, chunk INT NOT NULL, regions BLOB NOT NULL,
        sum INT NOT NULL, PRIMARY KEY (peer, object, chunk)
    ) WITHOUT ROWID;
    CREATE TABLE names (
        peer INT NOT NULL, directory BLOB NOT NULL, name BLOB NOT NULL, removal INT NOT NULL,
        sum INT NOT NULL, PRIMARY KEY (peer, directory, name)
    ) WITHOUT ROWID;
    PRAGMA application_id = {APPLICATION};
    PRAGMA user_version = {FORMAT};
"""
TABLES: Final = ("objects", "regions", "names")


def key_of(change: Change) -> tuple[object, ...]:
    """What the change is about: of two with the same key the later one stands for both."""
    match change:
        case SaveObject(object_id):
            return "o", object_id
        case SaveRegions(object_id, chunk):
            return "r", object_id, chunk
        case SaveName(directory, name) | DropName(directory, name):
            return "n", directory, name
        case DropObject(object_id):
            return "d", object_id
        case DropAll():
            return ("a",)


def statements(number: int, change: Change) -> tuple[Statement, ...]:
    """What saves a change of the log of the peer with this *number*."""
    match change:
        case DropObject(object_id):
            return (
                ("DELETE FROM objects WHERE peer = ? AND object = ?", (number, object_id)),
                ("DELETE FROM regions WHERE peer = ? AND object = ?", (number, object_id)),
                ("DELETE FROM names WHERE peer = ? AND directory = ?", (number, object_id)),
            )
        case DropAll():
            return tuple(
                (f"DELETE FROM {table} WHERE peer = ?", (number,))  # noqa: S608
                for table in TABLES
            )
        case _:
            return (_statement(number, change),)


def _statement(number: int, change: SaveObject | SaveRegions | SaveName | DropName) -> Statement:
    match change:
        case SaveRegions(object_id, chunk, b""):
            return (
                "DELETE FROM regions WHERE peer = ? AND object = ? AND chunk = ?",
                (number, object_id, chunk),
            )
        case SaveRegions():
            return "INSERT OR REPLACE INTO regions VALUES (?, ?, ?, ?, ?)", row_of(number, change)
        case SaveName():
            return "INSERT OR REPLACE INTO names VALUES (?, ?, ?, ?, ?)", row_of(number, change)
        case SaveObject():
            return (
                "INSERT OR REPLACE INTO objects VALUES (?, ?, ?, ?, ?, ?, ?)",
                row_of(number, change),
            )
        case DropName(directory, name):
            return (
                "DELETE FROM names WHERE peer = ? AND directory = ? AND name = ?",
                (number, directory, name),
            )


def row_of(number: int, change: SaveObject | SaveRegions | SaveName) -> tuple[Any, ...]:
    """The change as a row of its table, with its checksum."""
    match change:
        case SaveRegions(object_id, chunk, regions):
            checksum = zlib.crc32(b"%d %d " % (number, chunk) + object_id + regions)
            return number, object_id, chunk, regions, checksum
        case SaveName(directory, name, removal):
            checksum = zlib.crc32(b"%d %d " % (number, removal) + directory + name)
            return number, directory, name, int(removal), checksum
        case SaveObject(object_id, flags, tail, extent, handle):
            numbers = b"%d %d %d %d " % (number, flags, tail, extent)
            checksum = zlib.crc32(numbers + object_id + handle)
            return number, object_id, flags, tail, extent, handle, checksum
