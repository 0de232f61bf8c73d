"""What every target has: a directory to work in, and daemons behind it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from benchmarks import images
from benchmarks.processes import Namespace, cpu_s, resident_mib


@dataclass(frozen=True)
class Running:
    """A target that has been set up."""

    mount: Path
    """Where applications work."""
    stores: Path
    """The fresh filesystem beneath."""
    namespace: Namespace | None = None
    """Where its daemons are, if it has any."""

    def settle(self) -> None:
        """Write back what is dirty, so that it is not in the way of what comes next."""
        images.write_back(self.mount, self.stores)

    def forget(self) -> None:
        """Make reads cold: nothing of this target stays in the kernel's caches."""
        self.settle()
        images.drop_caches()

    def kill(self) -> None:
        """End its daemons at once: what hangs on it gets an error."""
        if self.namespace:
            self.namespace.kill()

    def cpu_s(self) -> float:
        """Processor time that all its daemons have used, in seconds."""
        return cpu_s(self.namespace.pids()) if self.namespace else 0.0

    def resident_mib(self) -> list[float]:
        """Resident memory of each daemon, in MiB."""
        return resident_mib(self.namespace.pids()) if self.namespace else []


class Target(Protocol):
    """A filesystem that can be measured."""

    @property
    def title(self) -> str:
        """What it is called in tables."""

    @property
    def packages(self) -> tuple[str, ...]:
        """Of the distribution; the first gives the version."""

    def start(self, base: Path) -> AbstractContextManager[Running]:
        """Set it up below the empty directory *base*, and take it away at the end."""
