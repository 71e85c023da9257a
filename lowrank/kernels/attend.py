"""Attention of tokens that belong to several requests, each over its own past in one cache; fp32 on a CPU."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank.kernels.build import kernel

#: Numbers of keys and values that make another thread worth its start.
_NUMBERS_PER_THREAD = 2**18


@dataclass(frozen=True)
class Heads:
    """Shapes of an attention: `heads` of `size`, `kv_heads` of keys; `window`: tokens that are seen, None for all."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int | None = None


def is_available() -> bool:
    """Whether there is a compiled kernel."""
    return kernel() is not None


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of a pass belong: the cache's row and column of each, and the longest past among them."""

    rows: Tensor
    columns: Tensor
    most: int


def keep(heads: Heads, qkv: Tensor, turns: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor], at: Tokens) -> None:
    """Turn q and k of qkv (tokens, (heads + 2 kv_heads) · size) in place; put k and v into the cache.

    Args:
        turns: cosine and sine (tokens, size) of the rotary embedding.
        cache: keys (rows, kv_heads, size, columns), values (rows, kv_heads, columns, size); columns of 16, contiguous.
    """
    compiled = kernel()
    assert compiled is not None
    compiled.keep_tokens(
        *_sizes(len(qkv), heads),
        ctypes.c_int64(qkv.stride(0)),
        *_pointers(qkv, *turns, *cache),
        ctypes.c_int64(cache[1].shape[2]),
        *_pointers(at.rows, at.columns),
        1 if len(qkv) < 64 else torch.get_num_threads(),
    )


def attend(heads: Heads, qkv: Tensor, cache: tuple[Tensor, Tensor], at: Tokens) -> Tensor:
    """softmax(scale q Kᵀ) V (tokens, heads · size) of tokens whose q was turned, each over the columns up to its own.

    Raises:
        MemoryError: there was none for the scores.
    """
    compiled = kernel()
    assert compiled is not None
    said = qkv.new_empty(len(qkv), heads.heads * heads.size)
    work = len(qkv) * at.most * heads.kv_heads * heads.size
    failed = compiled.attend_tokens(
        *_sizes(len(qkv), heads),
        ctypes.c_int64(heads.window or 0),
        ctypes.c_float(heads.scale),
        ctypes.c_int64(qkv.stride(0)),
        *_pointers(qkv, *cache),
        ctypes.c_int64(cache[1].shape[2]),
        *_pointers(at.rows, at.columns, said),
        max(1, min(torch.get_num_threads(), work // _NUMBERS_PER_THREAD)),
    )
    if failed:
        raise MemoryError(f"attend to {at.most} tokens: no memory for the scores")
    return said


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight · x / √(mean(x²) + eps) for x (tokens, n)."""
    compiled = kernel()
    assert compiled is not None
    x, y = x.contiguous(), torch.empty_like(x)
    sizes = [ctypes.c_int64(size) for size in x.shape]
    compiled.normalize_rows(*sizes, *_pointers(x, weight), ctypes.c_float(eps), *_pointers(y))
    return y


def _sizes(tokens: int, heads: Heads) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(size) for size in (tokens, heads.heads, heads.kv_heads, heads.size)]


def _pointers(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
