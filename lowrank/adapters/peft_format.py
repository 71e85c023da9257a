"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which any tool reads.

Families that PEFT has not lie in the same layout under a `peft_type` of our own. What PEFT would ignore (the base's
hash, shapes, options) stands under `rankline`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lowrank.adapters.base import Adapter, check_finite
from lowrank.adapters.registry import FAMILIES, family_of
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

_PREFIX = "base_model.model."
_SHARED = "base_model."
#: What must be the same where an adapter is loaded, as messages name it.
_BASE_KEYS = {"base_sha256": "weights of sha256", "split_key": "the split", "base": "a base of kind"}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(
    directory: Path,
    adapters: Mapping[str, Adapter],
    config: AdapterConfig,
    base: Mapping[str, Any],
    saved: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> None:
    """Write `adapters` (module -> adapter) as a PEFT directory with deterministic bytes.

    Args:
        directory: Existing or new directory.
        adapters: The trained layers, all of one family.
        config: Alpha, scaling rule, dropout and options.
        base: What the adapter was trained over (hashes); goes under `rankline` in the config, which PEFT ignores.
        saved: Modules trained whole beside the adapter: module -> name -> tensor.

    Raises:
        AdapterError: a tensor holds NaN or infinity.
    """
    from safetensors.torch import save_file

    family = type(next(iter(adapters.values())))
    shared = family.shared_tensors(adapters)
    layers = {module: adapter.tensors() for module, adapter in adapters.items()}
    for part in ({"shared": shared}, layers, saved or {}):
        check_finite(part)
    tensors = {f"{_SHARED}{name}": tensor for name, tensor in shared.items()}
    for module, named in layers.items():
        tensors |= {f"{_PREFIX}{module}.{name}": tensor for name, tensor in named.items()}
    for module, whole in (saved or {}).items():
        tensors |= {f"{_PREFIX}{module}.{name}": tensor for name, tensor in whole.items()}
    directory.mkdir(parents=True, exist_ok=True)
    stored = {name: (t.float() if t.is_floating_point() else t).contiguous().cpu() for name, t in tensors.items()}
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})
    written = _peft_config(adapters, config, base)
    if saved:
        # Whole names: PEFT compares them with the ends of its own.
        written["modules_to_save"] = sorted(saved)
    text = json.dumps(written, indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n")


def _peft_config(adapters: Mapping[str, Adapter], config: AdapterConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    family = type(next(iter(adapters.values())))
    ranks = {module: adapter.r for module, adapter in adapters.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    settings = family.peft_settings(config)
    shapes = {module: list(adapter.shape) for module, adapter in sorted(adapters.items())}
    if "fan_in_fan_out" in settings:
        settings["fan_in_fan_out"] = bool(base.get("fan_in_fan_out", False))
    return {
        "peft_type": family.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.get("name"),
        "r": common,
        "rank_pattern": {module: r for module, r in ranks.items() if r != common},
        "alpha_pattern": dict(config.alpha_pattern),
        "target_modules": sorted(adapters),
        "inference_mode": True,
        "rankline": dict(base) | {"method": config.method, "options": dict(config.options), "shapes": shapes},
        **settings,
    }


def read_config(directory: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a directory.

    Raises:
        AdapterError: missing, damaged, or of a family that is not here.
    """
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"load adapter {directory}: {CONFIG} is missing or damaged ({error}).") from error
    if not isinstance(config, dict):
        raise AdapterError(f"load adapter {directory}: {CONFIG} is damaged (no JSON object).")
    if family_of(config) is None:
        known = ", ".join(sorted({family.peft_type for family in FAMILIES.values()}))
        raise AdapterError(f"load adapter {directory}: peft_type {config.get('peft_type')!r}; allowed are {known}.")
    return config


def check_base(directory: Path, config: Mapping[str, Any], base: Mapping[str, Any]) -> None:
    """Refuse an adapter for another base; what either side does not tell (files of other tools) is not compared.

    Raises:
        AdapterError: it was trained over another model, another split of it, or another kind of base.
    """
    trained = config.get("rankline") or {}
    dense = base.get("base", trained.get("base")) == "dense"
    for key, what in _BASE_KEYS.items():
        if dense and key == "split_key":
            continue
        theirs, ours = trained.get(key), base.get(key)
        if None not in (theirs, ours) and theirs != ours:
            raise AdapterError(
                f"load adapter {directory}: it was trained over {what} {theirs} (model {trained.get('name')!r}), this "
                f"base has {ours} (model {base.get('name')!r}). Load it onto the base that it was trained over, train "
                "it again over this one, or write it for the original dense model with `rankline export`."
            )


def load_adapter(directory: Path, base: Mapping[str, Any] | None = None) -> dict[str, Adapter]:
    """Read a PEFT directory of any family: module -> adapter.

    Args:
        directory: of our own or of PEFT's making.
        base: what the adapter is to be loaded onto, by the names that `save_adapter` records; None does not ask.

    Raises:
        AdapterError: damaged files, missing tensors, wrong shapes, values that are not finite, or another base.
    """
    config = read_config(directory)
    check_base(directory, config, base or {})
    family = family_of(config)
    assert family is not None
    tensors = _read_tensors(directory)
    whole = {f"{_PREFIX}{module}.{name}" for module, named in _whole(tensors, config).items() for name in named}
    layers, shared = _by_module({key: t for key, t in tensors.items() if key not in whole}, family.prefix)
    _require_finite(directory, {**layers, "shared": shared})
    try:
        return dict(family.load_all(layers, shared, config))
    except (AdapterError, KeyError, TypeError, ValueError) as error:
        module = _first_that_fails(family, layers, shared, config)
        problem = str(error) if isinstance(error, AdapterError) else f"no {config['peft_type']} adapter ({error!r})"
        held = {name: tuple(tensor.shape) for name, tensor in sorted(layers.get(module, shared).items())}
        raise AdapterError(
            f"load adapter {directory}: {module or 'all layers'}: {problem} Its tensors are {held}. Save it again, "
            "with the configuration that it was trained with."
        ) from error


def _first_that_fails(
    family: type[Adapter],
    layers: Mapping[str, Mapping[str, Tensor]],
    shared: Mapping[str, Tensor],
    config: Mapping[str, Any],
) -> str:
    """The first module that does not load alone; empty where all do."""
    for module, named in layers.items():
        try:
            family.load_all({module: named}, shared, config)
        except (AdapterError, KeyError, TypeError, ValueError):
            return module
    return ""


def load_saved_modules(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The modules that were trained whole beside an adapter: module -> name -> tensor; mostly none.

    Raises:
        AdapterError: damaged files, none for a pattern of `modules_to_save`, or values that are not finite.
    """
    config = read_config(directory)
    found = _whole(_read_tensors(directory), config)
    _require_finite(directory, found)
    for pattern in config.get("modules_to_save") or ():
        if not any(module.endswith(pattern) for module in found):
            raise AdapterError(
                f"load adapter {directory}: modules_to_save names {pattern!r}, but {WEIGHTS} has no tensor of it. Save "
                "it again."
            )
    return found


def _require_finite(directory: Path, layers: Mapping[str, Mapping[str, Tensor]]) -> None:
    try:
        check_finite(layers)
    except AdapterError as error:
        raise AdapterError(f"load adapter {directory}: {error}") from error


def _read_tensors(directory: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return dict(load_file(directory / WEIGHTS))
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"load adapter {directory}: {WEIGHTS} is missing or damaged ({error}).") from error


def _whole(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Tensors of modules that were trained whole, whose names end as PEFT's `modules_to_save` says."""
    found: dict[str, dict[str, Tensor]] = {}
    for pattern in config.get("modules_to_save") or ():
        for key, tensor in tensors.items():
            named = re.match(rf"(.*?{re.escape(pattern)})\.(.+)$", key.removeprefix(_PREFIX))
            if key.startswith(_PREFIX) and named:
                found.setdefault(named[1], {})[named[2]] = tensor
    return found


def _by_module(tensors: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Tensors by module and name, and those that belong to no module; a name starts with the family's prefix."""
    layers: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, found, rest = key.partition(f".{prefix}")
        name = prefix + rest
        if found and module.startswith(_PREFIX):
            layers.setdefault(module.removeprefix(_PREFIX), {})[name] = tensor
        else:
            shared[key.removeprefix(_PREFIX).removeprefix(_SHARED)] = tensor
    return layers, shared
