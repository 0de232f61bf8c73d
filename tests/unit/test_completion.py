"""Completion, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from replfs.cli import completion, main
from replfs.cli.describe import shapes
from replfs.node.settings.options import OPTIONS


@pytest.fixture(scope="module")
def found():
    return shapes()


def test_the_command_line_as_data(found):
    by_name = {shape.name: shape for shape in found}
    assert set(main.MODULES) <= set(by_name)
    assert by_name["peer"].actions == ("list", "add", "remove", "replace")
    flags = {name: flag for flag in by_name["mount"].flags for name in flag.names}
    assert flags["--policy"].words == ("sync", "strict", "async", "none")
    assert flags["--key-file"].metavar == "FILE"
    assert flags["--spin"].metavar == ""
    assert "--ready-fd" not in flags
    assert {f"--{option.name}" for option in OPTIONS} <= set(flags)
    assert [one.metavar for one in by_name["policy set"].positionals] == ["POLICY", "PATH"]
    assert all(shape.help for shape in found)


def needs(shell: str):
    return pytest.mark.skipif(shutil.which(shell) is None, reason=f"no {shell}")


CASES = [
    (["replfs", "mou"], {"mount"}),
    (["replfs", "mount", "--pol"], {"--policy"}),
    (["replfs", "mount", "--policy", "st"], {"strict"}),
    (["replfs", "mount", "/a", "/b", "--strict-on-loss", ""], {"fail", "suspend"}),
    (["replfs", "peer", "re"], {"remove", "replace"}),
    (["replfs", "policy", "set", "as"], {"async"}),
    (["replfs", "wait", "--for", "i"], {"in-sync"}),
    (["replfs", "completion", "z"], {"zsh"}),
]


@needs("bash")
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_bash(found, words, expected):
    script = completion.SHELLS["bash"](found) + (
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _replfs; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "-euc", script.replace("complete -o", ": complete -o"), "bash", *words],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == expected
    assert done.stderr == ""


@needs("bash")
def test_bash_completes_paths(found, tmp_path):
    (tmp_path / "store").mkdir()
    script = completion.SHELLS["bash"](found) + (
        'COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _replfs; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    for words in (["mount", f"{tmp_path}/st"], ["keygen", f"{tmp_path}/st"]):
        done = subprocess.run(
            ["bash", "-c", script, "bash", "replfs", *words],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout == f"{tmp_path}/store\n"


@needs("fish")
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_fish(found, words, expected, tmp_path):
    (tmp_path / "replfs.fish").write_text(completion.SHELLS["fish"](found))
    line = " ".join(words)
    done = subprocess.run(
        ["fish", "--no-config", "-c", f"source {tmp_path}/replfs.fish; complete -C '{line}'"],
        capture_output=True, text=True, check=True, env={"HOME": str(tmp_path), "PATH": "/usr/bin"},
    )  # fmt: skip
    assert {row.split("\t")[0] for row in done.stdout.splitlines()} == expected
    assert done.stderr == ""


@needs("zsh")
@pytest.mark.parametrize(("words", "expected"), CASES)
def test_zsh(found, words, expected, tmp_path):
    """What it gives to zsh's own functions, which do the rest in a terminal."""
    (tmp_path / "_replfs").write_text(completion.SHELLS["zsh"](found))
    script = (
        '_arguments() { print -rl -- "words: $words[1] $CURRENT" "$@" }\n'
        '_describe() { print -rl -- "${(@P)2}" }\n'
        f'words=("$@"); CURRENT=$#; . {tmp_path}/_replfs'
    )
    done = subprocess.run(
        ["zsh", "-f", "-c", script, "zsh", *words], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    assert [word for word in expected if word not in done.stdout] == []
    if len(words) > 2:
        depth = 2 if words[1] == "policy" else 1
        first = done.stdout.splitlines()[0]
        assert first == f"words: {words[depth]} {len(words) - depth}"
