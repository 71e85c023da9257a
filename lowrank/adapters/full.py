"""Full training of a layer: ΔW (m, n) is a dense trained matrix that starts at 0, over a W that stays as it is.

With weight decay 0 this is full fine-tuning of the layer, also over a quantized W, whose codes could not take a small
step. Decoupled weight decay shrinks ΔW, not W + ΔW: it pulls back to the pretrained weight. `lora_alpha` has no effect.

Source: none; the baseline that every low-rank family is compared with, and what GaLore (arXiv 2403.03507) trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import full_problem
from lowrank.adapters.base import Adapter, Export, Layer, require_fit
from lowrank.adapters.settings import dropout_of
from lowrank.blocks import BlockMatrix
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.executor import SerialExecutor
from lowrank.rank import RankRule

#: Sides up to which a cut computes the whole SVD; above, block Krylov finds the leading triplets only.
_WHOLE_SVD = 1024


class Full(Adapter):
    """ΔW (m, n) itself."""

    peft_type: ClassVar[str] = "FULL"
    prefix: ClassVar[str] = "full_"
    export: ClassVar[Export] = "truncated"

    def __init__(self, delta: Tensor, dropout: float = 0.0) -> None:
        """Args: delta: ΔW (m, n). dropout: on the input while training, in [0, 1)."""
        require_fit("full", delta=(delta, "mn"))
        super().__init__((delta.shape[0], delta.shape[1]), 1.0, dropout)
        self.full_delta = nn.Parameter(delta)

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """ΔW = 0.

        Raises:
            AdapterError: the configuration sets a rank or a scaling, of which a dense ΔW has neither.
        """
        if (problem := full_problem(config)) is not None:
            raise AdapterError(f"initialise {layer.what}: finetune.adapter.{problem}")
        return cls(torch.zeros(layer.shape), config.lora_dropout)

    @property
    def r(self) -> int:
        """min(m, n): nothing bounds the rank of ΔW."""
        return min(self.shape)

    def delta(self, x: Tensor) -> Tensor:
        """ΔW x for x (..., n): (..., m)."""
        return F.linear(self.scaling * x, self.full_delta.to(x.dtype))

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """ΔW (m, n)."""
        del weight
        return self.scaling * self.full_delta

    def _svd(self, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """The `keep` leading triplets; a last σ stands for all others together, so that no energy is lost."""
        delta = self.delta_weight()
        if min(self.shape) <= _WHOLE_SVD or 4 * keep > min(self.shape):
            return super()._svd(keep)
        # Not at the top: the decompositions import scipy, and only exports need them.
        from lowrank.decompositions import decompose
        from lowrank.factors import SVDFactors

        matrix = BlockMatrix.from_tensor("ΔW", delta.float())
        factors = decompose(matrix, method="block_krylov", rule=RankRule(rank=keep), executor=SerialExecutor()).factors
        assert isinstance(factors, SVDFactors)
        rest = delta.double().square().sum() - factors.s.double().square().sum()
        return factors.u, torch.cat([factors.s, rest.clamp(min=0.0).sqrt().float()[None]]), factors.vh

    def tensors(self) -> dict[str, Tensor]:
        """ΔW."""
        return {"full_delta": self.full_delta.detach()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored ΔW."""
        del module
        return cls(tensors["full_delta"].float(), dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """The dropout; PEFT has not this family."""
        return {"lora_dropout": config.lora_dropout}
