"""Every error replfs raises on purpose, as one tree.

    ReplfsError
    ├── UsageError              what the person typed cannot be done; exit code 2
    │   └── ConfigError         a configuration key or value
    ├── StoreError              STORE cannot be used, or its state files cannot be believed
    │   └── StoreBusy           another daemon has it
    ├── LinkError
    │   ├── PeerLost            the link went down, or the peer did not answer in time; EIO
    │   └── ProtocolError       the other side sent something it must not; closes the session
    ├── Refused                 the handshake said no (another volume, the same store, split brain)
    └── NotInSync               a strict change cannot be confirmed; EIO

Every class carries `errno`, what an application sees, and `exit_code`, what a script sees.
System call failures stay `OSError`: their errno is already right. One in the middle of a change
that takes several calls is `HalfDone`, an `OSError`, where what the earlier calls did remains;
one of the state, which then does not say what it was told, is `NotRecorded`.
"""

from __future__ import annotations

import errno as _errno


class ReplfsError(Exception):
    """Base of all; never raised itself."""

    errno = _errno.EIO
    exit_code = 1


class UsageError(ReplfsError):
    """What was typed cannot be done: one sentence, what is wrong and what to do."""

    errno = _errno.EINVAL
    exit_code = 2


class ConfigError(UsageError):
    """A configuration key is unknown, or its value is out of range."""


class StoreError(ReplfsError):
    """STORE cannot be used, or its state files cannot be believed."""

    exit_code = 3


class StoreBusy(StoreError):
    """Another replfs process has this STORE."""


class LinkError(ReplfsError):
    """Something between two nodes."""

    exit_code = 4


class PeerLost(LinkError):
    """The link went down or the peer did not answer within `peer-timeout`."""


class ProtocolError(LinkError):
    """The other side sent something it must not. It closes the session and changes nothing."""


class Refused(ReplfsError):
    """The handshake decided that these two stores may not be connected."""

    exit_code = 5


class NotInSync(ReplfsError):
    """A `strict` change cannot be confirmed by the peers it needs; the caller sees EIO."""

    exit_code = 6


class HalfDone(OSError):
    """A change failed here after a part of it was made; errno of the call that failed."""


class NotRecorded(OSError):
    """The state could not be written; what was to be recorded may have happened all the same."""
