"""What a terminal would obey never comes through, however a text is cut into pieces."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.plain_text import PlainText, plain

HARMLESS = "Größe: 5 µm\n\tπ ≈ 3.14, 日本語 👩‍💻 [31m] \u2028 ok"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (HARMLESS, HARMLESS),
        ("\x1b[1;31mred\x1b[0m and \x1b[2Kgone", "red and gone"),
        ("\x9b31mred\x9bm", "red"),
        ("a\x1b]0;title\x07b\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "ablink"),
        ("a\x9d52;c;Y2xpcA==\x9cb\x1bPq#0\x1b\\c", "abc"),
        ("\x1bcreset\x1b(0box\x1b7saved", "resetboxsaved"),
        ("over\rwritten\b\b\x7f\x00\x85", "overwritten"),
        ("\x1b]an open string\nhides one line", "\nhides one line"),
        ("half a pair: \ud83d.", "half a pair: ."),
        ("\x1b", ""),
    ],
)
def test_known_sequences(text: str, shown: str) -> None:
    assert plain(text) == shown
    pieces = PlainText()
    assert "".join(pieces.feed(character) for character in text) == shown


_text = st.text(st.one_of(st.characters(), st.sampled_from("\x1b\x9b\x9d\x9c\x07[]P\\;0mA \n\t\r")))


@given(_text, st.integers(0, 50))
def test_any_text(text: str, cut: int) -> None:
    shown = plain(text)
    assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    pieces = PlainText()
    assert pieces.feed(text[:cut]) + pieces.feed(text[cut:]) == shown
    assert shown.count("\n") == text.count("\n")
