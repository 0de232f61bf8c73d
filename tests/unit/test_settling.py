"""What was cleared and is not on the disk yet: nothing is sent on top of it."""

from __future__ import annotations

import pytest

from replfs.core import ops
from replfs.core.dirty import DirtyLog
from replfs.core.regions import REGION_SIZE
from replfs.core.settling import Settling

FILE, DIRECTORY, OTHER = (bytes([n]) * 16 for n in range(3))


@pytest.fixture
def settling():
    return Settling()


@pytest.fixture
def log(settling):
    log = DirtyLog()
    log.watch(settling)
    return log


def write(settling, start, stop, object_id=FILE):
    return settling.allows(ops.Write(object_id, start, 0), start, stop)


def name_op(name):
    return ops.Make(OTHER, DIRECTORY, name, 0o100644, 0, 0, 0, b"", 0, 0)


def test_a_write_waits_for_the_regions_that_were_just_carried_and_no_others(log, settling):
    log.mark_data(FILE, 0, 4 * REGION_SIZE)
    assert settling.is_empty
    log.clear_regions(FILE, 1, 2)
    assert not settling.is_empty
    assert write(settling, 0, REGION_SIZE)
    assert not write(settling, REGION_SIZE, REGION_SIZE + 1)
    assert write(settling, 2 * REGION_SIZE, 3 * REGION_SIZE)
    assert write(settling, REGION_SIZE, 2 * REGION_SIZE, OTHER)
    settling.begin()
    assert not write(settling, REGION_SIZE, REGION_SIZE + 1)
    settling.settle(log)
    assert settling.is_empty
    assert write(settling, REGION_SIZE, REGION_SIZE + 1)


def test_what_is_cleared_while_the_disk_is_written_to_waits_for_the_next_time(log, settling):
    log.mark_data(FILE, 0, 2 * REGION_SIZE)
    log.clear_regions(FILE, 0, 1)
    settling.begin()
    log.clear_regions(FILE, 1, 2)
    settling.settle(log)
    assert not settling.is_empty
    assert write(settling, 0, REGION_SIZE)
    assert not write(settling, REGION_SIZE, 2 * REGION_SIZE)


def test_a_disk_that_failed_covers_nothing(log, settling):
    log.mark_data(FILE, 0, 2 * REGION_SIZE)
    log.clear_regions(FILE, 0, 1)
    settling.begin()
    log.clear_regions(FILE, 1, 2)
    settling.begin()  # and the first has not ended
    assert not write(settling, 0, REGION_SIZE)
    settling.settle(log)
    assert settling.is_empty


def test_a_tail_that_was_carried_in_part(log, settling):
    log.mark_tail(FILE, REGION_SIZE)
    log.clear_tail(FILE, 3)
    assert not write(settling, 2 * REGION_SIZE, 2 * REGION_SIZE + 1)
    assert write(settling, 0, REGION_SIZE)
    assert not settling.allows(ops.Truncate(FILE, 0, 0), 0, None)
    log.clear_tail(FILE, None)
    assert not write(settling, 100 * REGION_SIZE, 100 * REGION_SIZE + 1)


def test_nothing_waits_for_a_clear_of_what_was_clean(log, settling):
    log.mark_attrs(FILE)
    log.clear_regions(FILE, 0, None)
    log.clear_tail(FILE, None)
    log.clear_name(DIRECTORY, b"x")
    assert settling.is_empty


def test_names_and_attributes(log, settling):
    log.mark_name(DIRECTORY, b"x")
    log.mark_attrs(FILE)
    log.clear_name(DIRECTORY, b"x")
    assert not settling.allows(name_op(b"x"), 0, 0)
    assert settling.allows(name_op(b"y"), 0, 0)
    assert not settling.name_is_settled(DIRECTORY, b"x")
    assert settling.allows(ops.SetAttr(FILE, mode=0o600), 0, 0)
    log.clear_attrs(FILE)
    assert not settling.allows(ops.SetAttr(FILE, mode=0o600), 0, 0)
    assert not settling.object_is_settled(FILE)


def test_of_a_directory_that_was_listed_every_name_waits(log, settling):
    log.mark_names_all(DIRECTORY)
    log.clear_names_all(DIRECTORY)
    assert not settling.allows(name_op(b"any"), 0, 0)


def test_what_was_refused_and_carried_again_has_the_disk_waited_for(log, settling):
    log.mark_data(FILE, 0, REGION_SIZE)
    log.clear_regions(FILE, 0, 1)
    log.clear_attrs(FILE)
    assert not settling.is_waited_for(log)
    assert not write(settling, 0, 1)
    log.mark_data(FILE, 0, 1)
    assert not settling.is_waited_for(log)  # it is to be carried first
    settling.begin()
    settling.settle(log)
    log.clear_regions(FILE, 0, 1)
    log.clear_attrs(FILE)
    assert settling.is_waited_for(log)
    settling.begin()
    settling.settle(log)
    assert not settling.is_waited_for(log)
    # Nobody waits any more.
    log.mark_data(FILE, 0, 1)
    log.clear_regions(FILE, 0, 1)
    log.clear_attrs(FILE)
    assert not settling.is_waited_for(log)


def test_a_name_that_was_refused_and_carried_again(log, settling):
    log.mark_name(DIRECTORY, b"x")
    log.clear_name(DIRECTORY, b"x")
    assert not settling.allows(name_op(b"x"), 0, 0)
    log.mark_name(DIRECTORY, b"x")
    log.clear_name(DIRECTORY, b"x")
    assert settling.is_waited_for(log)


def test_of_many_ranges_all_between_them_waits(settling):
    for number in range(200):
        settling.data(FILE, number * 10, number * 10 + 1)
    assert not write(settling, 1900, 1901)
    assert not write(settling, 0, 1)
    assert write(settling, 5000, 5001)
    settling.begin()
    settling.data(FILE, 5000, None)
    settling.begin()
    assert not write(settling, 9000, 9001)
    assert not write(settling, 100, 101)


def test_an_object_that_is_waited_for_and_not_carried_again_is_no_reason_to_wait(log, settling):
    log.mark_data(FILE, 0, 1)
    log.clear_regions(FILE, 0, 1)
    assert not write(settling, 0, 1)
    # Its attributes are dirty still.
    assert not settling.is_waited_for(log)
