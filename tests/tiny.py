"""A tiny random model on disk as `shard` and `quantize` would leave it, made without either, in well under a second."""

from __future__ import annotations

import json
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster.artifacts import save_split
from cluster.model import ModelSource
from lowrank.config import AdapterConfig

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<unk>"]
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}


def make_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Save a character-level tokenizer with a ChatML template (or none)."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        unk_token="<unk>",
    )
    fast.chat_template = chat_template
    fast.save_pretrained(directory)
    return directory


def tiny_config(arch: str) -> Any:
    """A transformers config of two layers for `llama`, `llama-32` (heads as wide as vLLM takes), `qwen2`, `mistral` or
    `gpt2`."""
    from transformers import GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

    common = {"vocab_size": 104, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    if arch == "gpt2":
        return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=256, **common)
    if arch == "llama-32":
        return LlamaConfig(**common, **_SIZES | {"hidden_size": 64}, **_HEADS, tie_word_embeddings=False)
    made = {"llama": LlamaConfig, "qwen2": Qwen2Config, "mistral": MistralConfig}[arch]
    return made(**common, **_SIZES, **_HEADS, tie_word_embeddings=arch == "qwen2")


def tiny_model(arch: str = "llama", seed: int = 0) -> Any:
    """A random model whose losses differ visibly between tokens."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(arch), dtype=torch.float32, attn_implementation="sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.2)
    return model.eval()


def make_tiny(
    root: Path,
    arch: str = "llama",
    *,
    base: str = "nf4",
    rank: int = 2,
    adapter: AdapterConfig | None = None,
    seed: int = 0,
) -> ModelSource:
    """Write shards and splits of a tiny model under `root` and return where they lie.

    Args:
        root: New directory.
        arch: as `tiny_config`.
        base: `nf4` or `dense`.
        rank: Rank of the split of every linear layer.
        adapter: Adapter configuration; null takes the split with alpha 4.
        seed: Seed of the weights.
    """
    from cluster.architecture import describe

    model = tiny_model(arch, seed)
    architecture = describe(model.config)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    transposed = {f"{spec.name}.weight" for spec in architecture.linears if spec.transposed}
    tensors = {name: (state[name].T if name in transposed else state[name]) for name in architecture.parameters}
    shards = _write_shards(root / "shards", model.config, tensors, transposed)
    architecture.save(shards / "units" / "meta" / "architecture.json")
    weights = {spec.name: tensors[f"{spec.name}.weight"] for spec in architecture.linears}
    splits = _write_splits(root / "splits", weights, rank)
    config = adapter or AdapterConfig(lora_alpha=4.0)
    return ModelSource(
        shards=shards,
        splits=splits,
        adapter=config,
        base=base,  # type: ignore[arg-type]
        base_facts={"name": "tiny", "base_sha256": f"{seed:064x}", "split_key": f"{seed:020x}", "base": base},
    )


def _write_shards(root: Path, config: Any, tensors: Mapping[str, Tensor], transposed: set[str]) -> Path:
    from safetensors.torch import save_file

    meta = root / "units" / "meta"
    meta.mkdir(parents=True)
    make_tokenizer(meta)
    (meta / "config.json").write_text(config.to_json_string())
    (root / "units" / "shard-0").mkdir()
    file = "units/shard-0/rows.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, root / file)
    rows = [
        {
            "tensor": name,
            "file": file,
            "key": name,
            "row_start": 0,
            "row_stop": tensor.shape[0],
            "dtype": "F32",
            "shape": list(tensor.shape),
            "transposed": name in transposed,
            "nbytes": tensor.numel() * 4,
        }
        for name, tensor in tensors.items()
    ]
    _write_index(root, rows)
    return root


def _write_splits(root: Path, weights: Mapping[str, Tensor], rank: int) -> Path:
    from lowrank.factors import LowRankFactors
    from lowrank.quantization.nf4 import quantize_nf4
    from lowrank.quantization.residual import SplitWeight

    rows = []
    for module, weight in weights.items():
        u, s, vh = torch.linalg.svd(weight.float(), full_matrices=False)
        left, right = u[:, :rank] * s[:rank].sqrt(), s[:rank].sqrt()[:, None] * vh[:rank]
        residual = quantize_nf4(weight - left @ right, 64, True, name=module)
        (root / "units" / module).mkdir(parents=True)
        part = LowRankFactors(left, right)
        save_split(root / "units" / module, SplitWeight(module, residual.shape, residual, part, 0.1, 0.2))
        rows.append({"module": module, "shape": list(weight.shape), "block_size": 64, "double_quant": True})
    _write_index(root, rows)
    return root


def _write_index(root: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    (root / "units" / "index").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([dict(row) for row in rows]), root / "units" / "index" / "index.parquet")


def write_jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arithmetic_rows(count: int, offset: int = 0) -> list[dict[str, str]]:
    """Rows of ragged lengths with something to learn: a sum, spelled with varying padding words."""
    rows = []
    for index in range(offset, offset + count):
        filler = " please" * (index % 5)
        rows.append({"prompt": f"{index} + {index + 1}{filler} = ", "completion": str(2 * index + 1) * (1 + index % 3)})
    return rows


def make_tokens(directory: Path, tokenizer_dir: Path, count: int, offset: int = 0, max_length: int = 64) -> Path:
    """Tokenise `arithmetic_rows`, in this process; the Parquet file."""
    from cluster.config import DataConfig
    from cluster.data import prepare_tokens
    from cluster.tokens import TOKENS_FILE

    file = write_jsonl(directory / "rows.jsonl", arithmetic_rows(count, offset))
    config = DataConfig(train=str(file), heldout=str(file), max_length=max_length)
    prepare_tokens(str(file), tokenizer_dir, config, directory, use_ray=False)
    return directory / TOKENS_FILE
