"""What several unit tests start from."""

from __future__ import annotations

import os

import pytest

from replfs.store.tree import Tree


@pytest.fixture
def fd(tmp_path):
    """The test's own directory, open."""
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield fd
    os.close(fd)


@pytest.fixture
def tree(tmp_path):
    """The objects of an empty store, `tmp_path/store`."""
    store = tmp_path / "store"
    store.mkdir()
    fd = os.open(store, os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(fd)
    yield tree
    tree.close_all()
    os.close(fd)
