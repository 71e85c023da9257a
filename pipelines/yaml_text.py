"""YAML as plain values: no tags that make objects, every key once, and aliases that cannot multiply without bounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from lowrank.reading import shown

if TYPE_CHECKING:
    import yaml

#: Largest YAML text in bytes, and the most values that it may stand for once its aliases are followed.
MOST_BYTES, MOST_VALUES = 2**20, 100_000
_MOST_ALIASES, _MOST_KEYS, _DEEPEST = 100, 10_000, 64


def parse_yaml(text: str | bytes) -> Any:
    """The value of a YAML text, with texts for keys (YAML reads `1:` and `on:` as other types).

    Raises:
        ValueError: no YAML, a key that stands twice, nested too deeply, or too large.
    """
    import yaml

    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES} bytes")
    try:
        value = yaml.load(text, _loader())
    except RecursionError:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that does not exist is a ValueError
        raise ValueError(" ".join(str(error).split())) from error
    except (AttributeError, LookupError) as error:  # `!!int ""`, `!!bool x`, `!!timestamp x`
        raise ValueError(f"a value does not fit its tag ({error})") from error
    return plain(value)


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        """PyYAML's safe loader; `<<` copies keys while it reads, so that bounds must be kept here."""

        aliases = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.aliases += self.check_event(yaml.AliasEvent)
            if self.aliases > _MOST_ALIASES:
                raise ValueError(f"it has more than {_MOST_ALIASES} aliases")
            node = super().compose_node(parent, index)
            if isinstance(node, yaml.MappingNode):
                _refuse_twice(node)
            return node

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            if len(node.value) > _MOST_KEYS:
                raise ValueError(f"a mapping has more than {_MOST_KEYS} keys")

    return Loader


def _refuse_twice(node: yaml.MappingNode) -> None:
    """The later of two equal keys would silently win."""
    known: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if isinstance(key.value, str) and key.tag != "tag:yaml.org,2002:merge":
            if (key.tag, key.value) in known:
                raise ValueError(f"line {key.start_mark.line + 1}: the key {shown(key.value)} stands twice")
            known.add((key.tag, key.value))


def plain(value: Any) -> Any:
    """A copy with text keys: YAML reads `1:` and `on:` as other types.

    Raises:
        ValueError: nested too deeply, or too many values once its aliases are followed.
    """
    return _plain(value, iter(range(MOST_VALUES)), 0)


def _plain(value: Any, left: Iterator[int], depth: int) -> Any:
    if next(left, None) is None:
        raise ValueError(f"it stands for more than {MOST_VALUES} values")
    if depth > _DEEPEST:
        raise ValueError(f"it is nested deeper than {_DEEPEST} levels, or holds itself")
    if isinstance(value, Mapping):
        return {str(key): _plain(item, left, depth + 1) for key, item in value.items()}
    return [_plain(item, left, depth + 1) for item in value] if isinstance(value, list) else value
