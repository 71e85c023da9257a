"""How a family continues the part S that `quantize` split off: s divided out, and wider where its rank is larger."""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.adapters.base import Layer, kaiming
from lowrank.errors import AdapterError


def divided(scaling: float, *factors: Tensor) -> list[Tensor]:
    """The factors of a product in new tensors, s divided out of all alike: s times their product is the old one.

    Args:
        scaling: s > 0.
        factors: of a product that is linear in each.
    """
    return [factor / scaling ** (1 / len(factors)) for factor in factors]


def extended(layer: Layer, r: int, generator: torch.Generator, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """The same product L R with a rank of r: zero columns after those of L (m, k), Kaiming rows after R's (k, n).

    Returns:
        L (m, r) and R (r, n), fp32.

    Raises:
        AdapterError: r is smaller than k.
    """
    k = left.shape[1]
    refuse_smaller(layer, r, k)
    rows, columns = kaiming(r, right.shape[1], generator), torch.zeros(left.shape[0], r)
    rows[:k], columns[:, :k] = right, left
    return columns, rows


def refuse_smaller(layer: Layer, r: int, k: int) -> None:
    """Raises: AdapterError: the rank r cannot hold the rank k of the split."""
    if r < k:
        raise AdapterError(
            f"initialise {layer.what}: r = {r} is smaller than the rank {k} of the split that its residual was "
            f"quantized against. Set finetune.adapter.r >= {k} (or null), or the rank of decompose <= {r}."
        )
