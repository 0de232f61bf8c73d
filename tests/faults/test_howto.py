"""The commands of docs/howto, run as they stand there, on two machines that are one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
from pathlib import Path

import pytest
from helpers import nodes
from helpers.compare import wait_equal
from helpers.nodes import REPLFS, environment, free_port, make_base, remove_base, wait_for

pytestmark = pytest.mark.mounted

HOWTO = Path(nodes.REPOSITORY) / "docs" / "howto"
_STEP = re.compile(r"^```sh\n(.*?)^```$|^<!-- test: (.*?) -->$", re.MULTILINE | re.DOTALL)


class Machines:
    """alpha and beta: `/srv/store` and `/data` are directories of each, hosts are ports here."""

    def __init__(self) -> None:
        self.base = make_base()
        self.endpoints = {}
        for name in ("alpha", "beta"):
            self.endpoints[f"tcp://{name}:4710"] = f"tcp://127.0.0.1:{free_port()}"
            self.store(name).mkdir(parents=True)
            self.top(name).mkdir()
            (self.base / name / "run").mkdir()
        program = self.base / "bin" / "replfs"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\nexec {shlex.join(REPLFS)} "$@"\n')
        program.chmod(0o755)
        self.starts: dict[str, str] = {}
        """What started the node of each machine."""

    def store(self, name: str) -> Path:
        return self.base / name / "store"

    def top(self, name: str) -> Path:
        return self.base / name / "data"

    def run(self, name: str, line: str) -> str:
        """One command line on one machine; an error ends the test."""
        words = line.replace("/srv/store", str(self.store(name)))
        words = re.sub(r"(?<![\w/-])/data\b", str(self.top(name)), words)
        for endpoint, here in self.endpoints.items():
            words = words.replace(endpoint, here)
        if words.startswith(("replfs agent", "replfs mount")):
            self.starts[name] = line
            words += " --peer-timeout 2s"
        done = subprocess.run(
            ["/bin/sh", "-ec", words],
            env=environment()
            | {
                "PATH": f"{self.base / 'bin'}{os.pathsep}{os.environ['PATH']}",
                "REPLFS_RUNDIR": str(self.base / name / "run"),
            },
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
        )
        assert done.returncode == 0, f"{name}: {words}\n{done.stdout}{done.stderr}"
        return done.stdout

    def status(self, name: str) -> dict[str, object]:
        done = subprocess.run(
            [*REPLFS, "status", self.store(name), "--json", "--rundir", self.base / name / "run"],
            env=environment(),
            stdout=subprocess.PIPE,
            check=False,
        )
        found: dict[str, object] = json.loads(done.stdout or "{}")
        return found

    def lose(self, name: str) -> None:
        pid = self.status(name).get("pid")
        if isinstance(pid, int):
            descriptor = os.pidfd_open(pid)
            try:
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
            finally:
                os.close(descriptor)
            wait_for(lambda: not Path(f"/proc/{pid}/cmdline").exists() or _is_dead(pid))
        nodes.unmount_all(self.top(name))

    def do(self, action: str) -> None:
        """What stands in a comment of the page."""
        words = action.split()
        match words[0]:
            case "lose":
                self.lose(words[1])
            case "stop":
                self.run(words[1], "replfs stop /srv/store")
            case "start":
                self.run(words[1], self.starts[words[1]])
            case "promote":
                self.run(words[1], "replfs promote /srv/store")
            case "write":
                (self.top(words[1]) / words[2]).write_text(f"{words[2]} by {words[1]}\n")
            case "equal":
                wait_equal(self.store("alpha"), self.store("beta"), timeout_s=20)
            case "apart":
                wait_for(lambda: self.status("alpha")["state"] == "split-brain", 60)
                wait_for(lambda: self.status("beta")["state"] == "split-brain", 60)
            case _:
                raise AssertionError(action)

    def follow(self, page: Path) -> None:
        """Everything that stands on a page."""
        for commands, action in _STEP.findall(page.read_text(encoding="utf-8")):
            if action:
                self.do(action)
                continue
            name = ""
            for line in commands.replace("\\\n", " ").splitlines():
                if line.startswith("# on "):
                    name = line.removeprefix("# on ")
                elif line.strip():
                    self.run(name, line)

    def clean_up(self) -> None:
        for name in ("alpha", "beta"):
            with contextlib.suppress(OSError, ValueError, AssertionError):
                self.lose(name)
        remove_base(self.base)


def _is_dead(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"


@pytest.mark.parametrize(
    "page", ["replace-a-failed-machine", "switch-over", "resolve-a-split-brain"]
)
def test_the_commands_do_what_the_page_says(page):
    machines = Machines()
    try:
        machines.follow(HOWTO / "two-machines.md")
        machines.follow(HOWTO / f"{page}.md")
        text = (machines.top("alpha") / "before").read_text()
        assert text == "before by alpha\n"
        if page == "resolve-a-split-brain":
            names = sorted(os.listdir(machines.top("beta")))
            assert [name.partition(".beta-")[0] for name in names if ".beta-" in name] == [
                "both",
                "only-beta",
            ]
    except BaseException as error:
        for log in machines.base.glob("*/run/*.log"):
            error.add_note(f"{log.parent.parent.name}: {log.read_text()[-4000:]}")
        raise
    finally:
        machines.clean_up()
