"""What a model is made of, read from its config alone: parameter names, linear layers, tied tensors.

Everything after `shard` sees the weight of a linear layer as (out_features, in_features); GPT-2's `Conv1D` stores the
transpose, and only the description made here knows it.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.durable import reading
from cluster.errors import ModelError
from lowrank.reading import read_json

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class LinearSpec:
    """A linear layer: module path, (out_features, in_features), and whether it stores the transpose."""

    name: str
    shape: tuple[int, int]
    transposed: bool
    bias: bool


@dataclass(frozen=True)
class Architecture:
    """Stored tensors (after tying) and linear layers of a causal language model."""

    model_type: str
    base_prefix: str
    parameters: dict[str, tuple[int, ...]]
    aliases: dict[str, str]
    linears: tuple[LinearSpec, ...]

    def save(self, path: Path) -> None:
        """Write as JSON, so that later stages need not build the model to know it."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True))

    @classmethod
    def load(cls, path: Path) -> Architecture:
        """Read what `save` wrote.

        Raises:
            DamagedError: it is not what `save` writes.
        """
        with reading(path):
            data = read_json(path)
            linears = tuple(
                LinearSpec(s["name"], tuple(s["shape"]), s["transposed"], s["bias"]) for s in data["linears"]
            )
            parameters = {name: tuple(shape) for name, shape in data["parameters"].items()}
            return cls(data["model_type"], data["base_prefix"], parameters, data["aliases"], linears)


def load_config(directory: Path) -> PretrainedConfig:
    """The config of a local model directory; code from the checkpoint is never run.

    Raises:
        ModelError: no config.json, or an architecture that transformers has no causal language model for.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    if not (directory / "config.json").is_file():
        raise ModelError(
            f"load model {directory}: config.json is missing. Give a Hugging Face directory or a GGUF file."
        )
    try:
        config = AutoConfig.from_pretrained(str(directory), trust_remote_code=False)
    except Exception as error:  # whatever strange files lead transformers to
        raise ModelError(
            f"load model {directory}: transformers does not know this architecture ({_first_line(error)}). "
            "Models that bring their own code are refused."
        ) from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError(
            f"load model {directory}: model_type {config.model_type!r} has no causal language model in transformers. "
            "Give a decoder such as Llama, Mistral, Qwen2 or GPT-2."
        )
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"load model {directory}: the checkpoint is already quantized. Give the original in float32, bfloat16 or "
            "float16; rankline quantizes it itself."
        )
    return config


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def meta_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model with every tensor on the meta device (no memory)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")


def describe(config: PretrainedConfig) -> Architecture:
    """Describe the architecture of `config`."""
    model = meta_model(config)
    model.tie_weights()
    owners: dict[int, str] = {}
    parameters: dict[str, tuple[int, ...]] = {}
    aliases: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owners:
            aliases[name] = owners[id(parameter)]
        else:
            owners[id(parameter)] = name
            parameters[name] = tuple(parameter.shape)
    skipped = {name for name, _ in model.named_non_persistent_buffers()}
    parameters |= {name: tuple(b.shape) for name, b in model.named_buffers() if name not in skipped}
    return Architecture(
        model_type=str(config.model_type),
        base_prefix=str(model.base_model_prefix),
        parameters=parameters,
        aliases=aliases,
        linears=tuple(_linears(model)),
    )


def _linears(model: PreTrainedModel) -> Iterable[LinearSpec]:
    import torch
    from transformers.pytorch_utils import Conv1D

    head: Any = model.get_output_embeddings()
    for name, module in model.named_modules():
        if module is head:
            continue
        if isinstance(module, Conv1D):
            yield LinearSpec(name, (module.weight.shape[1], module.weight.shape[0]), True, module.bias is not None)
        elif isinstance(module, torch.nn.Linear):
            yield LinearSpec(name, (module.out_features, module.in_features), False, module.bias is not None)


def select_targets(architecture: Architecture, target_modules: str | Sequence[str]) -> list[LinearSpec]:
    """The linear layers that `target_modules` names.

    Args:
        architecture: The model.
        target_modules: `all-linear`, or names: a full path, a last part (`q_proj`) or a regular expression of the path.

    Raises:
        ModelError: a name matches nothing; the message lists the last parts that exist.
    """
    if target_modules == "all-linear":
        return list(architecture.linears)
    chosen: dict[str, LinearSpec] = {}
    for pattern in [target_modules] if isinstance(target_modules, str) else target_modules:
        found = [spec for spec in architecture.linears if _matches(pattern, spec.name)]
        if not found:
            leaves = sorted({spec.name.rpartition(".")[2] for spec in architecture.linears})
            raise ModelError(f"decompose.target_modules: {pattern!r} matches no linear layer. This model has {leaves}.")
        chosen.update((spec.name, spec) for spec in found)
    return [spec for spec in architecture.linears if spec.name in chosen]


def _matches(pattern: str, name: str) -> bool:
    if name == pattern or name.endswith("." + pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ModelError(f"decompose.target_modules: {pattern!r} is not a regular expression ({error}).") from error
