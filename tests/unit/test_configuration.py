"""`replfs config check` and `sample`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from replfs.cli import configuration, main
from replfs.cli.exit_codes import ExitCode
from replfs.node.settings import config
from replfs.node.settings.options import OPTIONS
from replfs.transport.security import generate_keypair, save_keypair


def test_the_sample_has_every_key_and_the_defaults():
    text = configuration.sample()
    assert tomllib.loads(text) == {}
    values = tomllib.loads(re.sub(r"^#(?=[a-z])", "", text, flags=re.MULTILINE))
    everywhere = {option.name for option in OPTIONS if option.everywhere}
    assert set(values) == everywhere | {"store", "mountpoint"}
    defaults = config.Settings(command="mount", store="", name="")
    for option in OPTIONS:
        if option.everywhere and option.name not in configuration._EXAMPLES:
            assert option.read(values[option.name]) == getattr(defaults, option.field), option.name


def test_the_sample_with_all_of_it_is_accepted(tmp_path, monkeypatch, capsys):
    path = tmp_path / "replfs.toml"
    path.write_text(re.sub(r"^#(?=[a-z])", "", configuration.sample(), flags=re.MULTILINE))
    settings = config.build("mount", {}, config_file=str(path))
    assert settings.peers[0].name == "beta"
    assert settings.none_patterns == ("*.tmp", "node_modules/")


class Place:
    """A directory with a store and a configuration."""

    def __init__(self, top: Path) -> None:
        self.top = top
        (top / "store").mkdir()
        (top / "mnt").mkdir()

    def check(self, text: str) -> int:
        (self.top / "replfs.toml").write_text(text)
        return main.main(["config", "check", str(self.top / "replfs.toml")])


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def test_a_file_that_is_fine(place, capsys):
    keys = generate_keypair()
    save_keypair(str(place.top / "key"), keys)
    (place.top / "peers").write_text(f"beta = {keys.public}\n")
    code = place.check(
        'store = "store"\nmountpoint = "mnt"\npeer = ["beta=tcp://beta:4710"]\nname = "alpha"\n'
        'key-file = "key"\npeer-keys = "peers"\n'
    )
    out, err = capsys.readouterr()
    assert (code, err) == (0, "")
    assert out == (
        f"{place.top}/replfs.toml is fine for 'replfs mount': {place.top}/store as alpha, mounted "
        f"on {place.top}/mnt, replicated to beta\n"
    )
    assert place.check('store = "store"\nlisten = "tcp://127.0.0.1:0"\n') == 0
    assert "is fine for 'replfs agent'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("stoer = 1", ["stoer: there is no such option; did you mean store?"]),
        ("x = [", ["it is not TOML"]),
        ('listen = "tcp://0.0.0.0:1"', ["store: there is none"]),
        (
            'store = "nowhere"\nlisten = "tcp://0.0.0.0:4710"',
            ["store: {}/nowhere is not a directory; create it", "tcp://0.0.0.0:4710 is open to"],
        ),
        (
            'store = "store"\nlisten = "tcp://127.0.0.1:1"\nkey-file = "k"',
            ["peer-keys: it is needed too"],
        ),
        (
            'store = "store"\nlisten = "tcp://127.0.0.1:1"\nkey-file = "k"\npeer-keys = "p"',
            ["cannot read {}/k: No such file"],
        ),
        (
            'store = "store"\nlisten = "tcp://127.0.0.1:1"\nhook = "replfs.toml"',
            ["hook {}/replfs.toml is not a program that can be run"],
        ),
    ],
)
def test_each_thing_that_is_wrong_is_said(place, capsys, text, sentences):
    assert place.check(text) == ExitCode.USAGE
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(sentences)
    for line, sentence in zip(lines, sentences, strict=True):
        assert line.startswith(f"replfs: {place.top}/replfs.toml: ")
        assert sentence.format(place.top) in line


def test_a_key_that_others_can_read_is_said(place, capsys):
    keys = generate_keypair()
    save_keypair(str(place.top / "k"), keys)
    (place.top / "k").chmod(0o644)
    (place.top / "p").write_text(f"a = {keys.public}\n")
    code = place.check(
        'store = "store"\nlisten = "tcp://127.0.0.1:1"\nkey-file = "k"\npeer-keys = "p"'
    )
    assert code == ExitCode.USAGE
    assert f"others have access to {place.top}/k: chmod 600 it" in capsys.readouterr().err


def test_a_file_that_is_not_there(capsys):
    assert main.main(["config", "check", "/nowhere.toml"]) == ExitCode.USAGE
    assert capsys.readouterr().err == (
        "replfs: /nowhere.toml: it cannot be read: No such file or directory\n"
    )


def test_a_secondary_that_knows_its_primary_is_no_mount(place, capsys):
    text = 'store = "store"\nlisten = "tcp://127.0.0.1:0"\npeer = ["alpha=tcp://127.0.0.1:4710"]\n'
    assert place.check(text) == ExitCode.OK
    assert "is fine for 'replfs agent'" in capsys.readouterr().out


def test_a_secondary_without_a_store_is_one_under_systemd_alone(place, capsys, monkeypatch):
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert place.check('listen = "tcp://127.0.0.1:0"\n') == ExitCode.USAGE
    assert "only under systemd it may be left out" in capsys.readouterr().err
