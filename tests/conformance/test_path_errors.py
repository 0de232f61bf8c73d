"""What every call that takes a path answers to a path that does not lead anywhere.

Source: POSIX.1-2024, "Pathname Resolution"; path_resolution(7).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import pytest
from helpers.cases import (
    KINDS,
    NAME_MAX,
    PATH_MAX,
    exists,
    fails,
    make,
    outcome,
    remove,
    unchanged,
    write,
)
from helpers.children import as_user
from helpers.libc import faccessat, linkat, utimensat

NOW = (1_000_000_000, 5)


def _create(path):
    return os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)


def _create_exclusively(path):
    return os.open(path, os.O_CREAT | os.O_EXCL, 0o600)


def _link_from(path):
    os.link(path, os.path.join(os.path.dirname(HERE[0]), "link target"))


def _rename_from(path):
    os.rename(path, os.path.join(os.path.dirname(HERE[0]), "rename target"))


HERE = [""]
"""A file that exists in the directory of the case; sources of link and rename."""

# name -> (call, does it make the last component, does it follow a symlink there)
CALLS: dict[str, tuple[Callable[..., object], bool, bool]] = {
    "access": (lambda path: faccessat(path, os.F_OK), False, True),
    "chdir": (os.chdir, False, True),
    "chmod": (lambda path: os.chmod(path, 0o600), False, True),
    "chown": (lambda path: os.chown(path, -1, -1), False, True),
    "getxattr": (lambda path: os.getxattr(path, "user.x"), False, True),
    "lchown": (lambda path: os.lchown(path, -1, -1), False, False),
    "link from": (_link_from, False, False),
    "link to": (lambda path: linkat(-100, HERE[0], path, 0), True, False),
    "listxattr": (os.listxattr, False, True),
    "lstat": (os.lstat, False, False),
    "mkdir": (os.mkdir, True, False),
    "mkfifo": (os.mkfifo, True, False),
    "mknod": (lambda path: os.mknod(path, stat.S_IFREG | 0o600), True, False),
    "open to create": (_create, True, True),
    "open to read": (lambda path: os.open(path, os.O_RDONLY), False, True),
    "open to write": (lambda path: os.open(path, os.O_WRONLY), False, True),
    "opendir": (os.listdir, False, True),
    "readlink": (os.readlink, False, False),
    "removexattr": (lambda path: os.removexattr(path, "user.x"), False, True),
    "rename from": (_rename_from, False, False),
    "rename to": (lambda path: os.rename(HERE[0], path), True, False),
    "rmdir": (os.rmdir, False, False),
    "setxattr": (lambda path: os.setxattr(path, "user.x", b"1"), False, True),
    "stat": (os.stat, False, True),
    "statvfs": (os.statvfs, False, True),
    "symlink": (lambda path: os.symlink("x", path), True, False),
    "truncate": (lambda path: os.truncate(path, 3), False, True),
    "unlink": (os.unlink, False, False),
    "utimensat": (lambda path: utimensat(path, NOW, NOW), False, True),
}
call = pytest.mark.parametrize("name", CALLS)


@call
def test_a_path_that_leads_nowhere(tree, name):
    function, makes, follows = CALLS[name]
    HERE[0] = str(tree / "here")
    write(tree / "here", b"12345")
    write(tree / "file", b"")
    os.mkdir(tree / "closed", 0o700)
    os.symlink("loop b", tree / "loop a")
    os.symlink("loop a", tree / "loop b")
    os.symlink("nowhere/deeper", tree / "dangling")
    long_name, long_path = "n" * (NAME_MAX + 1), "p/" * (PATH_MAX // 2) + "p"
    expected = {
        "": "ENOENT",
        "missing/x": "ENOENT",
        "dangling/x": "ENOENT",
        "file/x": "ENOTDIR",
        "file/.": "ENOTDIR",
        "file/../here": "ENOTDIR",
        f"{long_name}": "ENAMETOOLONG",
        f"{long_name}/x": "ENAMETOOLONG",
        f"{long_path}": "ENAMETOOLONG",
        "loop a/x": "ELOOP",
    }
    if not makes:
        expected["missing"] = "ENOENT"
    if follows:
        expected["loop a"] = "ELOOP"
    os.chdir(tree)
    found = {path: outcome(function, path) for path in expected}
    assert found == expected


@call
def test_search_permission_is_needed_in_each_directory(tree, name):
    function = CALLS[name][0]
    os.makedirs(tree / "closed/open")
    HERE[0] = str(tree / "here")
    write(tree / "here", b"")
    for path in (tree.path, tree / "here", tree / "closed/open"):
        os.chmod(path, 0o777)
    os.chmod(tree / "closed", 0o666)  # readable and writable, not searchable

    def attempt():
        os.chdir(tree)
        return outcome(function, "closed/x"), outcome(function, "closed/open/x")

    assert as_user(attempt) == ("EACCES", "EACCES")


@pytest.mark.parametrize(
    "name", ["link to", "mkdir", "mkfifo", "mknod", "open with O_EXCL", "symlink"]
)
def test_what_makes_a_name_replaces_nothing(tree, name):
    HERE[0] = str(tree / "here")
    write(tree / "here", b"")
    function = _create_exclusively if name == "open with O_EXCL" else CALLS[name][0]
    for kind in KINDS:
        make(kind, tree / kind)
        with unchanged(tree / kind, tree):
            assert outcome(function, tree / kind) == "EEXIST", kind


@pytest.mark.parametrize(
    "name", ["link to", "mkdir", "mkfifo", "mknod", "open to create", "rename to", "symlink"]
)
def test_names_of_255_bytes(tree, name):
    HERE[0] = str(tree / "here")
    write(tree / "here", b"")
    path = tree / ("\N{LATIN SMALL LETTER E WITH ACUTE}" * 127 + "e")
    assert len(os.fsencode(path.name)) == NAME_MAX
    assert outcome(CALLS[name][0], path) == "ok"
    assert path.name in os.listdir(tree)
    remove(path)
    assert not exists(path)


def test_write_permission_in_a_directory_is_needed_to_change_it(tree):
    os.mkdir(tree / "dir")
    write(tree / "dir/file", b"")
    os.mkdir(tree / "dir/sub")
    os.chmod(tree.path, 0o777)
    write(tree / "here", b"")
    os.chown(tree / "here", 10_001, 20_001)
    HERE[0] = str(tree / "here")
    attempts = {
        "link to": "dir/x",
        "mkdir": "dir/x",
        "mkfifo": "dir/x",
        "mknod": "dir/x",
        "open to create": "dir/x",
        "rename from": "dir/file",
        "rename to": "dir/x",
        "rmdir": "dir/sub",
        "symlink": "dir/x",
        "unlink": "dir/file",
    }

    def attempt():
        os.chdir(tree)
        return {name: outcome(CALLS[name][0], path) for name, path in attempts.items()}

    assert as_user(attempt) == dict.fromkeys(attempts, "EACCES")
    assert sorted(os.listdir(tree / "dir")) == ["file", "sub"]


def test_a_trailing_slash(tree):
    os.chdir(tree)
    write("file", b"")
    os.mkdir("dir")
    os.symlink("dir", "to dir")
    HERE[0] = str(tree / "file")
    assert outcome(os.stat, "file/") == "ENOTDIR"
    assert outcome(_create, "new/") == "EISDIR"
    assert outcome(os.unlink, "file/") == "ENOTDIR"
    assert outcome(os.symlink, "x", "new/") == "ENOENT"
    assert outcome(os.link, "file", "new/") == "ENOENT"
    assert outcome(os.rename, "file", "new/") == "ENOTDIR"
    assert outcome(os.rmdir, "to dir/") == "ENOTDIR"
    assert os.path.isdir("to dir/")
    os.mkdir("made/")
    os.rename("made/", "moved/")
    os.rmdir("moved/")


def test_forty_symlinks_are_followed_and_not_one_more(tree):
    write(tree / "0", b"end")
    for number in range(1, 42):
        os.symlink(str(number - 1), tree / str(number))
    assert os.stat(tree / "40").st_size == 3
    with fails(40):
        os.stat(tree / "41")
