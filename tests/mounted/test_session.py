"""A real mount of a file system in memory, served by another process (`helpers.memory_fs`)."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from replfs.front import mountinfo, mounting

pytestmark = pytest.mark.mounted

TESTS = Path(__file__).parents[1]
DEADLINE_S = 60.0
STOCK = "none"
TUNINGS = ("all", "loop", STOCK)


def wait_for(condition, what, timeout_s=DEADLINE_S):
    deadline = time.monotonic() + timeout_s
    while not (result := condition()):
        assert time.monotonic() < deadline, f"waited {timeout_s} s for {what}"
        time.sleep(0.005)
    return result


class Server:
    """The process behind a mount. A watchdog kills it, so that no test hangs on a dead mount."""

    def __init__(self, mountpoint, *arguments, env=None, prefix=()):
        self.mountpoint = Path(mountpoint)
        self.process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "helpers.memory_fs", str(mountpoint), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", **(env or {})},
        )
        self._lines = queue.Queue()
        self._stderr = []
        self._threads = [
            threading.Thread(target=self._read_stdout),
            threading.Thread(target=self._read_stderr),
        ]
        self._watchdog = threading.Timer(100, self.process.kill)
        for thread in (*self._threads, self._watchdog):
            thread.daemon = True
            thread.start()
        self.ready = {}

    def _read_stdout(self):
        for line in self.process.stdout:
            self._lines.put(json.loads(line))
        self._lines.put(None)

    def _read_stderr(self):
        self._stderr.extend(line.decode(errors="replace") for line in self.process.stderr)

    @property
    def stderr(self):
        self._threads[1].join(DEADLINE_S)
        return "".join(self._stderr)

    def answer(self):
        line = self._lines.get(timeout=DEADLINE_S)
        assert line is not None, f"the server ended:\n{self.stderr}"
        return line

    def say(self, word):
        self.process.stdin.write(word.encode() + b"\n")
        self.process.stdin.flush()

    def ask(self, word):
        self.say(word)
        return self.answer()

    def calls(self):
        return self.ask("stats")["calls"]

    def wait_end(self, outcome="normally"):
        """run() ends as said, the mount goes, and no descriptor is left."""
        assert self.answer() == {"ended": outcome}
        last = self.answer()
        assert last == {"unmounted": True, "descriptors_left": 0}
        self.process.wait(DEADLINE_S)
        assert self.process.returncode == 0

    def stop(self):
        self.say("stop")
        self.wait_end()

    def clean_up(self):
        self._watchdog.cancel()
        self.process.kill()
        self.process.wait(DEADLINE_S)
        for thread in self._threads:
            thread.join(DEADLINE_S)
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            with contextlib.suppress(OSError):
                pipe.close()


@pytest.fixture
def mountpoint(tmp_path):
    path = tmp_path / "mnt"
    path.mkdir()
    yield path
    while mountinfo.find_mount(str(path)) is not None:
        mounting.unmount_lazily(str(path))


@pytest.fixture
def start(mountpoint):
    servers = []

    def start_server(*arguments, path=mountpoint, env=None, prefix=()):
        server = Server(path, *arguments, env=env, prefix=prefix)
        servers.append(server)
        server.ready = server.answer()
        return server

    yield start_server
    for server in servers:
        server.clean_up()


_children = []


def child(code, *arguments):
    """A process of its own which may hang or be killed."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", f"import os, sys, time\n{code}", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    _children.append(process)
    return process


@pytest.fixture(autouse=True)
def no_child_left():
    yield
    # Set up before `start`, so torn down after it: no child is in a handler's hands any more.
    while _children:
        process = _children.pop()
        process.kill()
        process.stdout.close()
        process.stderr.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(DEADLINE_S)


GONE = {str(errno.ENOTCONN), str(errno.ECONNABORTED)}
"""What a caller gets whose request was read but never answered."""

STAT = """
try: os.stat(sys.argv[1])
except OSError as error: print(error.errno, flush=True)
else: print(0, flush=True)
"""


def finish(process):
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert not errors.strip() or process.returncode < 0, errors
    return output.decode().strip()


def in_its_request(process):
    """Wait until *process* sleeps in the kernel for a FUSE daemon's answer."""
    where = Path(f"/proc/{process.pid}/wchan")
    wait_for(lambda: where.read_text() == "request_wait_answer", "a caller to be in its request")


