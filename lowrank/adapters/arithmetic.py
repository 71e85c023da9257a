"""One adapter from several over the same base: weighted sums, and TIES and DARE against interference.

    linear  Σ wᵢ ΔWᵢ, exact: the factors side by side, rank Σ rᵢ
    svd     the same, cut to the best of rank r
    ties    per layer: keep the largest `density` of every ΔWᵢ, elect a sign per entry, add what agrees
    dare    per layer: keep a random `density` of every ΔWᵢ, divide by it, add

Source: TIES, Yadav et al., arXiv 2306.01708, Algorithm 1; DARE, Yu et al., arXiv 2311.03099, eq. 1-2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lowrank.adapters.base import Adapter, cut
from lowrank.adapters.lora import LoRA
from lowrank.errors import AdapterError
from lowrank.factors import LoRAExport
from lowrank.factors.base import dense_svd, factored_svd

Combination = Literal["linear", "svd", "ties", "dare"]


def combine(
    adapters: Sequence[Mapping[str, Adapter]],
    weights: Sequence[float],
    method: Combination = "linear",
    *,
    rank: int | None = None,
    density: float = 0.2,
    seed: int = 0,
) -> dict[str, LoRA]:
    """Merge adapters over the same base into one LoRA adapter with s = 1.

    Args:
        adapters: module -> adapter, of any additive family; a module that one of them lacks counts as ΔW = 0 there.
        weights: wᵢ, one per adapter.
        method: how ΔWᵢ are added.
        rank: of the result, >= 1; needed by all but `linear`.
        density: share of the entries that `ties` and `dare` keep, in (0, 1].
        seed: of `dare`.

    Returns:
        module -> LoRA (m, n) of scaling 1.

    Raises:
        AdapterError: nothing to merge, as many weights as adapters are not given, a rank or density is out of range,
            shapes differ, or a family cannot be written as LoRA.
    """
    what = f"merge {len(adapters)} adapters by {method}"
    if not adapters or len(weights) != len(adapters):
        raise AdapterError(f"{what}: got {len(weights)} weights. Give one weight per adapter.")
    if method != "linear" and (rank is None or rank < 1):
        raise AdapterError(f"{what}: rank = {rank}. Set rank >= 1.")
    if not 0 < density <= 1:
        raise AdapterError(f"{what}: density = {density}. Set it in (0, 1].")
    modules = sorted({module for adapter in adapters for module in adapter})
    result = {}
    for index, module in enumerate(modules):
        present = [(w, a[module]) for w, a in zip(weights, adapters) if module in a]
        if len({adapter.shape for _, adapter in present}) > 1:
            sizes = ", ".join("x".join(map(str, adapter.shape)) for _, adapter in present)
            raise AdapterError(f"{what}: {module} is {sizes}. Merge adapters of one base.")
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        with torch.no_grad():
            merged = _merged(present, method, rank, density, generator)
        result[module] = LoRA(merged.a, merged.b, 1.0)
    return result


def _merged(
    present: Sequence[tuple[float, Adapter]],
    method: Combination,
    rank: int | None,
    density: float,
    generator: torch.Generator,
) -> LoRAExport:
    if method in ("ties", "dare"):
        assert rank is not None
        deltas = torch.stack([w * adapter.delta_weight().float() for w, adapter in present])
        whole = _ties(deltas, density) if method == "ties" else _dare(deltas, density, generator)
        return cut(*dense_svd(whole), rank)
    pairs = [(w, adapter.to_lora()) for w, adapter in present]
    left = torch.cat([w * pair.b for w, pair in pairs], dim=1)
    right = torch.cat([pair.a for _, pair in pairs])
    if method == "linear" or rank is None or len(right) <= rank:
        return LoRAExport(right, left, 1.0, True)
    return cut(*factored_svd(left, right), rank)


def _ties(deltas: Tensor, density: float) -> Tensor:
    """Trim, elect, and average the entries of the elected sign."""
    keep = max(1, int(density * deltas[0].numel()))
    flat = deltas.flatten(1)
    thresholds = flat.abs().kthvalue(flat.shape[1] - keep + 1, dim=1).values
    trimmed = torch.where(flat.abs() >= thresholds[:, None], flat, 0.0)
    sign = trimmed.sum(0).sign()
    agreeing = torch.where(trimmed.sign() == sign, trimmed, 0.0)
    counts = (agreeing != 0).sum(0).clamp(min=1)
    return (agreeing.sum(0) / counts).reshape(deltas.shape[1:])


def _dare(deltas: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Drop at random and rescale, so that the expectation stays."""
    kept = torch.rand(deltas.shape, generator=generator) < density
    return torch.where(kept, deltas / density, 0.0).sum(0)
