"""Where a node's log lines go and what they look like: standard error, as text, JSON or journal.

The log of a node in the background is a file, and two of `LOG_SIZE_MAX` at most: the one that is
full is moved to `.old`, while the node runs and when it starts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from typing import Final, TextIO

_PRIORITY: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}

LOG_SIZE_MAX: Final = 8 << 20
"""Bytes of a log in the run directory; a line more and it is moved to `.old`."""


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
        self.converter = time.gmtime
        self.default_time_format = "%Y-%m-%dT%H:%M:%S"
        self.default_msec_format = "%s.%03dZ"

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802
        record.name = record.name.removeprefix("replfs.")
        return super().formatMessage(record)


class _Json(_Text):
    def format(self, record: logging.LogRecord) -> str:
        fields = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = self.formatException(record.exc_info)
        return json.dumps(fields)


class _Journal(logging.Formatter):
    """Lines that journald files under their priority (sd-daemon(3)); it adds the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"<{_PRIORITY.get(record.levelno, 6)}>"
        text = super().format(record)
        return "\n".join(prefix + line for line in text.splitlines())


class _Bounded(logging.StreamHandler[TextIO]):
    """To standard error, which is a file of our own."""

    def __init__(self, path: str) -> None:
        super().__init__(sys.stderr)
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        # Where it stands, for others write there too: a hook, Python when it dies.
        with contextlib.suppress(OSError):
            if os.fstat(2).st_size > LOG_SIZE_MAX:
                self._begin_anew()
        super().emit(record)

    def _begin_anew(self) -> None:
        """Everything goes to a new file from here on; without room for one, to the old one."""
        is_ours = os.path.samestat(os.fstat(2), os.stat(self._path))
        if not is_ours:
            return  # somebody else has moved it away
        os.replace(self._path, f"{self._path}.old")
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self.flush()
            for output in (1, 2):
                os.dup2(fd, output)
        finally:
            os.close(fd)


def rotate(path: str) -> None:
    """Move a log that is full away, before a node starts with it."""
    with contextlib.suppress(OSError):
        if os.stat(path).st_size > LOG_SIZE_MAX:
            os.replace(path, f"{path}.old")


def configure(level: str, form: str, path: str | None = None) -> None:
    """Send everything from *level* up to standard error, as `text`, `json` or `journal`.

    *path* is that of the log in the run directory, where standard error goes there.
    """
    formatters: dict[str, logging.Formatter] = {
        "text": _Text(),
        "json": _Json(),
        "journal": _Journal("%(name)s: %(message)s"),
    }
    handler = logging.StreamHandler(sys.stderr) if path is None else _Bounded(path)
    handler.setFormatter(formatters[form])
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
