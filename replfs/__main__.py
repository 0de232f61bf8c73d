"""`python -m replfs` is the `replfs` command."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    try:
        from replfs.cli.main import entry

        entry()
    except KeyboardInterrupt:
        sys.exit(130)