def open_fuse_control(tmp_path, request):
    """The fusectl file system on a directory of our own."""
    path = tmp_path / "fusectl"
    path.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", path], check=True)
    request.addfinalizer(lambda: mounting.unmount_quietly(str(path)))
    return path


# ----------------------------------------------------------------- the three ways to be served


@pytest.mark.parametrize("tuning", TUNINGS)
def test_files_are_written_read_and_listed(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    assert server.ready["tuned"] is (tuning == "all")
    assert bool(server.ready["reason"]) is (tuning != "all")
    assert server.ready["fd"] > 2
    content = os.urandom(3_000_000)
    (mountpoint / "a").write_bytes(content)
    assert (mountpoint / "a").read_bytes() == content
    with (mountpoint / "a").open("r+b") as file:
        file.seek(1_000_000)
        file.write(b"x")
        file.truncate(1_500_000)
    assert (mountpoint / "a").read_bytes() == content[:1_000_000] + b"x" + content[
        1_000_001:1_500_000
    ]
    (mountpoint / "d").mkdir()
    (mountpoint / "l").symlink_to("a")
    assert sorted(os.listdir(mountpoint)) == ["a", "d", "l"]
    os.unlink(mountpoint / "a")
    assert not (mountpoint / "a").exists()
    server.stop()
    assert mountinfo.find_mount(str(mountpoint)) is None
    assert os.listdir(mountpoint) == []


@pytest.mark.parametrize("tuning", TUNINGS)
def test_two_sessions_one_after_the_other_in_one_process(start, mountpoint, tuning):
    server = start("--tuning", tuning, "--twice")
    (mountpoint / "a").write_bytes(b"second")
    assert (mountpoint / "a").read_bytes() == b"second"
    server.stop()
    assert server.stderr == ""


def test_the_environment_forces_the_stock_path(start, mountpoint):
    server = start(env={"REPLFS_FUSE_TUNING": STOCK})
    assert server.ready["reason"] == "the stock loop was asked for"
    (mountpoint / "a").write_bytes(b"x")
    server.stop()


@pytest.mark.parametrize(
    ("tuning", "broken", "reason"),
    [
        ("all", "init", "another kind"),
        ("loop", "version", "pyfuse3 3.6.0"),
        ("loop", "names", "no _wait_fuse_readable"),
    ],
)
def test_what_is_not_as_expected_is_not_used(start, mountpoint, tuning, broken, reason):
    server = start("--tuning", tuning, "--broken", broken)
    assert server.ready["tuned"] is False
    assert reason in server.ready["reason"]
    if broken == "names":
        # Not even pyfuse3 can work without: that it was not touched is all there is to see.
        return
    (mountpoint / "a").write_bytes(b"x")
    assert (mountpoint / "a").read_bytes() == b"x"
    assert (server.ask("stats")["session"]["received"] > 0) is (broken == "init")
    server.stop()
    assert mountinfo.find_mount(str(mountpoint)) is None


def test_a_user_other_than_root_falls_back_to_fusermount(start, tmp_path, mountpoint, request):
    os.chown(mountpoint, 65534, 65534)
    for folder in [tmp_path, *tmp_path.parents]:
        mode = folder.stat().st_mode
        if not mode & 0o001:
            folder.chmod(mode | 0o001)
            request.addfinalizer(lambda folder=folder, mode=mode: folder.chmod(mode))
    # Not everywhere is /dev/fuse for everyone: give the server one that is, in a namespace.
    own_device = """
mknod "$1/fuse" c 10 229 && chmod 666 "$1/fuse" && mount --bind "$1/fuse" /dev/fuse || exit
shift
exec "$@"
"""
    prefix = ("unshare", "--mount", "sh", "-c", own_device, "sh", str(tmp_path))
    server = start("--uid", "65534", "-o", '{"allow_other": false}', prefix=prefix)
    assert server.ready["tuned"] is False
    assert "root" in server.ready["reason"]
    enter = (
        "nsenter",
        "-t",
        str(server.process.pid),
        "-m",
        "--setuid",
        "65534",
        "--setgid",
        "65534",
        "--",
    )
    write_and_read = 'echo x > "$0" && cat "$0"'
    output = subprocess.run(
        [*enter, "sh", "-c", write_and_read, str(mountpoint / "a")],
        check=True,
        capture_output=True,
        timeout=DEADLINE_S,
    )
    assert output.stdout == b"x\n"
    assert server.ask("stats")["session"]["received"] > 0
    server.stop()
    assert server.stderr == ""


# ----------------------------------------------------------------- what is agreed with the kernel


def test_writes_do_not_ask_for_capabilities(start, mountpoint):
    server = start()
    with (mountpoint / "a").open("wb", buffering=0) as file:
        server.calls()
        for _ in range(50):
            file.write(b"x" * 4096)
        calls = server.calls()
    assert calls["write"] == 50
    assert calls.get("getxattr", 0) <= 2
    server.stop()


def test_the_umask_is_left_to_the_handlers(start, mountpoint):
    server = start()
    finish(
        child(
            "os.umask(0o027); os.chdir(sys.argv[1]); os.mkdir('d');"
            "os.close(os.open('f', os.O_CREAT | os.O_WRONLY, 0o666))",
            mountpoint,
        )
    )
    assert server.ask("stats")["created"] == {"d": [0o777, 0o027], "f": [0o666, 0o027]}
    assert (mountpoint / "d").stat().st_mode & 0o777 == 0o750
    server.stop()


def test_closes_are_told_unless_nobody_has_to_know(start, mountpoint):
    server = start()
    for name in ("silent", "loud"):
        (mountpoint / name).write_bytes(b"x")
        server.calls()
        assert (mountpoint / name).read_bytes() == b"x"
        calls = wait_for(lambda: server.calls(), "the calls")
        assert calls.get("flush", 0) == (name == "loud")
    server.stop()


def test_symlinks_are_cached_by_the_kernel(start, mountpoint):
    server = start()
    (mountpoint / "l").symlink_to("target")
    for _ in range(10):
        assert os.readlink(mountpoint / "l") == "target"
    assert server.calls()["readlink"] == 1
    server.stop()


def test_max_background_reaches_the_kernel(start, mountpoint, tmp_path, request):
    server = start("-o", '{"max_background": 77}')
    mount = mountinfo.find_mount(str(mountpoint))
    control = open_fuse_control(tmp_path, request) / mount.device.split(":")[1]
    assert (control / "max_background").read_text().strip() == "77"
    assert (control / "congestion_threshold").read_text().strip() == "57"
    server.stop()


@pytest.mark.parametrize("tuning", TUNINGS)
def test_mount_options_reach_the_kernel(start, mountpoint, tuning):
    options = {
        "read_only": True,
        "fsname": "/a, b",
        "nosuid": True,
        "nodev": True,
        "noexec": True,
        "noatime": True,
        "allow_other": False,
    }
    server = start("--tuning", tuning, "-o", json.dumps(options))
    mount = mountinfo.find_mount(str(mountpoint))
    assert {"ro", "nosuid", "nodev", "noexec", "noatime"} <= set(mount.options.split(","))
    assert "allow_other" not in mount.super_options
    assert (mount.fstype, mount.source) == ("fuse.replfs", "/a, b")
    with pytest.raises(OSError, match="Read-only"):
        (mountpoint / "a").write_bytes(b"")
    server.stop()
    server = start("--tuning", tuning)
    mount = mountinfo.find_mount(str(mountpoint))
    assert not {"ro", "nosuid", "nodev", "noexec"} & set(mount.options.split(","))
    assert "allow_other" in mount.super_options
    assert "default_permissions" in mount.super_options
    server.stop()


def test_pages_are_kept_over_a_new_mtime_if_the_mount_is_exclusive(start, mountpoint):
    reads = {}
    for exclusive in (False, True):
        server = start("--uncached", "-o", json.dumps({"exclusive": exclusive}))
        (mountpoint / "a").write_bytes(b"x" * 4096)
        with (mountpoint / "a").open("r+b", buffering=0) as file:
            server.calls()
            for _ in range(5):
                assert os.pwrite(file.fileno(), b"y" * 4096, 0) == 4096
                os.fstat(file.fileno())
                assert os.pread(file.fileno(), 4096, 0) == b"y" * 4096
            reads[exclusive] = server.calls().get("read", 0)
        server.stop()
    assert reads[True] == 0
    assert reads[False] == 5


# ----------------------------------------------------------------- concurrency


def at_gate(server, count):
    wait_for(lambda: server.ask("stats")["at_gate"] == count, f"{count} callers at the gate")


@pytest.mark.parametrize("tuning", TUNINGS)
def test_32_callers_are_served_at_the_same_time(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    for n in range(40):
        (mountpoint / f"d{n}").mkdir()
    # 40 callers, 32 workers: the last eight wait for a worker.
    callers = [child(STAT, mountpoint / f"d{n}" / "gate") for n in range(40)]
    at_gate(server, 32)
    server.say("open")
    at_gate(server, 8)
    server.say("open")
    assert [finish(caller) for caller in callers] == [str(errno.ENOENT)] * 40
    stats = server.ask("stats")
    assert stats["passed"] == 40
    assert stats["most_at_gate"] == 32
    server.stop()


def test_lookups_in_one_directory_are_parallel(start, mountpoint):
    server = start()
    callers = [child(STAT, mountpoint / f"gate-{n}") for n in range(5)]
    at_gate(server, 5)
    server.say("open")
    assert [finish(caller) for caller in callers] == [str(errno.ENOENT)] * 5
    server.stop()


def test_others_are_served_while_all_but_one_worker_wait(start, mountpoint):
    server = start("--workers", "4")
    # Not in the root: a lookup in flight keeps others from creating in its directory.
    (mountpoint / "d").mkdir()
    callers = [child(STAT, mountpoint / "d" / f"gate-{n}") for n in range(3)]
    at_gate(server, 3)
    for n in range(100):
        (mountpoint / "a").write_bytes(b"%d" % n)
        assert (mountpoint / "a").read_bytes() == b"%d" % n
    assert server.ask("stats")["session"]["in_flight"] == 3
    server.say("cancel")
    server.wait_end("cancelled")
    assert all(finish(c) in GONE for c in callers)


@pytest.mark.parametrize("how", [("--delay-ms", "0.2"), ("--checkpoints",)])
def test_handlers_that_wait_and_handlers_that_do_not(start, mountpoint, how):
    """Each write waits, so that workers take turns at the descriptor all the time."""
    server = start(*how)
    code = """
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
for n in range(150):
    os.pwrite(fd, b'%08d' % n, 8 * n); os.fstat(fd)
    assert os.pread(fd, 8, 8 * n) == b'%08d' % n
print('done')
"""
    callers = [child(code, mountpoint / f"file-{n}") for n in range(4)]
    assert [finish(caller) for caller in callers] == ["done"] * 4
    for n in range(4):
        expected = b"".join(b"%08d" % k for k in range(150))
        assert (mountpoint / f"file-{n}").read_bytes() == expected
    server.stop()


@pytest.mark.parametrize("delay_ms", ["0", "0.2"])
def test_a_request_that_is_gone_when_it_is_read(start, mountpoint, delay_ms):
    """The poll says "readable" when nothing is there, as when a caller was killed just then."""
    server = start("--spurious", "7", "--delay-ms", delay_ms)
    with (mountpoint / "a").open("wb", buffering=0) as file:
        for n in range(300):
            file.write(b"%03d" % n)
            if n % 10 == 0:
                time.sleep(0.001)  # so that the server finds nothing there, now and then
    assert (mountpoint / "a").read_bytes() == b"".join(b"%03d" % n for n in range(300))
    assert server.ask("stats")["session"]["withdrawn"] > 0
    server.stop()
    assert server.stderr == ""


# ----------------------------------------------------------------- callers that go away


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_caller_killed_while_its_handler_waits(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    (mountpoint / "d").mkdir()
    caller = child(STAT, mountpoint / "d" / "gate")
    at_gate(server, 1)
    caller.kill()
    (mountpoint / "a").write_bytes(b"alive")
    assert caller.poll() is None
    server.say("open")
    assert caller.wait(DEADLINE_S) == -signal.SIGKILL
    assert (mountpoint / "a").read_bytes() == b"alive"
    caller.communicate()
    server.stop()


def test_what_a_killed_caller_opened_is_released(start, mountpoint):
    """The kernel takes the reply, whoever waits for it: no handle is left over."""
    server = start()
    caller = child("os.open(sys.argv[1], os.O_CREAT | os.O_EXCL)", mountpoint / "later")
    at_gate(server, 1)
    caller.kill()
    server.say("open")
    assert caller.wait(DEADLINE_S) == -signal.SIGKILL
    caller.communicate()
    assert (mountpoint / "later").exists()
    wait_for(lambda: server.calls().get("release"), "the handle to be released")
    server.stop()
    assert server.stderr == ""


def test_callers_killed_at_any_moment(start, mountpoint):
    server = start("--delay-ms", "0.05")
    code = """
names = [os.path.join(sys.argv[1], 'n%d' % n) for n in range(100)]
print('up', flush=True)
while True:
    for name in names:
        try: os.stat(name)
        except FileNotFoundError: pass
"""
    for n in range(24):
        caller = child(code, mountpoint)
        assert caller.stdout.readline() == b"up\n"
        time.sleep(0.001 * (n % 5))
        caller.kill()
        assert caller.wait(DEADLINE_S) == -signal.SIGKILL
        caller.communicate()
    (mountpoint / "a").write_bytes(b"alive")
    assert (mountpoint / "a").read_bytes() == b"alive"
    server.stop()


def test_a_caller_killed_before_its_request_is_read(start, mountpoint):
    server = start()
    (mountpoint / "a").write_bytes(b"x")
    os.kill(server.process.pid, signal.SIGSTOP)
    callers = [child(STAT, mountpoint / f"n{n}") for n in range(3)]
    try:
        for caller in callers:
            in_its_request(caller)
            caller.kill()
            assert caller.wait(DEADLINE_S) == -signal.SIGKILL
            caller.communicate()
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    assert (mountpoint / "a").read_bytes() == b"x"
    server.stop()


# ----------------------------------------------------------------- ways to end


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("command", [["umount"], ["fusermount3", "-u"], ["umount", "-l"]])
def test_an_unmount_from_outside_ends_it(start, mountpoint, tuning, command):
    server = start("--tuning", tuning)
    (mountpoint / "a").write_bytes(b"x")
    subprocess.run([*command, str(mountpoint)], check=True)
    server.wait_end()
    # The kernel sends RELEASE after close(2) has returned, and an unmount may overtake the reply.
    late = "fuse_release(): fuse_reply_* failed with No such file or directory"
    assert [line for line in server.stderr.splitlines() if late not in line] == []


@pytest.mark.parametrize("tuning", TUNINGS)
def test_an_aborted_connection_ends_it(start, mountpoint, tuning, tmp_path, request):
    server = start("--tuning", tuning)
    caller = child(STAT, mountpoint / "gate")
    at_gate(server, 1)
    device = mountinfo.find_mount(str(mountpoint)).device
    control = open_fuse_control(tmp_path, request)
    (control / device.split(":")[1] / "abort").write_text("1")
    assert finish(caller) in GONE
    server.say("open")
    server.wait_end()
    if tuning == "all":
        assert mountinfo.find_mount(str(mountpoint)) is None
    else:
        assert mountinfo.is_dead_mount(str(mountpoint), timeout_s=DEADLINE_S)


@pytest.mark.parametrize("tuning", TUNINGS)
def test_stop_lets_handlers_in_flight_finish(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    for n in range(3):
        (mountpoint / f"d{n}").mkdir()
    callers = [child(STAT, mountpoint / f"d{n}" / "gate") for n in range(3)]
    at_gate(server, 3)
    server.say("stop")
    server.say("open")
    server.wait_end()
    assert [finish(caller) for caller in callers] == [str(errno.ENOENT)] * 3


def test_stop_does_not_take_what_was_not_received(start, mountpoint):
    server = start()
    early = child(STAT, mountpoint / "gate-1")
    at_gate(server, 1)
    server.say("stop")
    assert server.ask("stats")["at_gate"] == 1
    late = child(STAT, mountpoint / "gate-2")
    in_its_request(late)
    server.say("open")
    server.wait_end()
    assert finish(early) == str(errno.ENOENT)
    assert finish(late) in GONE


@pytest.mark.parametrize("tuning", TUNINGS)
def test_an_escaped_exception_ends_it(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    (mountpoint / "d").mkdir()
    other = child(STAT, mountpoint / "d" / "gate")
    at_gate(server, 1)
    boom = child(STAT, mountpoint / "boom")
    if tuning != STOCK:
        wait_for(lambda: server.ask("stats")["calls"].get("lookup"), "the exception")
        server.say("open")
    server.wait_end("handler")
    assert finish(boom) in GONE
    # pyfuse3's own loop cuts the others off.
    assert finish(other) in ({str(errno.ENOENT)} if tuning != STOCK else GONE)


def test_detach_serves_open_files_to_the_end(start, mountpoint):
    server = start()
    with (mountpoint / "a").open("w+b", buffering=0) as file:
        file.write(b"before")
        assert server.ask("detach") == {"detached": True}
        assert mountinfo.find_mount(str(mountpoint)) is None
        assert os.listdir(mountpoint) == []
        file.write(b" and after")
        assert os.pread(file.fileno(), 100, 0) == b"before and after"
        assert server.ask("stats")["session"]["in_flight"] == 0
    server.wait_end()


def test_detach_of_an_idle_mount_ends_it(start, mountpoint):
    server = start()
    (mountpoint / "a").write_bytes(b"x" * 100_000)
    server.say("detach")
    assert {"detached": True} in [server.answer(), server.answer()]
    assert server.answer() == {"unmounted": True, "descriptors_left": 0}


@pytest.mark.parametrize("tuning", TUNINGS)
def test_dirty_mapped_pages_do_not_hang_the_end(start, mountpoint, tuning):
    server = start("--tuning", tuning, "-o", '{"writeback": true}')
    code = """
import mmap
fd = os.open(sys.argv[1], os.O_CREAT | os.O_RDWR)
os.ftruncate(fd, 1 << 20)
area = mmap.mmap(fd, 1 << 20)
area[:] = b'x' * (1 << 20)
print('dirty', flush=True)
time.sleep(1000)
"""
    caller = child(code, mountpoint / "a")
    assert caller.stdout.readline() == b"dirty\n"
    server.stop()
    caller.kill()
    assert caller.wait(DEADLINE_S) == -signal.SIGKILL
    caller.communicate()
    wait_for(lambda: mountinfo.find_mount(str(mountpoint)) is None, "the mount to go")


@pytest.mark.parametrize("tuning", TUNINGS)
def test_only_its_own_mount_is_unmounted(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    subprocess.run(["mount", "-t", "tmpfs", "over-it", str(mountpoint)], check=True)
    (mountpoint / "theirs").write_bytes(b"x")
    server.stop()
    assert mountinfo.find_mount(str(mountpoint)).source == "over-it"
    assert os.listdir(mountpoint) == ["theirs"]


# ----------------------------------------------------------------- daemons that die, or hang


@pytest.mark.parametrize("tuning", TUNINGS)
def test_a_killed_daemon_leaves_a_dead_mount_that_is_recognised(start, mountpoint, tuning):
    server = start("--tuning", tuning)
    assert not mountinfo.is_dead_mount(str(mountpoint))
    server.process.kill()
    server.process.wait(DEADLINE_S)
    assert mountinfo.is_dead_mount(str(mountpoint), timeout_s=DEADLINE_S)
    refused = start("--tuning", tuning).ready
    assert refused["kind"] == "UsageError"
    assert "daemon that died" in refused["error"]
    mounting.unmount_lazily(str(mountpoint))
    assert not mountinfo.is_dead_mount(str(mountpoint))
    again = start("--tuning", tuning)
    (mountpoint / "a").write_bytes(b"x")
    again.stop()


def test_a_hung_daemon_is_not_dead_and_does_not_hang_the_question(start, mountpoint):
    server = start()
    os.kill(server.process.pid, signal.SIGSTOP)
    try:
        assert not mountinfo.is_dead_mount(str(mountpoint), timeout_s=0.2)
    finally:
        os.kill(server.process.pid, signal.SIGCONT)
    server.stop()


# ----------------------------------------------------------------- mountpoints


@pytest.mark.parametrize("name", ["with space", "tab\tand\\slash", "new\nline", b"\xff\xe9", "é"])
def test_any_directory_name(start, tmp_path, name):
    path = tmp_path / os.fsdecode(name)
    path.mkdir()
    server = start(path=path)
    try:
        (path / "a").write_bytes(b"x")
        assert os.listdir(path) == ["a"]
        server.stop()
    finally:
        mounting.unmount_quietly(str(path))
    assert mountinfo.find_mount(str(path)) is None


def test_a_mountpoint_behind_a_symlink_and_not_empty(start, mountpoint, tmp_path):
    (mountpoint / "covered").write_bytes(b"")
    link = tmp_path / "link"
    link.symlink_to(mountpoint)
    server = start(path=link)
    assert os.listdir(mountpoint) == []
    server.stop()
    assert os.listdir(mountpoint) == ["covered"]


def test_what_cannot_be_mounted_says_so_in_one_sentence(start, mountpoint, tmp_path):
    missing = start(path=tmp_path / "missing").ready
    assert missing["kind"] == "UsageError"
    assert missing["error"].endswith("No such file or directory")
    other = tmp_path / "other"
    other.mkdir()
    server = start("--other", str(other))
    assert server.ready["kind"] == "UsageError"
    assert "one process, one mount" in server.ready["error"]
    assert server.answer()["ready"]
    twice = start().ready
    assert twice["kind"] == "UsageError"
    assert "already" in twice["error"]
    (mountpoint / "a").write_bytes(b"still served")
    server.stop()
    assert mountinfo.find_mount(str(other)) is None
