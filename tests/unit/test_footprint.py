"""What each operation claims, against the table in the module's text, row by row."""

from __future__ import annotations

import inspect
import re

import pytest

from replfs.core import footprint, ops
from replfs.core.footprint import CLASSES, OpClass
from replfs.core.scheduler import END, EXCLUSIVE, RANGE, SHARED
from replfs.node.mounted.view import ReadOnlyView, View
from replfs.node.mounted.volume import Volume

DIRECTORY, OTHER, OBJECT, REPLACED = "directory", "other", "object", "replaced"

WAYS = {
    "write": footprint.data(OBJECT, 3, 10),
    "truncate": footprint.data(OBJECT, 3),
    "create": footprint.entry(DIRECTORY, b"n"),
    "link": footprint.entry_of(DIRECTORY, b"n", OBJECT),
    "unlink": footprint.entry_of(DIRECTORY, b"n", OBJECT),
    "rename": footprint.rename(DIRECTORY, b"n", OTHER, b"m", OBJECT, REPLACED),
    "setattr": footprint.whole(OBJECT),
    "setxattr": footprint.whole(OBJECT),
    "fsync": footprint.whole(OBJECT),
}
"""How an operation of each row makes its claims."""

CLAIMED: dict[str, set[tuple[object, int]]] = {
    "bytes": {(OBJECT, RANGE)},
    "the entry": {((DIRECTORY, b"n"), EXCLUSIVE)},
    "both entries": {((DIRECTORY, b"n"), EXCLUSIVE), ((OTHER, b"m"), EXCLUSIVE)},
    "the parent, shared": {(DIRECTORY, SHARED)},
    "both parents, shared": {(DIRECTORY, SHARED), (OTHER, SHARED)},
    "the object": {(OBJECT, EXCLUSIVE)},
    "what it replaces": {(REPLACED, EXCLUSIVE)},
}
"""What the words in the table's last column mean."""


def rows():
    """(class, operations, claims) of each row of the table in the module's text."""
    found = []
    for line in inspect.getdoc(footprint).splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].isupper():
            found.append((cells[0], re.sub(r"\(.*?\)", "", cells[1]), cells[2]))
    return found


def operations(cell):
    return [name.strip() for name in re.split(r"[,;]", cell)]


def test_the_table_is_there():
    assert len(rows()) == 10


@pytest.mark.parametrize("row", rows(), ids=lambda row: operations(row[1])[0])
def test_the_claims_are_those_of_the_table(row):
    name, cell, claims = row
    if OpClass[name] is OpClass.LOCAL:
        assert claims == "nothing"
        return
    expected: set[tuple[object, int]] = set()
    for part in claims.split(";"):
        expected |= CLAIMED[part.split(":")[0].strip()]
    made = WAYS[operations(cell)[0]]
    assert {(key, mode) for key, mode, _, _ in made} == expected


@pytest.mark.parametrize("row", rows(), ids=lambda row: operations(row[1])[0])
def test_the_classes_are_those_of_the_table(row):
    name, cell, _ = row
    for operation in operations(cell):
        if not operation.startswith("anything"):
            assert CLASSES[{"fdatasync": "fsync"}.get(operation, operation)] is OpClass[name]


def test_a_key_is_claimed_once():
    made = [
        *WAYS.values(),
        footprint.rename(DIRECTORY, b"n", DIRECTORY, b"m", OBJECT, None),
        footprint.rename(DIRECTORY, b"n", DIRECTORY, b"m", OBJECT, REPLACED),
        footprint.rename(DIRECTORY, b"n", OTHER, b"n", OBJECT, DIRECTORY),
        footprint.rename(DIRECTORY, b"n", OTHER, b"n", OBJECT, OTHER),
    ]
    for claims in made:
        keys = [claim[0] for claim in claims]
        assert len(keys) == len(set(keys)), claims


def test_a_parent_that_is_replaced_is_claimed_exclusively():
    claims = footprint.rename(DIRECTORY, b"n", OTHER, b"n", OBJECT, DIRECTORY)
    assert (DIRECTORY, EXCLUSIVE, 0, 0) in claims
    assert (DIRECTORY, SHARED, 0, 0) not in claims


def test_a_rename_to_a_free_name_claims_nothing_more():
    claims = footprint.rename(DIRECTORY, b"n", DIRECTORY, b"m", OBJECT, None)
    assert {claim[:2] for claim in claims} == {
        ((DIRECTORY, b"n"), EXCLUSIVE),
        ((DIRECTORY, b"m"), EXCLUSIVE),
        (OBJECT, EXCLUSIVE),
        (DIRECTORY, SHARED),
    }


def test_bytes_are_half_open_and_may_have_no_end():
    assert footprint.data(OBJECT, 3, 10) == ((OBJECT, RANGE, 3, 10),)
    assert footprint.data(OBJECT, 3) == ((OBJECT, RANGE, 3, END),)
    assert END > 2**63 - 1


def handlers(*classes):
    """Names of the public methods of *classes*."""
    names = set()
    for one in classes:
        names |= {name for name, _ in inspect.getmembers(one, callable) if name[0] != "_"}
    return names


def test_every_operation_that_changes_something_has_a_class():
    """What a read-only mount refuses is what changes something."""
    refused = ReadOnlyView.write
    changing = {name for name in handlers(ReadOnlyView) if getattr(ReadOnlyView, name) is refused}
    assert changing >= {"setattr", "make", "create", "unlink", "rename", "link", "write"}
    assert changing <= handlers(Volume)
    for name in changing:
        for kind in ("mknod", "mkdir", "symlink") if name == "make" else (name,):
            assert CLASSES[kind] is not OpClass.LOCAL, kind


def test_every_live_operation_is_of_a_class():
    of_class = {
        ops.Write: "write",
        ops.Truncate: "truncate",
        ops.Make: "create",
        ops.Link: "link",
        ops.Unlink: "unlink",
        ops.Rename: "rename",
        ops.SetAttr: "setattr",
        ops.SetXattr: "setxattr",
        ops.RemoveXattr: "removexattr",
        ops.SetPolicy: "policy",
        ops.Sync: "fsync",
        ops.Checkpoint: "fsyncdir",
    }
    # What is of replfs itself.
    own = {ops.Locate, ops.Forget, ops.Stable, ops.Generation, ops.Progress, ops.Summary}
    assert of_class.keys() | own == set(ops.LiveOp.__args__)
    for kind in of_class.values():
        assert CLASSES[kind] is not OpClass.LOCAL


def test_looking_is_local():
    changing = {name for name in CLASSES if CLASSES[name] is not OpClass.LOCAL}
    looking = handlers(View) & CLASSES.keys()
    assert looking >= {"lookup", "getattr", "read", "readlink", "statfs", "getxattr", "listxattr"}
    assert not looking & changing - {"fsync", "fsyncdir"}


def test_what_is_claimed_together_is_claimed_once_at_its_strongest():
    claims = footprint.together(
        [
            *footprint.entry(DIRECTORY, b"n"),
            *footprint.entry_of(OTHER, b"m", DIRECTORY),
            *footprint.entry(DIRECTORY, b"o"),
        ]
    )
    assert sorted(claims, key=str) == sorted(
        [
            ((DIRECTORY, b"n"), EXCLUSIVE, 0, 0),
            (DIRECTORY, EXCLUSIVE, 0, 0),
            ((OTHER, b"m"), EXCLUSIVE, 0, 0),
            (OTHER, SHARED, 0, 0),
            ((DIRECTORY, b"o"), EXCLUSIVE, 0, 0),
        ],
        key=str,
    )
