"""A trained adapter merged into a whole model that transformers loads by itself."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.artifacts import ShardSet, SplitSet
from cluster.model import ModelSource, add_to_weights, build_dense, initial_adapters, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

Onto = Literal["trained", "original"]


def export_merged(source: ModelSource, adapter_dir: Path, out: Path, onto: Onto) -> dict[str, Any]:
    """Write a dense fp32 model directory with the adapter inside, tokenizer and configuration beside it.

    Args:
        source: shards, splits and configuration of the run.
        adapter_dir: the trained adapter, in PEFT's format.
        out: directory to write.
        onto: `trained` adds ΔW to the base that it was trained over, dequantized: the served model. `original` adds
            what training changed to the original dense weights.

    Returns:
        num_layers, the relative Frobenius change ‖merged − W‖ / ‖W‖ (mean over layers), and what quantizing the merged
        weights to NF4 again would cost (likewise).
    """
    import torch

    shards, splits = ShardSet(source.shards), SplitSet(source.splits)
    model = build_dense(shards, torch.float32)
    changes: dict[str, Tensor] = {}
    moved, requantized = [], []
    merged = _merged(source, adapter_dir, onto)
    for module, split in splits.items():
        weight = shards.load(f"{module}.weight").float()
        new = merged(module, split, weight)
        changes[module] = new - weight
        moved.append(_relative(new - weight, weight))
        requantized.append(_relative(_nf4(new) - new, new))
    add_to_weights(model, shards, changes)
    model.save_pretrained(out)
    load_tokenizer(source.shards).save_pretrained(out)
    return {
        "num_layers": len(changes),
        "change": sum(moved) / len(moved),
        "requantization_error": sum(requantized) / len(requantized),
    }


def _merged(source: ModelSource, adapter_dir: Path, onto: Onto) -> Any:
    """(module, split, W) -> the merged weight (m, n) in fp32."""
    from lowrank.adapters.peft_format import load_adapter

    trained = load_adapter(adapter_dir)
    initial = initial_adapters(source) if onto == "original" else {}

    def weight_of(module: str, split: Any, weight: Tensor) -> Tensor:
        import torch

        with torch.no_grad():
            if onto == "original" and module in trained:
                return weight + trained[module].delta_weight(weight) - initial[module].delta_weight(weight)
            if source.base == "nf4" and onto == "trained":
                weight = (
                    torch.zeros(split.shape) if split.residual is None else split.residual.dequantize(torch.float32)
                )
            return weight + trained[module].delta_weight(weight) if module in trained else weight

    return weight_of


def _nf4(weight: Tensor) -> Tensor:
    from lowrank.quantization.nf4 import quantize_nf4

    return quantize_nf4(weight).dequantize()


def _relative(difference: Tensor, whole: Tensor) -> float:
    return float(difference.norm() / whole.norm().clamp(min=1e-30))
