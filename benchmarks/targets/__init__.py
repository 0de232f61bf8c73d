"""What can be measured. One line each: to measure replfs with another option, add a line."""

from __future__ import annotations

from typing import Final

from benchmarks.targets.base import Running, Target
from benchmarks.targets.gluster import Gluster
from benchmarks.targets.local import Ext4, Passthrough
from benchmarks.targets.moosefs import MooseFS
from benchmarks.targets.replfs import Nodes, Replfs, nodes

_ACKNOWLEDGES_LATE: Final = (
    ("performance.write-behind", "off"),
    ("performance.flush-behind", "off"),
)

TARGETS: Final[dict[str, Target]] = {
    "ext4": Ext4(),
    "passthrough": Passthrough(),
    "gluster-sync": Gluster("GlusterFS, write-behind off", _ACKNOWLEDGES_LATE),
    "gluster": Gluster("GlusterFS, default"),
    "moosefs": MooseFS(),
    "replfs": Replfs("replfs"),
    "replfs-close": Replfs("replfs, ack=close", ("--ack", "close")),
    "replfs-writeback": Replfs("replfs, writeback", ("--writeback",)),
    "replfs-alone": Replfs("replfs, no peer", peers=0),
    "replfs-two": Replfs("replfs, two peers", peers=2),
}

USUAL: Final = tuple(name for name in TARGETS if name not in ("replfs-alone", "replfs-two"))
"""Measured unless other targets are asked for."""

__all__ = [
    "TARGETS",
    "USUAL",
    "Ext4",
    "Nodes",
    "Passthrough",
    "Replfs",
    "Running",
    "Target",
    "nodes",
]
