"""Options: the three sources, their order, and the sentence each mistake is answered with."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from replfs.errors import ConfigError, UsageError
from replfs.node.settings.config import Settings, build
from replfs.node.settings.options import OPTIONS
from replfs.node.settings.values import (
    PeerSetting,
    default_node_name,
    parse_duration,
    parse_endpoint,
    parse_peer,
    parse_size,
)

MOUNT: dict[str, Any] = {"store": "/s", "mountpoint": "/m"}


def mount(typed: dict[str, Any] | None = None, options: str = "", **more: Any) -> Settings:
    return build("mount", MOUNT | (typed or {}), options, more.get("file", os.devnull))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("5", 5.0), ("5s", 5.0), ("500ms", 0.5), (" 2 m ", 120.0), ("1h", 3600.0), (".5s", 0.5),
     (3, 3.0), (0.25, 0.25), ("1d", 86400.0), ("1min", 60.0)],
)  # fmt: skip
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "-1s", "5 parsecs", "1e3", "nan", "inf", True, None, []])
def test_durations_refused(text):
    with pytest.raises(ValueError, match="write"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("0", 0), ("4096", 4096), ("64KiB", 65536), ("64k", 65536), ("1.5M", 3 << 19),
     ("10MB", 10_000_000), ("1GiB", 1 << 30), (7, 7), ("2T", 2 << 40)],
)  # fmt: skip
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "KiB", "-1", "1 XB", False, {}])
def test_sizes_refused(text):
    with pytest.raises(ValueError, match="write"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "name", "endpoint"),
    [
        ("tcp://host:4710", "host:4710", "tcp://host:4710"),
        ("b=tcp://host:4710", "b", "tcp://host:4710"),
        ("b=tcp://[::1]:1", "b", "tcp://[::1]:1"),
        ("tcp://[::1]:1", "[::1]:1", "tcp://[::1]:1"),
        ("ipc:///run/x.sock", "run-x.sock", "ipc:///run/x.sock"),
        ("b=ipc:///run/a=b", "b", "ipc:///run/a=b"),
    ],
)
def test_peers(text, name, endpoint):
    assert parse_peer(text) == PeerSetting(name, endpoint)


@pytest.mark.parametrize(
    "text",
    ["host:4710", "tcp://host", "tcp://:1", "tcp://host:0", "tcp://host:65536", "tcp://host:x",
     "tcp://::1:1", "udp://host:1", "=tcp://h:1", "a b=tcp://h:1", "x" * 65 + "=tcp://h:1", "", 5,
     "tcp://a/b:1", "ipc://"],
)  # fmt: skip
def test_peers_refused(text):
    with pytest.raises(ValueError, match="write|needs|port|brackets"):
        parse_peer(text)


def test_port_zero_is_for_listening_only():
    assert parse_endpoint("tcp://127.0.0.1:0", listen=True) == "tcp://127.0.0.1:0"
    with pytest.raises(ValueError, match="port"):
        parse_endpoint("tcp://127.0.0.1:0")


def test_defaults_stand_in_one_place():
    settings = mount()
    assert settings == Settings(
        command="mount",
        store="/s",
        mountpoint="/m",
        name=default_node_name(),
        allow_other=os.geteuid() == 0,
    )


def test_command_line_wins_over_mount_options_wins_over_file(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text("peer-timeout = '1s'\nsuspend-timeout = '1s'\nslow-peer = '1s'\n")
    settings = mount({"peer-timeout": "3s"}, "peer-timeout=2s,suspend-timeout=2s", file=str(file))
    assert settings.peer_timeout_s == 3
    assert settings.suspend_timeout_s == 2
    assert settings.slow_peer_s == 1


def test_peers_of_one_source_replace_those_of_the_next(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text("peer = ['a=tcp://a:1', 'b=tcp://b:1']\n")
    assert [p.name for p in mount(file=str(file)).peers] == ["a", "b"]
    settings = mount({"peer": ["c=tcp://c:1", "d=tcp://d:1"]}, file=str(file))
    assert [p.name for p in settings.peers] == ["c", "d"]


def test_peers_as_tables(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text(
        "[[peer]]\nname = 'a'\nendpoint = 'tcp://a:1'\n[[peer]]\nendpoint='tcp://b:1'\n"
    )
    assert mount(file=str(file)).peers == (
        PeerSetting("a", "tcp://a:1"),
        PeerSetting("b:1", "tcp://b:1"),
    )


def test_file_paths_are_relative_to_the_file(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text("store='data'\nmountpoint='/mnt'\nkey-file='keys/mine'\nrundir='/r'\n")
    settings = build("mount", {}, "", str(file))
    assert settings.store == str(tmp_path / "data")
    assert settings.key_file == str(tmp_path / "keys/mine")
    assert settings.rundir == "/r"


def test_typed_paths_are_relative_to_the_directory(tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = build("agent", {"store": "s", "listen": "ipc:///x", "rundir": "r"}, "", os.devnull)
    assert settings.store == str(tmp_path / "s")
    assert settings.rundir == str(tmp_path / "r")


def test_mount_options_as_mount_and_fstab_write_them():
    settings = mount(
        {},
        "rw,noatime,nodev,suid,exec,_netdev,noauto,nofail,x-systemd.automount,comment=x,defaults,"
        "none=*.tmp:node_modules/,none=*.o,peer=a=tcp://a:1,peer=tcp://b:1,rescan=no,relatime",
    )
    assert not settings.read_only
    assert settings.noatime
    assert settings.nodev
    assert not settings.nosuid
    assert not settings.noexec
    assert not settings.rescan
    assert settings.none_patterns == ("*.tmp", "node_modules/", "*.o")
    assert [p.name for p in settings.peers] == ["a", "b:1"]


def test_mount_options_may_name_the_file(tmp_path: Path):
    file = tmp_path / "r.toml"
    file.write_text("ack = 'close'\n")
    assert build("mount", MOUNT, f"config={file}").ack == "close"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ("peer-timeuot=3s", "no such option; did you mean peer-timeout?"),
        ("peer-timeout", "needs a value"),
        ("rescan=perhaps", "write yes or no"),
        ("acl=no,foo", "no such option"),
    ],
)
def test_bad_mount_options(options, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        mount({}, options)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("policy", "snyc", "did you mean sync?"),
        ("policy", "inherit", "write one of sync, strict, async, none"),
        ("ack", "never", "write one of op, close"),
        ("peer-timeout", "1ms", "must be 100ms to 10m"),
        ("peer-timeout", "1y", "unknown unit"),
        ("strict-peers", "0", "must be 1 to 64"),
        ("strict-peers", "two", "write a whole number"),
        ("async-queue", "1k", "must be 1MiB to 1GiB"),
        ("name", "a b", "letters, digits"),
        ("none", "a/b", "a pattern is a name"),
        ("none", "", "write patterns"),
        ("max-background", "70000", "must be 1 to 65535"),
        ("log-level", "loud", "write one of debug"),
        ("peer", ["tcp://h:1", "tcp://h:1"], "same name"),
        ("listen", "4710", "tcp://0.0.0.0:4710"),
    ],
)
def test_bad_values(name, value, sentence):
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        mount({name: value})
    assert str(caught.value).startswith(f"--{name}: it ")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("ack = ", "not TOML"),
        ("peer_timeout = 5", "no such option; did you mean peer-timeout?"),
        ("foreground = true", "no such option"),
        ("rescan = 'maybe'", "write yes or no"),
        ("[[peer]]\nname='a'", "has no endpoint"),
        ("[[peer]]\nendpoint='tcp://a:1'\nkey='x'", "unknown key 'key'"),
        ("peer = 5", "endpoint"),
        ("strict-peers = true", "whole number"),
    ],
)
def test_bad_files(tmp_path: Path, content, sentence):
    file = tmp_path / "r.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        mount(file=str(file))
    assert str(caught.value).startswith(str(file))


def test_missing_file():
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        mount(file="/does/not/exist.toml")


@pytest.mark.parametrize(
    ("command", "typed", "sentence"),
    [
        ("mount", {"store": "/s"}, "needs a MOUNTPOINT"),
        ("mount", {}, "needs a STORE"),
        ("agent", {"store": "/s"}, "needs --listen"),
        ("mount", {"store": "/s", "mountpoint": "/s/m"}, "inside STORE"),
        ("mount", {"store": "/m/s", "mountpoint": "/m"}, "inside MOUNTPOINT"),
        ("mount", MOUNT | {"policy": "strict", "ack": "close"}, "strict refuses close"),
        ("mount", MOUNT | {"policy": "strict", "writeback": True}, "strict refuses it"),
        ("mount", MOUNT | {"peer": "tcp://a:1", "strict-peers": "2"}, "only 1 peer is"),
    ],
)
def test_what_does_not_go_together(command, typed, sentence):
    with pytest.raises(UsageError, match=sentence):
        build(command, typed, "", os.devnull)


def test_mountpoint_may_be_the_store_itself():
    assert build("mount", {"store": "/s/", "mountpoint": "/s"}, "", os.devnull).store == "/s"


def test_agent_stays_in_the_foreground_and_mount_does_not():
    agent = {"store": "/s", "listen": "ipc:///x"}
    assert build("agent", agent, "", os.devnull).foreground
    assert not build("agent", agent | {"foreground": False}, "", os.devnull).foreground
    assert not mount().foreground


def test_every_row_of_the_table_has_a_field_and_every_field_a_row():
    fields = {field.name for field in msgspec.structs.fields(Settings)}
    rows = [option.field for option in OPTIONS]
    assert len(set(rows)) == len(rows)
    assert set(rows) == fields - {"command", "store", "mountpoint"}
    names = [option.name for option in OPTIONS]
    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", name) for name in names)


def test_host_names_make_node_names(monkeypatch):
    for host, name in (("a.b", "a.b"), ("ä_1", "1"), ("---", "node"), ("x" * 80, "x" * 64)):
        monkeypatch.setattr(os, "uname", lambda host=host: os.uname_result(("", host, "", "", "")))
        assert default_node_name() == name
