"""Where a node's log lines go and what they look like: standard error, as text, JSON or journal."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Final

_PRIORITY: Final = {
    logging.DEBUG: 7,
    logging.INFO: 6,
    logging.WARNING: 4,
    logging.ERROR: 3,
    logging.CRITICAL: 2,
}


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


def configure(level: str, form: str) -> None:
    """Send everything from *level* up to standard error, as `text`, `json` or `journal`."""
    formatters: dict[str, logging.Formatter] = {
        "text": _Text(),
        "json": _Json(),
        "journal": _Journal("%(name)s: %(message)s"),
    }
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatters[form])
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
