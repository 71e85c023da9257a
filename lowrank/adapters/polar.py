"""PoLAR: ΔW = s·X·Θ·Yᵀ with X (m, r) and Y (n, r) near orthonormal columns and Θ (r, r) free.

X and Y are kept near the Stiefel manifold by the direction they are moved in (`landing`), not by a projection.

Source: Lion et al., arXiv 2506.03133, eq. 5 and algorithm 1; landing, Ablin and Peyré, arXiv 2102.07432, eq. 4.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapters.base import Adapter, Export, Layer, require_fit
from lowrank.adapters.settings import dropout_of, rank_of, scaling_for, scaling_from
from lowrank.config import AdapterConfig


class PoLAR(Adapter):
    """ΔW = s·X·Θ·Yᵀ."""

    peft_type: ClassVar[str] = "POLAR"
    prefix: ClassVar[str] = "polar_"
    export: ClassVar[Export] = "exact"
    orthonormal: ClassVar[tuple[str, ...]] = ("polar_x", "polar_y")
    """The parameters that `landing` is for."""

    def __init__(self, x: Tensor, theta: Tensor, y: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: x: X (m, r). theta: Θ (r, r). y: Y (n, r). scaling: s. dropout: on the input, in [0, 1)."""
        require_fit("PoLAR", X=(x, "mr"), theta=(theta, "rr"), Y=(y, "nr"))
        super().__init__((x.shape[0], y.shape[0]), scaling, dropout)
        self.polar_x = nn.Parameter(x)
        self.polar_theta = nn.Parameter(theta)
        self.polar_y = nn.Parameter(y)

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """X and Y random with orthonormal columns, Θ = 0."""
        (m, n), r, generator = layer.shape, rank_of(layer, config), layer.generator(config.seed)
        x, y = (torch.linalg.qr(torch.randn(rows, r, generator=generator))[0].contiguous() for rows in (m, n))
        return cls(x, torch.zeros(r, r), y, scaling_for(layer, config, r), config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank."""
        return len(self.polar_theta)

    def delta(self, x: Tensor) -> Tensor:
        """s·X·Θ·Yᵀ·x for x (..., n): (..., m)."""
        inner = F.linear(F.linear(x, self.polar_y.T.to(x.dtype)), self.polar_theta.to(x.dtype))
        return F.linear(inner, self.polar_x.to(x.dtype)) * self.scaling

    def low_rank(self) -> tuple[Tensor, Tensor]:
        """(s·X·Θ, Yᵀ)."""
        return self.scaling * (self.polar_x @ self.polar_theta), self.polar_y.T

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """s·X·Θ·Yᵀ (m, n)."""
        del weight
        left, right = self.low_rank()
        return left @ right

    def tensors(self) -> dict[str, Tensor]:
        """X, Θ and Y."""
        named = {"polar_X": self.polar_x, "polar_theta": self.polar_theta, "polar_Y": self.polar_y}
        return {name: parameter.detach() for name, parameter in named.items()}

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored triple."""
        x, theta, y = (tensors[f"polar_{name}"].float() for name in ("X", "theta", "Y"))
        return cls(x, theta, y, scaling_from(config, module, len(theta)), dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """In the names of `peft.LoraConfig`."""
        return {
            "lora_alpha": config.lora_alpha,
            "use_rslora": config.use_rslora,
            "lora_dropout": config.lora_dropout,
        }


@torch.no_grad()
def landing(parameter: Tensor, gradient: Tensor, weight: float = 1.0) -> Tensor:
    """The direction skew(G Xᵀ)·X + λ·X·(XᵀX − I), for an optimizer to take in place of the gradient.

    The first term turns X within its orthonormal columns, the second pulls it back to them; they are orthogonal to
    each other where XᵀX = I. skew(M) = (M − Mᵀ)/2, and no m×m matrix is built: ½·(G·(XᵀX) − X·(GᵀX)).

    Args:
        parameter: X (m, r), m >= r.
        gradient: G = ∂L/∂X (m, r), of the whole batch.
        weight: λ >= 0.

    Returns:
        (m, r), in the dtype of X.
    """
    gram = parameter.T @ parameter
    turn = 0.5 * (gradient @ gram - parameter @ (gradient.T @ parameter))
    eye = torch.eye(gram.shape[0], dtype=gram.dtype, device=gram.device)
    return turn + weight * (parameter @ (gram - eye))
