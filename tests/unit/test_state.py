"""The durable state: who a STORE is, what it keeps through kill -9, full disks and damage."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest
from helpers.states import opened

import replfs
from replfs.core.dirty import DirtyLog
from replfs.core.marks import DropAll, DropObject, NotKept
from replfs.core.regions import REGION_SIZE
from replfs.errors import StoreBusy, StoreError
from replfs.store import binding, state
from replfs.store.identity import HISTORY_MAX
from replfs.store.state import State

ROOT = Path(replfs.__path__[0]).parent
OBJECTS = [number.to_bytes(16, "big") for number in range(1, 4000)]
GENERATION = b"G" * 16


@pytest.fixture
def store(tmp_path):
    directory = tmp_path / "store"
    directory.mkdir()
    return directory


def content(log: DirtyLog) -> list[Any]:
    """All that a log holds, to compare."""
    return sorted(
        (
            object_id,
            marks.flags,
            marks.tail,
            marks.handle,
            sorted(marks.names or ()),
            list(log.dirty_regions(object_id, 1 << 45)),
        )
        for object_id in log.objects()
        if (marks := log.marks(object_id)) is not None
    )


def run(script: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """Another process, to be killed; its standard input keeps it alive."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n" + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def kill_after(process: subprocess.Popen[str], lines: int) -> list[str]:
    """Kill it once it has printed so many lines; all complete lines it has printed."""
    out = process.stdout
    assert out is not None
    with process:
        try:
            read = list(itertools.islice(out, lines))
        finally:
            process.send_signal(signal.SIGKILL)
        read += out.readlines()
    assert len(read) >= lines, "the process ended by itself"
    return [line.strip() for line in read if line.endswith("\n")]


# Who -------------------------------------------------------------------------------------------


def test_a_new_store(store):
    with opened(store) as it:
        identity = it.identity()
        assert len(identity.node) == 16
        assert identity.role == "unset"
        assert identity.uninitialized
        assert not it.unclean
        assert not it.memory_lost
        assert it.is_in_place()
    assert sorted(os.listdir(store)) == [".replfs"]
    assert {"limbo", "kept", "lock", "state.db"} <= set(os.listdir(store / ".replfs"))
    assert (store / ".replfs").stat().st_mode & 0o777 == 0o700


def test_identity_is_kept(store):
    with opened(store) as it:
        first = it.update(
            volume=b"V" * 16, role="primary", name="one", generation=GENERATION, inconsistent=True
        )
    with opened(store) as it:
        assert it.identity() == first


def test_a_new_generation_remembers_the_one_before(store):
    with opened(store) as it:
        generations = [it.new_generation() for _ in range(HISTORY_MAX + 5)]
        assert len(set(generations)) == len(generations)
        it.update(history=[*it.identity().history, GENERATION])
    with opened(store) as it:
        assert it.identity().generation == generations[-1]
        assert it.identity().history == tuple(generations[-2 : -HISTORY_MAX - 2 : -1])


@pytest.mark.parametrize(
    "changes",
    [{"role": "boss"}, {"volume": b"short"}, {"generation": b"x" * 17}, {"node": b""},
     {"history": [b"y"]}],
)  # fmt: skip
def test_impossible_values_are_refused(store, changes):
    with opened(store) as it:
        before = it.identity()
        with pytest.raises(ValueError, match=r"16 bytes|impossible"):
            it.update(**changes)
        with pytest.raises(TypeError):
            it.update(colour="red")
        assert it.identity() == before


def test_one_process_at_a_time(store):
    directory = os.open(store, os.O_RDONLY)
    with opened(store), pytest.raises(StoreBusy, match=rf"{store}.*{os.getpid()}"):
        State(directory)
    State(directory).close()
    os.close(directory)


def test_the_lock_goes_with_the_process(store):
    script = f"""
        import os
        from replfs.store.state import State
        it = State(os.open({str(store)!r}, os.O_RDONLY))
        print("open", flush=True)
        sys.stdin.read()
    """
    process = run(script)
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    with pytest.raises(StoreBusy, match=str(process.pid)), opened(store):
        pass
    kill_after(process, 0)
    with opened(store):
        pass


def test_closing_twice_is_harmless(store):
    directory = os.open(store, os.O_RDONLY)
    it = State(directory)
    it.close()
    it.close()
    os.close(directory)


