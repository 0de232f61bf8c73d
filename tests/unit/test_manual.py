"""The manual pages: whole, and such that man(1) has nothing to say about them."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest

from replfs.cli import main, manual
from replfs.cli.exit_codes import ExitCode
from replfs.node.settings.options import OPTIONS


def shown(name: str) -> str:
    """A page as plain text."""
    done = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-P-c", "-P-b", "-P-u"], input=manual.render(name),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


needs_groff = pytest.mark.skipif(shutil.which("groff") is None, reason="no groff")


@needs_groff
def test_replfs_1():
    text = shown("replfs")
    for name in main.MODULES:
        assert re.search(rf"^ +{re.escape(name)}\b", text, re.MULTILINE), name
    assert "--tentative" in text
    assert "the data, TARGET a mountpoint or a STORE" in " ".join(text.split())
    for code in ExitCode:
        assert re.search(rf"^ +{code.value} +\w", text, re.MULTILINE), code


@needs_groff
def test_replfs_toml_5():
    text = shown("replfs.toml")
    for option in OPTIONS:
        if option.everywhere:
            assert re.search(rf"^ +{re.escape(option.name)} = ", text, re.MULTILINE), option


@needs_groff
def test_mount_replfs_8():
    text = shown("mount.replfs")
    assert "/srv/data  /data  replfs  config=/etc/replfs/replfs.toml,_netdev,nofail  0  0" in text


def test_text_means_itself():
    assert manual._text(".a\\b-c") == "\\&.a\\eb\\-c"


def test_they_are_printed_and_installed(capsys, tmp_path):
    assert main.main(["man", "mount.replfs"]) == 0
    assert capsys.readouterr().out == manual.render("mount.replfs")
    assert main.main(["man", "--install", str(tmp_path)]) == 0
    paths = ["man1/replfs.1", "man5/replfs.toml.5", "man8/mount.replfs.8"]
    assert sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.[0-9]")) == paths
    assert main.main(["man", "--install", "/proc/nowhere"]) == ExitCode.USAGE
