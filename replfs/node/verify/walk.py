"""A walk over what the peers shall have, while it is in use: each directory before those below it.

Only the directories from the top to the one that is looked at are kept known, so that memory is
bounded by the depth of the tree and the names in those. A directory that is renamed meanwhile may
be missed, or seen twice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TypeVar

from replfs.node.replication.policies import Policies
from replfs.store.inode import Inode
from replfs.store.tree import Tree

T = TypeVar("T")
Below = list[tuple[bytes, T]]
"""Names, each with what is to be known of it when it is entered; the last is entered first."""


async def walk(
    tree: Tree,
    policies: Policies,
    top: Inode,
    known: T,
    enter: Callable[[Inode, T], Awaitable[Below[T]]],
    leave: Callable[[Inode], None] = lambda _: None,
) -> None:
    """*enter* every directory at or below *top*; it says which of the names there to go on with.

    *known* is what *enter* is told of *top*. *leave* is called after all that is below, and for
    what was entered when the walk is cut off. Names that are not directories, or cannot be read,
    are passed over.
    """
    frames: list[tuple[Inode, Below[T]]] = []

    async def begin(directory: Inode, known: T) -> None:
        tree.hold(directory)
        below: Below[T] = []
        frames.append((directory, below))
        below += await enter(directory, known)

    def end() -> None:
        directory, _ = frames.pop()
        leave(directory)
        tree.release(directory)

    try:
        await begin(top, known)
        while frames:
            directory, below = frames[-1]
            if not below:
                end()
                continue
            name, known = below.pop()
            child = policies.readable_child(directory, name)
            if child is None:
                continue
            if child.is_directory:
                await begin(child, known)
            else:
                tree.drop_unused(child)
    finally:
        while frames:
            end()
