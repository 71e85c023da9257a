"""Read text that may hold anything: what is wrong with it is a ValueError, in time and memory of its size."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

#: Deepest nesting that is believed; what walks through a value calls itself per level.
_DEEPEST = 64
#: Characters of a foreign value in a message.
_SHOWN = 120


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: it is no JSON in UTF-8, has a key twice, or is nested deeper than 64 levels.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError(f"nested deeper than {_DEEPEST} levels") from None
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return value
    raise ValueError(f"nested deeper than {_DEEPEST} levels")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of equal keys one reader would take the first, another the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"the key {shown(key)} stands twice")
    return found


def read_json(path: Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it cannot be read. ValueError: as `parse_json`.
    """
    return parse_json(path.read_bytes())


def shown(value: Any) -> str:
    """A foreign value as a message shows it: at most 120 characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more than 4300 digits; a value that holds itself
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def is_texts(value: Any) -> bool:
    """Whether a value is a mapping of texts."""
    return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())


def is_number(value: Any) -> bool:
    """Whether a value is a number, which true and false are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)
