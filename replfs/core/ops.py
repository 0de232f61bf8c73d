"""The operations that travel from a primary to its peers, and their answers.

One frozen struct per operation. Objects are named by their id (16 bytes, `OBJECT_ID_SIZE`), never
by a path: a path changes under a rename, an id does not. Names are single directory entries.
Times are nanoseconds since the epoch, and may be negative. Payload bytes (a write's data, a
transferred region) travel beside the operation in a frame of their own and never pass through
here.

Live operations (`LiveOp`) carry what an application did; they go through the ordered live stream.
Resync operations (`BulkOp`) put a replica right; they go through the bulk stream. Both streams
carry `Locate` and `Forget`, which have no answer: they only tell the peer where an object is.
"""

from __future__ import annotations

import errno
from typing import Final

import msgspec

OBJECT_ID_SIZE: Final = 16
NAME_MAX: Final = 255
PATH_MAX: Final = 4096
XATTR_VALUE_MAX: Final = 65536
PAYLOAD_MAX: Final = 1 << 20
"""Bytes: the kernel's largest FUSE write, and the largest region transferred at once."""
NAMES_PER_MESSAGE: Final = 1000
ITEMS_PER_MESSAGE: Final = 256
"""Objects made with one `PlaceMany`."""
RUNS_PER_MESSAGE: Final = 4096
PLACES_PER_MESSAGE: Final = NAMES_PER_MESSAGE + PATH_MAX // 2
"""An object more than `NAMES_PER_MESSAGE` may bring all its parents with it."""
NO_OBJECT: Final = b""
DISAGREES: Final = errno.EBADMSG
"""The errno that answers a `Summary` that is not the peer's own."""
KEEP: Final = -1
"""In `SetAttr.mode`, `.uid`, `.gid`: leave as it is."""

ObjectId = bytes


