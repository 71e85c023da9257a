"""What leaves the house: an adapter as plain LoRA, or merged into a whole model that transformers loads by itself."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.model import ModelSource, add_to_weights, build_dense, initial_adapters, load_tokenizer

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedModel

    from cluster.tokens import TokenTable
    from lowrank.adapters.base import Adapter

#: Held-out rows that an export is scored on, and how many at a time.
_LOSS_ROWS, _BATCH = 64, 8
Onto = Literal["trained", "original"]


def export_lora(
    source: ModelSource, adapter_dir: Path, out: Path, max_rank: int | None, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Write trained adapters of any family as LoRA over the original model, in PEFT's format.

    Modules that were trained whole go with it as they are.

    Args:
        source: shards, splits and configuration of the run.
        adapter_dir: the trained adapter, in PEFT's format.
        out: directory to write.
        max_rank: largest rank, >= 1; larger changes are cut. None exports exactly.
        facts: goes under `rankline` in the configuration.

    Returns:
        num_layers, rank, and the least and mean share of the change's energy that was kept.

    Raises:
        AdapterError: the family is merge-only, or has no small exact LoRA and `max_rank` is not given.
    """
    from lowrank.adapters.export import as_lora
    from lowrank.adapters.peft_format import load_adapter, load_saved_modules, save_adapter
    from lowrank.config import AdapterConfig

    trained = load_adapter(adapter_dir, source.base_facts)
    made = as_lora(trained, _taken_out_of_weights(source, trained), max_rank)
    flipped = any(spec.transposed for spec in source.shard_set.architecture.linears)
    plain = AdapterConfig(method="lora", r=made.rank, lora_alpha=float(made.rank), init="kaiming")
    told = {**facts, "base": "dense", "fan_in_fan_out": flipped}
    save_adapter(out, made.layers, plain, told, load_saved_modules(adapter_dir))
    energies = list(made.retained_energy.values())
    return {
        "num_layers": len(made.layers),
        "rank": made.rank,
        "retained_energy_min": min(energies),
        "retained_energy_mean": sum(energies) / len(energies),
    }


def _taken_out_of_weights(source: ModelSource, trained: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """The layers whose ΔW before training was part of the original weight, before training."""
    from lowrank.adapters.pairs import RESIDUAL

    if not any(adapter.takes_split for adapter in trained.values()):
        return {}
    if source.adapter.init in RESIDUAL:
        return initial_adapters(source)
    if source.adapter.init != "split" or source.base != "nf4":
        return {}
    parts = {module for module, split in source.split_set.items() if split.part is not None}
    return {module: adapter for module, adapter in initial_adapters(source).items() if module in parts} if parts else {}


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

    shards, splits = source.shard_set, source.split_set
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
    _put_saved(model, adapter_dir)
    model.save_pretrained(out)
    load_tokenizer(source.shard_set).save_pretrained(out)
    return {
        "num_layers": len(changes),
        "change": sum(moved) / len(moved),
        "requantization_error": sum(requantized) / len(requantized),
    }


def export_base(source: ModelSource, out: Path, dtype: torch.dtype) -> None:
    """Write the base that adapters were trained over as a dense model directory, tokenizer and configuration with it.

    Args:
        source: shards, splits and configuration of the run.
        out: directory to write.
        dtype: of the weights; a quantized base is dequantized, Q alone without the part that was split off.
    """
    import torch

    from lowrank.adapters.pairs import RESIDUAL

    shards = source.shard_set
    model = build_dense(shards, dtype)
    if source.base == "nf4":
        flipped = {spec.name for spec in shards.architecture.linears if spec.transposed}
        for module, split in source.split_set.items():
            base = torch.zeros(split.shape) if split.residual is None else split.residual.dequantize(torch.float32)
            layer: Any = model.get_submodule(module)
            layer.weight = torch.nn.Parameter((base.T if module in flipped else base).to(dtype).contiguous(), False)
    elif source.adapter.init in RESIDUAL:
        add_to_weights(model, shards, {m: -a.delta_weight() for m, a in initial_adapters(source).items()})
    model.save_pretrained(out)
    load_tokenizer(source.shard_set).save_pretrained(out)


def losses_over_original(source: ModelSource, adapter_dir: Path, exported: Path, tokens: Path) -> dict[str, Any]:
    """What an export over the original dense weights costs where training ran over quantized ones.

    Args:
        source: shards, splits and configuration of the run.
        adapter_dir: the trained adapter, in PEFT's format.
        exported: what `export_lora` or `export_merged` wrote.
        tokens: `tokens.parquet` of held-out rows, of which the first 64 are read.

    Returns:
        loss_trained of the model that was trained (Q + s·B·A), loss_exported of what was exported, both in nats per
        answer token in fp32, and loss_rows, the number of rows.
    """
    import torch

    from cluster.model import build_adapted
    from cluster.tokens import TokenTable

    table = TokenTable.read(tokens).head(_LOSS_ROWS)
    trained = _mean_loss(build_adapted(source, torch.float32, {"trained": adapter_dir}), table)
    return {
        "loss_trained": trained,
        "loss_exported": _mean_loss(_over_original(source, exported), table),
        "loss_rows": len(table),
    }


def _over_original(source: ModelSource, exported: Path) -> PreTrainedModel:
    """The model that whoever gets the export will run."""
    import torch

    from lowrank.adapters.peft_format import CONFIG, load_adapter

    if not (exported / CONFIG).is_file():
        from transformers import AutoModelForCausalLM

        merged: PreTrainedModel = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        return merged.eval()
    shards = source.shard_set
    model = build_dense(shards, torch.float32)
    layers = load_adapter(exported)
    add_to_weights(model, shards, {module: layer.delta_weight().detach() for module, layer in layers.items()})
    _put_saved(model, exported)
    return model


def _mean_loss(model: PreTrainedModel, table: TokenTable) -> float:
    """Mean NLL of the answer tokens, in nats."""
    import torch

    from cluster.answer_loss import answer_nll
    from cluster.batches import collate
    from cluster.unpack import unpack_if_room

    unpack_if_room(model, torch.float32)
    rows, nll = sorted(range(len(table)), key=table.lengths.__getitem__), 0.0
    with torch.no_grad():
        for start in range(0, len(rows), _BATCH):
            nll += float(answer_nll(model, collate([[row] for row in rows[start : start + _BATCH]], table)))
    return nll / sum(table.num_answer_tokens)


def _put_saved(model: PreTrainedModel, adapter_dir: Path) -> None:
    """Put in the modules that were trained whole; an output head that was tied to the embedding no longer is."""
    import torch

    from lowrank.adapters.peft_format import load_saved_modules

    for module, named in load_saved_modules(adapter_dir).items():
        layer = model.get_submodule(module)
        for name, tensor in named.items():
            parent, _, leaf = name.rpartition(".")
            layer.get_submodule(parent)._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if model.config.tie_word_embeddings and head is not None and head.weight is not embedding.weight:
        model.config.tie_word_embeddings = False


def _merged(source: ModelSource, adapter_dir: Path, onto: Onto) -> Any:
    """(module, split, W) -> the merged weight (m, n) in fp32."""
    from lowrank.adapters.peft_format import load_adapter

    trained = load_adapter(adapter_dir, source.base_facts)
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
