"""Adapters on disk in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`, which any tool reads."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowrank.adapters.lora import LoRA
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

_PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(directory: Path, adapters: Mapping[str, LoRA], config: AdapterConfig, base: Mapping[str, Any]) -> None:
    """Write `adapters` (module -> LoRA) as a PEFT directory with deterministic bytes.

    Args:
        directory: Existing or new directory.
        adapters: The trained layers.
        config: Alpha, scaling rule and dropout.
        base: What the adapter was trained over (hashes); goes under `rankline` in the config, which PEFT ignores.

    Raises:
        AdapterError: a factor holds NaN or infinity.
    """
    from safetensors.torch import save_file

    tensors = {}
    for module, adapter in adapters.items():
        for name, tensor in adapter.tensors().items():
            if not torch.isfinite(tensor).all():
                raise AdapterError(
                    f"save adapter: {module}.{name} holds NaN or infinity. Lower finetune.learning_rate."
                )
            tensors[f"{_PREFIX}{module}.{name}"] = tensor.float().contiguous().cpu()
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(_peft_config(adapters, config, base), indent=2, sort_keys=True)
    (directory / CONFIG).write_text(text + "\n")


def _peft_config(adapters: Mapping[str, LoRA], config: AdapterConfig, base: Mapping[str, Any]) -> dict[str, Any]:
    ranks = {module: adapter.r for module, adapter in adapters.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.get("name"),
        "r": common,
        "lora_alpha": config.lora_alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": config.lora_dropout,
        "rank_pattern": {module: r for module, r in ranks.items() if r != common},
        "alpha_pattern": {},
        "target_modules": sorted(adapters),
        "fan_in_fan_out": bool(base.get("fan_in_fan_out", False)),
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
        "rankline": dict(base),
    }


def read_config(directory: Path) -> dict[str, Any]:
    """The `adapter_config.json` of a directory.

    Raises:
        AdapterError: missing, damaged, or not LoRA.
    """
    try:
        config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise AdapterError(f"load adapter {directory}: {CONFIG} is missing or damaged ({error}).") from error
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"load adapter {directory}: peft_type {config.get('peft_type')!r}; allowed is 'LORA'.")
    return config


def load_adapter(directory: Path) -> dict[str, LoRA]:
    """Read a PEFT LoRA directory: module -> LoRA.

    Raises:
        AdapterError: damaged files, a half pair, wrong shapes, or values that are not finite.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config = read_config(directory)
    try:
        tensors = load_file(directory / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"load adapter {directory}: {WEIGHTS} is missing or damaged ({error}).") from error
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, _, factor = key.removeprefix(_PREFIX).removesuffix(".weight").rpartition(".")
        factors.setdefault(module, {})[factor] = tensor
    return {module: _layer(directory, module, pair, config) for module, pair in factors.items()}


def _layer(directory: Path, module: str, pair: dict[str, Tensor], config: dict[str, Any]) -> LoRA:
    if set(pair) != {"lora_A", "lora_B"}:
        raise AdapterError(f"load adapter {directory}: {module} has {sorted(pair)}; allowed are lora_A and lora_B.")
    if not all(bool(torch.isfinite(tensor).all()) for tensor in pair.values()):
        raise AdapterError(f"load adapter {directory}: {module} holds NaN or infinity. Train it again.")
    r = int(pair["lora_A"].shape[0])
    alpha = float(config.get("alpha_pattern", {}).get(module, config["lora_alpha"]))
    scaling = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return LoRA(pair["lora_A"].float(), pair["lora_B"].float(), scaling, float(config.get("lora_dropout", 0.0)))


def plain_lora(trained: Mapping[str, LoRA], initial: Mapping[str, LoRA]) -> dict[str, LoRA]:
    """The change since initialisation as a LoRA of twice the rank, for the original dense base.

    s·(B·A − B₀·A₀) = s·[B, −B₀]·[A; A₀]: exact, and it fits W instead of the quantized residual.

    Source: PiSSA, arXiv 2404.02948, appendix on converting to LoRA.
    """
    result = {}
    for module, adapter in trained.items():
        first = initial[module]
        a = torch.cat([adapter.lora_a.detach(), first.lora_a.detach()])
        b = torch.cat([adapter.lora_b.detach(), -first.lora_b.detach()], dim=1)
        result[module] = LoRA(a, b, adapter.scaling)
    return result
