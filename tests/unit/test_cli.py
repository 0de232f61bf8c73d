"""The command line: what is typed wrong, what is shown, and with which status it ends."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio
from helpers.states import opened

from replfs import __version__ as replfs_version
from replfs.cli import exit_codes, main, mount, operate, spawn, text
from replfs.cli.exit_codes import ExitCode
from replfs.cli.policy import EFFECTIVE, POLICY
from replfs.errors import NotInSync, ReplfsError, UsageError
from replfs.node.operating import control
from replfs.node.settings import config
from replfs.node.settings.options import OPTIONS
from replfs.store.identity import Identity
from replfs.store.state import State


def replfs(capsys, *argv: str) -> tuple[int, str, str]:
    code = main.main(argv)
    output = capsys.readouterr()
    return code, output.out, output.err


def run_as_process(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*spawn.python(), *argv],
        capture_output=True, text=True, timeout=60, check=False, env=spawn.environment(), **more,
    )  # fmt: skip


@contextlib.contextmanager
def fake_node(directory: Path, statuses: list[dict[str, Any]], **commands: Any):
    """A control server with an event loop in a thread; `statuses` come one after the other."""
    store = directory / "store"
    store.mkdir()
    started, stop = threading.Event(), threading.Event()
    failures: list[BaseException] = []

    def snapshot() -> dict[str, Any]:
        return statuses.pop(0) if len(statuses) > 1 else statuses[0]

    async def serve() -> None:
        server = control.ControlServer(
            directory / "run", str(store), None,
            snapshot=snapshot, commands=commands, beat=time.monotonic_ns,
        )  # fmt: skip
        server.start(trio.lowlevel.current_trio_token())
        started.set()
        await trio.to_thread.run_sync(stop.wait)
        server.stop()

    def loop() -> None:
        try:
            trio.run(serve)
        except BaseException as error:
            failures.append(error)
            started.set()

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        assert started.wait(30)
        yield [str(store), "--rundir", str(directory / "run")]
    finally:
        stop.set()
        thread.join(30)
        assert not failures


IN_SYNC: dict[str, Any] = {
    "version": "0.1.0", "store": "/srv/data", "mountpoint": "/mnt", "role": "primary",
    "name": "a", "volume": "11aa", "generation": "22bb", "state": "in-sync", "hung": False,
    "uptime_s": 3723.0, "in_flight": 0, "policy_default": "sync", "unrepresentable": 0,
    "held": {"overlap": 3, "policy": 0},
    "operations": {"write": {"count": 12, "held": 3, "p50_us": 101.4, "p99_us": 900},
                   "barrier": {"count": 0}},
    "peers": [{"name": "b", "endpoint": "tcp://h:1", "link": "up", "state": "in-sync",
               "data": "up-to-date", "dirty_files": 0, "dirty_bytes": 0, "dirty_names": 0}],
}  # fmt: skip
RESYNC: dict[str, Any] = IN_SYNC | {
    "state": "resync",
    "peers": [{"name": "b", "endpoint": "tcp://h:1", "link": "up", "state": "incremental",
               "data": "inconsistent", "reason": "link was down", "since_s": 61.0,
               "last_in_sync": 1700000000, "dirty_files": 3, "dirty_bytes": 5 << 20,
               "dirty_names": 2, "lag_ops": 4, "lag_bytes": 2048,
               "progress": {"phase": "data", "files": 3, "files_total": 9, "bytes": 1 << 20,
                            "bytes_total": 1 << 30, "rate": 10 << 20, "eta_s": 102.0},
               "last_error": {"path": "/x", "reason": "quota", "when": 1700000001}}],
}  # fmt: skip


# What is typed wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["mout"], "there is no command 'mout'; did you mean mount?"),
        (["frobnicate"], "there is no command 'frobnicate'; see replfs --help"),
        (["mount"], "mount: it needs a STORE; see replfs mount --help"),
        (["mount", "/s"], "mount: it needs a MOUNTPOINT; see replfs mount --help"),
        (["mount", "/s", "/m", "/x"], "mount: '/x' is one argument too many; see replfs mount"),
        (["mount", "/s", "/m", "--peers", "tcp://h:1"], "there is no option --peers; did you mean"),
        (["mount", "/s", "/m", "--peer"], "mount: argument --peer: expected one argument"),
        (["mount", "/s", "/m", "--peer-timeout=1y"], "--peer-timeout: it has an unknown unit"),
        (["mount", "/s", "/m", "--rescan=perhaps"], "-- rescan: it cannot be 'perhaps'; write yes"),
        (["mount", "/s", "/m", "-o", "rescn=no"], "-o rescn: there is no such option; did you"),
        (["mount", "/s", "/s/m"], "MOUNTPOINT /s/m is inside STORE /s"),
        (["mount", "/does/not/exist", "/m"], "STORE /does/not/exist does not exist; create it"),
        (["mount", "/dev/null", "/m"], "STORE /dev/null is not a directory"),
        (["agent", "/s"], "agent: it needs --listen ENDPOINT"),
        (["agent", "/s", "--listen", "0.0.0.0:1"], "write an endpoint such as tcp://0.0.0.0:4710"),
        (["umount", "/does/not/exist"], "/does/not/exist is not mounted"),
        (["wait", "/m", "--timeout", "soon"], "a time cannot be 'soon'; write 5s"),
        (["wait", "/m", "--for", "ever"], "wait: argument --for: invalid choice: 'ever'"),
        (["policy"], "policy: the following arguments are required: ACTION"),
        (["policy", "set", "snyc", "/x"], "invalid choice: 'snyc'"),
        (["policy", "get", "/tmp"], "/tmp is not on a replfs mount"),
        (["policy", "set", "sync", "/tmp"], "/tmp is not on a replfs mount"),
        (["peer", "add", "/m", "h:1"], "peer add: the peer cannot be 'h:1'"),
        (["peer", "swap", "/m"], "invalid choice: 'swap'"),
        (["split-brain", "/m", "guess"], "invalid choice: 'guess'"),
    ],
)  # fmt: skip
def test_usage_errors_are_one_sentence_and_exit_2(capsys, argv, sentence):
    code, out, err = replfs(capsys, *argv)
    assert sentence in err
    assert err.startswith("replfs: ")
    assert err.count("\n") == 1
    assert out == ""
    assert code == ExitCode.USAGE


@pytest.mark.parametrize(
    "argv",
    [["status"], ["status", "/m"], ["stop", "/m"], ["sync", "/m"],
     ["pause", "/m"], ["peer", "list", "/m"], ["promote", "/m"], ["events", "/m"],
     ["wait", "/m", "--timeout", "0"]],
)  # fmt: skip
def test_no_node_exits_4(capsys, tmp_path, argv):
    code, out, err = replfs(capsys, *argv, "--rundir", str(tmp_path))
    assert code == ExitCode.DOWN
    assert "no node" in err
    assert out == ""


def test_help_and_version(capsys):
    code, out, _ = replfs(capsys, "--help")
    assert code == 0
    for name in main.MODULES:
        assert f"\n  {name} " in out
    for number in exit_codes.ExitCode:
        assert f"  {number.value:>3}  {number.meaning}" in out
    assert replfs(capsys)[0] == ExitCode.USAGE
    assert replfs(capsys, "--version")[1].startswith("replfs 0.")


@pytest.mark.parametrize("name", list(main.MODULES))
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        main.main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: replfs {name}" in capsys.readouterr().out


def test_exit_codes_are_those_of_the_errors():
    codes = {member.value for member in ExitCode}
    pending = [ReplfsError]
    while pending:
        error = pending.pop()
        pending += error.__subclasses__()
        assert error.exit_code in codes


def test_every_option_is_on_the_command_line_under_its_own_name():
    args = [f"--{option.name}" for option in OPTIONS if option.is_switch]
    parsed = mount.COMMANDS["mount"].parse("mount", "x", ["/s", "/m", *args])
    for option in OPTIONS:
        assert getattr(parsed, option.name) is (True if option.is_switch else None)


def test_switches_take_values_and_opposites():
    def settings(*argv: str) -> config.Settings:
        line = ["/s", *argv, "/m", "--config", os.devnull]
        return mount._settings("mount", mount.COMMANDS["mount"].parse("mount", "x", line))

    assert settings().rescan
    assert not settings("--rescan=no").rescan
    assert not settings("--no-rescan").rescan
    assert settings("--rescan=yes").rescan
    assert settings("--nosuid").nosuid
    assert not settings("--suid").nosuid
    assert settings("--ro").read_only
    assert not settings("--rw", "-o", "ro").read_only
    assert settings("-f").foreground
    assert settings("-o", "noatime", "-o", "nodev,ack=close").ack == "close"
    assert [p.name for p in settings("--peer", "a=tcp://a:1", "--peer", "tcp://b:1").peers] == [
        "a", "b:1",
    ]  # fmt: skip


# mount(8) --------------------------------------------------------------------------------------


def test_mount_helper_becomes_mount():
    translate = mount.translate_mount_helper
    assert translate(["/s", "/m"]) == ["mount", "/s", "/m"]
    assert translate(["/s", "/m", "-sv", "-o", "rw,noatime", "-t", "replfs"]) == [
        "mount", "/s", "/m", "-o", "rw,noatime",
    ]  # fmt: skip
    assert translate(["/s", "/m", "-f", "-o", "rw"]) == []
    with pytest.raises(UsageError, match="usage: mount.replfs"):
        translate(["/s"])
    with pytest.raises(UsageError, match="cannot be remounted"):
        translate(["/s", "/does/not/exist", "-o", "remount,ro"])


# A process of its own --------------------------------------------------------------------------


def test_the_announcement_reaches_the_parent(tmp_path, monkeypatch):
    script = tmp_path / "node.py"
    script.write_text(
        "import sys\nfrom replfs.cli.spawn import Announcement\n"
        "a = Announcement(int(sys.argv[-1]))\n"
        "if sys.argv[1] == 'good': a.ready('tcp://h:1')\n"
        "if sys.argv[1] == 'bad': a.failed('STORE is busy', 3); sys.exit(3)\n"
        "if sys.argv[1] == 'dead': print('last words'); sys.stdout.flush(); sys.exit(7)\n"
    )
    monkeypatch.setattr(spawn, "python", lambda: [sys.executable, str(script)])

    def start(how: str) -> str:
        node = spawn.NodeProcess([how], str(tmp_path / "log"))
        try:
            deadline = time.monotonic() + 60
            while (listening := node.poll_ready(1.0)) is None:
                assert time.monotonic() < deadline
            return listening
        finally:
            node.close()
            node.process.wait(60)

    assert start("good") == "tcp://h:1"
    with pytest.raises(spawn.StartFailed, match="STORE is busy") as caught:
        start("bad")
    assert caught.value.exit_code == 3
    with pytest.raises(spawn.StartFailed, match="ended with status 7.*: last words"):
        start("dead")


def test_a_reader_that_goes_away_is_no_traceback():
    with subprocess.Popen(
        [*spawn.python(), "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=spawn.environment() | {"PYTHONUNBUFFERED": "1"},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_ctrl_c_ends_wait_with_130(tmp_path):
    statuses = [RESYNC] * 4
    with fake_node(tmp_path, statuses) as target:
        process = subprocess.Popen(
            [*spawn.python(), "wait", *target],
            env=spawn.environment(),
            stderr=subprocess.PIPE,
            # Where these tests run in the background of a shell, it is ignored.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            # Once it has asked, it is past the interpreter's start.
            deadline = time.monotonic() + 60
            while len(statuses) > 2:
                assert time.monotonic() < deadline
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == ExitCode.INTERRUPTED
        finally:
            process.kill()
            process.communicate()


# status, wait and the rest ---------------------------------------------------------------------


def test_status_of_a_node_in_sync(capsys, tmp_path):
    with fake_node(tmp_path, [IN_SYNC]) as target:
        code, out, err = replfs(capsys, "status", *target)
    assert (code, err) == (ExitCode.OK, "")
    assert out.startswith("/srv/data: primary, in-sync\n")
    assert re.search(r"node +a, process \d+, up 1 h 2 min, version 0\.1\.0", out)
    assert "3 overlap" in out
    assert re.search(r"b +up +in-sync +up-to-date +- +- +now", out)
    assert re.search(r"write +12 +3 +101 us +900 us", out)
    assert "barrier" not in out


def test_status_of_a_degraded_node(capsys, tmp_path):
    with fake_node(tmp_path, [RESYNC]) as target:
        code, out, _ = replfs(capsys, "status", *target)
        assert code == ExitCode.NOT_IN_SYNC
        assert "3 files, 5.0 MiB, 2 names" in out
        assert "4 ops, 2.0 KiB" in out
        assert "incremental for 1 min 1 s: link was down" in out
        assert "3 of 9 files, 1.0 MiB of 1.0 GiB, 10.0 MiB/s, 1 min 42 s left" in out
        assert "last error: /x: quota (20" in out
        code, out, _ = replfs(capsys, "status", *target, "--json")
        assert json.loads(out)["peers"][0]["progress"]["files"] == 3
        # Without a target: all nodes of the run directory.
        code, out, _ = replfs(capsys, "status", "--json", *target[1:])
        assert len(json.loads(out)) == 1
        assert code == ExitCode.NOT_IN_SYNC


@pytest.mark.parametrize(
    "status",
    [{}, {"hung": True, "hung_s": 12.0}, {"peers": [{}]}, {"peers": [{"last_error": "x"}]},
     {"operations": {"write": {"count": 1}}}, {"peers": [{"progress": {}}], "held": None}],
)  # fmt: skip
def test_what_is_absent_is_left_out(status):
    assert "None" not in operate.render_status(status)
    expected = ExitCode.DOWN if status.get("hung") else ExitCode.NOT_IN_SYNC
    assert operate.exit_code_of(status) == expected


def test_status_as_metrics(capsys, tmp_path):
    with fake_node(tmp_path, [RESYNC]) as target:
        _, out, _ = replfs(capsys, "status", "--metrics", *target)
    assert 'replfs_in_sync{store="/srv/data"} 0\n' in out
    assert 'replfs_peer_dirty_bytes{store="/srv/data",peer="b"} 5242880\n' in out
    assert 'replfs_operations_total{store="/srv/data",class="write"} 12\n' in out


def test_wait_until_it_is_in_sync(capsys, tmp_path):
    with fake_node(tmp_path, [RESYNC, RESYNC, IN_SYNC]) as target:
        assert replfs(capsys, "wait", *target, "--timeout", "60")[0] == ExitCode.OK


def test_wait_gives_up(capsys, tmp_path):
    with fake_node(tmp_path, [RESYNC]) as target:
        code, _, err = replfs(capsys, "wait", *target, "--timeout", "1ms")
        assert code == ExitCode.NOT_IN_SYNC
        assert "is not in-sync after 0.001 s: b incremental, link up" in err
        assert replfs(capsys, "wait", *target, "--for", "connected")[0] == ExitCode.OK
        assert replfs(capsys, "wait", *target, "--for", "up", "--timeout", "1ms")[0] == ExitCode.OK
        code, _, err = replfs(capsys, "wait", *target, "--peer", "c")
        assert code == ExitCode.USAGE
        assert "no peer 'c'" in err


def test_commands_send_their_arguments_and_show_the_answer(capsys, tmp_path):
    seen: list[tuple[str, dict[str, Any]]] = []

    def command(name: str):
        def run(args: dict[str, Any]) -> dict[str, Any]:
            seen.append((name, args))
            return {"message": f"{name} done"}

        return run

    def refuse(args: dict[str, Any]) -> dict[str, Any]:
        raise NotInSync("b is not in sync; wait, or use --force")

    names = ("pause", "resume", "resync", "sync", "peer-add", "peer-remove", "peer-replace",
             "switchover", "split-brain", "verify")  # fmt: skip
    commands = {name: command(name) for name in names} | {"promote": refuse}
    with fake_node(tmp_path, [IN_SYNC], **commands) as target:
        for argv, fields in (
            (["pause", "--peer", "b", "--reason", "moving"], {"peer": "b", "reason": "moving"}),
            (["resume"], {"peer": None}),
            (["resync", "--full"], {"peer": None, "full": True, "tentative": False}),
            (["sync"], {}),
            (["switchover"], {"peer": None, "tentative": False}),
            (["verify", "--repair"], {"peer": None, "path": None, "repair": True}),
        ):  # fmt: skip
            code, out, err = replfs(capsys, *argv, *target)
            assert (code, out, err) == (0, f"{argv[0]} done\n", "")
            assert seen.pop() == (argv[0], fields)
        for argv, fields in (
            (["peer", "add", target[0], "c=tcp://c:1"], {"name": "c", "endpoint": "tcp://c:1"}),
            (["peer", "remove", target[0], "c"], {"name": "c"}),
            (["peer", "replace", target[0], "c", "tcp://d:1"],
             {"name": "c", "endpoint": "tcp://d:1"}),
        ):  # fmt: skip
            assert replfs(capsys, *argv, *target[1:])[0] == 0
            assert seen.pop() == (f"peer-{argv[1]}", fields)
        assert replfs(capsys, "split-brain", target[0], "list", *target[1:])[0] == 0
        assert seen.pop() == ("split-brain", {"action": "list", "peer": None, "tentative": False})
        code, _, err = replfs(capsys, "promote", *target)
        assert code == ExitCode.NOT_IN_SYNC
        assert err == "replfs: b is not in sync; wait, or use --force\n"
        code, out, _ = replfs(capsys, "peer", "list", *target)
        assert re.search(r"b +tcp://h:1 +up +in-sync +up-to-date", out)


def test_verify_tells_what_differs(capsys, tmp_path):
    def verify(args: dict[str, Any]) -> dict[str, Any]:
        return {"differences": ["/x: content", "/y: mode"], "message": "2 of 9 objects differ"}

    with fake_node(tmp_path, [IN_SYNC], verify=verify) as target:
        code, out, _ = replfs(capsys, "verify", *target)
    assert code == ExitCode.NOT_IN_SYNC
    assert out == "/x: content\n/y: mode\n2 of 9 objects differ\n"


def test_events(capsys, tmp_path):
    seen: list[Any] = []

    def events(args: dict[str, Any]) -> dict[str, Any]:
        seen.append(args["after"])
        event = {"number": 1, "time": 1700000000, "event": "link", "peer": "b", "state": "up"}
        later = event | {"number": 2, "state": "down"}
        return {"events": [event] if args["after"] < 1 else [later] if args["after"] == 1 else []}

    with fake_node(tmp_path, [IN_SYNC], events=events) as target:
        code, out, _ = replfs(capsys, "events", *target)
        assert code == 0
        assert out.endswith("  link  peer=b  state=up\n")
        code, out, _ = replfs(capsys, "events", "--json", *target)
        assert json.loads(out)["number"] == 1
        # Only --follow may wait for something to happen.
        assert seen == [-1, -1]
        follower = subprocess.Popen(
            [*spawn.python(), "events", "--follow", *target],
            env=spawn.environment(), stdout=subprocess.PIPE,
        )  # fmt: skip
        try:
            assert follower.stdout is not None
            # What is so now comes first, and then only what is new.
            now = b"  now  role=primary  state=in-sync  peers={'b': 'in-sync'}\n"
            assert follower.stdout.readline().endswith(now)
            assert follower.stdout.readline().endswith(b"  link  peer=b  state=down\n")
            follower.send_signal(signal.SIGINT)
            assert follower.wait(60) == ExitCode.INTERRUPTED
        finally:
            follower.kill()
            follower.communicate()


def test_umount_that_is_busy_says_so(capsys, tmp_path):
    def umount(args: dict[str, Any]) -> dict[str, Any]:
        raise OSError(16, "Device or resource busy", "/mnt")

    with fake_node(tmp_path, [IN_SYNC], umount=umount) as target:
        code, _, err = replfs(capsys, "umount", *target)
    assert code == ExitCode.ERROR
    assert err == "replfs: Device or resource busy (/mnt)\n"


def test_umount_of_a_node_that_goes_on_returns(capsys, tmp_path):
    def umount(args: dict[str, Any]) -> dict[str, Any]:
        return {"stopping": False, "message": "unmounted; the node goes on"}

    with fake_node(tmp_path, [IN_SYNC], umount=umount) as target:
        code, out, _ = replfs(capsys, "umount", *target)
    assert (code, out) == (0, "unmounted; the node goes on\n")


def test_adopting_a_copy_and_a_moved_store(capsys, tmp_path):
    store = tmp_path / "store"
    store.mkdir()

    def identity(path: Path) -> Identity:
        fd = os.open(path, os.O_RDONLY)
        try:
            state = State(fd)
            state.close()
            return state.identity()
        finally:
            os.close(fd)

    original = identity(store)
    subprocess.run(["cp", "-a", store, tmp_path / "copy"], check=True)
    for how in ("--new", "--move"):
        code, out, _ = replfs(capsys, "adopt", str(tmp_path / "copy"), how, "--tentative")
        assert code == 0
        assert "it would be " in out
        assert identity(tmp_path / "copy") == original
    assert replfs(capsys, "adopt", str(tmp_path / "copy"), "--new")[0] == 0
    copy = identity(tmp_path / "copy")
    assert copy.node != original.node
    assert copy.binding != original.binding
    assert copy.uninitialized
    subprocess.run(["cp", "-a", store, tmp_path / "moved"], check=True)
    code, out, _ = replfs(capsys, "adopt", str(tmp_path / "moved"), "--move")
    assert (code, out) == (0, f"{tmp_path}/moved: it is the store it was, in its new place\n")
    moved = identity(tmp_path / "moved")
    assert moved.node == original.node
    assert moved.binding != original.binding
    code, out, _ = replfs(capsys, "adopt", str(tmp_path / "moved"), "--move")
    assert (code, out) == (
        0, f"{tmp_path}/moved: it stands where it did: there is nothing to adopt\n"
    )  # fmt: skip
    assert replfs(capsys, "adopt", str(store))[0] == ExitCode.USAGE
    assert replfs(capsys, "adopt", str(tmp_path / "none"), "--new")[0] == ExitCode.USAGE


def test_a_directory_that_is_no_store_is_not_made_one_by_adopting_it(capsys, tmp_path):
    for how in ("--new", "--move"):
        code, _, said = replfs(capsys, "adopt", str(tmp_path), how)
        assert code == ExitCode.USAGE
        assert f"{tmp_path} is no store" in said
    assert not list(tmp_path.iterdir())


def test_a_stopped_store_is_not_promoted_tentatively(capsys, tmp_path):
    with opened(tmp_path) as state:
        generation = b"G" * 16
        before = state.update(
            role="secondary", volume=b"V" * 16, generation=generation, uninitialized=False
        )
    code, out, _ = replfs(capsys, "promote", str(tmp_path), "--tentative")
    assert (code, out) == (0, "it would be promoted: nothing speaks against it\n")
    with opened(tmp_path) as state:
        assert state.identity() == before


def test_keygen(capsys, tmp_path):
    file = tmp_path / "key"
    code, out, _ = replfs(capsys, "keygen", str(file), "--name", "a")
    assert code == 0
    assert re.search(r"^a = \S{40}$", out, re.MULTILINE)
    assert file.stat().st_mode & 0o777 == 0o600
    code, _, err = replfs(capsys, "keygen", str(file))
    assert code == ExitCode.USAGE
    assert "exists already" in err
    other = tmp_path / "other"
    code, _, err = replfs(capsys, "keygen", str(other), "--name", "a b")
    assert code == ExitCode.USAGE
    assert "--name cannot be 'a b'" in err
    assert not other.exists()


def test_doctor(capsys, tmp_path):
    code, out, _ = replfs(
        capsys, "doctor", str(tmp_path), "--rundir", str(tmp_path / "r"), "--peer", "tcp://[::1]:1"
    )
    assert "ok    pyfuse3" in out
    assert f"{tmp_path} has extended attributes" in out
    assert "FAIL  tcp://[::1]:1 cannot be reached" in out
    assert code == ExitCode.ERROR
    assert f"note  no node runs on {tmp_path}" in out
    assert f"{tmp_path} is on " in out
    assert list(tmp_path.iterdir()) == [tmp_path / "r"]


def test_doctor_compares_both_sides(capsys, tmp_path):
    peer = IN_SYNC["peers"][0]
    status = IN_SYNC | {
        "version": replfs_version,
        "peers": [
            peer | {"release": "0.0.9", "clock_difference_s": -61.0},
            peer | {"name": "c", "release": replfs_version, "clock_difference_s": 0.01},
            peer | {"name": "d", "link": "down", "reason": "the peer is gone"},
        ],
    }
    with fake_node(tmp_path, [status]) as target:
        code, out, _ = replfs(capsys, "doctor", *target)
    assert code == ExitCode.ERROR
    assert f"note  peer b is 0.0.9, this node {replfs_version}: use one version" in out
    assert "note  peer b: clocks differ by 61.0 s; set both clocks by NTP" in out
    assert f"ok    peer c is {replfs_version}" in out
    assert "ok    peer c: clocks differ by 0.0 s" in out
    assert "FAIL  peer d is not connected: the peer is gone" in out


def test_doctor_tries_to_listen(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        _, out, _ = replfs(capsys, "doctor", "--listen", f"tcp://127.0.0.1:{port}")
    assert f"FAIL  tcp://127.0.0.1:{port} cannot be listened on: Address already in use" in out
    assert "FAIL  --listen cannot be 'x'" in replfs(capsys, "doctor", "--listen", "x")[1]
    _, out, _ = replfs(capsys, "doctor", "--listen", f"tcp://127.0.0.1:{port}")
    assert f"ok    tcp://127.0.0.1:{port} is free" in out


def test_a_policy_report_goes_on_where_something_was_removed_meanwhile(
    capsys, tmp_path, monkeypatch
):
    (tmp_path / "here").write_text("x")
    (tmp_path / "removed").write_text("x")
    values = {EFFECTIVE: b"sync", POLICY: b"async"}

    def getxattr(path, name):
        if str(path).endswith("removed"):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        if name in values:
            return values[name]
        raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    monkeypatch.setattr(os, "getxattr", getxattr)
    code, out, _ = replfs(capsys, "policy", "report", str(tmp_path))
    assert code == ExitCode.OK
    assert "2 of 2 objects have a policy of their own" in out
    assert replfs(capsys, "policy", "report", str(tmp_path / "removed"))[0] == ExitCode.ERROR


def test_events_and_policy_show_nothing_of_other_filesystems(capsys, tmp_path):
    (tmp_path / "f").write_text("x")
    assert replfs(capsys, "policy", "report", str(tmp_path))[0] == ExitCode.USAGE
    code, _, err = replfs(capsys, "policy", "get", str(tmp_path / "missing"))
    assert code == ExitCode.ERROR
    assert err == f"replfs: {tmp_path}/missing: No such file or directory\n"


# How it looks ----------------------------------------------------------------------------------


def test_watching_never_blanks_the_screen_and_gives_it_back(tmp_path):
    """In a pseudo-terminal of 12 lines of 60 characters, until Ctrl-C."""
    many = RESYNC | {"peers": [RESYNC["peers"][0] | {"name": f"peer{n}"} for n in range(9)]}
    with fake_node(tmp_path, [many, IN_SYNC]) as target:
        ours, theirs = os.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 12, 60, 0, 0))
        watching = subprocess.Popen(
            [*spawn.python(), "status", *target, "--watch"],
            stdin=theirs, stdout=theirs, stderr=theirs,
            env=spawn.environment() | {"TERM": "xterm"},
        )  # fmt: skip
        os.close(theirs)
        seen = b""
        try:
            while b"in-sync" not in seen.rpartition(b"\x1b[H")[2] or not seen.endswith(b"\x1b[J"):
                seen += os.read(ours, 65536)
            watching.send_signal(signal.SIGINT)
            assert watching.wait(60) == ExitCode.INTERRUPTED
            seen += os.read(ours, 65536)
        finally:
            watching.kill()
            watching.wait()
            os.close(ours)
    assert b"\x1b[2J" not in seen
    assert seen.startswith(b"\x1b[?1049h\x1b[?25l")
    assert seen.endswith(b"\x1b[?25h\x1b[?1049l")
    frames = seen.split(b"\x1b[H")[1:]
    assert len(frames) == 2
    for frame in frames:
        lines = frame.split(b"\x1b[K")[:-1]
        assert len(lines) <= 12
        assert max(len(line.strip()) for line in lines) <= 60
    assert b"more lines" in frames[0]


def test_quantities():
    assert [text.size(n) for n in (None, 0, 1023, 1536, 5 << 20, 3 << 40)] == [
        "-", "0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.0 TiB",
    ]  # fmt: skip
    assert [text.duration(s) for s in (None, 0.25, 42, 61, 3723, 90000)] == [
        "-", "0.2 s", "42 s", "1 min 1 s", "1 h 2 min", "1 d 1 h",
    ]  # fmt: skip
    assert text.moment(None) == "never"
    assert text.moment("yesterday") == "yesterday"
    assert re.fullmatch(r"2023-11-1\d \d\d:\d\d:\d\d", text.moment(1700000000))


def test_status_is_quick_and_light(tmp_path):
    """The time itself is not asserted here: a loaded machine would make that a lie."""
    done = run_as_process("status", "--rundir", str(tmp_path))
    assert done.returncode == ExitCode.DOWN
    script = (
        "import sys\nfrom replfs.cli import main\n"
        f"main.main(['status', '--rundir', {str(tmp_path)!r}])\n"
        "heavy = {'trio', 'zmq', 'pyfuse3', 'msgspec', 'asyncio', 'inspect'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
