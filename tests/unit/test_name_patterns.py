"""Names that are `none` by a pattern."""

from __future__ import annotations

import pytest

from replfs.core.policy import NO_PATTERNS, NamePatterns


@pytest.mark.parametrize(
    ("patterns", "name", "directory", "expected"),
    [
        (["*.tmp"], b"a.tmp", False, "*.tmp"),
        (["*.tmp"], b"a.tmp", True, "*.tmp"),
        (["*.tmp"], b"a.tmpx", False, ""),
        (["*.tmp"], b"a.TMP", False, ""),
        (["*.tmp"], b".tmp", False, "*.tmp"),
        (["cache/"], b"cache", True, "cache/"),
        (["cache/"], b"cache", False, ""),
        (["a", "*"], b"a", False, "a"),
        (["x?y"], "xéy".encode(), False, "x?y"),
        (["x?y"], b"x\xffy", False, "x?y"),
        (["[ab]c"], b"bc", False, "[ab]c"),
        (["[!ab]c"], b"bc", False, ""),
        (["*.tmp"], b"two\nlines.tmp", False, "*.tmp"),
        (["a.b"], b"axb", False, ""),
        ([], b"a", False, ""),
    ],
)
def test_match(patterns, name, directory, expected):
    assert NamePatterns(patterns).match(name, directory=directory) == expected


def test_none_are_none():
    assert not NO_PATTERNS
    assert NamePatterns(["a"])
    assert not NO_PATTERNS.match(b"a", directory=True)