class Op(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Base of all operations."""


# Live: where things are ------------------------------------------------------------------------


class Locate(Op, frozen=True, tag=1):
    """*object* is `name` in *parent*. Sent once a session before an object is first used."""

    object: ObjectId
    parent: ObjectId
    name: bytes


class Forget(Op, frozen=True, tag=2):
    """The primary no longer uses these objects; the peer may forget where they are."""

    objects: list[ObjectId]


# Live: data ------------------------------------------------------------------------------------


class Write(Op, frozen=True, tag=10):
    """The payload goes to `offset`; `mtime` is the object's afterwards, on both sides."""

    object: ObjectId
    offset: int
    mtime: int


class Truncate(Op, frozen=True, tag=11):
    """The object's size becomes `size`, in either direction."""

    object: ObjectId
    size: int
    mtime: int


# Live: metadata --------------------------------------------------------------------------------


class Make(Op, frozen=True, tag=20):
    """A new object of any type; `mode` holds type and permissions as they *resulted* locally.

    So do the ACLs, as extended attributes, empty where there is none: the replica's parent may not
    have the default ACL yet that they come from (acl(5), "OBJECT CREATION").
    """

    object: ObjectId
    parent: ObjectId
    name: bytes
    mode: int
    uid: int
    gid: int
    rdev: int
    target: bytes
    mtime: int
    parent_mtime: int
    acl: bytes = b""
    default_acl: bytes = b""


class Link(Op, frozen=True, tag=21):
    """One more name for *object*."""

    object: ObjectId
    parent: ObjectId
    name: bytes
    parent_mtime: int


class Unlink(Op, frozen=True, tag=22):
    """The name goes away; `directory` tells rmdir from unlink."""

    object: ObjectId
    parent: ObjectId
    name: bytes
    directory: bool
    parent_mtime: int


class Rename(Op, frozen=True, tag=23):
    """`replaced` is what stood under the new name (exchanged with, if `exchange`), or empty."""

    object: ObjectId
    parent: ObjectId
    name: bytes
    new_parent: ObjectId
    new_name: bytes
    replaced: ObjectId
    exchange: bool
    parent_mtime: int
    new_parent_mtime: int


class SetAttr(Op, frozen=True, tag=24):
    """Attributes other than the size; `KEEP` and None leave one as it is."""

    object: ObjectId
    mode: int = KEEP
    uid: int = KEEP
    gid: int = KEEP
    atime: int | None = None
    mtime: int | None = None


class SetXattr(Op, frozen=True, tag=25):
    """Set an extended attribute, whether it exists or not (the flags were judged locally).

    `mode` is the object's resulting mode: setting an ACL changes it, and may clear set-group-ID.
    """

    object: ObjectId
    name: bytes
    value: bytes


class RemoveXattr(Op, frozen=True, tag=26):
    """Remove an extended attribute; it is no error if there is none."""

    object: ObjectId
    name: bytes


class SetPolicy(Op, frozen=True, tag=27):
    """The object's own policy (see `core.policy`); 0 means inherit."""

    object: ObjectId
    policy: int
    ack: int


# Live: barriers --------------------------------------------------------------------------------


class Sync(Op, frozen=True, tag=30):
    """Flush *object* to stable storage; with `data_only`, as fdatasync(2) does."""

    object: ObjectId
    data_only: bool


class Checkpoint(Op, frozen=True, tag=31):
    """Flush the whole store: everything before it in the stream is stable once answered."""

    generation: bytes


class Stable(Op, frozen=True, tag=32):
    """What came before the last `Checkpoint` is on the primary's disk, too.

    `everywhere`: and on that of every peer it has.
    """

    everywhere: bool


class Generation(Op, frozen=True, tag=33):
    """What follows in the stream belongs to another generation: some other peer does not get it.

    Sent to peers that are in sync; durable against a crash of the process when answered.
    `discarded`: those of its history that an operator decided against.
    """

    generation: bytes
    history: list[bytes]
    discarded: list[bytes] = msgspec.field(default_factory=list)


class Progress(Op, frozen=True, tag=34):
    """The peer has everything up to the primary's change `number`: from here on it counts.

    Each of `CHANGES` on the live stream is one more. Sent where nothing is recorded for the peer.
    """

    number: int


# Both: what was sent -----------------------------------------------------------------------------


class Summary(Op, frozen=True, tag=35):
    """All that was sent before on this stream and in this session; the peer compares its own.

    `number` operations, with that running `checksum` (`messages.chained`). `generation`: what the
    peer should have recorded as its own; empty: not to be compared. `change`: up to which change of
    the primary it should have everything; 0: not to be compared. Answered with `DISAGREES` where
    anything is another (`core.summary`). Changes nothing.
    """

    number: int
    checksum: int
    generation: bytes
    change: int


# Bulk: resync ----------------------------------------------------------------------------------


class Attributes(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """All that an object has besides names and data."""

    mode: int
    uid: int
    gid: int
    rdev: int
    size: int
    mtime: int
    target: bytes
    policy: int
    ack: int
    xattrs: dict[bytes, bytes]


class Gather(Op, frozen=True, tag=40):
    """What stands at each of *names* and is not what is wanted there goes to limbo, by its id.

    `wanted` is parallel to `names`; an empty id means that no name is wanted. What is right
    already stays, and the peer remembers where it is.
    """

    parent: ObjectId
    names: list[bytes]
    wanted: list[ObjectId]


class Place(Op, frozen=True, tag=41):
    """*object* shall be `name` in *parent*: from limbo, by a link, adopted as it stands, or new.

    `hints` are other names the object may be found under, (directory id, name). With `whole` the
    attributes are final, and the payload, if any, is all the data: an object that has to be made
    new is complete at once. Answered with `Placed`.
    """

    object: ObjectId
    parent: ObjectId
    name: bytes
    attributes: Attributes
    hints: list[tuple[ObjectId, bytes]]
    whole: bool = False


class Clear(Op, frozen=True, tag=42):
    """`name` in *parent* shall not exist; what stands there goes to limbo."""

    parent: ObjectId
    name: bytes


class Digest(Op, frozen=True, tag=43):
    """Answer the digest of each region of [`start`, `start` + `count` * `size`) (`Digests`)."""

    object: ObjectId
    start: int
    count: int
    size: int


class Data(Op, frozen=True, tag=44):
    """The payload, or `hole` zero bytes as a hole, goes to `offset`."""

    object: ObjectId
    offset: int
    hole: int = 0


class Finish(Op, frozen=True, tag=45):
    """Size, attributes and xattrs become exactly these; the object is complete from here on."""

    object: ObjectId
    attributes: Attributes


class List(Op, frozen=True, tag=46):
    """Names and ids in a directory, after `after` in byte order, at most `NAMES_PER_MESSAGE`.

    With `digests`, what is small enough has its digest beside it.
    """

    parent: ObjectId
    after: bytes
    digests: bool = False


class EmptyLimbo(Op, frozen=True, tag=47):
    """All names are in place: what is left in limbo was deleted on the primary."""


class Phase(Op, frozen=True, tag=48):
    """The replica is `inconsistent` from here on, or (False) consistent again, durably.

    The others are as in `Generation`.
    """

    inconsistent: bool
    generation: bytes
    history: list[bytes]
    discarded: list[bytes] = msgspec.field(default_factory=list)


class Inspect(Op, frozen=True, tag=49):
    """Look at what stands at `name` in `parent`, or, with an empty name, at `parent` itself.

    Answered with `Inspected`. Changes nothing.
    """

    parent: ObjectId
    name: bytes


# Bulk: what a peer has ---------------------------------------------------------------------------


class Suspects(Op, frozen=True, tag=50):
    """What this replica has applied and the asking side may lack. Answered with `Suspected`.

    Pages are asked for one by one from `page` 0, which looks anew. `everywhere`: since all stores
    of the volume were stable together; otherwise, since the last primary and this one were.
    Changes nothing.
    """

    page: int
    everywhere: bool


class Fetch(Op, frozen=True, tag=51):
    """The bytes [`offset`, `offset` + `length`) of a file, or an xattr's value; see `Fetched`.

    `xattr` is empty where the file's data is wanted. Changes nothing.
    """

    object: ObjectId
    offset: int
    length: int
    xattr: bytes


class Handover(Op, frozen=True, tag=52):
    """The primary asks this replica to take its place, if it is at `generation`.

    Without `commit` it is only asked whether it could. With it, the primary has become a secondary
    already, and nothing is in flight: an answer of success says that the replica is the primary,
    durably, any other that it is not.
    """

    generation: bytes
    commit: bool


class Item(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One of many to be placed; the fields are those of `Place`."""

    object: ObjectId
    name: bytes
    attributes: Attributes


class PlaceMany(Op, frozen=True, tag=53):
    """For each of *items*, in their order, what `Place` does without hints.

    With `whole`, if it is no directory.

    The payload is the data of all files, one after the other. Answered with `PlacedMany`.
    """

    parent: ObjectId
    items: list[Item]


LiveOp = (
    Locate | Forget | Write | Truncate | Make | Link | Unlink | Rename | SetAttr | SetXattr
    | RemoveXattr | SetPolicy | Sync | Checkpoint | Stable | Generation | Progress | Summary
)  # fmt: skip
BulkOp = (
    Locate | Forget | Gather | Place | Clear | Digest | Data | Finish | List | EmptyLimbo | Phase
    | Inspect | Suspects | Fetch | Handover | PlaceMany | Summary
)  # fmt: skip
AnyOp = (
    Locate | Forget | Write | Truncate | Make | Link | Unlink | Rename | SetAttr | SetXattr
    | RemoveXattr | SetPolicy | Sync | Checkpoint | Stable | Generation | Progress | Summary
    | Gather | Place | Clear | Digest | Data | Finish | List | EmptyLimbo | Phase | Inspect
    | Suspects | Fetch | Handover | PlaceMany
)  # fmt: skip

CHANGES: Final[frozenset[type[Op]]] = frozenset({
    Write, Truncate, Make, Link, Unlink, Rename, SetAttr, SetXattr, RemoveXattr, SetPolicy,
})  # fmt: skip
"""What an application changed, of the live operations."""


# Answers ---------------------------------------------------------------------------------------


class Answer(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one operation: errno 0 is success; `written` is a write's length."""


class Done(Answer, frozen=True, tag=1):
    """Applied (errno 0) or failed with an errno; `written` counts payload bytes applied."""

    errno: int
    written: int = 0


class Placed(Answer, frozen=True, tag=2):
    """`complete`: the object was there with its contents; else all of it is to be compared."""

    complete: bool
    created: bool


class Digests(Answer, frozen=True, tag=3):
    """xxh3_128 of each region, in order; one byte-string of 16 bytes a region, and the size."""

    digests: bytes
    size: int


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One name in a listing; `object` is empty where the object has no valid id.

    `digest`, where it is not empty, is that of all there is to the object besides its names
    (`store.look`).
    """

    name: bytes
    object: ObjectId
    complete: bool
    digest: bytes = b""


class Listing(Answer, frozen=True, tag=4):
    """Entries in byte order; `more` tells that the next `List` goes on after the last one.

    `digest`, on the last page, is that of the directory's own attributes; empty where it is not
    complete, or was not asked for.
    """

    entries: list[Entry]
    more: bool
    digest: bytes = b""


class Inspected(Answer, frozen=True, tag=5):
    """What an object is; `attributes` is None where nothing stands at the name.

    `object` is empty where there is no valid id. The values in `attributes.xattrs` are the
    xxh3_128 digests of the values (16 bytes).
    """

    object: ObjectId
    complete: bool
    attributes: Attributes | None


class Suspect(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Marks of one object; there may be several of these for one.

    `flags` are those of `core.marks`; `tail` a region or -1; `runs` are regions, half-open. An
    empty name among `names` stands for all of them.
    """

    object: ObjectId
    flags: int
    tail: int
    runs: list[tuple[int, int]]
    names: list[bytes]


class Suspected(Answer, frozen=True, tag=6):
    """One page. `known` is false where everything has to be compared.

    `places` tell where each of the objects is, its parents before it, unless an earlier page told.
    """

    known: bool
    places: list[Locate]
    suspects: list[Suspect]
    more: bool


class Fetched(Answer, frozen=True, tag=7):
    """`data` without the holes in it: (start, stop) in the file, in order, within what was asked.

    `size` is the file's, or the xattr value's.
    """

    data: bytes
    holes: list[tuple[int, int]]
    size: int


class PlacedMany(Answer, frozen=True, tag=8):
    """What `Place` would have answered, for each item."""

    results: list[Done | Placed]


AnyAnswer = Done | Placed | Digests | Listing | Inspected | Suspected | Fetched | PlacedMany
