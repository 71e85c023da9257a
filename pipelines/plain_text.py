"""Text of others, made harmless for a terminal: no control characters, and no escape sequences of ECMA-48."""

from __future__ import annotations

import unicodedata
from enum import Enum, auto


class _State(Enum):
    TEXT = auto()
    ESCAPE = auto()
    """After ESC, until the letter that ends a short sequence."""
    CONTROL = auto()
    """Colours, cursor movement: parameters, until a letter."""
    STRING = auto()
    """Window titles, links, the clipboard: until BEL or a string terminator."""


_OPENED_BY = {"\x1b": _State.ESCAPE, "\x9b": _State.CONTROL} | dict.fromkeys("\x90\x98\x9d\x9e\x9f", _State.STRING)
_AFTER_ESCAPE = {"[": _State.CONTROL} | dict.fromkeys("PX]^_", _State.STRING)


class PlainText:
    """Takes a text in pieces, which may break a sequence anywhere, and gives back what can be shown."""

    def __init__(self) -> None:
        self._state = _State.TEXT

    def feed(self, piece: str) -> str:
        """The visible part of a piece, with newlines and tabs."""
        return "".join(filter(self._visible, piece))

    def _visible(self, character: str) -> bool:
        if character in "\n\t":  # ends a sequence too, so that an open one hides no more than its line
            self._state = _State.TEXT
            return True
        if unicodedata.category(character) in ("Cc", "Cs"):
            self._state = _OPENED_BY.get(character, _State.TEXT)
            return False
        if self._state is _State.TEXT:
            return True
        if self._state is _State.ESCAPE and not " " <= character <= "/":
            self._state = _AFTER_ESCAPE.get(character, _State.TEXT)
        elif self._state is _State.CONTROL and not " " <= character <= "?":
            self._state = _State.TEXT
        return False


def plain(text: str) -> str:
    """The visible part of a whole text."""
    return PlainText().feed(text)
