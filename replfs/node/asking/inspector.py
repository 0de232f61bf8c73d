"""Looking at the tree of another primary: a session of its own, in which nothing is changed."""

from __future__ import annotations

import errno
import os
import stat as _stat
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import trio

from replfs.core import ops
from replfs.core.messages import BULK, Hello, Refuse, Welcome
from replfs.core.policy import Policy
from replfs.errors import NotInSync, PeerLost, ReplfsError
from replfs.node.asking.identity import INSPECTION, hello_of
from replfs.node.asking.probe import Prober
from replfs.node.asking.question import ask
from replfs.store.record import ROOT_ID
from replfs.transport.link import Link

_PATIENCE_S: Final = 10.0
"""How long it may take to be let in."""

T = TypeVar("T")


class Inspector:
    """One such session; the owner of its link."""

    def __init__(self, node: Prober, name: str, endpoint: str) -> None:
        self._node = node
        self._name = name
        self._settled = trio.Event()
        self._refusal = ""
        self._located: set[bytes] = {ROOT_ID}
        self._root_policy: int | None = None
        self._link = Link(
            node.context,
            endpoint,
            self,
            peer_timeout_s=node.settings.peer_timeout_s,
            security=node.curve,
            name=name,
            on_refused=self._refused,
        )

    async def run(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do *work* while the session is there.

        Raises:
            NotInSync: there is no session, or it was lost.
        """
        result: list[T] = []
        failure: list[ReplfsError | OSError] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._link.run)
            with trio.move_on_after(_PATIENCE_S):
                await self._settled.wait()
            try:
                if not self._link.is_up:
                    raise NotInSync(
                        f"{self._name} does not let itself be looked at: "
                        f"{self._refusal or 'it does not answer'}"
                    )
                result.append(await work())
            except PeerLost:
                failure.append(NotInSync(f"{self._name} was lost while it was looked at"))
            except (ReplfsError, OSError) as error:
                failure.append(error)
            nursery.cancel_scope.cancel()
        if failure:
            raise failure[0]
        return result[0]

    # The link's owner ----------------------------------------------------------------------------

    def hello(self) -> Hello:
        """This node, which only wants to look."""
        return hello_of(self._node.state, INSPECTION)

    def welcomed(self, link: Link, welcome: Welcome) -> None:
        """It may."""
        del link, welcome
        self._settled.set()

    def went_down(self, link: Link, reason: str) -> None:
        """Those who ask learn it."""

    def _refused(self, link: Link, refuse: Refuse) -> None:
        del link
        self._refusal = refuse.reason
        self._settled.set()

    # Looking -------------------------------------------------------------------------------------

    async def ask(self, op: ops.AnyOp) -> ops.AnyAnswer:
        """Have *op* done there. Raises PeerLost."""
        return await ask(self._link, op)

    async def at(self, path: bytes) -> ops.Inspected | None:
        """What stands at a path there, located so that it can be asked about; None: nothing.

        What is that node's own is not shown.
        """
        if await self._is_all_own():
            return None
        above, found = ROOT_ID, None
        for name in path.split(b"/"):
            if found is not None and not _is_directory(found):
                return None
            answer = await self.ask(ops.Inspect(above, name))
            if not isinstance(answer, ops.Inspected) or answer.attributes is None:
                return None
            if answer.object and answer.object not in self._located:
                self._link.send(ops.Locate(answer.object, above, name), None, None, BULK)
                self._located.add(answer.object)
            above, found = answer.object, answer
            if not above:
                break
        return found

    async def _is_all_own(self) -> bool:
        """Whether the root has policy `none` there."""
        if self._root_policy is None:
            answer = await self.ask(ops.Inspect(ROOT_ID, b""))
            found = answer.attributes if isinstance(answer, ops.Inspected) else None
            self._root_policy = found.policy if found is not None else Policy.INHERIT
        return self._root_policy == Policy.NONE

    async def digests(self, object_id: bytes, start: int, count: int, size: int) -> bytes:
        """Digests of a file's regions there. Raises OSError where it cannot be read."""
        answer = await self.ask(ops.Digest(object_id, start, count, size))
        if not isinstance(answer, ops.Digests):
            raise _failure(answer)
        return answer.digests

    async def fetch(self, object_id: bytes, offset: int, length: int) -> ops.Fetched:
        """Bytes of a file there. Raises OSError where it cannot be read."""
        answer = await self.ask(ops.Fetch(object_id, offset, length, b""))
        if not isinstance(answer, ops.Fetched):
            raise _failure(answer)
        return answer

    async def xattr(self, object_id: bytes, name: bytes) -> bytes:
        """An extended attribute there. Raises OSError where it cannot be read."""
        answer = await self.ask(ops.Fetch(object_id, 0, ops.XATTR_VALUE_MAX, name))
        if not isinstance(answer, ops.Fetched):
            raise _failure(answer)
        return answer.data


def _is_directory(found: ops.Inspected) -> bool:
    return found.attributes is not None and _stat.S_ISDIR(found.attributes.mode)


def _failure(answer: ops.AnyAnswer) -> OSError:
    number = answer.errno if isinstance(answer, ops.Done) else errno.EPROTO
    return OSError(number or errno.EPROTO, f"it cannot be read there: {os.strerror(number)}")
