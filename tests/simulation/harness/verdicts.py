"""What must hold of a run, held against its nodes, its stores and what applications were told."""

from __future__ import annotations

from typing import TYPE_CHECKING

from simulation.harness import check
from simulation.harness.nodes import Member

from replfs.core.footprint import CLASSES
from replfs.core.relationship import State
from replfs.store.reach import KEEP_PIN

if TYPE_CHECKING:
    from simulation.harness.world import Simulation


class Verdicts:
    """The checks of one run; each raises Failure."""

    def __init__(self, sim: Simulation) -> None:
        self.sim = sim

    def covered(self, what: str, *, slots: check.Slots | None = None) -> None:
        """Whatever differs on a replica is recorded."""
        ours = check.Snapshot(self.sim.primary.raw, primary=True)
        for replica in self.sim.replicas:
            self.log(replica, ours, what, slots or set())
        self.sim.note(f"checked: {what}")

    def log(self, replica: Member, ours: check.Snapshot, what: str, slots: check.Slots) -> None:
        peer = self.sim.primary.peer(replica.name)
        if peer.state is State.UNINITIALIZED or replica.is_other:
            return
        if self.sim.may_split:
            return  # another primary may have had it meanwhile
        primary = self.sim.primary.primary
        if primary is not None and not primary.rescan.is_over.is_set():
            return  # until then something may differ that only the disk knows of
        if not peer.is_asked or not peer.peer_node:
            return  # since the primary was promoted it has not met that node, or not asked it yet
        theirs = ours.of_replica(replica.raw, was_primary=replica.was_primary)
        found = check.not_covered(ours, theirs, peer.log, slots)
        self.sim.verdict(f"{what}: {peer.name} lacks something that is not recorded", found)

    def equal(self, what: str) -> None:
        """Replicas are what they should be."""
        everything = check.Snapshot(self.sim.primary.raw, primary=False)
        self.sim.verdict(f"{what}: acknowledged and missing", self.sim.ledger.missing(everything))
        ours = check.Snapshot(self.sim.primary.raw, primary=True)
        for replica in self.sim.replicas:
            theirs = ours.of_replica(replica.raw, was_primary=replica.was_primary)
            self.sim.verdict(f"{what}: {replica.name} differs", check.differences(ours, theirs))
            found = check.compared(self.sim.primary.raw, replica.raw, ours, theirs)
            self.sim.verdict(f"{what}: {replica.name} differs", found)
        self.sim.note(f"checked equal: {what}")

    async def forgotten(self) -> None:
        """Nothing is held for nobody."""
        node, pipeline, kernel = (
            self.sim.primary,
            self.sim.primary.pipeline,
            self.sim.primary.kernel,
        )
        assert kernel is not None
        await kernel.drop_everything()
        self.sim.verdict("the kernel holds inodes", kernel.held())
        held = list(pipeline.scheduler._lines)
        self.sim.verdict("claims are left", [repr(key) for key in held])
        self.sim.verdict("slots are in use", [repr(key) for key in node.in_flight()])
        kinds = {word for reason in pipeline.scheduler.held for word in reason.split(" behind ")}
        self.sim.verdict("kinds without a class", sorted(kinds - CLASSES.keys() - {"resync"}))
        # What works in the background holds what it looks at, and lets it go.
        await self.sim.until("nothing is held", lambda: not node.tree._held)
        # Whoever looked at the tree is known to be gone after a while.
        await self.sim.until("no inode is held", lambda: not _held(node))
        table = node.tree.table
        self.sim.verdict("handles are open", [repr(number) for number in table.handles])

    def acknowledged(self) -> None:
        """The dead primary and all that were in sync with it have what applications were told."""
        for name, _ in sorted(self.sim.primary.in_sync_at_death):
            member = self.sim.named(name)
            is_bound = self.sim.confirms and not member.is_other and not self.sim.may_split
            if member is not self.sim.primary and not is_bound:
                continue
            store = check.Snapshot(member.raw, primary=False)
            self.sim.verdict(f"{name} lacks what was acknowledged", self.sim.ledger.missing(store))
        self.sim.note(f"checked: {self.sim.ledger.noted} acknowledged changes")


def _held(node: Member) -> list[str]:
    table = node.tree.table
    return [
        f"{inode.path()!r} lookups {inode.lookups} open {inode.is_open} pins {inode.pins}"
        for inode in table.by_nodeid.values()
        if inode is not table.root and (inode.lookups or inode.is_open or inode.pins & ~KEEP_PIN)
    ]
