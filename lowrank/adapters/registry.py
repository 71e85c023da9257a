"""The adapter families by the name that `finetune.adapter.method` takes; a new family is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence

from lowrank.adapters.abba import ABBA
from lowrank.adapters.base import Adapter, Layer
from lowrank.adapters.loha import LoHA
from lowrank.adapters.lokh import KRAdapter, LoKH
from lowrank.adapters.lokr import KronA, LoKr
from lowrank.adapters.lora import LoRA
from lowrank.config import AdapterConfig

FAMILIES: dict[str, type[Adapter]] = {
    "lora": LoRA,
    "loha": LoHA,
    "abba": ABBA,
    "lokr": LoKr,
    "krona": KronA,
    "lokh": LoKH,
    "kradapter": KRAdapter,
}


def initial_adapters(layers: Sequence[Layer], config: AdapterConfig) -> dict[str, Adapter]:
    """The adapter of every layer before training, by `config.method`.

    Raises:
        AdapterError: a rank or shape that the family cannot take; the message names the layer.
    """
    return dict(FAMILIES[config.method].initial_all(layers, config))


def family_of(peft_type: str) -> type[Adapter] | None:
    """The family that writes this `peft_type`, or None."""
    return next((family for family in FAMILIES.values() if family.peft_type == peft_type), None)
