"""ZMTP 3.1 (ZeroMQ RFC 37), mechanism NULL: bytes in, messages out. No sockets, no clock.

What a connection says, in both directions: a greeting of 64 bytes, a READY command, then frames;
the frames of a message are marked as belonging together, and commands (heartbeats) may stand
between any two of them. Whatever the bytes are, `Decoder` yields messages, or raises
`ProtocolError` for what ends the connection.
"""

from __future__ import annotations

import struct
from typing import Final

import msgspec

from replfs.errors import ProtocolError

GREETING_BYTES: Final = 64
COMMAND_MAX: Final = 8192
"""Bytes of a command, the peer's READY with its metadata included."""
FRAMES_MAX: Final = 64
"""Frames of a message that are skipped, where two are allowed, before the connection is closed."""
READ_AHEAD: Final = 64 << 10
"""Bytes received at once where nothing larger is due."""
JOIN_MAX: Final = 32 << 10
"""Bytes up to which a payload is copied behind its head: one buffer is cheaper to send than two."""

_MORE: Final = 1
_LONG: Final = 2
_COMMAND: Final = 4
_SIZE: Final = struct.Struct(">Q")
_PROPERTY: Final = struct.Struct(">I")
_SHORT_MAX: Final = 255
_SHORT_HEADERS: Final = tuple(
    tuple(bytes((flags, size)) for size in range(_SHORT_MAX + 1)) for flags in (0, _MORE)
)
_LONG_HEADER: Final = 9
_PING_CONTEXT_MAX: Final = 16
_PING_TTL_BYTES: Final = 2
_VERSION_MAJOR: Final = 3
_SIGNATURE: Final = b"\xff" + bytes(8) + b"\x7f"
_MECHANISM: Final = b"NULL".ljust(20, b"\0")
_GREETING: Final = (_SIGNATURE + bytes((_VERSION_MAJOR, 1)) + _MECHANISM).ljust(
    GREETING_BYTES, b"\0"
)

_PARTNERS: Final = {b"DEALER": b"ROUTER", b"ROUTER": b"DEALER"}


class Message(msgspec.Struct, gc=False):
    """What one message brought."""

    head: bytes
    payload: memoryview | None
    """Valid until the next call of the decoder; to be released by whoever was given it."""
    wrong: str = ""
    """If not empty: it was none, and this is what was wrong with its frames."""


def opening(socket_type: bytes) -> bytes:
    """What a side says first: its greeting and its READY."""
    ready = b"\x05READY" + _metadata(b"Socket-Type", socket_type) + _metadata(b"Identity", b"")
    return _GREETING + bytes((_COMMAND, len(ready))) + ready


