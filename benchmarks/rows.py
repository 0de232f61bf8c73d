"""The rows of the table: what is measured, in which unit, and whether more of it is better."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Row:
    """A quantity that is measured on a target."""

    title: str
    unit: str
    more_is_better: bool = True

    def gain(self, value: float, base: float) -> float:
        """How many times better *value* is than *base*."""
        if self.more_is_better:
            return value / base
        return base / value if value else float("inf")


REPEATED: Final = ("create", "rename", "chmod", "unlink")
"""Operations whose cost must not grow with the tree."""

ROWS: Final[dict[str, Row]] = {
    "create": Row("create + write 1 KiB + close", "files/s"),
    "create_cpu": Row("daemon CPU per created file", "ms", more_is_better=False),
    "rename": Row("rename", "ops/s"),
    "chmod": Row("chmod", "ops/s"),
    "unlink": Row("unlink", "ops/s"),
    "stat_new": Row("stat of files just made", "ops/s"),
    "open_known": Row("open + close of known files", "ops/s"),
    "read_small": Row("open + read + close of small cached files", "ops/s"),
    "stat_known": Row("stat of known files", "ops/s"),
    "list": Row("listing a directory", "names/s"),
    "stat_cold": Row("stat, cold", "ops/s"),
    "read_cold": Row("open + read + close of small files, cold", "ops/s"),
    "write_4k": Row("4 KiB random write, 1 writer", "ops/s"),
    "write_4k_p50": Row("the same, median latency", "us", more_is_better=False),
    "write_4k_x4": Row("4 KiB random write, 4 writers", "ops/s"),
    "write_4k_fsync": Row("4 KiB random write + fsync each", "ops/s"),
    "append_1k": Row("append 1 KiB", "ops/s"),
    "write_1m": Row("sequential write in 1 MiB", "MB/s"),
    "write_cpu": Row("daemon CPU per GiB of it", "s", more_is_better=False),
    "write_128k": Row("sequential write in 128 KiB", "MB/s"),
    "read_seq_cold": Row("sequential read, cold", "MB/s"),
    "read_again": Row("sequential read, cached", "MB/s"),
    "cp": Row("cp -a of a tree", "files/s"),
    "rsync": Row("rsync -a of a tree", "files/s"),
    "tar": Row("tar x of a tree", "files/s"),
    "rm": Row("rm -rf of a tree", "files/s"),
    "git_clone": Row("git clone", "files/s"),
    "git_checkout": Row("git checkout of another branch", "files/s"),
    "git_status_cold": Row("git status, cold", "files/s"),
    "mail": Row("mail delivery, 4 processes", "messages/s"),
    "sqlite_rollback": Row("sqlite, rollback journal", "tx/s"),
    "sqlite_wal": Row("sqlite, WAL", "tx/s"),
    "write_4k_p99": Row("4 KiB write, p99", "us", more_is_better=False),
    "write_4k_p99_stream": Row(
        "the same while another client streams 1 MiB writes", "us", more_is_better=False
    ),
    "memory": Row("largest daemon, resident", "MiB", more_is_better=False),
    "first_copy_small": Row("first copy of a tree of small files", "files/s"),
    "first_copy_large": Row("first copy of large files", "MB/s"),
    "compare_all": Row("comparison with a peer that has the same tree", "files/s"),
    "memory_known": Row(
        "largest daemon when every inode of the large tree is known", "MiB", more_is_better=False
    ),
    "write_4k_p99_in_sync": Row("4 KiB write, p99, large tree in sync", "us", more_is_better=False),
    "write_4k_p99_resync": Row("4 KiB write, p99, during a resync", "us", more_is_better=False),
    **{
        f"{operation}_large_{where}": Row(
            f"{operation} in a large {where}: cost, an empty tree's is 1", "x", more_is_better=False
        )
        for where in ("tree", "directory")
        for operation in REPEATED
    },
}
