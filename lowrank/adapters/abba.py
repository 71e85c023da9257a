"""ABBA: ΔW = √α₁√α₂·(B1 A1)∘(B2 A2), whose first pair starts as the truncated SVD of W and is trained too.

The other pair starts at zero, so that training starts at W. The rank is `r` for the second pair, `options.r1` for the
first; for the numbers of a LoRA of rank r take half of it for each.

Source: Singhal et al., ABBA, arXiv 2505.14238, section 3; scaling as in the authors' `abba.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch

from lowrank.adapter_options import ABBAOptions
from lowrank.adapters.base import Layer, kaiming, matched
from lowrank.adapters.file_config import pattern_value
from lowrank.adapters.loha import LoHA, from_split
from lowrank.adapters.pairs import residual_part
from lowrank.adapters.products import refuse_rslora
from lowrank.adapters.settings import rank_of
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import HadamardFactors


class ABBA(LoHA):
    """ΔW = √α₁√α₂·(B1 A1)∘(B2 A2), B1 A1 from the SVD of W."""

    peft_type: ClassVar[str] = "ABBA"
    prefix: ClassVar[str] = "abba_"
    names: ClassVar[tuple[str, str, str, str]] = ("abba_b1", "abba_a1", "abba_b2", "abba_a2")

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """The split that `quantize` took out; without one B1 A1 = SVD_r1(W) with equal Grams, B2 = 0, A2 Kaiming."""
        refuse_rslora(layer, config)
        (m, n), r, options = layer.shape, rank_of(layer, config), ABBAOptions(**config.options)
        r1 = options.r1 or r
        if r1 > min(m, n):
            raise AdapterError(
                f"initialise {layer.what}: r1 = {r1} > {min(m, n)}. Set finetune.adapter.options.r1 <= {min(m, n)}."
            )
        alpha2 = matched(config.alpha_pattern, layer.name, config.lora_alpha)
        scaling, generator = _scaling(options.alpha1, alpha2), layer.generator(config.seed)
        if isinstance(layer.split, HadamardFactors):
            return cls(*from_split(layer, layer.split, (r1, r), scaling, generator), scaling, config.lora_dropout)
        b1, a1 = (part.contiguous() for part in residual_part(layer.weight().float(), r1, "pissa"))
        second = torch.zeros(m, r), kaiming(r, n, generator)
        return cls((b1, a1), second, scaling, config.lora_dropout)

    @classmethod
    def stored_scaling(cls, module: str, r: int, config: Mapping[str, Any]) -> float:
        """√α₁√α₂, which knows no rank."""
        del r
        alpha2 = pattern_value(config, "alpha_pattern", module, config["lora_alpha"])
        return _scaling(config["alpha1"], alpha2)

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """α₁ (null: as α₂) and α₂ of this family, which PEFT has not."""
        alpha1 = ABBAOptions(**config.options).alpha1
        return {"lora_alpha": config.lora_alpha, "alpha1": alpha1, "lora_dropout": config.lora_dropout}


def _scaling(alpha1: float | None, alpha2: float) -> float:
    return math.sqrt(alpha2 if alpha1 is None else alpha1) * math.sqrt(alpha2)
