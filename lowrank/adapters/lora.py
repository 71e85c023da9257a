"""LoRA and rsLoRA: ΔW = s·B·A with A (r, n), B (m, r) and s = α/r or α/√r.

Source: Hu et al., arXiv 2106.09685, eq. 3; Kalajdzievski, arXiv 2312.03732, eq. 3 (rank-stabilised scaling).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapters.base import Adapter, Export, Layer
from lowrank.adapters.pairs import initial_pair
from lowrank.adapters.settings import dropout_of, scaling_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.kernels.grouped import Pair


class LoRA(Adapter):
    """ΔW = s·B·A."""

    peft_type: ClassVar[str] = "LORA"
    prefix: ClassVar[str] = "lora_"
    export: ClassVar[Export] = "exact"
    takes_split: ClassVar[frozenset[str]] = frozenset({"low_rank"})

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: a: (r, n). b: (m, r). scaling: s. dropout: on the input while training, in [0, 1)."""
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"LoRA factors do not fit: A is {tuple(a.shape)}, B is {tuple(b.shape)}; "
                "allowed are A (r, n) and B (m, r) with the same r."
            )
        super().__init__((b.shape[0], a.shape[1]), scaling, dropout)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """A and B by `config.init`; see `initial_pair`."""
        a, b, scaling = initial_pair(layer, config)
        return cls(a, b, scaling, config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank."""
        return int(self.lora_a.shape[0])

    def delta(self, x: Tensor) -> Tensor:
        """s·B·A·x for x (..., n): (..., m), in the dtype of x."""
        # s meets the r numbers of a token: over m of them it would cost as much as the second product.
        return F.linear(F.linear(x, self.lora_a.to(x.dtype)) * self.scaling, self.lora_b.to(x.dtype))

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·B·A (m, n)."""
        del weight
        return self.scaling * (self.lora_b @ self.lora_a)

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s·B, A)."""
        return self.scaling * self.lora_b, self.lora_a

    def pair(self) -> Pair:
        """A and B as they lie, and s."""
        return Pair(self.lora_a.detach().contiguous(), self.lora_b.detach().T, self.scaling)

    def tensors(self) -> dict[str, Tensor]:
        """A and B by PEFT's names."""
        return {"lora_A.weight": self.lora_a.detach(), "lora_B.weight": self.lora_b.detach()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A pair on disk, with the scaling that the configuration gives its rank."""
        a, b = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
        return cls(a, b, scaling_from(config, module, len(a)), dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.LoraConfig` names them."""
        return {
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "lora_dropout": config.lora_dropout,
            "fan_in_fan_out": False,
            "bias": "none",
            "init_lora_weights": True,
        }
