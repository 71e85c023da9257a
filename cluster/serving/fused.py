"""Passes of Llama and its kin without transformers' modules, over tokens that lie side by side whatever their requests.

Prompts and single tokens share a pass, and nothing is padded: one product for q, k and v, one for gate and up, and a
compiled attention over every token's own past. A model is taken for one of the kin by its type; whether the passes give
its logits is tried out before they are used (`trial`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.serving.steps import Chunk, Rows, doubled, grown, mix_of, refuse_unknown, windows_of
from lowrank.inject import AdaptedLinear, SavedModule, speakers
from lowrank.linear import joined
from lowrank.mixing import Mix, MixedLayers

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

_KIN = ("llama", "mistral", "qwen2")
#: Tokens of a chunk from which a library's attention is faster than the compiled one, which takes each for itself.
_LONG = 48
#: Columns that a cache has at first.
_FIRST_COLUMNS = 64


def may_fuse(model: PreTrainedModel) -> bool:
    """Whether `FusedSteps` may be tried."""
    import torch

    from lowrank.kernels import attend

    config = model.config
    known = config.model_type in _KIN and config.hidden_act == "silu"
    return known and model.device.type == "cpu" and model.dtype == torch.float32 and attend.is_available()


class Joined:
    """Linear layers of one input as one product where their bases can be joined, each with its own adapters."""

    def __init__(self, modules: list[nn.Module]) -> None:
        """Args: modules: adapted or not; see `lowrank.linear.joined` for what becomes of their bases."""
        adapted = [module if isinstance(module, AdaptedLinear) else None for module in modules]
        self._bases: list[Any] = [module.base if isinstance(module, AdaptedLinear) else module for module in modules]
        self.sizes = [base.out_features for base in self._bases]
        self._mixed = MixedLayers(adapted, self.sizes)
        self._whole = joined(self._bases)

    def __call__(self, x: Tensor, mix: Mix | None) -> Tensor:
        """y (rows, Σ m) for x (rows, n)."""
        import torch

        y: Tensor
        y = torch.cat([base(x) for base in self._bases], dim=-1) if self._whole is None else self._whole(x)
        if mix is not None:
            self._mixed.change(y, x, mix)
        return y


@dataclass(frozen=True)
class _Layer:
    before: nn.Module
    qkv: Joined
    out: nn.Module
    after: nn.Module
    gate_up: Joined
    down: nn.Module


class PastCache:
    """Keys (rows, kv heads, size, columns) and values (rows, kv heads, columns, size) of every layer.

    Rows and columns double as they are needed.
    """

    def __init__(self, layers: int, kv_heads: int, size: int) -> None:
        import torch

        made = [(1, kv_heads, size, _FIRST_COLUMNS), (1, kv_heads, _FIRST_COLUMNS, size)]
        self.layers = [(torch.zeros(made[0]), torch.zeros(made[1])) for _ in range(layers)]

    def reserve(self, rows: int, columns: int) -> None:
        """Make room. Layer by layer, so that no two sizes of the whole are there at once."""
        for index, (keys, values) in enumerate(self.layers):
            held_rows, _, held_columns, _ = values.shape
            if held_rows < rows or held_columns < columns:
                shape = doubled(held_rows, rows), doubled(held_columns, columns)
                self.layers[index] = grown(keys.mT, *shape).mT.contiguous(), grown(values, *shape)


class _Pass:
    """The tokens of one pass, side by side, those of short chunks first."""

    def __init__(self, chunks: Sequence[Chunk], rows: Rows, before: Mix | None) -> None:
        import torch

        from lowrank.kernels.attend import Tokens

        self.chunks = sorted(chunks, key=lambda chunk: len(chunk.tokens))
        ids: list[int] = []
        own_rows: list[int] = []
        columns: list[int] = []
        names: list[str | None] = []
        self.long: list[tuple[slice, int, int]] = []
        for chunk in self.chunks:
            count, row = len(chunk.tokens), rows.of(chunk.request)
            if count >= _LONG:
                self.long.append((slice(len(ids), len(ids) + count), row, chunk.start))
            ids += chunk.tokens
            own_rows += [row] * count
            columns += range(chunk.start, chunk.start + count)
            names += [chunk.adapter] * count
        self.ids, self.columns = torch.tensor(ids), max(columns) + 1
        self.at = Tokens(torch.tensor(own_rows), torch.tensor(columns), self.columns)
        self.short = self.long[0][0].start if self.long else len(ids)
        self.mix = mix_of(names, before)

    def last_tokens(self) -> list[int]:
        """Of every chunk."""
        ends, end = [], 0
        for chunk in self.chunks:
            end += len(chunk.tokens)
            ends.append(end - 1)
        return ends


class FusedSteps:
    """`Steps` in one pass."""

    together = True

    def __init__(self, model: PreTrainedModel, rows: int) -> None:
        """Args: as of `BatchedSteps`.

        Raises:
            ValueError: as `BatchedSteps`, or the layers see by more than one mask.
        """
        from lowrank.kernels.attend import Heads

        refuse_unknown(model)
        windows = windows_of(model.config.get_text_config(decoder=True))
        if len(windows) > 1:
            raise ValueError(f"kinds of layers: {sorted(windows)}")
        self._inner: Any = model.model
        self._head: Any = model.get_output_embeddings()
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
        attention = self._inner.layers[0].self_attn
        size, (wide, narrow, _) = int(attention.head_dim), self._layers[0].qkv.sizes
        [window] = windows.values()
        self._heads = Heads(wide // size, narrow // size, size, float(attention.scaling), window)
        self._speakers = [speaker for speaker in speakers(model) if speaker is not self._head]
        self._rows = Rows(rows)
        self._mix: Mix | None = None
        self._cache = self._new_cache()

    def _new_cache(self) -> PastCache:
        return PastCache(len(self._layers), self._heads.kv_heads, self._heads.size)

    def step(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """See `Steps`."""
        for chunk in chunks:
            self._rows.open(chunk.request)
        made = _Pass(chunks, self._rows, self._mix)
        self._mix = made.mix
        self._cache.reserve(int(made.at.rows.max()) + 1, made.columns)
        found = self._logits(made)
        by_request = {chunk.request: own for chunk, own in zip(made.chunks, found, strict=True)}
        return [by_request[chunk.request] for chunk in chunks]

    def release(self, request: int) -> None:
        """See `Steps`."""
        if self._rows.release(request):
            self._cache = self._new_cache()

    def _logits(self, made: _Pass) -> Tensor:
        """Logits (chunks, vocabulary) after the last token of every chunk."""
        import torch
        from torch.nn import functional as F

        mix = made.mix if made.mix.rows else None
        for speaker in self._speakers:
            speaker.active = mix
        x: Tensor = self._inner.embed_tokens(made.ids)
        turns = tuple(turn[0] for turn in self._inner.rotary_emb(x, position_ids=made.at.columns[None]))
        for layer, cache in zip(self._layers, self._cache.layers, strict=True):
            x = x + layer.out(self._attend(layer.qkv(_norm(layer.before, x), mix), turns, cache, made))
            gate, up = torch.split(layer.gate_up(_norm(layer.after, x), mix), layer.gate_up.sizes, dim=-1)
            x = x + layer.down(F.silu(gate).mul_(up))
        x = _norm(self._inner.norm, x)
        last = x if len(x) == len(made.chunks) else x[made.last_tokens()]
        if isinstance(self._head, AdaptedLinear | SavedModule):
            self._head.active = Mix(tuple(chunk.adapter for chunk in made.chunks)) if mix is not None else None
        logits: Tensor = self._head(last)
        return logits

    def _attend(self, qkv: Tensor, turns: Any, cache: tuple[Tensor, Tensor], made: _Pass) -> Tensor:
        """What the heads say (tokens, heads · size); keys and values go into the cache."""
        import torch

        from lowrank.kernels import attend

        attend.keep(self._heads, qkv, turns, cache, made.at)
        if not made.long:
            return attend.attend(self._heads, qkv, cache, made.at)
        said = [attend.attend(self._heads, qkv[: made.short], cache, made.at)] if made.short else []
        said += [self._attend_long(qkv[tokens], cache, row, start) for tokens, row, start in made.long]
        return torch.cat(said)

    def _attend_long(self, qkv: Tensor, cache: tuple[Tensor, Tensor], row: int, start: int) -> Tensor:
        """The same for many tokens of one request."""
        import torch
        from torch.nn import functional as F

        heads, count = self._heads, len(qkv)
        query = qkv[:, : heads.heads * heads.size].view(1, count, heads.heads, heads.size).transpose(1, 2)
        keys, values = (held[row : row + 1, :, : start + count] for held in (cache[0].mT, cache[1]))
        ages = torch.arange(start, start + count)[:, None] - torch.arange(start + count)
        mask = (ages >= 0) & (ages < (heads.window or start + count))
        said = F.scaled_dot_product_attention(query, keys, values, mask, scale=heads.scale, enable_gqa=True)
        return said[0].transpose(0, 1).reshape(count, -1)


def _norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm; a trained copy speaks for itself."""
    from lowrank.kernels import attend

    if isinstance(module, SavedModule):
        found: Tensor = module(x)
        return found
    held: Any = module
    return attend.rms_norm(x, held.weight, held.variance_epsilon)
