"""`adopt`: a store that stands elsewhere than it did is the one it was, or one of its own now."""

from __future__ import annotations

import os

from replfs.core.ops import OBJECT_ID_SIZE
from replfs.store.state import SUSPECTS, UNSTABLE, State


def adopt(state: State, *, new: bool, tentative: bool) -> str:
    """Accept the store of a stopped node where it is; what to tell the person.

    *new*: it is a copy. What it holds is kept, and recognised by digests when it becomes a replica.
    *tentative*: nothing is changed.

    Raises:
        OSError: that cannot be saved.
    """
    if not new:
        if state.is_in_place():
            return "it stands where it did: there is nothing to adopt"
        if not tentative:
            state.update(binding=state.place())
            state.flush(durable=True)
        return _said("the store it was, in its new place", tentative=tentative)
    names = ", ".join(peer.name for peer in state.peers())
    if not tentative:
        for peer in state.peers():
            state.remove_peer(peer.name)
        # Nor has it anything that others lack: they are none of its own any more.
        for name in (SUSPECTS, UNSTABLE):
            state.forget_peer(name)
        state.update(
            node=os.urandom(OBJECT_ID_SIZE), binding=state.place(), volume=b"", generation=b"",
            history=(), discarded=(), role="unset", role_changed=False, uninitialized=True,
            inconsistent=False, base=b"", base_progress=0, progress=0, follows=b"", leader=b"",
            led_by=b"", clean=True,
        )  # fmt: skip
        state.flush(durable=True)
    without = f", without its peers ({names})" if names else ""
    return _said(f"a store of its own now{without}", tentative=tentative)


def _said(what: str, *, tentative: bool) -> str:
    return f"it would be {what}" if tentative else f"it is {what}"
