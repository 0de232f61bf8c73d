"""The store's tree of objects, as it is known and as it is."""

from __future__ import annotations

import errno
import os
import stat
import struct

import pytest
from helpers import acl

from replfs.store import locators, syscalls
from replfs.store.inode import Inode
from replfs.store.tree import Tree

CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
"""As setcap(8) writes cap_net_bind_service=ep."""


def test_a_number_that_now_belongs_to_an_object_of_another_type(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "file").touch()
    tree = Tree(os.open(tmp_path, os.O_RDONLY))
    try:
        # What was known was removed behind the node's back, and its number given to a directory.
        old = Inode(os.stat(tmp_path / "d").st_ino, stat.S_IFLNK)
        old.id = b"i" * 16
        old.add_name(tree.root, b"link")
        old.pins = 1
        tree.table.add(old)
        found = tree.lookup(tree.root, b"d")[0]
        assert found is not old
        assert found.is_directory
        assert tree.lookup(found, b"file")[0].type == stat.S_IFREG
        assert old.gone
        assert not old.named
        assert tree.table.by_id.get(old.id) is not old
    finally:
        tree.close_all()


@pytest.mark.skipif(os.geteuid() != 0, reason="handles are only for root")
def test_a_locator_follows_its_object_and_asks_for_a_handle_once(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "a" / "file").touch()
    asked = []
    ask = syscalls.name_to_handle

    def counted(fd, name=b""):
        asked.append(name)
        return ask(fd, name)

    monkeypatch.setattr(syscalls, "name_to_handle", counted)
    tree = Tree(os.open(tmp_path, os.O_RDONLY))
    try:
        a, b = (tree.lookup(tree.root, name)[0] for name in (b"a", b"b"))
        file = tree.lookup(a, b"file")[0]
        tree.ensure_id(file)
        before = locators.of(tree, file)
        assert locators.of(tree, file) == before
        assert asked == [b"file", b"a"]
        tree.rename(a, b"file", b, b"new", 0, inode=file, replaced=None, replaced_links=0)
        after = locators.of(tree, file)
        assert asked == [b"file", b"a", b"b"]
        assert after != before
    finally:
        tree.close_all()
    # Another process, where nothing is known yet.
    other = Tree(os.open(tmp_path, os.O_RDONLY))
    try:
        found = locators.find(other, after, file.id)
        assert found is not None
        assert found.path() == b"b/new"
    finally:
        other.close_all()


@pytest.mark.skipif(os.geteuid() != 0, reason="capabilities are only for root")
def test_the_capability_of_a_new_file_is_known_from_here(tmp_path):
    tree = Tree(os.open(tmp_path, os.O_RDONLY))
    try:
        file, *_, fd = tree.make(tree.root, b"f", 0o100755, owner=(0, 0))
        os.close(fd)
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            tree.get_xattr(file, b"security.capability")
        tree.set_xattr(file, b"security.capability", CAPABILITY)
        assert tree.get_xattr(file, b"security.capability") == CAPABILITY
        assert tree.must_clear_privileges(file)
        tree.remove_xattr(file, b"security.capability")
        assert not tree.must_clear_privileges(file)
        with pytest.raises(OSError, match=os.strerror(errno.ENODATA)):
            tree.get_xattr(file, b"security.capability")
    finally:
        tree.close_all()


def test_whether_new_files_inherit_an_acl_is_known_through_every_change(tmp_path):
    default = acl.DEFAULT.encode()
    tree = Tree(os.open(tmp_path, os.O_RDONLY))

    def make(name):
        tree.set_umask(0)
        file, _, _, fd = tree.make(tree.root, name, 0o100666, owner=(os.geteuid(), os.getegid()))
        os.close(fd)
        return file

    try:
        assert not tree.inherits_acl(tree.root)
        assert tree.acls(make(b"before")) == (b"", b"")
        tree.set_xattr(tree.root, default, acl.pack(6, 4, 0, users={1234: 6}))
        assert tree.inherits_acl(tree.root)
        access, _ = tree.acls(make(b"within"))
        assert acl.unpack(access)[acl.USER, 1234] == 6
        below = tree.make(tree.root, b"d", 0o40755, owner=(os.geteuid(), os.getegid()))[0]
        assert tree.inherits_acl(below)
        tree.set_acls(tree.root, b"", b"")
        assert not tree.inherits_acl(tree.root)
        assert tree.inherits_acl(below)
        tree.remove_xattr(below, default)
        assert not tree.inherits_acl(below)
    finally:
        tree.close_all()
