"""Initial LoRA factors from a split W ≈ Q + L·R, exact for every scaling: B = L/√s, A = R/√s, so s·B·A = L·R."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.adapters.lora import LoRA
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError


def initial_lora(
    name: str, shape: tuple[int, int], left: Tensor | None, right: Tensor | None, config: AdapterConfig, index: int
) -> LoRA:
    """The adapter of one layer before training.

    Args:
        name: Module, for messages.
        shape: (m, n) = (out_features, in_features).
        left: L (m, k) of the split, or None (plain NF4, or a tensor that fell back).
        right: R (k, n) of the split, or None.
        config: Rank, alpha and initialisation. A larger r than k is filled with a Kaiming A and a zero B.
        index: Position of the layer; the Kaiming draw depends on `config.seed` and this alone.

    Raises:
        AdapterError: r is smaller than the rank k that the residual was quantized against.

    Source: QPiSSA, arXiv 2404.02948, section 3; the division by s is what keeps it exact for α ≠ r.
    """
    m, n = shape
    k = 0 if left is None else int(left.shape[1])
    r = config.r or k or 16
    if r < k:
        raise AdapterError(
            f"initialise the adapter of {name} ({m}x{n}): r = {r} is smaller than the rank {k} of the split that its "
            f"residual was quantized against. Set finetune.adapter.r >= {k} (or null), or decompose.rank <= {r}."
        )
    scaling = config.scaling(r)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + index)
    adapter = LoRA.kaiming(m, n, r, scaling, generator)
    adapter.dropout = config.lora_dropout
    if left is not None and right is not None:
        with torch.no_grad():
            adapter.lora_a[:k] = right / scaling**0.5
            adapter.lora_b[:, :k] = left / scaling**0.5
    return adapter
