"""What an `adapter_config.json` of anybody's making may say: types and bounds of its fields, and patterns resolved.

Patterns of ranks and alphas are regular expressions that a stranger may have written. Python's engine takes
exponential time on some, and holds every other thread up meanwhile; RE2, which pyarrow brings, never does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from lowrank.errors import AdapterError
from lowrank.reading import is_number, shown

_PATTERNS = ("rank_pattern", "alpha_pattern")
#: Bounds of what is believed: ranks, sizes of a layer, characters of a name or pattern, regular expressions, modules.
_MOST_RANK, _MOST_SIZE, MOST_NAME, _MOST_REGEX, _MOST_SAVED = 2**16, 2**31, 512, 64, 256
#: A key that is no more than a module's name, or the end of one.
_NAME = re.compile(r"[\w.-]+", re.ASCII)


def check_fields(config: Mapping[str, Any]) -> None:
    """Refuse fields that have another type, or are out of bounds.

    Raises:
        AdapterError: names the field, what it holds and what is allowed.
    """
    for names, allowed, fits in _FIELDS:
        for name in names:
            if config.get(name) is not None and not fits(config[name]):
                raise AdapterError(f"{name} is {shown(config[name])}; allowed is {allowed}. Correct it.")
    own = config.get("rankline") or {}
    for name, allowed, is_fit in _OWN_FIELDS:
        if own.get(name) is not None and not is_fit(own[name]):
            raise AdapterError(f"rankline.{name} is {shown(own[name])}; allowed is {allowed}. Correct it.")


def resolved(config: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """The configuration with `rank_pattern` and `alpha_pattern` as module -> value, by the rule of PEFT.

    Args:
        config: that `check_fields` has let pass.
        modules: the names that the file has tensors of.

    Raises:
        AdapterError: too many regular expressions, or one that RE2 does not read.
    """
    return dict(config) | {name: _values(config[name], modules) for name in _PATTERNS if config.get(name)}


def pattern_value(config: Mapping[str, Any], field: str, module: str, default: Any) -> Any:
    """The value that a resolved pattern gives a module, else `default`."""
    return (config.get(field) or {}).get(module, default)


def _values(pattern: Mapping[str, Any], modules: Collection[str]) -> dict[str, Any]:
    """The first key that matches the end of a module's name counts."""
    endings: dict[str, list[str]] = {}
    for module in modules:
        for ending in _endings(module):
            if ending in pattern:
                endings.setdefault(ending, []).append(module)
    regexes = [key for key in pattern if not _NAME.fullmatch(key)]
    if len(regexes) > _MOST_REGEX:
        raise AdapterError(f"got {len(regexes)} regular expressions; allowed are {_MOST_REGEX}. Name modules.")
    found: dict[str, Any] = {}
    for key, value in pattern.items():
        for module in endings.get(key, ()) if _NAME.fullmatch(key) else _matching(key, modules):
            found.setdefault(module, value)
    return found


def _endings(module: str) -> Iterator[str]:
    """`a.b.c`, `b.c` and `c`."""
    yield module
    while "." in module:
        module = module.partition(".")[2]
        yield module


def _matching(regex: str, modules: Collection[str]) -> list[str]:
    """Modules whose name ends with what the regular expression matches, after a dot or from the beginning."""
    import pyarrow as pa
    import pyarrow.compute as pc

    names = list(modules)
    try:
        hits = pc.match_substring_regex(pa.array(names, pa.string()), rf"^(.*\.)?({regex})$").to_pylist()
    except ValueError as error:  # pyarrow's own errors are ValueErrors too
        raise AdapterError(
            f"the pattern {shown(regex)} is no regular expression of RE2, which has no look-around and no "
            f"back-references ({shown(str(error))}). Name modules."
        ) from error
    return [name for name, hit in zip(names, hits, strict=True) if hit]


def _is_int(value: Any, least: int, most: int) -> bool:
    return type(value) is int and least <= value <= most


def _is_finite(value: Any) -> bool:
    return is_number(value) and abs(value) < 1e30 and math.isfinite(value)


def _is_share(value: Any) -> bool:
    return is_number(value) and 0 <= value < 1


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= MOST_NAME


def _is_pattern(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(_is_name(key) and fits(item) for key, item in value.items())


def _is_rank(value: Any) -> bool:
    return _is_int(value, 1, _MOST_RANK)


def _is_kept(value: Any) -> bool:
    """A rank, or of PEFT's AdaLoRA which components were kept."""
    return _is_rank(value) or (isinstance(value, list) and all(isinstance(item, bool) for item in value))


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_SAVED and all(_is_name(item) for item in value)


def _is_shape(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(_is_int(size, 0, _MOST_SIZE) for size in value)


#: Names, what a message allows, and the test; null is always allowed.
_FIELDS: list[tuple[tuple[str, ...], str, Callable[[Any], bool]]] = [
    (("peft_type",), "a text", lambda value: isinstance(value, str)),
    (("r", "init_r"), f"1 to {_MOST_RANK}", _is_rank),
    (("lora_alpha", "alpha", "alpha1"), "a finite number", _is_finite),
    (("lora_dropout", "vera_dropout", "hira_dropout"), "a number >= 0 and < 1", _is_share),
    (("use_rslora", "use_dora"), "true or false", lambda value: isinstance(value, bool)),
    (("rank_pattern",), f"a mapping of names of at most {MOST_NAME} characters to ranks", _is_pattern(_is_kept)),
    (("alpha_pattern",), f"a mapping of names of at most {MOST_NAME} characters to numbers", _is_pattern(_is_finite)),
    (("modules_to_save",), f"a list of at most {_MOST_SAVED} names", _are_names),
    (("rankline",), "a mapping", lambda value: isinstance(value, dict)),
]
_OWN_FIELDS: list[tuple[str, str, Callable[[Any], bool]]] = [
    ("method", "a text", lambda value: isinstance(value, str)),
    ("options", "a mapping", lambda value: isinstance(value, dict)),
    ("shapes", "a mapping of modules to two sizes", _is_pattern(_is_shape)),
]
