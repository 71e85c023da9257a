"""Build the four models of a run from what the stages left on disk: dense, nf4, nf4_init and adapter.

Weights are assigned to a model made on the meta device, so that nothing is initialised only to be overwritten.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.architecture import load_config, meta_model
from cluster.artifacts import ShardSet, SplitSet
from cluster.durable import units_at

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from cluster.objects import Mirror
    from lowrank.adapters.base import Adapter
    from lowrank.config import AdapterConfig
    from lowrank.quantization.residual import SplitWeight

Variant = Literal["dense", "nf4", "nf4_init", "adapter"]


@dataclass(frozen=True)
class ModelSource:
    """Where a model's parts lie; small, picklable, the same on every node of the cluster.

    `base` says what the frozen target layers are: `nf4` (the split of `quantize`) or `dense`.
    """

    shards: Path
    splits: Path
    adapter: AdapterConfig
    adapter_dir: Path | None = None
    base: Literal["nf4", "dense"] = "nf4"
    base_facts: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Name and hashes of the base: what adapters trained over it record, and what those loaded onto it must match."""
    mirror: Mirror | None = None
    """Of an object store: the paths above are those that it is mirrored by on each node."""

    @property
    def shard_set(self) -> ShardSet:
        """The weights, config and tokenizer."""
        return ShardSet(self.shards, self.mirror)

    @property
    def split_set(self) -> SplitSet:
        """The packed residuals and what was split off."""
        return SplitSet(self.splits, self.mirror)

    def trained(self) -> Path | None:
        """The directory of the trained adapter, on this machine."""
        if self.adapter_dir is None or self.mirror is None:
            return self.adapter_dir
        return units_at(self.adapter_dir.parents[1], self.mirror).fetch(self.adapter_dir.name)


def compute_dtype(choice: str, device: str) -> torch.dtype:
    """The dtype to compute in: bfloat16 on GPUs that have it, else float32 (half precision crawls on most CPUs)."""
    import torch

    if choice == "auto":
        return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[choice]


def load_tokenizer(shards: Path | ShardSet) -> PreTrainedTokenizerBase:
    """The tokenizer that `shard` kept."""
    from transformers import AutoTokenizer

    found = shards if isinstance(shards, ShardSet) else ShardSet(shards)
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(found.meta_dir))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def build_dense(shards: ShardSet, dtype: torch.dtype, layers: Mapping[str, nn.Module] | None = None) -> PreTrainedModel:
    """The model of a shard set; `layers` replaces modules before their weights would be read."""
    from lowrank.inject import replace_module

    config = load_config(shards.meta_dir)
    model = meta_model(config)
    for name, layer in (layers or {}).items():
        replace_module(model, name, layer)
    _assign(model, shards, dtype)
    _load_buffers(model, shards)
    _materialise_buffers(model)
    model.requires_grad_(False)
    if (shards.meta_dir / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(shards.meta_dir))
    return model.eval()


