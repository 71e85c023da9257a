"""What a family reads out of `adapter_config.json`, and which rank and alpha a pattern gives a module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank.adapters.base import Layer, matched, scaling_of
from lowrank.adapters.file_config import pattern_value
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

#: Rank where neither the configuration nor a split gives one.
DEFAULT_RANK = 16


def rank_of(layer: Layer, config: AdapterConfig, largest: int | None = None) -> int:
    """r of a layer: its pattern, else `config.r`, else the rank of its split, else 16 or the largest below.

    Args:
        layer: the layer.
        config: the adapter's configuration.
        largest: the largest rank that the family allows; None takes min(m, n).

    Raises:
        AdapterError: the rank is larger than that.
    """
    bound = min(layer.shape) if largest is None else largest
    default = min(DEFAULT_RANK, bound) if layer.split is None else layer.split.rank
    r: int = matched(config.rank_pattern, layer.name, config.r) or default
    if r > bound:
        raise AdapterError(f"initialise {layer.what}: rank {r} > {bound}. Set finetune.adapter.r <= {bound}.")
    return r


def common_rank(config: AdapterConfig, method: str) -> int:
    """r of all layers, for families whose layers share parameters: `config.r`, else 16.

    Raises:
        AdapterError: a pattern gives some layers another rank.
    """
    if config.rank_pattern:
        raise AdapterError(
            f"initialise {method}: its layers share one rank, got rank_pattern {dict(config.rank_pattern)}. "
            "Set finetune.adapter.r instead."
        )
    return config.r or DEFAULT_RANK


def scaling_for(layer: Layer, config: AdapterConfig, r: int) -> float:
    """s of a layer: the alpha of its pattern or of the configuration, by its own rank."""
    return scaling_of(matched(config.alpha_pattern, layer.name, config.lora_alpha), r, config.use_rslora)


def scaling_from(config: Mapping[str, Any], module: str, r: int, alpha: str = "lora_alpha") -> float:
    """s of a stored layer of rank r; `alpha` is the family's name for α in PEFT's configuration."""
    value = pattern_value(config, "alpha_pattern", module, config[alpha])
    return scaling_of(float(value), r, bool(config.get("use_rslora")))


def dropout_of(config: Mapping[str, Any], name: str = "lora_dropout") -> float:
    """Dropout on the input of a stored adapter."""
    return float(config.get(name) or 0.0)


def shapes_from(config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(m, n) of every module, as our own files tell them; empty for files that others wrote."""
    stored = (config.get("rankline") or {}).get("shapes") or {}
    return {module: (int(m), int(n)) for module, (m, n) in stored.items()}


def options_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """The family's options, as our own files tell them."""
    return dict((config.get("rankline") or {}).get("options") or {})
