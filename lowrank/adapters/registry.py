"""The adapter families by the name that `finetune.adapter.method` takes; a new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.adapters.base import Adapter, Layer, matched
from lowrank.adapters.lora import LoRA
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError

FAMILIES: dict[str, type[Adapter]] = {"lora": LoRA}


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


def family_of(peft_type: str) -> type[Adapter] | None:
    """The family that writes this `peft_type`, or None."""
    return next((family for family in FAMILIES.values() if family.peft_type == peft_type), None)
