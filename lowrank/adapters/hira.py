"""HiRA: ΔW = W ∘ (B·A), a change of high rank out of a pair A (r, n), B (m, r); there is no α.

Source: Huang et al., HiRA, ICLR 2025, eq. 3; names and starts as in `peft.HiraConfig`. PEFT 0.21 does not follow the
`rank_pattern` of a HiRA adapter: it loads those of one rank only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from lowrank.adapters.base import Adapter, Export, Layer, kaiming, require_fit
from lowrank.adapters.frozen import frozen_weight, needs_weight
from lowrank.adapters.settings import dropout_of, rank_of
from lowrank.config import AdapterConfig


class HiRA(Adapter):
    """ΔW = W ∘ (B·A)."""

    peft_type: ClassVar[str] = "HIRA"
    prefix: ClassVar[str] = "hira_"
    export: ClassVar[Export] = "merge-only"

    def __init__(self, a: Tensor, b: Tensor, dropout: float = 0.0) -> None:
        """Args: a: (r, n). b: (m, r). dropout: on the input while training, in [0, 1)."""
        require_fit("HiRA", A=(a, "rn"), B=(b, "mr"))
        super().__init__((b.shape[0], a.shape[1]), 1.0, dropout)
        self.hira_a = nn.Parameter(a)
        self.hira_b = nn.Parameter(b)

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """B = 0 and A ~ N(0, 1/r²) for `gaussian`, else Kaiming."""
        (m, n), r, generator = layer.shape, rank_of(layer, config), layer.generator(config.seed)
        gaussian = config.init == "gaussian"
        a = torch.randn(r, n, generator=generator) / r if gaussian else kaiming(r, n, generator)
        return cls(a, torch.zeros(m, r), config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank of B·A."""
        return int(self.hira_a.shape[0])

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """y + (W ∘ (B·A)) x. W and the product are made again in the backward pass, not kept for it."""
        change: Tensor = checkpoint(self._change, self.dropped(x), base, use_reentrant=False, preserve_rng_state=False)
        return y + change

    def _change(self, x: Tensor, base: nn.Module) -> Tensor:
        weight = frozen_weight(base, self.shape, "HiRA").to(self.hira_a.dtype)
        return F.linear(x, self.delta_weight(weight).to(x.dtype))

    def delta(self, x: Tensor) -> Tensor:
        """Raises: AdapterError: the change depends on the base; `forward` is given it."""
        del x
        raise needs_weight("HiRA", self.shape)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """W ∘ (B·A) (m, n)."""
        if weight is None:
            raise needs_weight("HiRA", self.shape)
        return self.scaling * weight * (self.hira_b @ self.hira_a)

    def tensors(self) -> dict[str, Tensor]:
        """A and B by PEFT's names."""
        return {"hira_A": self.hira_a.detach(), "hira_B": self.hira_b.detach()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored pair."""
        del module
        return cls(tensors["hira_A"].float(), tensors["hira_B"].float(), dropout_of(config, "hira_dropout"))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.HiraConfig` names them."""
        return {"hira_dropout": config.lora_dropout, "fan_in_fan_out": False, "init_weights": True}
