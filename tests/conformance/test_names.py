"""Names and paths: any byte, any length up to the limits. Source: path_resolution(7)."""

from __future__ import annotations

import errno
import os
import unicodedata

import pytest
from helpers.cases import NAME_MAX, PATH_MAX, exists, fails, fd_of, outcome, read, write

NAMES = {
    "one byte": b"a",
    "dots": b"...",
    "leading dot": b".hidden",
    "leading dash": b"-rf",
    "spaces": b" a  b ",
    "newline": b"a\nb\r\n",
    "tab and escape": b"\t\x1b[31m",
    "backslash": b"\\\\n\\040",
    "glob": b"*?[a]{b,c}",
    "quotes": b"'\"`$(x)",
    "percent": b"%s%n%00",
    "colon": b"C:\\con.txt:stream",
    "not UTF-8": b"\xff\xfe\x80",
    "half a character": "\N{EURO SIGN}".encode()[:2],
    "surrogate": b"\xed\xa0\x80",
    "255 bytes of UTF-8": ("\N{CJK UNIFIED IDEOGRAPH-4E2D}" * 85).encode(),
    "255 bytes of Latin-1": b"\xe9" * 255,
    "emoji": "\N{FAMILY}\N{ZERO WIDTH JOINER}\N{GRINNING FACE}".encode(),
    "right to left": "\u202eabc\N{HEBREW LETTER ALEF}".encode(),
    "the reserved name, deeper": b".replfs",
}
names = pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)


def raw(tree, *parts: bytes) -> bytes:
    return b"/".join([os.fsencode(tree.path), *parts])


@names
def test_every_call_takes_any_name(tree, name):
    os.mkdir(raw(tree, b"sub"))
    path, other = raw(tree, name), raw(tree, b"sub", name)
    write(path, b"data")
    assert os.listdir(os.fsencode(tree.path)) != []
    assert name in os.listdir(os.fsencode(tree.path))
    os.link(path, other)
    assert os.stat(path).st_nlink == 2
    os.unlink(path)
    os.symlink(name, path)
    assert os.readlink(path) == name
    os.unlink(path)
    os.rename(other, path)
    assert read(path) == b"data"
    os.unlink(path)
    os.mkdir(path)
    write(path + b"/" + name, b"deeper")
    os.rename(path, other)
    assert read(other + b"/" + name) == b"deeper"
    assert os.listdir(raw(tree, b"sub")) == [name]


def test_every_byte(tree):
    made = [bytes([byte]) for byte in range(1, 256) if byte not in b"/."]
    for name in made:
        os.mknod(raw(tree, name), 0o100600)
    assert sorted(os.listdir(os.fsencode(tree.path))) == sorted(made)
    for name in made:
        os.unlink(raw(tree, name))


def test_names_that_differ_a_little_are_different(tree):
    composed = unicodedata.normalize("NFC", "e\N{COMBINING ACUTE ACCENT}")
    decomposed = unicodedata.normalize("NFD", composed)
    many = ["a", "A", "a ", " a", "a.", composed, decomposed, "\N{LATIN SMALL LETTER A WITH ACUTE}"]
    for number, name in enumerate(many):
        write(tree / name, b"%d" % number)
    assert sorted(os.listdir(tree)) == sorted(many)
    assert [read(tree / name) for name in many] == [b"%d" % n for n in range(len(many))]


def test_all_lengths(tree):
    for length in range(1, NAME_MAX + 1):
        os.mknod(tree / ("n" * length), 0o100600)
    assert sorted(map(len, os.listdir(tree))) == list(range(1, NAME_MAX + 1))
    with fails(errno.ENAMETOOLONG):
        os.mknod(tree / ("n" * (NAME_MAX + 1)), 0o100600)
    with fails(errno.ENAMETOOLONG):
        os.stat(tree / ("n" * 2000))


def deep(tree, length: int) -> tuple[str, str]:
    """Make directories below `tree`; returns the last one and a name: together `length` bytes."""
    path = str(tree.path)
    while length - len(path) > 2 * NAME_MAX:
        path += "/" + "d" * 200
        os.mkdir(path)
    left = length - len(path) - 1
    if left > NAME_MAX:
        path += "/" + "e" * (left // 2)
        os.mkdir(path)
    return path, "f" * (length - len(path) - 1)


def test_a_path_of_path_max(tree):
    directory, name = deep(tree, PATH_MAX - 1)  # a NUL makes it PATH_MAX
    path = f"{directory}/{name}"
    assert len(os.fsencode(path)) == PATH_MAX - 1
    write(path, b"data")
    os.chmod(path, 0o600)
    os.setxattr(path, "user.x", b"1")
    os.link(path, tree / "link")
    os.rename(path, tree / "moved")
    os.rename(tree / "moved", path)
    os.unlink(tree / "link")
    assert read(path) == b"data"
    assert os.stat(path).st_nlink == 1
    assert outcome(os.stat, path + "x") == "ENAMETOOLONG"
    assert outcome(os.mkdir, path + "x") == "ENAMETOOLONG"
    # Shorter from within: the whole path may be longer than any call could name.
    os.chdir(directory)
    os.mkdir("x" * 250)
    write("x" * 250 + "/file", b"deeper")
    os.rename("x" * 250, "y" * 240)
    assert read("y" * 240 + "/file") == b"deeper"
    assert outcome(os.stat, f"{directory}/{'y' * 240}/file") == "ENAMETOOLONG"


def test_deeper_than_any_path(tree):
    levels = 60
    fd = os.open(tree, os.O_RDONLY)
    for level in range(levels):
        os.mkdir("d" * 150, dir_fd=fd)
        below = os.open("d" * 150, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
        os.mknod(f"file {level}", 0o100644, dir_fd=fd)
    os.symlink("../" * 20 + "x", "link", dir_fd=fd)
    with open(os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=fd), "wb") as file:
        file.write(b"bottom")
    os.close(fd)
    os.rename(tree / ("d" * 150), tree / "moved")
    found = sum(1 for _ in os.fwalk(tree))
    assert found == levels + 1


def test_many_small_levels(tree):
    os.chdir(tree)
    for _ in range(120):
        os.mkdir("d")
        os.chdir("d")
    write("leaf", b"x")
    assert os.path.samefile("../" * 120, tree)
    os.chdir(tree)
    assert exists("d/" * 120 + "leaf")


def test_the_working_directory_is_where_it_says(tree):
    os.makedirs(tree / "a/b")
    os.chdir(tree / "a/b")
    assert os.getcwd() == str(tree / "a/b")
    os.rename(tree / "a", tree / "c")
    assert os.getcwd() == str(tree / "c/b")
    with fd_of(".") as fd:
        assert os.readlink(f"/proc/self/fd/{fd}") == str(tree / "c/b")
