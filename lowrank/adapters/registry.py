"""The adapter families by the name that `finetune.adapter.method` takes; a new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lowrank.adapters.abba import ABBA
from lowrank.adapters.adalora import AdaLoRA
from lowrank.adapters.base import Adapter, Layer, matched
from lowrank.adapters.dora import DoRA
from lowrank.adapters.dylora import DyLoRA
from lowrank.adapters.full import Full
from lowrank.adapters.hira import HiRA
from lowrank.adapters.loha import LoHA
from lowrank.adapters.lokh import KRAdapter, LoKH
from lowrank.adapters.lokr import KronA, LoKr
from lowrank.adapters.lora import LoRA
from lowrank.adapters.lora_fa import LoRAFA
from lowrank.adapters.lora_xs import LoRAXS
from lowrank.adapters.polar import PoLAR
from lowrank.adapters.tensor_layers import LoRTA, LoTR
from lowrank.adapters.vera import VeRA
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

FAMILIES: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "dora": DoRA,
    "vera": VeRA,
    "lora_fa": LoRAFA,
    "lora_xs": LoRAXS,
    "hira": HiRA,
    "dylora": DyLoRA,
    "lotr": LoTR,
    "lorta": LoRTA,
    "adalora": AdaLoRA,
    "polar": PoLAR,
    "loha": LoHA,
    "abba": ABBA,
    "lokr": LoKr,
    "krona": KronA,
    "lokh": LoKH,
    "kradapter": KRAdapter,
    "full": Full,
}


def initial_adapters(layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Adapter]:
    """The adapter of every targeted layer before training, by `config.method`.

    Raises:
        AdapterError: a rank or shape that the family cannot take (the message names the layer), or a pattern that
            matches no layer.
    """
    names = [layer.name for layer in layers]
    for field in ("target_modules", "rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, field) or ():
            if not any(matched({pattern: True}, name, False) for name in names):
                leaves = ", ".join(sorted({name.rpartition(".")[2] for name in names}))
                raise AdapterError(f"finetune.adapter.{field}: {pattern!r} matches no layer. The targets are {leaves}.")
    wanted = None if config.target_modules is None else dict.fromkeys(config.target_modules, True)
    chosen = [layer for layer in layers if wanted is None or matched(wanted, layer.name, False)]
    return dict(FAMILIES[config.method].initial_all(chosen, config))


def family_of(config: Mapping[str, Any]) -> type[Adapter] | None:
    """The family of a directory by its `adapter_config.json`, or None: the one that wrote it, else by `peft_type`.

    Several families share PEFT's `LORA`: of files that others wrote, those with `use_dora` are DoRA, the rest LoRA.
    """
    peft_type, written = config.get("peft_type"), config.get("rankline") or {}
    method = written.get("method", "dora" if config.get("use_dora") else None)
    families = [FAMILIES[method]] if method in FAMILIES else []
    return next((family for family in [*families, *FAMILIES.values()] if family.peft_type == peft_type), None)