def test_no_descriptor_is_left_open(store):
    with opened(store):
        pass
    before = sorted(os.listdir("/proc/self/fd"))
    with opened(store) as it:
        it.flush(durable=True)
    shutil.rmtree(store / ".replfs/limbo")
    (store / ".replfs/state.db").write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError), opened(store):
        pass
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_copy_is_not_the_original(store, tmp_path):
    with opened(store) as it:
        assert it.is_in_place()
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-a", str(store), str(copy)], check=True)
    with opened(copy) as it:
        assert not it.is_in_place()
        it.update(binding=it.place())
        assert it.is_in_place()
    # A rename within the filesystem is no move.
    store.rename(tmp_path / "renamed")
    with opened(tmp_path / "renamed") as it:
        assert it.is_in_place()


def test_a_place_is_compared_by_what_is_known():
    here = binding.Binding(machine="m", filesystem="u", fsid=1, inode=2)

    def other(**changes):
        values: dict[str, Any] = {"machine": "m", "filesystem": "u", "fsid": 1, "inode": 2}
        return binding.Binding(**(values | changes))

    assert here.is_same_place(other())
    assert here.digest() == other().digest()
    assert here.is_same_place(other(fsid=9)), "a device number may change"
    assert not here.is_same_place(other(filesystem="w"))
    assert here.is_same_place(other(filesystem=""))
    assert not here.is_same_place(other(filesystem="", fsid=9))
    assert not here.is_same_place(other(machine="n"))
    assert not here.is_same_place(other(inode=3))
    assert here.digest() != other(inode=3).digest()


def test_loss_of_memory(store, monkeypatch):
    with opened(store) as it:
        it.started()
    with opened(store) as it:
        assert it.unclean
        assert not it.memory_lost, "the process was killed, the machine was not"
    for name in ("boot_id", "mount_id"):
        with monkeypatch.context() as patch:
            patch.setattr(state, name, lambda *_: "another")
            with opened(store) as it:
                assert it.unclean
                assert it.memory_lost
    with opened(store) as it:
        it.started()
        it.stopped_cleanly()
    monkeypatch.setattr(state, "boot_id", lambda: "another")
    with opened(store) as it:
        assert not it.unclean
        assert not it.memory_lost


