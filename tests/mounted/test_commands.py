"""`mount`, `agent`, `umount`, `stop` and mount(8)'s helper, as a person types them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from replfs.cli import spawn
from replfs.cli.exit_codes import ExitCode
from replfs.node.settings.rundir import file_stem, replfs_mounts

pytestmark = pytest.mark.mounted


class Desk:
    """A directory with two stores and a run directory of its own, and commands run in it."""

    def __init__(self, top: Path) -> None:
        self.top = top
        for name in ("a", "b", "m", "r"):
            (top / name).mkdir()
        self.env = spawn.environment() | {"REPLFS_RUNDIR": str(top / "run")}

    def run(self, *argv: str, code: int | None = ExitCode.OK) -> str:
        """Run a command; what it prints. It must end with *code*, if that is not None."""
        return self._run([*spawn.python(), *argv], code)

    def mount_helper(self, *argv: str, code: int = ExitCode.OK) -> str:
        """As mount(8) runs `mount.replfs`."""
        script = "from replfs.cli.main import entry_mount_helper as run; run()"
        return self._run([sys.executable, "-P", "-c", script, *argv], code)

    def _run(self, command: list[str], code: int | None) -> str:
        done = subprocess.run(
            command, cwd=self.top, env=self.env, check=False, timeout=120, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert code in {None, done.returncode}, f"{command}: {done.returncode}: {done.stdout}"
        return done.stdout

    def status(self, target: str) -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run("status", target, "--json", code=None))
        return answer

    def start_agent(self) -> str:
        """Start the peer in the background; returns its endpoint."""
        printed = self.run(
            "agent", "b", "--listen", "tcp://127.0.0.1:0", "--name", "b", "--mount", "r",
            "--no-foreground",
        )  # fmt: skip
        endpoint = str(self.status("b")["listen"])
        assert printed == f"listening on {endpoint}\n"
        return endpoint

    def kill(self, target: str) -> None:
        """Kill the node of *target*, which nobody here is the parent of."""
        pidfd = os.pidfd_open(int(self.status(target)["pid"]))
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            with contextlib.suppress(OSError):
                os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        finally:
            os.close(pidfd)

    def mounts(self) -> list[str]:
        """What is mounted here, by its name."""
        return sorted(
            os.path.basename(path) for path in replfs_mounts() if path.startswith(f"{self.top}/")
        )

    def clean_up(self) -> None:
        for name in self.mounts():
            subprocess.run(["umount", "-l", str(self.top / name)], check=False)
        for store in ("a", "b"):
            with contextlib.suppress(AssertionError, ValueError):
                self.kill(store)


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.clean_up()


def test_from_the_first_mount_to_the_last_umount(desk):
    endpoint = desk.start_agent()
    # It returns once the mount is usable, and says nothing when all is well.
    assert desk.run("mount", "a", "m", "--peer", f"b={endpoint}", "--name", "a") == ""
    desk.run("wait", "m", "--timeout", "60")
    (desk.top / "m/file").write_text("hello")
    assert (desk.top / "b/file").read_text() == "hello"
    assert "primary, in-sync" in desk.run("status", "m/file")
    assert desk.run("policy", "get", "m/file").splitlines()[1].split() == [
        "sync", "default", "op", "in-sync", "m/file",
    ]  # fmt: skip
    with (desk.top / "m/file").open():
        assert "in use" in desk.run("umount", "m", code=ExitCode.USAGE)
    assert desk.mounts() == ["m", "r"]
    desk.run("umount", "m")
    assert desk.mounts() == ["r"]
    assert "no node serves" in desk.run("status", "a", code=ExitCode.DOWN)
    # The agent goes on without its mount, until it is stopped.
    desk.run("umount", "r")
    assert desk.mounts() == []
    assert desk.status("b")["role"] == "secondary"
    desk.run("stop", "b")
    assert "no node serves" in desk.run("status", "b", code=ExitCode.DOWN)
    assert "not mounted" in desk.run("umount", "m", code=ExitCode.USAGE)


def test_what_is_in_the_way_is_said_before_anything_is_done(desk):
    for refused in (["--peer", "b=tcp://192.0.2.1:4710"], ["--hook", "/nowhere"]):
        desk.run("mount", "a", "m", *refused, code=ExitCode.USAGE)
        assert not (desk.top / "a" / ".replfs").exists()
    endpoint = desk.start_agent()
    desk.run("mount", "a", "m", "--peer", f"b={endpoint}")
    assert "is a replfs mount already" in desk.run(
        "mount", "a", "m", "--peer", f"b={endpoint}", code=ExitCode.USAGE
    )
    (desk.top / "m2").mkdir()
    assert "in use by another replfs process" in desk.run(
        "mount", "a", "m2", "--peer", f"b={endpoint}", code=ExitCode.STORE
    )
    assert desk.mounts() == ["m", "r"]


def test_a_killed_node_is_cleared_away_by_umount_and_by_the_next_mount(desk):
    endpoint = desk.start_agent()
    desk.run("mount", "a", "a", "--peer", f"b={endpoint}")
    (desk.top / "a/file").write_text("hello")
    desk.kill("a")
    assert "its node is gone" in desk.run("status", "a", code=ExitCode.DOWN)
    # STORE lies below the dead mount: it must go first.
    desk.run("mount", "a", "a", "--peer", f"b={endpoint}")
    assert (desk.top / "a/file").read_text() == "hello"
    desk.kill("a")
    assert "its mount is cleared" in desk.run("umount", "a")
    assert desk.mounts() == ["r"]
    assert (desk.top / "a/file").read_text() == "hello"


def test_doctor_finds_a_dead_mount_and_clears_it_away(desk):
    endpoint = desk.start_agent()
    desk.run("mount", "a", "m", "--peer", f"b={endpoint}")
    desk.run("wait", "m", "--timeout", "60")
    # Others may have left something on this machine: only lines about this place count.
    out = desk.run("doctor", "a", code=None)
    assert f"ok    {desk.top}/m is mounted, and its node is there" in out
    assert "ok    peer b: clocks differ by 0.0 s" in out
    desk.kill("a")
    out = desk.run("doctor", "a", code=ExitCode.ERROR)
    assert (
        f"FAIL  {desk.top}/m: its node is gone (Transport endpoint is not connected); doctor --fix"
    ) in out
    assert desk.mounts() == ["m", "r"]
    # In a namespace of its own, where it cannot clear away what is not ours.
    inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c",
              '"$@"; cat /proc/self/mountinfo', "sh"]  # fmt: skip
    out = desk._run([*inside, *spawn.python(), "doctor", "--fix"], None)
    assert f"ok    {desk.top}/m: its node was gone; the mount is cleared away" in out
    assert f" {desk.top}/r " in out
    assert f" {desk.top}/m " not in out


def test_mount_8_mounts_and_remounts(desk):
    endpoint = desk.start_agent()
    options = f"rw,_netdev,noatime,x-systemd.requires=network.target,peer=b={endpoint}"
    desk.mount_helper(str(desk.top / "a"), str(desk.top / "m"), "-n", "-o", options)
    (desk.top / "m/file").write_text("hello")
    desk.mount_helper(str(desk.top / "a"), str(desk.top / "m"), "-o", "remount,ro,nosuid")
    with pytest.raises(OSError, match="Read-only"):
        (desk.top / "m/file").write_text("no")
    desk.mount_helper(str(desk.top / "a"), str(desk.top / "m"), "-o", "remount,rw")
    (desk.top / "m/file").write_text("again")
    assert (desk.top / "b/file").read_text() == "again"
    desk.run("umount", "m")


MOUNT_8 = """
set -e
top=$1 replfs=$(dirname "$2")/replfs
in_sync() { "$replfs" wait "$top/m" --timeout 60s; }
mount -t tmpfs tmpfs "$1/over"
mkdir "$1/over/upper" "$1/over/work"
over="lowerdir=/usr/sbin,upperdir=$1/over/upper,workdir=$1/over/work"
mount -t overlay overlay -o "$over" /usr/sbin
ln -s "$2" /usr/sbin/mount.replfs
cd "$1"
mount -t replfs -o "$3,noatime" a m
in_sync
echo typed > m/typed
findmnt -n -o FSTYPE,OPTIONS m
umount m
while [ -e run/"$4" ]; do sleep 0.05; done
options=$3,_netdev,noauto,x-systemd.automount,x-systemd.requires=b.service
echo "$1/a $1/m replfs $options 0 0" > fstab
mount -T fstab "$1/m"
in_sync
echo fstab > m/fstab
umount m
"""


def test_mount_8_finds_its_helper_and_fstab_is_understood(desk):
    """By mount(8) itself, in a mount namespace where the helper is in /sbin."""
    helper = Path(sys.executable).with_name("mount.replfs")
    if not helper.exists() or os.readlink("/sbin") != "usr/sbin":
        pytest.skip("not installed, or /sbin is a directory of its own")
    endpoint = desk.start_agent()
    (desk.top / "over").mkdir()
    socket_name = f"{file_stem(str(desk.top / 'a'))}.sock"
    out = desk._run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", MOUNT_8, "sh",
         str(desk.top), str(helper), f"peer=b={endpoint},name=a", socket_name],
        ExitCode.OK,
    )  # fmt: skip
    assert "fuse.replfs" in out
    assert "noatime" in out
    assert (desk.top / "b/typed").read_text() == "typed\n"
    assert (desk.top / "b/fstab").read_text() == "fstab\n"
