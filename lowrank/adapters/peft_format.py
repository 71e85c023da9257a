"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which any tool reads.

Families that PEFT has not lie in the same layout under a `peft_type` of our own. What PEFT would ignore (the base's
hash, shapes, options) stands under `rankline`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.base import Adapter, check_finite, matched
from lowrank.adapters.file_config import MOST_NAME, check_fields, resolved
from lowrank.adapters.registry import FAMILIES, family_of
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.reading import read_json, shown
from lowrank.tensor_file import load_tensors

_PREFIX = "base_model.model."
_SHARED = "base_model."
#: What must be the same where an adapter is loaded, as messages name it.
_BASE_KEYS = {"base_sha256": "weights of sha256", "split_key": "the split", "base": "a base of kind"}
#: What tensors and numbers that do not fit each other lead a family to.
_STRANGE = (AdapterError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_MOST_SCALING, _MOST_SHOWN = 1e30, 8
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
        # Names in the place of patterns: whoever reads them needs no regular expressions.
        "alpha_pattern": {
            module: alpha for module in adapters if (alpha := matched(config.alpha_pattern, module, None)) is not None
        },
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
        config: dict[str, Any] = read_json(directory / CONFIG)
    except (OSError, ValueError) as error:
        raise AdapterError(f"load adapter {directory}: {CONFIG} is missing or damaged ({error}).") from error
    if not isinstance(config, dict):
        raise AdapterError(f"load adapter {directory}: {CONFIG} is damaged (no JSON object).")
    try:
        check_fields(config)
    except AdapterError as error:
        raise AdapterError(f"load adapter {directory}: {CONFIG}: {error}") from error
    if family_of(config) is None:
        known = ", ".join(sorted({family.peft_type for family in FAMILIES.values()}))
        kind = shown(config.get("peft_type"))
        raise AdapterError(f"load adapter {directory}: peft_type {kind}; allowed are {known}.")
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
                f"load adapter {directory}: it was trained over {what} {shown(theirs)} (model "
                f"{shown(trained.get('name'))}), this "
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
    own = {key: tensor for key, tensor in tensors.items() if key not in whole}
    if whole:  # they would hold all of the file, which has much else in it
        own = {key: tensor.clone() for key, tensor in own.items()}
    layers, shared = _by_module(own, family.prefix)
    try:
        config = resolved(config, layers)
        made = dict(family.load_all(layers, shared, config))
        _require_finite_scale(made, shared)
        return made
    except _STRANGE as error:
        module = _first_that_fails(family, layers, shared, config)
        problem = str(error) if isinstance(error, AdapterError) else f"no {config['peft_type']} adapter ({error!r})"
        tensors = layers.get(module, shared)
        held = {name: tuple(tensors[name].shape) for name in sorted(tensors)[:_MOST_SHOWN]}
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
    """The first module that does not load alone; empty where all do, or none of the first thousand."""
    for module, named in islice(layers.items(), 1000):
        try:
            family.load_all({module: named}, shared, config)
        except _STRANGE:
            return module
    return ""


def _require_finite_scale(adapters: Mapping[str, Adapter], shared: Mapping[str, Tensor]) -> None:
    for module, adapter in adapters.items():
        if not abs(adapter.scaling) < _MOST_SCALING:
            raise AdapterError(f"the scaling of {module} is {adapter.scaling}. Correct alpha and rank.")
    if any(name.endswith(".alpha") for name in shared):  # of LyCORIS, and multiplied into the factors
        check_finite({module: adapter.tensors() for module, adapter in adapters.items()})


def load_saved_modules(directory: Path) -> dict[str, dict[str, Tensor]]:
    """The modules that were trained whole beside an adapter: module -> name -> tensor; mostly none.

    Raises:
        AdapterError: damaged files, none for a pattern of `modules_to_save`, or values that are not finite.
    """
    config = read_config(directory)
    found = _whole(_read_tensors(directory), config)
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
    """Every tensor of a file, all of them finite."""
    from safetensors import SafetensorError

    try:
        tensors, flats = load_tensors(directory / WEIGHTS)
    except (OSError, SafetensorError, LookupError, RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise AdapterError(f"load adapter {directory}: {WEIGHTS} is missing or damaged ({error}).") from error
    for name in tensors:
        if len(name) > MOST_NAME:
            raise AdapterError(
                f"load adapter {directory}: {WEIGHTS} has the tensor {shown(name)}; allowed are names of at most "
                f"{MOST_NAME} characters. Save it again."
            )
    # What is too large for the factors' own fp32 is infinite from here on.
    if any(flat.dtype is torch.float64 for flat in flats):
        tensors = {
            name: tensor.float() if tensor.dtype is torch.float64 else tensor for name, tensor in tensors.items()
        }
    if not all(_is_finite(flat) for flat in flats):
        _require_finite(directory, {"": tensors})
    return tensors


def _is_finite(flat: Tensor) -> bool:
    if not flat.is_floating_point() or not flat.numel():
        return True
    # NumPy stays on this thread: of torch all cores would leave what else they are at, a server's decoding.
    numbers = (flat if flat.dtype in (torch.float32, torch.float16) else flat.float()).numpy()
    return math.isfinite(numbers.min()) and math.isfinite(numbers.max())


def _whole(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, dict[str, Tensor]]:
    """Tensors of modules that were trained whole, whose names end as PEFT's `modules_to_save` says."""
    found: dict[str, dict[str, Tensor]] = {}
    for pattern in config.get("modules_to_save") or ():
        for key, tensor in tensors.items():
            name = key.removeprefix(_PREFIX)
            before, dot, rest = name.partition(f"{pattern}.")
            if key.startswith(_PREFIX) and dot and rest:
                found.setdefault(before + pattern, {})[rest] = tensor
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