def _assign(model: PreTrainedModel, shards: ShardSet, dtype: torch.dtype) -> None:
    from torch import nn

    aliases = shards.architecture.aliases
    loaded: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        if not parameter.is_meta:
            continue
        owner = aliases.get(name, name)
        if owner not in loaded:
            tensor = shards.load(owner)
            tensor = tensor.T.contiguous() if shards.tensors[owner].transposed else tensor
            loaded[owner] = nn.Parameter(tensor.to(dtype), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        model.get_submodule(parent)._parameters[leaf] = loaded[owner]


def _load_buffers(model: PreTrainedModel, shards: ShardSet) -> None:
    for name, buffer in list(model.named_buffers()):
        if buffer.is_meta and name in shards.tensors:
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = shards.load(name)


def _materialise_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies, causal masks)."""
    import torch

    with torch.no_grad():
        for module in model.modules():
            if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
                for name, buffer in module.named_buffers(recurse=False):
                    module._buffers[name] = torch.empty_like(buffer, device="cpu")
                model._init_weights(module)


def build_variant(source: ModelSource, variant: Variant, dtype: torch.dtype) -> PreTrainedModel:
    """One of the four models that `evaluate` compares; `adapter` also serves `nf4_init` under the name `init`.

    dense: W. nf4: NF4(W). nf4_init: Q + S, the split before training. adapter: Q + ΔW. Q is 0 where the factors
    replace W.
    """
    shards = source.shard_set
    if variant == "dense":
        return build_dense(shards, dtype)
    if variant == "nf4":
        return build_dense(shards, dtype, _plain_nf4_layers(source))
    return build_adapted(source, dtype, {"init": None} if variant == "nf4_init" else {"adapter": source.trained()})


def build_adapted(source: ModelSource, dtype: torch.dtype, adapters: Mapping[str, Path | None]) -> PreTrainedModel:
    """The base of `source` with named adapters on every target; a path loads one, None makes the initial one.

    The first name is active.
    """
    from lowrank.adapters.pairs import RESIDUAL
    from lowrank.adapters.peft_format import load_adapter, load_saved_modules
    from lowrank.inject import inject
    from lowrank.saved_modules import add_saved, find_modules

    shards = source.shard_set
    model = build_dense(shards, dtype, _nf4_layers(source) if source.base == "nf4" else None)
    named: dict[str, dict[str, Adapter]] = {}
    for name, path in adapters.items():
        made = initial_adapters(source) if path is None else load_adapter(path, source.base_facts)
        for module, adapter in made.items():
            named.setdefault(module, {})[name] = adapter
    if source.adapter.init in RESIDUAL:
        add_to_weights(model, shards, {m: -a.delta_weight() for m, a in initial_adapters(source).items()})
    active = next(iter(adapters))
    inject(model, named, active)
    for name, path in adapters.items():
        untrained = dict.fromkeys(find_modules(model, source.adapter.modules_to_save or ())) if path is None else {}
        add_saved(model, name, untrained if path is None else load_saved_modules(path), active)
    return model.eval()


def add_to_weights(model: nn.Module, shards: ShardSet, changes: Mapping[str, Tensor]) -> None:
    """Add ΔW (m, n) to the dense weights of modules; GPT-2's store the transpose."""
    import torch

    flipped = {spec.name for spec in shards.architecture.linears if spec.transposed}
    with torch.no_grad():
        for module, change in changes.items():
            layer: Any = model.get_submodule(module)
            turned = change.T if module in flipped else change
            # A new tensor: the present one may be a page of the checkpoint.
            layer.weight = torch.nn.Parameter((layer.weight.float() + turned).to(layer.weight.dtype), False)


def _nf4_layers(source: ModelSource) -> dict[str, nn.Module]:
    from lowrank.linear import NF4Linear, ZeroLinear

    shards = source.shard_set
    layers: dict[str, nn.Module] = {}
    for module, split in source.split_set.items():
        bias = _bias(shards, module)
        layers[module] = ZeroLinear(split.shape, bias) if split.residual is None else NF4Linear(split.residual, bias)
    return layers


def _plain_nf4_layers(source: ModelSource) -> dict[str, nn.Module]:
    """NF4(W) made on the spot: cheap to compute, and so never stored."""
    from lowrank.linear import NF4Linear
    from lowrank.quantization.nf4 import quantize_nf4

    shards = source.shard_set
    layers: dict[str, nn.Module] = {}
    for record in source.split_set.records:
        module = record["module"]
        weight = shards.load(f"{module}.weight").float()
        quantized = quantize_nf4(weight, record["block_size"], record["double_quant"])
        layers[module] = NF4Linear(quantized, _bias(shards, module))
    return layers


def _bias(shards: ShardSet, module: str) -> Tensor | None:
    name = f"{module}.bias"
    return shards.load(name).float() if name in shards.tensors else None


def starts_from_part(source: ModelSource) -> bool:
    """Whether the model before training is its base with the initial adapter: a split, a residual in dense weights."""
    from lowrank.adapters.pairs import RESIDUAL

    return source.base == "nf4" or source.adapter.init in RESIDUAL


def initial_adapters(source: ModelSource) -> dict[str, Adapter]:
    """The adapter of every target before training (`finetune.adapter.init`); the same on every call."""
    from lowrank.adapters import registry
    from lowrank.adapters.base import Layer

    shards, use_split = source.shard_set, source.adapter.init == "split" and source.base == "nf4"
    layers = []
    for index, (module, split) in enumerate(source.split_set.items()):
        weight = partial(_base_weight, shards, split, source.base)
        layers.append(Layer(module, split.shape, index, weight, split.part if use_split else None))
    return registry.initial_adapters(layers, source.adapter)


def _base_weight(shards: ShardSet, split: SplitWeight, base: str) -> Tensor:
    """W (m, n) fp32 as the frozen layer holds it."""
    import torch

    if base == "dense":
        name = f"{split.name.removesuffix('.weight')}.weight"
        return shards.load(name).float()
    return torch.zeros(split.shape) if split.residual is None else split.residual.dequantize(torch.float32)


def generation_defaults(model: PreTrainedModel) -> dict[str, Any]:
    """Token ids that end an answer, from the model's own configuration."""
    return {"eos": end_ids(model.generation_config or model.config)}


def end_ids(config: Any) -> list[int]:
    """Token ids that end an answer, as a model's or generation's configuration names them."""
    eos = config.eos_token_id
    return [eos] if isinstance(eos, int) else list(eos or [])
