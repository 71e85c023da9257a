"""Read a GGUF file as if it were a Hugging Face checkpoint: names, row order and config of the Llama family.

llama.cpp stores the rows of q and k interleaved for its rotary embedding; here every read undoes that (a wrong order
still answers, with ten times the perplexity). Rows are dequantized on their own, so a read costs only its rows.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank.checkpoint import TensorSpec
from lowrank.errors import CheckpointError
from lowrank.headers import GGUF_ARCHITECTURES, gguf_headers

_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUFCheckpoint:
    """A GGUF file of the llama or qwen2 architecture, read as fp32 under Hugging Face names."""

    def __init__(self, path: Path) -> None:
        """Raises: CheckpointError: not a GGUF file, truncated, or of another architecture."""
        import gguf

        if not path.is_file():
            raise CheckpointError(f"read GGUF {path}: there is no such file. Check model.source.")
        gguf_headers(path)  # the library believes every count that it reads
        try:
            self._reader = gguf.GGUFReader(str(path))
            self._tensors = {_hf_name(tensor.name): tensor for tensor in self._reader.tensors}
        except (ValueError, LookupError, ArithmeticError, OSError) as error:
            raise CheckpointError(f"read GGUF {path}: damaged or truncated ({error}). Download it again.") from error
        self._path = path
        self.architecture = str(self._field("general.architecture"))

    def files(self) -> list[Path]:
        """The GGUF file."""
        return [self._path]

    def specs(self) -> list[TensorSpec]:
        """Every tensor under its Hugging Face name, as fp32, (out_features, in_features)."""
        return [self._spec(name) for name in self._tensors if name != "rope_freqs.weight"]

    def _spec(self, name: str) -> TensorSpec:
        shape = tuple(int(size) for size in reversed(self._tensors[name].shape))
        return TensorSpec(name, torch.float32, shape, str(self._path), 4 * int(np.prod(shape)))

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows [start, stop) dequantized to fp32, in Hugging Face's order."""
        import gguf

        tensor = self._tensors[name]
        order = self._row_order(name)
        data = tensor.data[start:stop] if order is None else tensor.data[order[start:stop]]
        try:
            values = gguf.quants.dequantize(np.ascontiguousarray(data), tensor.tensor_type)
        except (NotImplementedError, ValueError) as error:
            kind = tensor.tensor_type.name
            raise CheckpointError(
                f"read GGUF {self._path}: {name} is stored as {kind} ({error}). Convert it to F16 or Q8_0."
            ) from error
        return torch.from_numpy(np.array(values, dtype=np.float32, copy=True))

    def read_columns(self, name: str, start: int, stop: int) -> Tensor:
        """Columns [start, stop) of a matrix, dequantized to fp32."""
        return self.read_rows(name, 0, self._spec(name).rows)[:, start:stop]

    def _row_order(self, name: str) -> np.ndarray[Any, Any] | None:
        """Source row of every row: q and k go from (pair, half) back to (half, pair) within each head."""
        match = re.search(r"self_attn\.(q|k)_proj", name)
        if not match or not GGUF_ARCHITECTURES[self.architecture][2]:
            return None
        heads = self.config["num_attention_heads" if match[1] == "q" else "num_key_value_heads"]
        rows = self._spec(name).rows
        if heads < 1 or rows % (2 * heads):
            raise CheckpointError(
                f"read GGUF {self._path}: {name} has {rows} rows for {heads} heads. Download the file again."
            )
        return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)

    def _field(self, key: str, default: Any = None) -> Any:
        field = self._reader.get_field(key)
        if field is None:
            if default is None:
                raise CheckpointError(f"read GGUF {self._path}: metadata field {key!r} is missing. Download it again.")
            return default
        return field.contents()

    @cached_property
    def config(self) -> dict[str, Any]:
        """The Hugging Face `config.json` of this model.

        Raises:
            CheckpointError: a field is missing, or no number; or there is no embedding.
        """
        try:
            return self._config()
        except (ValueError, TypeError, LookupError, ArithmeticError) as error:
            raise CheckpointError(
                f"read GGUF {self._path}: its metadata is damaged ({error}). Download it again."
            ) from error

    def _config(self) -> dict[str, Any]:
        arch = self.architecture
        model_type, cls, _ = GGUF_ARCHITECTURES[arch]
        heads = int(self._field(f"{arch}.attention.head_count"))
        hidden = int(self._field(f"{arch}.embedding_length"))
        return {
            "model_type": model_type,
            "architectures": [cls],
            "hidden_size": hidden,
            "intermediate_size": int(self._field(f"{arch}.feed_forward_length")),
            "num_hidden_layers": int(self._field(f"{arch}.block_count")),
            "num_attention_heads": heads,
            "num_key_value_heads": int(self._field(f"{arch}.attention.head_count_kv", heads)),
            "head_dim": int(self._field(f"{arch}.attention.key_length", hidden // heads)),
            "vocab_size": int(self._spec("model.embed_tokens.weight").shape[0]),
            "max_position_embeddings": int(self._field(f"{arch}.context_length")),
            "rms_norm_eps": float(self._field(f"{arch}.attention.layer_norm_rms_epsilon")),
            "rope_theta": float(self._field(f"{arch}.rope.freq_base", 10000.0)),
            "hidden_act": "silu",
            "tie_word_embeddings": "lm_head.weight" not in self._tensors,
            "bos_token_id": int(self._field("tokenizer.ggml.bos_token_id", 1)),
            "eos_token_id": int(self._field("tokenizer.ggml.eos_token_id", 2)),
            "pad_token_id": int(self._field("tokenizer.ggml.padding_token_id", 2)),
            "dtype": "float32",
        }


def _hf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP:
        return f"{_TOP[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match and match[2] in _BLOCK:
        return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{suffix}"
    return name
