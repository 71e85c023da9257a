"""LoRA and rsLoRA: ΔW = s·B·A with A (r, n), B (m, r) and s = α/r or α/√r.

Source: Hu et al., arXiv 2106.09685, eq. 3; Kalajdzievski, arXiv 2312.03732, eq. 3 (rank-stabilised scaling).
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.errors import AdapterError


class LoRA(nn.Module):
    """The trained pair (A, B) of one layer; `forward` is its contribution s·B·A·x, never ΔW."""

    def __init__(self, a: Tensor, b: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: a: (r, n). b: (m, r). scaling: s. dropout: on the input while training, in [0, 1)."""
        super().__init__()
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise AdapterError(
                f"LoRA factors do not fit: A is {tuple(a.shape)}, B is {tuple(b.shape)}; "
                "allowed are A (r, n) and B (m, r) with the same r."
            )
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)
        self.scaling = scaling
        self.dropout = dropout

    @classmethod
    def kaiming(cls, m: int, n: int, r: int, scaling: float, generator: torch.Generator) -> LoRA:
        """A ~ U(−1/√n, 1/√n) (Kaiming with a = √5), B = 0: the update starts at exactly zero."""
        bound = 1.0 / math.sqrt(n)
        a = torch.rand(r, n, generator=generator) * (2 * bound) - bound
        return cls(a, torch.zeros(m, r), scaling)

    @property
    def r(self) -> int:
        """Rank."""
        return int(self.lora_a.shape[0])

    def forward(self, x: Tensor) -> Tensor:
        """s·B·A·x for x (..., n): (..., m), in the dtype of x."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return F.linear(F.linear(x, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype)) * self.scaling

    def delta_weight(self) -> Tensor:
        """ΔW = s·B·A (m, n), for tests and merges."""
        return self.scaling * (self.lora_b @ self.lora_a)

    def to_lora(self) -> tuple[Tensor, Tensor, float]:
        """(A, B, s): exact, LoRA is its own form."""
        return self.lora_a.detach(), self.lora_b.detach(), self.scaling

    def tensors(self) -> Mapping[str, Tensor]:
        """Trained tensors by PEFT's names."""
        return {"lora_A.weight": self.lora_a.detach(), "lora_B.weight": self.lora_b.detach()}
