"""The documents as web pages: they can be built, and every page can be found."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).parents[2]


def test_the_site_is_built_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert (site / "tutorial.html").is_file()
    assert dead_links(site) == []


def dead_links(site: Path) -> list[str]:
    """Links between pages, and from them to pictures and source files, that lead nowhere."""
    found = []
    for page in site.rglob("*.html"):
        if page.name == "404.html":
            continue
        for link in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            parts = urlsplit(html.unescape(link))
            target = (page.parent / unquote(parts.path)).resolve()
            if not parts.scheme and not parts.netloc and parts.path and not target.exists():
                found.append(f"{page.relative_to(site)}: {link}")
    return found
