"""Who speaks ZeroMQ's protocol: this process itself (`direct`), or libzmq.

Both can talk to each other. Direct is faster, and is taken wherever it is able to: over tcp and
ipc without CURVE. Encryption, and endpoints with a meaning of their own to libzmq (the name of an
interface, say), are libzmq's.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Callable
from functools import partial
from typing import Final

import zmq

from replfs.errors import UsageError
from replfs.transport import endpoint as endpoints
from replfs.transport.direct import DirectConnection, DirectListening
from replfs.transport.libzmq import ZmqConnection, ZmqListening
from replfs.transport.security import Curve
from replfs.transport.socket import Connection, Listening, Malformed, Received

WIRE_VARIABLE: Final = "REPLFS_WIRE"
"""Environment variable: auto or libzmq."""


class Wire(enum.StrEnum):
    """Who speaks."""

    AUTO = "auto"
    """This process where it is able to, else libzmq."""
    LIBZMQ = "libzmq"


def wire_of_environment() -> Wire:
    """What the environment asks for. Raises `UsageError`."""
    try:
        return Wire(os.environ.get(WIRE_VARIABLE) or Wire.AUTO)
    except ValueError as error:
        raise UsageError(f"{WIRE_VARIABLE} must be auto or libzmq") from error


def connect(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    received: Received,
    malformed: Malformed,
    *,
    wire: Wire,
    curve: Curve | None,
    peer: str,
    frame_max: int,
) -> Connection:
    """Begin to connect to *peer* at *endpoint*.

    Raises:
        UsageError: *endpoint* cannot be understood, or there is no key for *peer*.
    """
    address = endpoints.parse(endpoint, listening=False)
    if wire is not Wire.LIBZMQ and curve is None and address is not None:
        return DirectConnection(address, received, malformed, frame_max=frame_max)
    secure = None if curve is None else partial(curve.prepare_dialling, peer=peer)
    return ZmqConnection(context, endpoint, received, malformed, secure=secure, frame_max=frame_max)


def listen(
    context: zmq.Context[zmq.Socket[bytes]],
    endpoint: str,
    received: Received,
    malformed: Malformed,
    *,
    wire: Wire,
    curve: Curve | None,
    frame_max: int,
    heartbeat_s: float,
    silence_s: float,
    is_needed: Callable[[bytes], bool],
) -> Listening:
    """Listen on *endpoint*.

    Args:
        context: the process's ZeroMQ context.
        endpoint: where.
        received: called for each message.
        malformed: called instead for a message with too many frames.
        wire: who is to speak.
        curve: keys and allow-list, or None for plain text.
        frame_max: bytes of a frame that is accepted.
        heartbeat_s: how often a silent connection is asked for a sign.
        silence_s: how long it may be dead before it is closed.
        is_needed: whether the connection of this identity must not be closed to make room.

    Raises:
        UsageError: it cannot listen there.
    """
    address = endpoints.parse(endpoint, listening=True)
    if wire is not Wire.LIBZMQ and curve is None and address is not None:
        return DirectListening(
            address,
            received,
            malformed,
            frame_max=frame_max,
            silence_s=silence_s,
            is_needed=is_needed,
        )
    return ZmqListening(
        context,
        endpoint,
        received,
        malformed,
        curve=curve,
        frame_max=frame_max,
        heartbeat_s=heartbeat_s,
        silence_s=silence_s,
    )
