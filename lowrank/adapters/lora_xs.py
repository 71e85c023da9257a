"""LoRA-XS: ΔW = s·B·R·A with B = U_r Σ_r (m, r) and A = V_rᵀ (r, n) of W, both frozen, and R (r, r) trained.

Source: Bałazy et al., arXiv 2405.17604, eq. 2, with R ~ N(0, 1e-5²) at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapter_options import LoRAXSOptions, options_of
from lowrank.adapters.base import Adapter, Export, Layer, require_fit
from lowrank.adapters.settings import dropout_of, rank_of, scaling_for, scaling_from
from lowrank.blocks import BlockMatrix
from lowrank.config import AdapterConfig
from lowrank.executor import SerialExecutor
from lowrank.rank import RankRule


class LoRAXS(Adapter):
    """ΔW = s·B·R·A, R alone trained."""

    peft_type: ClassVar[str] = "LORA_XS"
    prefix: ClassVar[str] = "lora_xs_"
    export: ClassVar[Export] = "exact"

    lora_xs_a: Tensor
    lora_xs_b: Tensor

    def __init__(self, a: Tensor, b: Tensor, core: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: a: V_rᵀ (r, n). b: U_r Σ_r (m, r). core: R (r, r). scaling: s. dropout: on the input, in [0, 1)."""
        require_fit("LoRA-XS", A=(a, "rn"), B=(b, "mr"), R=(core, "rr"))
        super().__init__((b.shape[0], a.shape[1]), scaling, dropout)
        self.register_buffer("lora_xs_a", a)
        self.register_buffer("lora_xs_b", b)
        self.lora_xs_r = nn.Parameter(core)

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """A and B by a randomized SVD of the frozen weight, R almost 0."""
        # Not at the top: the decompositions import scipy, and no other family needs them.
        from lowrank.decompositions import decompose
        from lowrank.factors import SVDFactors

        options: LoRAXSOptions = options_of(config.method, config.options)
        r = rank_of(layer, config)
        matrix = BlockMatrix.from_tensor(layer.name, layer.weight().float())
        fit = decompose(
            matrix, rule=RankRule(rank=r), seed=config.seed, executor=SerialExecutor(), n_iter=options.n_iter
        )
        factors = fit.factors
        assert isinstance(factors, SVDFactors)
        core = torch.randn(r, r, generator=layer.generator(config.seed)) * options.init_std
        b = (factors.u * factors.s).contiguous()
        return cls(factors.vh.contiguous(), b, core, scaling_for(layer, config, r), config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank."""
        return len(self.lora_xs_r)

    def delta(self, x: Tensor) -> Tensor:
        """s·B·R·A·x for x (..., n): (..., m)."""
        inner = F.linear(F.linear(x, self.lora_xs_a.to(x.dtype)), self.lora_xs_r.to(x.dtype))
        return F.linear(inner, self.lora_xs_b.to(x.dtype)) * self.scaling

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s·B·R, A)."""
        return self.scaling * (self.lora_xs_b @ self.lora_xs_r), self.lora_xs_a

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·B·R·A (m, n)."""
        del weight
        left, right = self.low_rank()
        return left @ right

    def tensors(self) -> dict[str, Tensor]:
        """R, and the frozen A and B, so that a file needs no W to be read."""
        return {"lora_xs_A": self.lora_xs_a, "lora_xs_B": self.lora_xs_b, "lora_xs_R": self.lora_xs_r.detach()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored triple."""
        a, b, core = (tensors[f"lora_xs_{name}"].float() for name in "ABR")
        return cls(a, b, core, scaling_from(config, module, len(core)), dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """In the names of `peft.LoraConfig`."""
        return {
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "lora_dropout": config.lora_dropout,
        }
