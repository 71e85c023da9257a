"""DoRA: W + ΔW = diag(μ / ‖W + s·B·A‖_row)·(W + s·B·A), a LoRA for the direction and μ (m,) for the length of rows.

Source: Liu et al., arXiv 2402.09353, eq. 5 and 11: the row norm is held constant in the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.adapters.base import Adapter, Export, Layer, require_fit
from lowrank.adapters.frozen import frozen_weight, needs_weight, stored_weight
from lowrank.adapters.lora import LoRA
from lowrank.adapters.pairs import RESIDUAL, initial_pair
from lowrank.adapters.settings import dropout_of, scaling_from
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


class DoRA(Adapter):
    """ΔW = diag(μ / ‖W + s·B·A‖_row)·(W + s·B·A) − W."""

    peft_type: ClassVar[str] = "LORA"
    prefix: ClassVar[str] = "lora_"
    export: ClassVar[Export] = "merge-only"
    takes_split: ClassVar[frozenset[str]] = frozenset({"low_rank"})

    def __init__(self, a: Tensor, b: Tensor, magnitude: Tensor, scaling: float, dropout: float = 0.0) -> None:
        """Args: a: (r, n). b: (m, r). magnitude: μ (m,). scaling: s. dropout: on the input while training."""
        require_fit("DoRA", A=(a, "rn"), B=(b, "mr"), magnitude=(magnitude, "m"))
        super().__init__((b.shape[0], a.shape[1]), scaling, dropout)
        self.lora_a = nn.Parameter(a)
        self.lora_b = nn.Parameter(b)
        self.magnitude = nn.Parameter(magnitude)
        self._row_squares: tuple[Tensor, Tensor] | None = None

    @classmethod
    def initial(cls, layer: Layer, config: AdapterConfig) -> Self:
        """A and B by `config.init`; μ so that nothing but s·B·A changes.

        Raises:
            AdapterError: an init that takes its pair out of the base, which would have to change μ too.
        """
        if config.init in RESIDUAL:
            raise AdapterError(
                f"initialise {layer.what}: DoRA does not start from init = {config.init!r}. "
                "Set finetune.adapter.init to split, kaiming, gaussian or orthogonal."
            )
        a, b, scaling = initial_pair(layer, config)
        return cls(a, b, (layer.weight().float() + scaling * (b @ a)).norm(dim=1), scaling, config.lora_dropout)

    @property
    def r(self) -> int:
        """Rank of B·A."""
        return int(self.lora_a.shape[0])

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """diag(μ/‖·‖)·(W + s·B·A)·x + b for y = W x + b: the bias is not scaled."""
        dropped = self.dropped(x)
        # As in PEFT and the authors' code, the dropout acts on all that the magnitude scales.
        product = y if dropped is x else base(dropped)
        bias = getattr(base, "bias", None)
        if bias is not None:
            product = product - bias
        norms = self.row_norms(base)
        gain = (self.magnitude / norms).to(y.dtype)
        pair = F.linear(F.linear(dropped, self.lora_a.to(x.dtype)), self.lora_b.to(x.dtype)) * self.scaling
        return y + (gain - 1) * product + gain * pair

    @torch.no_grad()
    def gain_and_low_rank(self, base: nn.Module) -> tuple[Tensor, Tensor, Tensor]:
        """g = μ/‖W + s·B·A‖_row, g·s·B and A."""
        gain = self.magnitude / self.row_norms(base)
        return gain, (gain * self.scaling)[:, None] * self.lora_b, self.lora_a

    @torch.no_grad()
    def row_norms(self, base: nn.Module) -> Tensor:
        """‖W + s·B·A‖ of every row, (m,), without the matrix: ‖W‖² + 2s⟨WAᵀ, B⟩ + s²⟨B(AAᵀ), B⟩.

        ‖W‖² is computed once per base, and W Aᵀ (m, r) is one thin product. Rows of zeros have norm 1.
        """
        a, b, s = self.lora_a, self.lora_b, self.scaling
        weight, stored = frozen_weight(base, self.shape, "DoRA").to(a.dtype), stored_weight(base)
        if self._row_squares is None or self._row_squares[0] is not stored:
            self._row_squares = (stored, weight.square().sum(1))
        squares = self._row_squares[1].to(a) + 2 * s * ((weight @ a.T) * b).sum(1) + s**2 * ((b @ (a @ a.T)) * b).sum(1)
        return torch.where(squares > 0, squares, 1.0).sqrt()

    def delta(self, x: Tensor) -> Tensor:
        """Raises: AdapterError: the change depends on the base; `forward` is given it."""
        del x
        raise needs_weight("DoRA", self.shape)

    def delta_weight(self, weight: Tensor | None = None) -> Tensor:
        """ΔW (m, n) over `weight`, by the dense formula."""
        if weight is None:
            raise needs_weight("DoRA", self.shape)
        changed = weight + self.scaling * (self.lora_b @ self.lora_a)
        norms = changed.detach().norm(dim=1)
        return (self.magnitude / torch.where(norms > 0, norms, 1.0))[:, None] * changed - weight

    def tensors(self) -> dict[str, Tensor]:
        """A, B and μ by PEFT's names."""
        return {
            "lora_A.weight": self.lora_a.detach(),
            "lora_B.weight": self.lora_b.detach(),
            "lora_magnitude_vector": self.magnitude.detach(),
        }

    @classmethod
    def from_tensors(cls, module: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Self:
        """A stored pair and its μ."""
        a, b = tensors["lora_A.weight"].float(), tensors["lora_B.weight"].float()
        scaling = scaling_from(config, module, len(a))
        return cls(a, b, tensors["lora_magnitude_vector"].float(), scaling, dropout_of(config))

    @classmethod
    def peft_settings(cls, config: AdapterConfig) -> dict[str, Any]:
        """As `peft.LoraConfig` names them."""
        return LoRA.peft_settings(config) | {"use_dora": True}
