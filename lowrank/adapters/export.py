"""Adapters of any family as plain LoRA over the original dense model, which stock PEFT and vLLM load.

What an adapter changed is ΔW(trained) − ΔW(start): for families that start at zero their ΔW, for those that start from
the part that was split off before quantization the change since. Where both are LoRAs exactly, so is their difference,
of both ranks together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lowrank.adapters.base import Adapter, cut
from lowrank.adapters.lora import LoRA
from lowrank.errors import AdapterError
from lowrank.factors import LoRAExport
from lowrank.factors.base import factored_svd

#: Ranks that vLLM's kernels take; an export is padded with zeros to the next one.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True)
class Exported:
    """LoRA layers of one common rank and scaling 1 (lora_alpha = r), and what cutting cost.

    Attributes:
        layers: module -> LoRA.
        rank: the common rank, one of `VLLM_RANKS` where it is at most 512.
        retained_energy: module -> ‖s·B·A‖² / ‖change‖² in [0, 1]; 1 where nothing was cut.
    """

    layers: dict[str, LoRA]
    rank: int
    retained_energy: dict[str, float]


def as_lora(
    trained: Mapping[str, Adapter], initial: Mapping[str, Adapter] | None = None, max_rank: int | None = None
) -> Exported:
    """The change of every layer as LoRA factors of one common rank.

    Args:
        trained: module -> adapter, of any family.
        initial: those layers before training that did not start at ΔW = 0; None where all did.
        max_rank: largest rank, >= 1; larger changes are cut to the best of this rank. None exports exactly.

    Raises:
        AdapterError: `max_rank` below 1; a family that is merge-only; no small exact LoRA and no `max_rank`.

    Source: PiSSA, arXiv 2404.02948, appendix on converting to LoRA: s(BA − B₀A₀) = s[B, −B₀][A; A₀].
    """
    if max_rank is not None and max_rank < 1:
        raise AdapterError(f"export {len(trained)} adapters to LoRA: max_rank = {max_rank}. Set max_rank >= 1.")
    changes = {
        module: _change(module, adapter, (initial or {}).get(module), max_rank) for module, adapter in trained.items()
    }
    largest = max(len(change.a) for change in changes.values())
    rank = next((r for r in VLLM_RANKS if r >= largest), largest)
    layers = {
        module: LoRA(_padded(change.a, rank), _padded(change.b.T, rank).T, 1.0) for module, change in changes.items()
    }
    return Exported(layers, rank, {module: change.retained_energy for module, change in changes.items()})


def _change(module: str, trained: Adapter, initial: Adapter | None, max_rank: int | None) -> LoRAExport:
    try:
        if initial is None:
            return trained.to_lora(max_rank)
        now, before = trained.low_rank(), initial.low_rank()
    except AdapterError as error:
        raise AdapterError(f"{module}: {error}") from error
    if now is None or before is None:
        raise AdapterError(
            f"{module}: this {trained.peft_type} started from a part of the weight, and is no LoRA of a rank below "
            f"{min(trained.shape)}, so what it changed is none. Merge it."
        )
    with torch.no_grad():
        left, right = torch.cat([now[0], -before[0]], dim=1), torch.cat([now[1], before[1]])
        most = min(max_rank or len(right), *trained.shape)
        if len(right) <= most:
            return LoRAExport(right.contiguous(), left.contiguous(), 1.0, True)
        return cut(*factored_svd(left, right), most)


def _padded(rows: Tensor, rank: int) -> Tensor:
    """`rows` (r, k) with zero rows up to `rank`."""
    return F.pad(rows, (0, 0, 0, rank - len(rows))).contiguous()
