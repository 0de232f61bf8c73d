"""What replfs is to reach, and whether it does: computed from the medians of one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from benchmarks.results import Results
from benchmarks.rows import REPEATED, ROWS

_METADATA: Final = ("create", "rename", "chmod", "unlink")
_TREES: Final = ("cp", "rsync", "tar", "rm", "git_clone", "git_checkout")
_SMALL_FILES: Final = ("create", "cp", "rsync", "tar", "rm", "git_clone", "git_checkout")
_BLOCKS: Final = ("write_4k", "write_4k_x4", "append_1k")
_STREAMS: Final = ("write_1m", "write_128k")
_FSYNC: Final = ("write_4k_fsync", "mail", "sqlite_rollback", "sqlite_wal")
_READS: Final = (
    "open_known", "stat_known", "list", "stat_cold", "read_cold", "read_seq_cold",
    "git_status_cold",
)  # fmt: skip
# What MooseFS acknowledges after both copies have it: what ends with a close. Its metadata has one
# copy, its writes are acknowledged from the client's memory, and its fsync reaches no disk.
_MOOSEFS_AFTER_BOTH: Final = ("create", "cp", "rsync", "tar", "git_clone", "git_checkout")


@dataclass(frozen=True)
class Verdict:
    """How far a goal is reached."""

    goal: str
    asked: str
    found: str
    met: bool


class Goal(Protocol):
    """Something to be reached."""

    def judge(self, results: Results) -> Verdict | None:
        """None if it cannot be said, because something was not measured."""


@dataclass(frozen=True)
class Beats:
    """*target* is at least *factor* times as good as *base* in *row*."""

    row: str
    factor: float
    base: str
    target: str = "replfs"

    def judge(self, results: Results) -> Verdict | None:
        """Ratio of medians."""
        gain = results.gain(self.row, self.target, self.base)
        if gain is None:
            return None
        title = results.titles.get(self.target, self.target)
        base = results.titles.get(self.base, self.base)
        return Verdict(
            f"{ROWS[self.row].title}: {title} to {base}",
            f"at least {self.factor:g}x",
            f"{gain:.2f}x",
            gain >= self.factor,
        )


@dataclass(frozen=True)
class Bound:
    """*row* of replfs is at most (or, where more is better, at least) *limit*."""

    row: str
    limit: float

    def judge(self, results: Results) -> Verdict | None:
        """The median against the limit."""
        value = results.median(self.row, "replfs")
        if value is None:
            return None
        row = ROWS[self.row]
        return Verdict(
            row.title,
            f"at {'least' if row.more_is_better else 'most'} {self.limit:,g} {row.unit}",
            f"{value:,.4g} {row.unit}",
            row.gain(value, self.limit) >= 1,
        )


@dataclass(frozen=True)
class Within:
    """*row* of replfs is at most *factor* times its *calm*."""

    row: str
    calm: str
    factor: float

    def judge(self, results: Results) -> Verdict | None:
        """Ratio of medians."""
        value, calm = results.median(self.row, "replfs"), results.median(self.calm, "replfs")
        if value is None or not calm:
            return None
        found = value / calm
        title = f"{ROWS[self.row].title}, to: {ROWS[self.calm].title}"
        return Verdict(title, f"at most {self.factor:g}x", f"{found:.1f}x", found <= self.factor)


@dataclass(frozen=True)
class Memory:
    """A process with so many known inodes stays within a base and an amount for each."""

    base_mib: float = 80
    each_bytes: int = 300

    def judge(self, results: Results) -> Verdict | None:
        """For the large tree."""
        value = results.median("memory_known", "replfs")
        if value is None:
            return None
        sizes = results.about["sizes"]
        files = sizes["large_tree_files"] + sizes["large_directory_files"]
        limit = self.base_mib + files * self.each_bytes / (1 << 20)
        asked = f"at most {limit:.0f} MiB with {files:,} files"
        return Verdict(ROWS["memory_known"].title, asked, f"{value:.0f} MiB", value <= limit)


SECTIONS: Final[dict[str, list[Goal]]] = {
    "GlusterFS that acknowledges as replfs does (write-behind off)": [
        *(Beats(row, 8, "gluster-sync") for row in (*_METADATA, *_TREES)),
        *(Beats(row, 4, "gluster-sync") for row in (*_BLOCKS, *_STREAMS)),
        *(Beats(row, 3, "gluster-sync") for row in _FSYNC),
    ],
    "GlusterFS as it comes": [
        *(Beats(row, 2, "gluster") for row in (*_METADATA, *_TREES, *_STREAMS, *_FSYNC)),
        *(Beats(row, 1, "gluster") for row in _BLOCKS),
    ],
    "MooseFS, where it acknowledges after both copies": [
        Beats(row, 2, "moosefs") for row in _MOOSEFS_AFTER_BOTH
    ],
    "FUSE in C that replicates nothing": [
        *(Beats(row, 0.9, "passthrough") for row in _READS),
        *(Beats(row, 0.4, "passthrough") for row in (*_METADATA, *_TREES)),
        Beats("write_4k", 0.4, "passthrough"),
        Beats("write_4k_x4", 0.5, "passthrough"),
        Beats("write_1m", 0.7, "passthrough"),
        Beats("read_small", 2, "passthrough"),
        Beats("read_again", 0.5, "ext4"),
    ],
    "Acknowledged at close": [
        Beats(row, 0.7, "passthrough", "replfs-close") for row in _SMALL_FILES
    ],
    "Processor and memory": [Bound("create_cpu", 0.7), Bound("write_cpu", 3), Memory()],
    "Cost that does not grow": [
        Bound(f"{operation}_large_{where}", 1.3)
        for where in ("tree", "directory")
        for operation in REPEATED
    ],
    "First copy and comparison": [
        Beats("first_copy_small", 1, "ext4"),
        Beats("first_copy_large", 1, "ext4"),
        Bound("compare_all", 20_000),
    ],
    "Latency under load": [
        Within("write_4k_p99_stream", "write_4k_p99", 10),
        Within("write_4k_p99_resync", "write_4k_p99_in_sync", 3),
    ],
}
"""100,000 unchanged files compared in 5 s are 20,000 a second; a ratio to ext4 is one to rsync."""


def judge(results: Results) -> dict[str, list[Verdict]]:
    """By section; without what was not measured."""
    found = {
        section: [verdict for goal in goals if (verdict := goal.judge(results)) is not None]
        for section, goals in SECTIONS.items()
    }
    return {section: verdicts for section, verdicts in found.items() if verdicts}
