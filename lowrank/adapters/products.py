"""What the families of structured products (LoHA, ABBA, LoKr, LoKH) share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lowrank.adapters.base import Adapter, Layer
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


class AddedInPlace(Adapter):
    """A family whose ΔW x is so cheap that a second tensor of the size of y would cost as much again."""

    def forward(self, x: Tensor, y: Tensor, base: nn.Module) -> Tensor:
        """As every adapter's; where no gradient is asked for, y itself is changed and given back."""
        del base
        delta = self.delta(self.dropped(x))
        # With gradients y may be a view that autograd guards (an NF4 layer's, or one that ZeRO-3 has hooked).
        return y + delta if torch.is_grad_enabled() else y.add_(delta)


def row_products(a: Tensor, b: Tensor) -> Tensor:
    """A • B (m, r₁r₂) of A (m, r₁) and B (m, r₂): all products within a row (face-splitting product)."""
    return (a[:, :, None] * b[:, None, :]).flatten(1)


def column_products(a: Tensor, b: Tensor) -> Tensor:
    """A ⊙ B (r₁r₂, n) of A (r₁, n) and B (r₂, n): all products within a column (Khatri-Rao product)."""
    return (a[:, None, :] * b[None, :, :]).flatten(0, 1)


def refuse_rslora(layer: Layer, config: AdapterConfig) -> None:
    """Raises: AdapterError: `use_rslora` is set for a family whose file knows no such scaling."""
    if config.use_rslora:
        raise AdapterError(
            f"initialise {layer.what}: {config.method} has no use_rslora; a file of it would load with another "
            "scaling. Set finetune.adapter.use_rslora to false and choose lora_alpha."
        )


def refuse_other_names(cls: type[Adapter], tensors: Mapping[str, Any], shared: Mapping[str, Any]) -> None:
    """Raises: AdapterError: a file holds no tensor under PEFT's names, as those of LyCORIS do not."""
    if not tensors:
        raise AdapterError(
            f"load {cls.peft_type}: no tensor is named base_model.model.<module>.{cls.prefix}...; got "
            f"{sorted(shared)[:2]}. Rename the tensors of a LyCORIS file (its `alpha` ones too) by the modules of the "
            "model."
        )
