"""Asking another node who it is: a greeting that is answered and goes no further."""

from __future__ import annotations

from typing import Final, Protocol

import zmq

from replfs.core.messages import Hello, Welcome
from replfs.errors import PeerLost, Refused
from replfs.node.asking.identity import PROBE, YIELDING, hello_of, make_tellable
from replfs.node.settings.config import Settings
from replfs.store.state import State
from replfs.transport.link import Link
from replfs.transport.security import Curve

_PROBE_S: Final = 2.0
"""How long an answer may take at most."""


class Prober(Protocol):
    """What a probe needs of a node."""

    settings: Settings
    state: State
    context: zmq.Context[zmq.Socket[bytes]]
    curve: Curve | None


class _Stranger:
    """The owner of a link that greets, and never has a session."""

    def __init__(self, hello: Hello) -> None:
        self._hello = hello

    def hello(self) -> Hello:
        """The one greeting."""
        return self._hello

    def welcomed(self, link: Link, welcome: Welcome) -> None:
        """Never called."""

    def went_down(self, link: Link, reason: str) -> None:
        """Never called."""


async def yield_to(node: Prober, name: str, endpoint: str) -> None:
    """Tell another primary that what this store changed apart from it is given up.

    Raises:
        Refused: always, where it was heard; with the code `outdated` if it was taken.
        PeerLost: it was not.
    """
    make_tellable(node.state)
    await _greet(node, name, endpoint, hello_of(node.state, YIELDING))


async def probe(node: Prober, name: str, endpoint: str) -> Welcome | None:
    """What the node at *endpoint* says of itself; None where nobody answers in time."""
    try:
        return await _greet(node, name, endpoint, hello_of(node.state, PROBE))
    except (PeerLost, Refused):
        return None


async def _greet(node: Prober, name: str, endpoint: str, hello: Hello) -> Welcome:
    link = Link(
        node.context,
        endpoint,
        _Stranger(hello),
        peer_timeout_s=min(_PROBE_S, node.settings.peer_timeout_s),
        security=node.curve,
        name=name,
    )
    return await link.ask(hello)
