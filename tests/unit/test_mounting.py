"""Parsing of mountinfo and FUSE_INIT, and options; nothing here mounts anything."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from replfs.errors import UsageError
from replfs.front import mountinfo, mounting
from replfs.front.mountinfo import find_mount, parse_mountinfo
from replfs.front.mounting import MountOptions

MOUNTINFO = rb"""21 26 0:20 / /sys rw,nosuid shared:7 - sysfs sysfs rw
26 1 254:0 / / rw,relatime shared:1 master:2 propagate_from:3 - ext4 /dev/root rw
40 26 0:39 / /mnt/with\040space\134and\011tab\012newline rw - fuse.replfs /a\040b rw,user_id=0
41 26 0:40 / /mnt/x rw - fuse.replfs first rw
43 42 0:42 / /mnt/x rw - fuse third rw
42 41 0:41 / /mnt/x rw - tmpfs second rw
44 26 0:43 /sub /mnt/caf\351 ro - fuseblk - rw

not a line of mountinfo
45 26 0:44 / /mnt/no-dash rw
46 x 0:44
"""


def test_fields_are_unescaped_and_optional_ones_skipped():
    mounts = parse_mountinfo(MOUNTINFO)
    assert [m.mount_id for m in mounts] == [21, 26, 40, 41, 43, 42, 44]
    assert mounts[1] == (26, 1, "254:0", "/", "/", "rw,relatime", "ext4", "/dev/root", "rw")
    assert mounts[2].path == "/mnt/with space\\and\ttab\nnewline"
    assert mounts[2].source == "/a b"
    assert mounts[6].path == os.fsdecode(b"/mnt/caf\xe9")
    assert mounts[6].root == "/sub"
    assert [m.is_fuse for m in mounts] == [False, False, True, True, True, False, True]


def test_the_topmost_of_stacked_mounts_is_found_in_any_order():
    mounts = parse_mountinfo(MOUNTINFO)
    for order in (mounts, mounts[::-1]):
        found = find_mount("/mnt/x", order)
        assert found is not None
        assert found.source == "third"


def test_paths_are_made_absolute_lexically(monkeypatch, tmp_path):
    mounts = parse_mountinfo(MOUNTINFO)
    for path in ("/mnt/x/", "/mnt/./y/../x", "//mnt/x"):
        found = find_mount(path.replace("//", "/"), mounts)
        assert found is not None
        assert found.path == "/mnt/x"
    assert find_mount("/mnt", mounts) is None
    monkeypatch.chdir(tmp_path)
    assert find_mount("mnt/x", mounts) is None


def test_the_real_mountinfo_has_a_root():
    root = find_mount("/")
    assert root is not None
    assert root in mountinfo.mount_points()


def test_a_plain_directory_is_not_a_dead_mount(tmp_path):
    assert not mountinfo.is_dead_mount(str(tmp_path))
    assert not mountinfo.is_dead_mount(str(tmp_path / "missing"))


def test_options_for_libfuse():
    assert mounting.libfuse_options(
        MountOptions(
            fsname="a,b\\c é", read_only=True, noexec=True, noatime=True, allow_other=False
        )
    ) >= {"fsname=a\\,b\\\\c \\\\xe9", "ro", "noexec", "noatime", "default_permissions"}
    plain = mounting.libfuse_options(MountOptions())
    assert "allow_other" in plain
    assert "ro" not in plain
    if os.geteuid() == 0:
        assert {"dev", "suid"} <= plain
        assert {"nodev", "nosuid"} <= mounting.libfuse_options(
            MountOptions(nodev=True, nosuid=True)
        )


def test_mountpoints_that_cannot_be_used(tmp_path):
    with pytest.raises(UsageError, match="No such file or directory"):
        mounting.check_mountpoint(str(tmp_path / "missing"))
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match="is not a directory"):
        mounting.check_mountpoint(str(tmp_path / "file"))
    (tmp_path / "link").symlink_to(tmp_path)
    assert mounting.check_mountpoint(str(tmp_path / "link")) == str(tmp_path.resolve())


def test_errors_of_the_system_calls_name_the_path(tmp_path):
    with pytest.raises(OSError, match=f"cannot unmount {tmp_path}"):
        mounting.unmount_lazily(str(tmp_path))
    mounting.unmount_quietly(str(tmp_path))
    with pytest.raises(OSError, match="cannot mount on"):
        mounting.mount_fuse(-1, str(tmp_path), MountOptions())


def test_becoming_an_io_flusher_says_what_it_could_not_do():
    # In a process of its own: threads and children inherit it.
    output = subprocess.run(
        [
            sys.executable,
            "-c",
            "import json; from replfs.front import mounting;"
            "print(json.dumps(mounting.become_io_flusher()))",
        ],
        check=True,
        capture_output=True,
        timeout=60,
    ).stdout
    problems = json.loads(output)
    assert len(problems) <= 2
    assert all(problem.startswith("cannot ") for problem in problems)


def test_it_loads_neither_pyfuse3_nor_trio():
    code = (
        "import sys; import replfs.front.mounting;"
        "sys.exit(bool({'pyfuse3', 'trio', 'zmq'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_freed_memory_is_used_again():
    """In a process of its own, whose allocator nobody has told anything before."""
    code = """if True:
        import resource, sys
        from replfs.front import mounting

        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(20):
                requests = [bytes(memoryview(large)) for _ in range(4)]
                del requests
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        large = bytearray(1 << 20)
        faults()
        before = faults()
        mounting.keep_freed_memory()
        faults()
        print(before, faults())
    """
    output = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=60
    ).stdout
    before, after = map(int, output.split())
    assert after < before / 10
