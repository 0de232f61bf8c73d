"""`replfs verify`: one verification at a time, its progress, and where an interrupted one stopped.

Where a verification was interrupted (the link went down) is remembered until the next one of the
same peer and path, which goes on from there; a restart of the node forgets it, and the next one
begins anew.
"""

from __future__ import annotations

import os
import time
from typing import Any

import trio

from replfs.errors import NotInSync, PeerLost, ReplfsError, UsageError
from replfs.node.pacing.rate import Rate
from replfs.node.replication.peer import Peer
from replfs.node.replication.pipeline import Pipeline
from replfs.node.verify.verify import Course, Place, Verification


class Verifier:
    """The node's verifications: one at a time, those that were interrupted remembered."""

    def __init__(self, pipeline: Pipeline, rate_bytes: int, prefixes: list[str]) -> None:
        """*prefixes*: the absolute paths by which people call the root of the volume."""
        self._pipeline = pipeline
        self._rate_bytes = rate_bytes
        self._prefixes = prefixes
        self._courses: dict[tuple[str, Place], Course] = {}
        self._key: object = None
        self._over = trio.Event()
        self._outcome: dict[str, Any] | Exception = {}
        self._current: Verification | None = None
        self._began = 0.0

    def stop(self) -> None:
        """The node ends."""
        if self._current is not None:
            self._current.stopped = True

    def status(self) -> dict[str, Any] | None:
        """How far it has come, for people; None while nothing is being verified."""
        current = self._current
        if current is None:
            return None
        course = current.course
        return {
            "phase": f"verifying {current.at}",
            "files": course.files,
            "bytes": course.bytes,
            "differences": course.differences,
            "skipped": course.skipped,
            "rate": course.bytes / max(time.monotonic() - self._began, 1e-3),
        }

    async def command(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The `verify` command: {peer, path, repair} -> {differences, message}."""
        if arguments.get("repair") and self._pipeline.unwritten.number:
            raise NotInSync(
                "this node's disk failed to write something: where the two differ, its peer may be "
                "right. Verify without --repair, or start this node again: it then fetches that"
            )
        place = self._place(arguments.get("path"))
        name = arguments.get("peer")
        peers = [peer for peer in self._pipeline.peers if not name or peer.name == name]
        if not peers:
            raise UsageError(f"there is no peer named {name}" if name else "there are no peers")
        key = (tuple(peer.name for peer in peers), place, bool(arguments.get("repair")))
        if self._key is not None:
            if self._key != key:
                raise UsageError("another verification is running: wait until it has ended")
            await self._over.wait()
        else:
            self._key = key
            self._over = trio.Event()
            try:
                self._outcome = await self._all(peers, place, repair=key[2])
            except (ReplfsError, OSError) as error:
                self._outcome = error
            except BaseException:
                self._outcome = NotInSync("the verification was stopped")
                raise
            finally:
                self._key = None
                self._current = None
                self._over.set()
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome

    def _place(self, path: object) -> Place:
        if not path:
            return ()
        text = os.path.normpath(str(path))
        for prefix in self._prefixes:
            if text == prefix:
                return ()
            if text.startswith(prefix.rstrip("/") + "/"):
                below = os.fsencode(text[len(prefix.rstrip("/")) + 1 :])
                return tuple(below.split(b"/"))
        raise UsageError(f"{path} is not on this mount; write a path below {self._prefixes[0]}")

    async def _all(self, peers: list[Peer], place: Place, *, repair: bool) -> dict[str, Any]:
        lines: list[str] = []
        messages: list[str] = []
        lost: list[str] = []
        for peer in peers:
            prefix = f"{peer.name}: " if len(self._pipeline.peers) > 1 else ""
            try:
                course, resumed = await self._one(peer, place, repair=repair)
            except PeerLost as error:
                lost.append(str(error))
                continue
            lines += [prefix + text for text in course.told]
            messages.append(f"{peer.name}: {_summary(course, resumed=resumed, repair=repair)}")
        if lost:
            done = "".join(f"; {message}" for message in messages)
            raise PeerLost(
                f"{'; '.join(lost)}: not all was compared, the next verify goes on from there{done}"
            )
        return {"differences": lines, "message": "\n".join(messages)}

    async def _one(self, peer: Peer, place: Place, *, repair: bool) -> tuple[Course, bool]:
        if not peer.live:
            raise PeerLost(f"{peer.name} is not connected")
        key = (peer.name, place)
        course = self._courses.setdefault(key, Course())
        resumed = course.reached is not None
        self._began = time.monotonic()
        self._current = Verification(
            self._pipeline, peer, place, course, repair=repair, rate=Rate(self._rate_bytes)
        )
        try:
            await self._current.run()
        except (UsageError, OSError):
            del self._courses[key]
            raise
        del self._courses[key]
        return course, resumed


def _summary(course: Course, *, resumed: bool, repair: bool) -> str:
    found = course.differences
    parts = [
        f"{course.files} objects and {course.bytes} bytes compared",
        "no differences" if not found else f"{found} differences" if found > 1 else "1 difference",
    ]
    if found and repair:
        parts.append("marked: the resync mends them")
    if found > len(course.told):
        parts.append(f"the first {len(course.told)} are told")
    if course.skipped:
        parts.append(f"{course.skipped} skipped, which are known to be dirty")
    if resumed:
        parts.append("goes on from where the last one was interrupted")
    return ", ".join(parts)
