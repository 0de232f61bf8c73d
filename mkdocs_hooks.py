"""What the web pages need beyond mkdocs: source files that pages link to, as pages can show them.

On the file system, and where the repository is browsed, such a link leads to the file itself. Of
the web pages it would lead out.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent
_LINK: Final = re.compile(r'href="((?:\.\./)+)((?:replfs|tests|benchmarks)/[^"#]+)')
_linked: set[str] = set()


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Lead links to source files to copies of them, among the pages."""

    def led(found: re.Match[str]) -> str:
        file = found[2]
        if not (ROOT / file).is_file():
            return found[0]
        _linked.add(file)
        above = os.path.relpath("source", os.path.dirname(page.url) or ".")
        return f'href="{above}/{file}.txt'

    return _LINK.sub(led, html)


def on_post_build(config: Any, **_: Any) -> None:
    """Put the copies there. As text: a browser shows that, and need not know the language."""
    for file in sorted(_linked):
        copy = Path(config["site_dir"]) / "source" / f"{file}.txt"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, copy)
