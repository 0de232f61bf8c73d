"""A short run of each scenario of `python -m soak`."""

from __future__ import annotations

import pytest

from soak import faults, kills, operators, verifications
from soak.story import PAUSE_MAX_MS, Story

pytestmark = [pytest.mark.mounted, pytest.mark.slow]


@pytest.mark.timeout(300)
def test_nothing_acknowledged_is_lost_by_kills():
    report = kills.run(12, 1, Story(), rest_s=0.001)
    assert report.longest_ns / 1e6 < PAUSE_MAX_MS, report


@pytest.mark.timeout(300)
def test_everything_heals_by_itself():
    report = faults.run(5, 1, Story(), files=500, size=30_000, rest_s=0.001)
    assert report.longest_ns / 1e6 < PAUSE_MAX_MS, report


@pytest.mark.timeout(300)
def test_verification_beside_writers_finds_what_is_there_and_nothing_else():
    verifications.run(1, 1, Story(), writers=2, rest_s=0.002, files=100)


@pytest.mark.timeout(300)
def test_whatever_an_operator_does_nothing_is_lost():
    report = operators.run(5, 1, Story())
    assert report.longest_ns / 1e6 < PAUSE_MAX_MS, report
