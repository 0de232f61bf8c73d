"""Pictures of the terminal show what a terminal would."""

from __future__ import annotations

from xml.etree import ElementTree as ET

import pytest
from pictures.terminal import Screen, picture


def test_a_screen_is_what_was_written_last():
    screen = Screen()
    screen.write("one\r\ntwo\r\n\r\x1b[K  50 %\r\x1b[K  done\r\n")
    assert screen.shown() == ["one", "two", "  done"]
    screen.write("\x1b[Hthree\x1b[K\r\nfour\x1b[K\x1b[J")
    assert screen.shown() == ["three", "four"]
    with pytest.raises(ValueError, match="is not known"):
        screen.write("\x1b[1m")


def test_a_picture_has_every_line_of_every_frame():
    frames = [("$ a", ["x < y", "", "  z"]), ("$ b", ["& so on"])]
    root = ET.fromstring(picture(frames))  # noqa: S314 - our own
    texts = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert texts == ["$ a", "x < y", "  z", "$ b", "& so on"]
