"""How far a secondary has followed: counted, and kept over the death of its process."""

from __future__ import annotations

import pytest

from replfs.store.progress import Progress

NODE, OTHER = b"n" * 16, b"o" * 16


@pytest.fixture
def path(tmp_path):
    return str(tmp_path / "progress")


def test_nothing_is_counted_from_a_number_that_is_not_known(path):
    progress = Progress(path, NODE, None)
    progress.count()
    assert progress.number == 0
    progress.number = 5 << 40
    progress.count()
    assert progress.number == (5 << 40) + 1
    progress.close(clean=False)


def test_a_process_that_was_killed_leaves_the_number(path):
    first = Progress(path, NODE, 0)
    first.number = 7
    first.count()
    # It has no time to close anything.
    second = Progress(path, NODE, None)
    assert second.number == 8
    second.close(clean=False)
    first.close(clean=False)


def test_what_is_saved_elsewhere_counts_more_than_what_lies_there(path):
    Progress(path, NODE, 9).close(clean=False)
    again = Progress(path, NODE, 3)
    assert again.number == 3
    again.close(clean=False)


@pytest.mark.parametrize("damage", [b"", b"x", b"x" * 40, b"x" * 100])
def test_a_file_of_something_else_tells_nothing(path, damage):
    with open(path, "wb") as file:
        file.write(damage)
    progress = Progress(path, NODE, None)
    assert progress.number == 0
    progress.close(clean=False)


def test_the_number_of_another_store_tells_nothing(path):
    Progress(path, OTHER, 9).close(clean=False)
    progress = Progress(path, NODE, None)
    assert progress.number == 0
    progress.close(clean=False)


def test_a_clean_end_leaves_no_file(path, tmp_path):
    Progress(path, NODE, 9).close(clean=True)
    assert not list(tmp_path.iterdir())
