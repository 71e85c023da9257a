"""A decode step of Llama and its kin without transformers' modules: one product for q, k and v, one for gate and up.

Prompts are still read by the model itself. A model is taken for one of the kin by its type; whether the step gives its
logits is tried out before it is used (`steps_for`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.serving.steps import BatchedSteps
from lowrank.inject import AdaptedLinear, Mix, SavedModule
from lowrank.linear import few_tokens_linear

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_KIN = ("llama", "mistral", "qwen2")


def is_llama_like(model: PreTrainedModel) -> bool:
    """Whether `FusedSteps` may be tried."""
    config = model.config
    return config.model_type in _KIN and config.hidden_act == "silu"


class Joined:
    """Linear layers of one input as one product, each with its own adapters.

    Dense weights become views of one tensor, so that nothing is held twice.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        """Args: modules: adapted or not."""
        from torch import nn

        self._adapted = [module if isinstance(module, AdaptedLinear) else None for module in modules]
        self._bases: list[Any] = [module.base if isinstance(module, AdaptedLinear) else module for module in modules]
        self.sizes = [base.out_features for base in self._bases]
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if all(isinstance(base, nn.Linear) for base in self._bases):
            self._join()

    def _join(self) -> None:
        import torch
        from torch import nn

        parts = [base.weight.detach() for base in self._bases]
        self._weight = _joined_before(parts)
        if self._weight is None:
            self._weight = torch.cat(parts)
            for base, rows in zip(self._bases, torch.split(self._weight, self.sizes), strict=True):
                base.weight = nn.Parameter(rows, requires_grad=False)
        if any(base.bias is not None for base in self._bases):
            zeros = (self._weight.new_zeros(size) for size in self.sizes)
            self._bias = torch.cat(
                [empty if base.bias is None else base.bias.detach() for base, empty in zip(self._bases, zeros)]
            )

    def __call__(self, x: Tensor, mix: Mix | None) -> Tensor:
        """y (rows, Σ m) for x (rows, n)."""
        import torch

        if self._weight is None:
            y = torch.cat([base(x) for base in self._bases], dim=-1)
        else:
            y = few_tokens_linear(x, self._weight, self._bias)
        if mix is not None:
            for adapted, part in zip(self._adapted, torch.split(y, self.sizes, dim=-1), strict=True):
                if adapted is not None:
                    adapted.mix_into(part, x, mix)
        return y


def _joined_before(parts: list[Tensor]) -> Tensor | None:
    """The tensor whose rows these are, one after another, if they are."""
    import torch

    first, total = parts[0], sum(len(part) for part in parts)
    whole = first.as_strided((total, first.shape[1]), (first.shape[1], 1)) if _holds(first, total) else None
    if whole is None:
        return None
    together = zip(parts, torch.split(whole, [len(part) for part in parts]), strict=True)
    return whole if all(part.data_ptr() == rows.data_ptr() for part, rows in together) else None


def _holds(first: Tensor, rows: int) -> bool:
    left = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
    return first.is_contiguous() and left >= rows * first.shape[1] * first.itemsize


@dataclass(frozen=True)
class _Layer:
    before: nn.Module
    qkv: Joined
    out: nn.Module
    after: nn.Module
    gate_up: Joined
    down: nn.Module


class FusedSteps(BatchedSteps):
    """`BatchedSteps` with a decode step of its own."""

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        """Args: as of `BatchedSteps`.

        Raises:
            ValueError: the layers see by more than one mask.
        """
        super().__init__(model, rows)
        if len(self._windows) > 1:
            raise ValueError(f"kinds of layers: {sorted(self._windows)}")
        self._inner: Any = model.model
        self._head: Any = model.get_output_embeddings()
        attention = self._inner.layers[0].self_attn
        self._size, self._scale = int(attention.head_dim), float(attention.scaling)
        self._layers = [
            _Layer(
                layer.input_layernorm,
                Joined([layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj]),
                layer.self_attn.o_proj,
                layer.post_attention_layernorm,
                Joined([layer.mlp.gate_proj, layer.mlp.up_proj]),
                layer.mlp.down_proj,
            )
            for layer in self._inner.layers
        ]

    def _step(self, ids: Tensor, positions: Tensor, masks: dict[str, Tensor], mix: Mix | None) -> Tensor:
        import torch
        from torch.nn import functional as F

        [mask] = masks.values()
        x: Tensor = self._inner.embed_tokens(ids[:, 0])
        cos, sin = self._inner.rotary_emb(x, position_ids=positions)
        for index, layer in enumerate(self._layers):
            x = x + layer.out(self._attend(layer.qkv(_norm(layer.before, x), mix), cos, sin, mask, index, layer))
            gate, up = torch.split(layer.gate_up(_norm(layer.after, x), mix), layer.gate_up.sizes, dim=-1)
            x = x + layer.down(F.silu(gate) * up)
        logits: Tensor = self._head(_norm(self._inner.norm, x))
        return logits

    def _attend(self, qkv: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, index: int, layer: _Layer) -> Tensor:
        """What the heads say (rows, heads · size); keys and values go into the cache."""
        import torch
        from torch.nn import functional as F

        rows, (wide, narrow, _) = len(qkv), layer.qkv.sizes
        turned = qkv[:, : wide + narrow].view(rows, -1, self._size)
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat((-second, first), dim=-1) * sin
        kv_heads = narrow // self._size
        query, key = torch.split(turned, [wide // self._size, kv_heads], dim=1)
        value = qkv[:, wide + narrow :].view(rows, kv_heads, 1, self._size)
        keys, values = self._cache.update(key[:, :, None], value, index)
        # The heads that share a key stand in the place of its queries.
        query = query.reshape(rows, kv_heads, -1, self._size)
        said = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=self._scale)
        return said.reshape(rows, wide)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in one operation; a trained copy speaks for itself."""
    from torch.nn import functional as F

    if isinstance(module, SavedModule):
        found: Tensor = module(x)
        return found
    held: Any = module
    return F.rms_norm(x, held.weight.shape, held.weight, held.variance_epsilon)
