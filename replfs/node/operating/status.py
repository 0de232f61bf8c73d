"""What `replfs status` shows, from counters alone: it may be called while the event loop hangs."""

from __future__ import annotations

import os
import time
from typing import Any, Final, Protocol

import replfs
from replfs.core.relationship import State, word
from replfs.node.mounted.frontend import FrontEnd
from replfs.node.replication.peer import Peer
from replfs.node.resync.machine import Resync
from replfs.node.roles.primary import Primary
from replfs.node.roles.roles import Roles
from replfs.node.roles.secondary import Secondary
from replfs.node.settings.config import Settings
from replfs.store.state import State as StoreState
from replfs.store.tree import Tree

_KEPT_SHOWN: Final = 100
_PAGE_SIZE: Final = os.sysconf("SC_PAGE_SIZE")


class Shown(Protocol):
    """The node, as far as its status needs it."""

    settings: Settings
    state: StoreState
    listening: str
    metrics: str
    tree: Tree

    @property
    def roles(self) -> Roles:
        """The node's roles."""

    @property
    def primary(self) -> Primary | None:
        """While it is one."""

    @property
    def secondary(self) -> Secondary | None:
        """While it is one."""

    @property
    def front(self) -> FrontEnd | None:
        """While it is mounted."""


class StatusBoard:
    """Makes the status dictionary; its form is documented in docs/operations/cli.md."""

    def __init__(self, node: Shown) -> None:
        self._node = node
        self._began = time.monotonic()

    def snapshot(self) -> dict[str, Any]:
        """The status as it is now."""
        node = self._node
        identity = node.state.identity()
        found: dict[str, Any] = {
            "version": replfs.__version__,
            "pid": os.getpid(),
            "store": node.settings.store,
            "mountpoint": node.front.mountpoint if node.front is not None else None,
            "role": identity.role,
            "name": node.settings.name,
            "volume": identity.volume.hex(),
            "generation": identity.generation.hex(),
            "uptime_s": time.monotonic() - self._began,
            "listen": node.listening or None,
            "metrics": node.metrics or None,
            "policy_default": node.settings.policy,
            "disk_error": os.strerror(number) if (number := node.roles.unwritten.number) else None,
            "process": {
                "objects": len(node.tree.table.by_nodeid),
                "memory_bytes": _resident_bytes(),
                "descriptors": len(os.listdir("/proc/self/fd")) - 1,
                "cpu_s": sum(os.times()[:2]),
            },
        }
        if node.primary is not None:
            found |= self._primary(node.primary)
        elif node.secondary is not None:
            found |= self._secondary(node.secondary)
        return found

    def _primary(self, primary: Primary) -> dict[str, Any]:
        pipeline = primary.pipeline
        return {
            "state": primary.state_word(),
            "checkpoints": primary.checkpoints.count,
            "in_flight": pipeline.scheduler.in_flight,
            "suspended": pipeline.suspended,
            "held": dict(pipeline.scheduler.held),
            "operations": {
                kind: {
                    "count": found.count,
                    "held": sum(
                        number
                        for reason, number in pipeline.scheduler.held.items()
                        if reason.startswith(f"{kind} ")
                    ),
                    "p50_us": found.quantile_us(0.5),
                    "p99_us": found.quantile_us(0.99),
                    "seconds": found.total_ns / 1e9,
                    "histogram_us": found.below_us(),
                }
                for kind, found in list(pipeline.latencies.items())
            },
            "unrepresentable": sum(len(peer.unrepresentable) for peer in pipeline.peers),
            "peers": [
                self._peer(peer, resync)
                for peer in pipeline.peers
                if (resync := primary.resyncs.get(peer.name)) is not None
            ],
            "snapshots": primary.snapshots.provider,
            "verify": primary.verifier.status(),
            "rescan": primary.rescan.status(),
        }

    def _peer(self, peer: Peer, resync: Resync) -> dict[str, Any]:
        link = peer.link.statistics()
        found: dict[str, Any] = {
            "name": peer.name,
            "endpoint": peer.endpoint,
            "link": {"up": "up", "resuming": "connecting", "connecting": "connecting"}.get(
                link.state, "down"
            )
            if link.sessions or link.state != "connecting"
            else "connecting",
            "state": word(peer.state),
            "data": "up-to-date" if peer.state is State.IN_SYNC else peer.data_word(),
            "reason": peer.reason or (link.last_error if not peer.live else ""),
            "since_s": time.time() - peer.since,
            "last_in_sync": peer.last_in_sync,
            "dirty_objects": len(peer.log),
            "dirty_files": peer.log.dirty_files,
            "dirty_bytes": peer.log.dirty_bytes,
            "dirty_names": peer.log.dirty_names,
            "unstable_objects": peer.unstable.objects,
            "lag_ops": link.outstanding,
            "lag_bytes": link.outstanding_bytes,
            "rtt_us": link.rtt_ns // 1000,
            "release": peer.release or None,
            "clock_difference_s": peer.clock_difference_s,
            "sent_ops": link.sent_ops,
            "sent_bytes": link.sent_bytes,
        }
        if peer.live and peer.state is not State.IN_SYNC:
            progress = resync.work.progress
            elapsed = max(time.monotonic() - progress.began, 1e-3)
            rate = progress.bytes / elapsed
            found["progress"] = {
                "phase": word(peer.state),
                "files": progress.files,
                "bytes": progress.bytes,
                "rate": rate,
                "eta_s": peer.log.dirty_bytes / rate if rate else None,
            }
        stuck = list(resync.work.stuck.values())[:20]
        if stuck:
            found["stuck"] = [
                {
                    "path": one.path,
                    "reason": one.reason,
                    "next_try_s": max(0.0, one.retry_at - time.monotonic()),
                }
                for one in stuck
            ]
        error = peer.last_error
        if error is not None:
            found["last_error"] = {"path": error.path, "reason": error.reason, "when": error.when}
        return found

    def _secondary(self, secondary: Secondary) -> dict[str, Any]:
        identity = self._node.state.identity()
        following = secondary.session is not None
        if identity.uninitialized:
            state = "uninitialized"
        elif identity.inconsistent:
            state = "inconsistent"
        else:
            state = "in-sync" if following else "out-of-sync"
        return {
            "state": state,
            "in_flight": 0,
            "primary": secondary.primary_name or None,
            "link": "up" if following else "down",
            "applied": secondary.replica.applied,
            "unstable_objects": secondary.replica.unstable.objects,
            "kept": list(secondary.kept)[-_KEPT_SHOWN:],
            "frozen_until": secondary.freezer.until,
            "snapshots": secondary.keeper.provider,
            "state_before_resync": secondary.keeper.place,
            "peers": [],
        }


def _resident_bytes() -> int:
    with open("/proc/self/statm", encoding="ascii") as fields:
        return int(fields.read().split()[1]) * _PAGE_SIZE