def _metadata(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + _PROPERTY.pack(len(value)) + value


def encode(head: bytes, payload: bytes | None) -> tuple[bytes, bytes | None]:
    """A message as it is sent: one buffer, and for a large payload that itself as a second."""
    if payload is None:
        return _header(0, len(head)) + head, None
    front = _header(_MORE, len(head)) + head + _header(0, len(payload))
    if len(payload) <= JOIN_MAX:
        return front + payload, None
    return front, payload


def _header(flags: int, size: int) -> bytes:
    if size <= _SHORT_MAX:
        return _SHORT_HEADERS[flags][size]
    return bytes((flags | _LONG,)) + _SIZE.pack(size)


class Decoder:
    """One direction of one connection: what the other side has said.

    The owner receives into `space`, says how much came by `feed`, and takes messages by `next`
    until there is none.

    Args:
        socket_type: of this side, DEALER or ROUTER; the other side's has to be the other.
        frame_max: bytes of a frame; a longer one ends the connection before it is received.
    """

    __slots__ = (
        "_buffer", "_end", "_frame_max", "_frames", "_greeted", "_head", "_partner", "_start",
        "_view", "_wanted", "ready", "replies",
    )  # fmt: skip

    def __init__(self, socket_type: bytes, frame_max: int) -> None:
        self.ready = False
        """Whether the handshake is through, so that messages may be sent."""
        self.replies = b""
        """What has to be sent to the other side because of what it said; the owner takes it."""
        self._partner = _PARTNERS[socket_type]
        self._frame_max = frame_max
        self._buffer = bytearray(2 * READ_AHEAD)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        """Where what was received and not yet taken begins and ends."""
        self._wanted = 0
        """Bytes from `_start` on that the next step needs."""
        self._greeted = False
        self._head: bytes | None = None
        """First frame of a message whose second has not come yet."""
        self._frames = 0
        """Frames so far of the message that is being received."""

    def space(self) -> memoryview:
        """Where to receive: all of it may be filled.

        It ends with the frame that is due if that is a large one: what comes behind it then
        begins at the start of the buffer, and is not moved.
        """
        start, end = self._start, self._end
        if start == end:
            self._start = self._end = start = end = 0
        wanted = max(self._wanted, READ_AHEAD)
        if start + wanted > len(self._buffer):
            view = self._view
            if wanted > len(self._buffer):
                self._buffer = bytearray(wanted + READ_AHEAD)
                self._view = memoryview(self._buffer)
            self._view[: end - start] = view[start:end]
            self._start, self._end = 0, end - start
            start, end = 0, self._end
        return self._view[end : start + wanted]

    def feed(self, count: int) -> None:
        """*count* bytes were received into `space`."""
        self._end += count

    @property
    def is_amid(self) -> bool:
        """Whether a message, or a part of the handshake, has begun and is not complete."""
        return self._start != self._end or self._frames > 0

    def next(self) -> Message | None:
        """The next message, None if it has not come in whole.

        Raises:
            ProtocolError: the other side does not speak this protocol; close the connection.
        """
        if not self._greeted and not self._greet():
            return None
        buffer = self._buffer
        while True:
            start = self._start
            available = self._end - start
            if available < 2:
                self._wanted = 2
                return None
            flags = buffer[start]
            if flags & _LONG:
                if available < _LONG_HEADER:
                    self._wanted = _LONG_HEADER
                    return None
                at = start + _LONG_HEADER
                (size,) = _SIZE.unpack_from(buffer, start + 1)
            else:
                at = start + 2
                size = buffer[start + 1]
            end = at + size
            if end > self._end:
                self._check_announced(flags, size)
                self._wanted = end - start
                return None
            self._start = end
            if flags & ~(_MORE | _LONG) or not self.ready:
                self._check_announced(flags, size)
                self._command(bytes(self._view[at:end]))
                continue
            message = self._frame(flags, at, end)
            if message is not None:
                return message

    def _frame(self, flags: int, at: int, end: int) -> Message | None:
        """A frame of a message; the message, if it was its last."""
        if end - at > self._frame_max:
            self._check_announced(flags, end - at)
        frames = self._frames
        if flags & _MORE:
            if not frames:
                self._head = bytes(self._view[at:end])
            elif frames >= FRAMES_MAX:
                raise ProtocolError(f"a message of more than {FRAMES_MAX} frames")
            self._frames = frames + 1
            return None
        self._frames = 0
        if not frames:
            return Message(bytes(self._view[at:end]), None)
        head, self._head = self._head or b"", None
        if frames == 1:
            return Message(head, self._view[at:end])
        return Message(b"", None, f"a message of {frames + 1} frames")

    def _check_announced(self, flags: int, size: int) -> None:
        """Before a frame has come in whole: whether it may be waited for."""
        if flags & ~(_MORE | _LONG | _COMMAND) or (flags & _COMMAND and flags & _MORE):
            raise ProtocolError(f"a frame with flags {flags:#04x}")
        if not self.ready and not flags & _COMMAND:
            raise ProtocolError("a message before the handshake is through")
        if size > (COMMAND_MAX if flags & _COMMAND else self._frame_max):
            raise ProtocolError(f"a frame of {size} bytes")

    # Handshake and heartbeats --------------------------------------------------------------------

    def _greet(self) -> bool:
        """Take the greeting; whether all of it has come."""
        start = self._start
        greeting = bytes(self._view[start : min(self._end, start + GREETING_BYTES)])
        if greeting[:1] not in (b"", b"\xff") or greeting[9:10] not in (b"", b"\x7f"):
            raise ProtocolError("it does not speak ZMTP 3")
        if greeting[10:11] and greeting[10] < _VERSION_MAJOR:
            raise ProtocolError(f"it speaks ZMTP {greeting[10]}, not {_VERSION_MAJOR}")
        if len(greeting) < GREETING_BYTES:
            self._wanted = GREETING_BYTES
            return False
        if greeting[12:32] != _MECHANISM:
            name = greeting[12:32].rstrip(b"\0").decode("ascii", "replace")
            raise ProtocolError(f"it asks for the security mechanism {name!r}, not NULL")
        self._start = start + GREETING_BYTES
        self._greeted = True
        return True

    def _command(self, body: bytes) -> None:
        length = body[0] if body else 0
        name, data = body[1 : 1 + length], body[1 + length :]
        if not self.ready:
            if name == b"ERROR":
                raise ProtocolError(f"it says {data[1:101].decode('ascii', 'replace')!r}")
            if name != b"READY":
                raise ProtocolError("its handshake is not one of the mechanism NULL")
            self._check_partner(data)
            self.ready = True
        elif name == b"PING":
            # Sent by libzmq between any two frames, where heartbeats are asked for.
            context = data[_PING_TTL_BYTES : _PING_TTL_BYTES + _PING_CONTEXT_MAX]
            self.replies += bytes((_COMMAND, 5 + len(context))) + b"\x04PONG" + context
            if len(self.replies) > COMMAND_MAX:
                raise ProtocolError("more heartbeats than can be answered")

    def _check_partner(self, data: bytes) -> None:
        properties: dict[bytes, bytes] = {}
        at = 0
        while at < len(data):
            name_end = at + 1 + data[at]
            value_at = name_end + _PROPERTY.size
            if value_at > len(data):
                raise ProtocolError("its handshake ends amid a property")
            value_end = value_at + _PROPERTY.unpack_from(data, name_end)[0]
            if value_end > len(data):
                raise ProtocolError("its handshake ends amid a property")
            properties[data[at + 1 : name_end].lower()] = data[value_at:value_end]
            at = value_end
        if properties.get(b"socket-type") != self._partner:
            raise ProtocolError(f"it is not a {self._partner.decode()}")