def test_boot_and_mount_have_names(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    other = os.open("/proc", os.O_RDONLY)
    assert len(binding.boot_id()) == 36
    assert binding.mount_id(directory) == binding.mount_id(directory)
    assert binding.mount_id(directory) != binding.mount_id(other)
    os.close(directory)
    os.close(other)


# Peers -----------------------------------------------------------------------------------------


def test_peers(store):
    with opened(store) as it:
        it.save_peer("b", endpoint="tcp://b:1", settings={"x": "y"})
        it.save_peer("a", endpoint="tcp://a:1")
        it.save_peer("b", state="in_sync", node=b"N" * 16)
    with opened(store) as it:
        first, second = it.peers()
        assert (first.name, first.endpoint) == ("a", "tcp://a:1")
        assert (second.endpoint, second.state) == ("tcp://b:1", "in_sync")
        assert (second.node, second.settings) == (b"N" * 16, {"x": "y"})
        it.remove_peer("a")
        assert [peer.name for peer in it.peers()] == ["b"]


def test_an_unknown_peer_has_no_log(store):
    with opened(store) as it:
        for call in (it.journal, it.load_log, it.remove_peer):
            with pytest.raises(StoreError, match="no peer named nobody"):
                call("nobody")


def test_a_peer_added_again_starts_with_an_empty_log(store):
    with opened(store) as it:
        it.save_peer("a")
        it.save_peer("b")
        it.load_log("a").mark_data(OBJECTS[0], 0, 1)
        it.load_log("b").mark_data(OBJECTS[1], 0, 1)
        it.load_log("a").clear_attrs(OBJECTS[0])  # pending, and not to be saved for a new peer
        assert it.statistics().pending == 1
        it.remove_peer("a")
        assert it.statistics().pending == 0
        it.save_peer("a")
        assert it.load_log("a").is_empty
        assert list(it.load_log("b").objects()) == [OBJECTS[1]]


# Logs ------------------------------------------------------------------------------------------


def scribble(log: DirtyLog, seed: int, count: int) -> None:
    """Marks and clears of every kind."""
    dice = random.Random(seed)
    for _ in range(count):
        object_id = dice.choice(OBJECTS[:20])
        start = dice.choice([0, 5, 70, 300, 10000]) * REGION_SIZE + dice.randrange(REGION_SIZE)
        name = b"name%d" % dice.randrange(5)
        match dice.randrange(13):
            case 0 | 1 | 2:
                stop = start + dice.randrange(1, 1 << 26)
                log.mark_data(object_id, start, stop, compare=dice.random() < 0.3)
            case 3:
                log.mark_tail(object_id, start, size=start * 2, handle=b"h%d" % dice.randrange(3))
            case 4:
                log.mark_attrs(object_id)
            case 5 | 6:
                log.mark_name(object_id, name, removal=dice.random() < 0.3)
            case 7:
                log.mark_names_all(object_id, deep=dice.random() < 0.5)
            case 8:
                log.clear_regions(object_id, start // REGION_SIZE, start // REGION_SIZE + 300)
            case 9:
                log.clear_tail(object_id, dice.choice([None, 200]))
            case 10:
                log.clear_attrs(object_id)
            case 11:
                log.clear_name(object_id, dice.choice([name, b""]))
            case _:
                log.forget(object_id)


@pytest.mark.parametrize("seed", range(8))
def test_a_log_is_loaded_as_it_was(store, seed):
    with opened(store) as it:
        it.save_peer("a")
        it.save_peer("b")
        first, second = it.load_log("a"), it.load_log("b")
        scribble(first, seed, 150)
        with it.batch():
            scribble(second, seed + 100, 150)
            scribble(first, seed + 200, 50)
        expected = content(first), content(second)
    with opened(store) as it:
        first, second = it.load_log("a"), it.load_log("b")
        assert (content(first), content(second)) == expected
        counts = first.dirty_files, first.dirty_names, first.dirty_bytes, first.is_empty
        scribble(first, seed + 300, 50)
        second.discard()
        expected = content(first), []
    with opened(store) as it:
        again = it.load_log("a")
        assert (content(again), content(it.load_log("b"))) == expected
        assert counts[3] == (not counts[0] and not counts[1] and not counts[2]) or not counts[3]


def test_logs_saved_anew_are_what_they_are_in_memory(store):
    """Also where clears were lost before, on a full disk."""
    with opened(store) as it:
        it.save_peer("a")
        it.save_peer("b")
        log, other = it.load_log("a"), it.load_log("b")
        other.mark_attrs(OBJECTS[7])
        for object_id in OBJECTS[:4]:
            log.mark_data(object_id, 0, 1, handle=b"h")
        log.mark_data(OBJECTS[4], 3 * REGION_SIZE, 600 * REGION_SIZE)
        log.mark_data(OBJECTS[4], 255 * REGION_SIZE, 258 * REGION_SIZE)
        log.mark_tail(OBJECTS[5], 9 * REGION_SIZE, compare=True)
        log.mark_name(OBJECTS[6], b"gone", removal=True)
        log.mark_names_all(OBJECTS[6], deep=True)
        log.attach(NotKept())  # the clears that follow are lost
        for object_id in OBJECTS[:3]:
            log.forget(object_id)
        it.are_clears_lost = True
        assert content(it.load_log("a")) != content(log)
        it.save_logs({"a": log})
        assert not it.are_clears_lost
        again = it.load_log("a")
        assert content(again) == content(log)
        assert list(again.removals()) == [(OBJECTS[6], b"gone")]
        assert content(it.load_log("b")) == content(other)


def test_clears_are_saved_lazily_and_marks_are_not(store):
    with opened(store) as it:
        it.save_peer("a")
        log = it.load_log("a")
        for object_id in OBJECTS[:10]:
            log.mark_data(object_id, 0, 1)
        before = it.statistics().commits
        for object_id in OBJECTS[:10]:
            log.forget(object_id)
        assert it.statistics().commits == before
        log.mark_attrs(OBJECTS[10])
        assert it.statistics().commits == before + 1
        assert list(it.load_log("a").objects()) == [OBJECTS[10]]


def test_many_lazy_clears_do_not_pile_up(store):
    with opened(store) as it:
        it.save_peer("a")
        log = it.load_log("a")
        with it.batch():
            for object_id in OBJECTS:
                log.mark_data(object_id, 0, 1)
        for object_id in OBJECTS:
            log.forget(object_id)
        assert it.statistics().pending <= 1024
        it.flush()
        assert it.statistics().pending == 0
        assert it.load_log("a").is_empty


def test_harden_runs_beside_marks_and_keeps_the_log_short(store):
    """In another thread, as the node does it; the write-ahead log is moved and starts anew."""
    with opened(store) as it:
        it.save_peer("a")
        log = it.load_log("a")
        stop = threading.Event()
        failures: list[BaseException] = []

        def harden():
            while not stop.is_set():
                try:
                    it.harden()
                except BaseException as error:
                    failures.append(error)
                    return

        thread = threading.Thread(target=harden)
        thread.start()
        try:
            for number in range(6000):
                log.mark_data(
                    OBJECTS[number % 3000], number * REGION_SIZE, number * REGION_SIZE + 1
                )
        finally:
            stop.set()
            thread.join()
        assert failures == []
        it.harden()
        assert it.statistics().checkpoints >= 1
        # It started anew: what follows goes where the beginning was.
        size = (store / ".replfs/state.db-wal").stat().st_size
        for number in range(500):
            log.mark_data(OBJECTS[number], 1 << 40, (1 << 40) + 1)
        assert (store / ".replfs/state.db-wal").stat().st_size == size
        expected = content(log)
    with opened(store) as it:
        assert content(it.load_log("a")) == expected


def test_no_file_of_the_state_is_mapped(store):
    """A disk that dies, or is full, would kill the process by SIGBUS."""
    with opened(store) as it:
        it.save_peer("a")
        it.load_log("a").mark_data(OBJECTS[0], 0, 1)
        it.harden()
        assert not (store / ".replfs/state.db-shm").exists()
        assert "state.db" not in Path("/proc/self/maps").read_text()


# Killed ----------------------------------------------------------------------------------------

MARKING = """
    import os
    from replfs.store.state import State
    it = State(os.open(sys.argv[1], os.O_RDONLY))
    it.save_peer("a")
    log = it.load_log("a")
    print("ready", flush=True)
    for number in range(100000):
        object_id = (number // 3).to_bytes(16, "big")
        if number % 3 == 0:
            log.mark_data(object_id, 65536 * number, 65536 * number + 1)
        elif number % 3 == 1:
            log.mark_name(object_id, b"%d" % number)
        else:
            log.mark_data(object_id, 1 << 40, (1 << 40) + 1)
            log.clear_regions(object_id, 1 << 24, (1 << 24) + 1)
        if number % 500 == 499:
            it.flush(durable=True)
        print(number, flush=True)
"""


@pytest.mark.parametrize("lines", [2, 50, 900, 3500])
def test_every_mark_made_before_a_kill_is_there(store, lines):
    """Marks are not synced to disk, and need not be: the kernel has them."""
    told = kill_after(run(MARKING, str(store)), lines)
    assert told[0] == "ready"
    with opened(store) as it:
        log = it.load_log("a")
        for number in map(int, told[1:]):
            object_id = (number // 3).to_bytes(16, "big")
            if number % 3 == 0:
                start = number * REGION_SIZE
                assert not log.data_is_clean(object_id, start, start + 1)
            elif number % 3 == 1:
                assert not log.name_is_clean(object_id, b"%d" % number)
        # And nothing else but what it was about to tell when it died.
        assert len(log) <= (len(told) + 3) // 3 + 1


def test_a_kill_while_the_state_is_made_leaves_nothing_half_made(store):
    script = """
        import os, sqlite3
        from replfs.store import state
        connect = sqlite3.connect
        def stuck(*arguments):
            connect(*arguments).execute("CREATE TABLE half (made)")
            print("half", flush=True)
            sys.stdin.read()
        sqlite3.connect = stuck
        state.State(os.open(sys.argv[1], os.O_RDONLY))
    """
    assert kill_after(run(script, str(store)), 1) == ["half"]
    assert os.listdir(store) == [".replfs.new"]
    with opened(store) as it:
        assert it.identity().uninitialized
    assert os.listdir(store) == [".replfs"]


# Damaged ---------------------------------------------------------------------------------------


@pytest.fixture
def used(store):
    """A store with a state that holds something, and what its log holds."""
    with opened(store) as it:
        it.update(name="used", generation=GENERATION, history=[b"H" * 16])
        it.save_peer("a", endpoint="tcp://a:1")
        log = it.load_log("a")
        scribble(log, 7, 400)
        expected = content(log)
    return store, store / ".replfs/state.db", expected


def refused(store, match):
    with pytest.raises(StoreError, match=match) as raised, opened(store) as it:
        it.peers()
        it.load_log("a")
    sentence = str(raised.value)
    assert str(store) in sentence
    assert "\n" not in sentence
    assert not isinstance(raised.value, StoreBusy)


def test_a_missing_database_is_refused_and_not_made_anew(used):
    store, path, _ = used
    path.unlink()
    refused(store, r"has a \.replfs without a state\.db; put it back")
    assert not path.exists()


def test_a_file_in_the_place_of_the_directory(store):
    (store / ".replfs").write_bytes(b"mine")
    refused(store, "is not a directory, and that name is reserved; rename it")
    assert (store / ".replfs").read_bytes() == b"mine"


def test_a_link_in_the_place_of_the_directory(store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (store / ".replfs").symlink_to(tmp_path / "elsewhere")
    refused(store, "is not a directory")
    assert os.listdir(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("size", [0, 1, 16, 100, 512, 4095, 4096, 4097, 12288, -4096])
def test_a_truncated_database_is_refused(used, size):
    store, path, _ = used
    os.truncate(path, size if size >= 0 else path.stat().st_size + size)
    before = path.read_bytes()
    refused(store, r"is damaged \(.*\); put a good copy back, or move \.replfs away")
    assert path.read_bytes() == before


def test_another_kind_of_file_is_refused(used):
    store, path, _ = used
    path.write_bytes(b"This is a text file.\n" * 1000)
    refused(store, r"is damaged \(it is not a database\)")


def test_another_database_is_refused(used):
    store, path, _ = used
    path.unlink()
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE meta (key, value, sum)")
    refused(store, "it is not a replfs state")


def test_a_later_format_is_refused(used):
    store, path, _ = used
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("PRAGMA user_version = 2")
    refused(store, "has format 2, this replfs reads 1; use the version of replfs that wrote it")


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM meta",
        "UPDATE meta SET value = x'00'",
        "UPDATE meta SET value = 'text'",
        "UPDATE peers SET sum = sum + 1",
        "UPDATE objects SET flags = 255",
        "UPDATE objects SET object = 'text' WHERE object = (SELECT min(object) FROM objects)",
        "UPDATE objects SET handle = x'0102'",
        "UPDATE regions SET regions = x'ffff'",
        "UPDATE regions SET chunk = chunk + 1000000",
        "UPDATE regions SET chunk = -chunk - 1000000",
        "UPDATE names SET name = 'x' || length(name) || name",
        "UPDATE names SET removal = 1 - removal",
        "DROP TABLE names",
    ],
)
def test_rows_that_were_changed_are_refused(used, statement):
    store, path, _ = used
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.execute(statement)
    refused(store, "is damaged")


@pytest.mark.parametrize("seed", range(40))
def test_overwritten_bytes_are_refused_or_meant_nothing(used, seed):
    """Never another exception, never other marks, never another identity."""
    store, path, expected = used
    dice = random.Random(seed)
    data = bytearray(path.read_bytes())
    at = dice.randrange(len(data))
    length = dice.choice([1, 16, 512, 4096])
    data[at : at + length] = dice.randbytes(min(length, len(data) - at))
    path.write_bytes(data)
    try:
        with opened(store) as it:
            assert it.identity().generation == GENERATION
            assert [peer.endpoint for peer in it.peers()] == ["tcp://a:1"]
            assert content(it.load_log("a")) == expected
    except StoreError as error:
        assert "damaged" in str(error) or "format" in str(error)
    except OSError as error:
        assert error.errno == errno.EIO


def test_an_unfinished_write_ahead_log_is_cut_where_it_ends(store):
    """A torn end was never acknowledged by anybody."""
    kill_after(run(MARKING, str(store), "shared"), 40)
    wal = store / ".replfs/state.db-wal"
    os.truncate(wal, wal.stat().st_size - 1000)
    with opened(store) as it:
        log = it.load_log("a")
        assert not log.data_is_clean(bytes(16), 0, 1)
        assert not log.name_is_clean(bytes(16), b"1")
        scribble(log, 1, 30)


# Full and failing disks --------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path):
    """A tiny ext4 of its own, mounted; gone at the end."""
    if os.geteuid() != 0 or not os.path.exists("/dev/loop-control"):
        pytest.skip("needs root and loop devices")
    image, mountpoint = tmp_path / "image", tmp_path / "disk"
    mountpoint.mkdir()
    with open(image, "wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-b", "4096", str(image)], check=True)
    disk = Disk(image, mountpoint)
    disk.mount()
    yield disk
    disk.unmount()
    assert disk.loops() == ""


class Disk:
    def __init__(self, image: Path, mountpoint: Path) -> None:
        self.image, self.mountpoint = image, mountpoint

    def mount(self) -> None:
        # The loop device goes with the mount.
        subprocess.run(["mount", "-o", "loop", str(self.image), str(self.mountpoint)], check=True)

    def unmount(self) -> None:
        subprocess.run(["umount", str(self.mountpoint)], check=True)

    def loops(self) -> str:
        found = subprocess.run(
            ["losetup", "-j", str(self.image)], check=True, capture_output=True, text=True
        )
        return found.stdout

    def fill(self) -> None:
        with open(self.mountpoint / "filling", "ab", buffering=0) as file:
            before = -1
            # Writing things back may free what was set aside for it.
            while file.tell() != before:
                before = file.tell()
                for size in (1 << 20, 4096, 1):
                    with contextlib.suppress(OSError):
                        while True:
                            file.write(b"x" * size)
                os.fsync(file.fileno())

    def cut_power(self) -> None:
        """Nothing that is not on the disk by now gets there: EXT4_IOC_SHUTDOWN, NOLOGFLUSH."""
        directory = os.open(self.mountpoint, os.O_RDONLY)
        fcntl.ioctl(directory, 0x8004587D, struct.pack("I", 2))
        os.close(directory)

    def make(self) -> Path:
        store = self.mountpoint / "store"
        store.mkdir()
        return store


class DeadDisk:
    """A connection whose disk is gone: what SQLite reads then makes no sense to it."""

    in_transaction = False

    def execute(self, *_: object) -> None:
        error = sqlite3.DatabaseError("database disk image is malformed")
        error.sqlite_errorcode = sqlite3.SQLITE_CORRUPT
        raise error

    def close(self) -> None:
        pass


def test_what_a_dead_disk_does_not_take_is_an_error_of_the_call(store, monkeypatch):
    """It is not known to be damaged: the next start finds that out, and this node lives on."""
    with opened(store) as it:
        before = it.identity()
        with monkeypatch.context() as patch:
            patch.setattr(it._database, "_db", DeadDisk())
            with pytest.raises(OSError, match="cannot be used") as caught:
                it.update(name="another")
        assert caught.value.errno == errno.EIO
        assert it.identity() == before


def test_a_full_disk(small_disk):
    """Marks go on in the reserve; then they fail, and have not been made; then there is space."""
    store = small_disk.make()
    marked = []
    with opened(store) as it:
        it.save_peer("a")
        log = it.load_log("a")
        small_disk.fill()
        with pytest.raises(OSError, match="no space for the state") as raised:
            for object_id in OBJECTS:
                log.mark_data(object_id, 0, 1)
                marked.append(object_id)
        assert raised.value.errno == errno.ENOSPC
        assert len(marked) >= 200
        failed = OBJECTS[len(marked)]
        assert log.object_is_clean(failed)
        assert not it.reserve_space()
        with pytest.raises(OSError, match="no space"):
            for number in range(1000):
                it.update(name=f"name {number}")
        name = f"name {number - 1}" if number else ""
        assert it.identity().name == name
        # Clears cost nothing, and what is marked already is no new mark.
        log.mark_data(marked[0], 0, 1)
        assert log.clear_attrs(marked[0])
    # The state can be closed and opened on a full disk.
    with opened(store) as it:
        log = it.load_log("a")
        assert all(not log.object_is_clean(object_id) for object_id in marked)
        assert log.object_is_clean(failed)
        assert it.identity().name == name
        (small_disk.mountpoint / "filling").unlink()
        assert it.reserve_space()
        log.mark_data(failed, 0, 1)
        it.update(name="other")
    with opened(store) as it:
        assert set(it.load_log("a").objects()) == {*marked, failed}
        assert it.identity().name == "other"


def test_a_batch_on_a_full_disk_is_made_good_before_any_later_mark(small_disk):
    """Its marks count in memory, so a later mark of the same must not pass for saved."""
    store = small_disk.make()
    with opened(store) as it:
        it.save_peer("a")
        it.save_peer("b")
        log, other = it.load_log("a"), it.load_log("b")
        small_disk.fill()
        with pytest.raises(OSError, match="no space"):
            while True:
                other.mark_attrs(os.urandom(16), handle=os.urandom(20000))
        with pytest.raises(OSError, match="no space"), it.batch():
            for object_id in OBJECTS[:500]:
                log.mark_data(object_id, 0, 1)
        assert not log.object_is_clean(OBJECTS[0])
        for again in (log.mark_data, other.mark_data):
            with pytest.raises(OSError, match="no space"):
                again(OBJECTS[0], 0, 1)
        with pytest.raises(OSError, match="no space"):
            log.mark_attrs(OBJECTS[0])
        # Clears that cannot be saved are lost when there are too many; marks are not.
        for object_id in OBJECTS[-1100:]:
            it.journal("b")([DropObject(object_id)], lazily=True)
        (small_disk.mountpoint / "filling").unlink()
        log.mark_data(OBJECTS[0], 0, 1)
        assert it.statistics().pending == 0
        assert content(it.load_log("a")) == content(log)
        assert len(log) == 500


@pytest.mark.parametrize("seed", range(3))
def test_what_was_hardened_outlives_a_power_loss(small_disk, seed):
    """And what was not may be gone, but the state is whole."""
    store = small_disk.make()
    dice = random.Random(seed)
    directory = os.open(store, os.O_RDONLY)
    it = State(directory)
    it.save_peer("a")
    log = it.load_log("a")
    hard = 0
    for number, object_id in enumerate(OBJECTS[: 1500 + dice.randrange(1000)]):
        log.mark_data(object_id, 0, 1)
        if dice.random() < 0.01:
            it.flush(durable=True)
            hard = number + 1
    small_disk.cut_power()
    with contextlib.suppress(OSError):
        it.close()
    os.close(directory)
    small_disk.unmount()
    small_disk.mount()
    with opened(store) as it:
        found = it.load_log("a")
        assert all(not found.object_is_clean(object_id) for object_id in OBJECTS[:hard])
        # In order: what was made later is not there without what was made before.
        assert list(found.objects()) == OBJECTS[: len(found)]


# Covered ---------------------------------------------------------------------------------------

COVERING = """
    import os, subprocess, threading
    from replfs.store.state import State
    store, cover = sys.argv[1:]
    directory = os.open(store, os.O_RDONLY)
    it = State(directory)
    it.save_peer("a")
    log = it.load_log("a")
    subprocess.run(["mount", "--bind", cover, store], check=True)
    try:
        assert os.listdir(store) == [".replfs"]
        for number in range(2500):
            log.mark_data(number.to_bytes(16, "big"), 0, 1)
        thread = threading.Thread(target=it.harden)
        thread.start()
        thread.join()
        it.flush(durable=True)
        assert it.statistics().checkpoints == 1, it.statistics()
        assert it.reserve_space()
        assert it.is_in_place()
        it.stopped_cleanly()
        it.close(covered=True)
        # Left open: to close them SQLite would look for them by their paths.
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        assert any(os.readlink(x).endswith("state.db-wal") for x in links if os.path.islink(x))
    finally:
        subprocess.run(["umount", store], check=True)
    print("done", flush=True)
"""


def test_a_store_may_be_covered_once_it_is_open(store, tmp_path):
    """A mount over STORE hides every path into it: none is used any more."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount")
    cover = tmp_path / "cover"
    (cover / ".replfs").mkdir(parents=True)
    decoys = [cover / ".replfs" / f"state.db{tail}" for tail in ("", "-wal", "-shm")]
    for decoy in decoys:
        decoy.write_bytes(b"decoy")
    with run(COVERING, str(store), str(cover)) as process:
        assert process.stdout is not None
        assert process.stdout.read() == "done\n"
    assert [decoy.read_bytes() for decoy in decoys] == [b"decoy"] * 3
    with opened(store) as it:
        assert len(it.load_log("a")) == 2500


def test_drop_all_is_one_change_for_all_tables(store):
    with opened(store) as it:
        it.save_peer("a")
        log = it.load_log("a")
        scribble(log, 3, 100)
        it.journal("a")([DropAll()])
        assert it.load_log("a").is_empty
