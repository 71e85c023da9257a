"""The sizes of a model that nobody has to download: parameters and layers from its config.json, on the meta device."""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.errors import ClusterError
from lowrank.errors import LowRankError
from pipelines.config import PipelineConfig
from pipelines.errors import ConfigError

if TYPE_CHECKING:
    from cluster.architecture import Architecture, LinearSpec

#: Bytes of a stored number by `torch_dtype`.
_ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Families whose size follows from the shapes and their options alone.
_WITHOUT_RANK = ("full", "krona", "kradapter")


@dataclass(frozen=True)
class ModelShape:
    """A model as the stages will meet it.

    Attributes:
        architecture: parameters and linear layers.
        targets: the layers that are decomposed and quantized.
        itemsize: bytes of a stored number.
        hidden_size, num_layers, vocab_size: of the model.
        attention_size: heads times their width.
        adapter_parameters: trained numbers.
        adapter_sizes: the same per tensor.
    """

    architecture: Architecture
    targets: tuple[LinearSpec, ...]
    itemsize: int
    hidden_size: int
    num_layers: int
    vocab_size: int
    attention_size: int
    adapter_sizes: tuple[int, ...]

    @property
    def num_parameters(self) -> int:
        """All stored numbers, tied ones once."""
        return sum(_numel(shape) for shape in self.architecture.parameters.values())

    @property
    def num_linear(self) -> int:
        """Weights of all linear layers but the head."""
        return sum(_numel(spec.shape) for spec in self.architecture.linears)

    @property
    def num_targets(self) -> int:
        """Weights of the layers that are decomposed and quantized."""
        return sum(_numel(spec.shape) for spec in self.targets)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the checkpoint."""
        return self.itemsize * self.num_parameters

    @property
    def adapter_parameters(self) -> int:
        """Trained numbers."""
        return sum(self.adapter_sizes)

    @property
    def num_features(self) -> int:
        """Inputs and outputs of all linear layers, summed (what `estimates.ModelSize` calls so)."""
        return sum(sum(spec.shape) for spec in self.architecture.linears)


def read_shape(path: Path, config: PipelineConfig) -> ModelShape:
    """The shape of the model that a Hugging Face config.json describes, with the pipeline's targets and adapter.

    Args:
        path: the configuration, under any name; no weights are needed beside it.
        config: `decompose.target_modules`, `decompose.rank` and `finetune.adapter`.

    Raises:
        ConfigError: the file is missing, not JSON, of an unknown or quantized architecture, or does not fit the
            pipeline; the message says what to do.
    """
    values = _read(path)
    from cluster.architecture import describe, load_config, select_targets

    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(values))
        try:
            found = load_config(Path(directory))
            architecture = describe(found)
            targets = tuple(select_targets(architecture, config.decompose.target_modules))
            sizes = _adapter_sizes(targets, config)
        except (ClusterError, LowRankError) as error:
            raise ConfigError(f"--model-config {path}: {str(error).replace(directory, 'config')}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
            raise ConfigError(
                f"--model-config {path}: transformers cannot build a {values.get('model_type')!r} model from it "
                f"({type(error).__name__}: {str(error)[:200]}). Give the config.json of the model as it was published."
            ) from error
    heads = found.num_attention_heads
    width = getattr(found, "head_dim", None) or found.hidden_size // heads
    return ModelShape(
        architecture=architecture,
        targets=targets,
        itemsize=_ITEMSIZE.get(str(values.get("torch_dtype") or values.get("dtype")), 4),
        hidden_size=found.hidden_size,
        num_layers=found.num_hidden_layers,
        vocab_size=found.vocab_size,
        attention_size=heads * width,
        adapter_sizes=sizes,
    )


def _read(path: Path) -> dict[str, Any]:
    """The mapping in the file, of a model type that transformers knows."""
    from cluster.known_models import causal_model_types

    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(
            f"--model-config {path}: {error.strerror or error}. Give the config.json of a Hugging Face model."
        ) from error
    except ValueError as error:
        raise ConfigError(
            f"--model-config {path}: not JSON ({error}). Give the config.json of a Hugging Face model."
        ) from error
    kind = values.get("model_type") if isinstance(values, dict) else None
    known = causal_model_types()
    if not isinstance(kind, str) or (known and kind not in known):
        raise ConfigError(
            f"--model-config {path}: model_type is {kind!r}; allowed are the causal language models of transformers "
            "(llama, mistral, qwen2, gpt2 ...). Give the config.json of such a model."
        )
    return dict(values)


def _adapter_sizes(targets: tuple[LinearSpec, ...], config: PipelineConfig) -> tuple[int, ...]:
    """Numbers of every trained tensor of the adapter, made on the meta device."""
    import dataclasses

    import torch

    from lowrank.adapters.base import Layer
    from lowrank.adapters.registry import initial_adapters

    adapter = config.finetune.adapter
    split = adapter.init == "split" and config.finetune.base == "nf4" and config.quantize.method != "nf4"
    rank = adapter.r or (config.decompose.rank if split else None)
    if adapter.method == "lora_xs":  # its start reads W, which nobody has
        return tuple(min(rank or 16, *spec.shape) ** 2 for spec in targets)
    rank = None if adapter.method in _WITHOUT_RANK else rank
    plain = dataclasses.replace(adapter, init="kaiming", r=rank)
    with torch.device("meta"):
        layers = [
            Layer(spec.name, spec.shape, index, _no_weight(spec.shape), None) for index, spec in enumerate(targets)
        ]
        made = initial_adapters(layers, plain)
    trained = {id(p): p.numel() for one in made.values() for p in one.parameters() if p.requires_grad}
    return tuple(trained.values())


def _no_weight(shape: tuple[int, int]) -> Any:
    import torch

    return lambda: torch.empty(shape, device="meta")


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
