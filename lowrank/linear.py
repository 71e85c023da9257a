"""Frozen base layers: what an adapter sits on. `nn.Linear` is the dense one; `NF4Linear` keeps packed 4-bit bytes.

An adapter only calls the base layer and asks it for `dense_weight`; it never learns how the weight is stored.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.kernels import dense
from lowrank.kernels import nf4 as kernels
from lowrank.quantization.nf4 import NF4Tensor

#: Entries (16 MB in fp32) that a product dequantizes at a time: they are still in the cache when it reads them.
_PANEL = 2**22
_scratch = threading.local()


class _NF4Product(torch.autograd.Function):
    """x Wᵀ, or g W when `transposed`; each is the other's backward pass, which dequantizes W again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear, transposed: bool) -> Tensor:
        ctx.layer, ctx.transposed = layer, transposed
        if not _by_panels(x):
            weight = layer.dense_weight(x.dtype)
            return x @ (weight if transposed else weight.T)
        flat = x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(flat), layer.in_features if transposed else layer.out_features)
        for rows, weight in layer.panels():
            if transposed:
                torch.addmm(y, flat[:, rows], weight, beta=int(rows.start > 0), out=y)
            else:
                torch.mm(flat, weight.T, out=y[:, rows])
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Through `apply`, so that it can be differentiated once more.
        return _NF4Product.apply(grads[0], ctx.layer, not ctx.transposed), None, None  # type: ignore[no-untyped-call]


def _by_panels(x: Tensor) -> bool:
    return x.is_cpu and x.dtype == torch.float32


def _panel_buffer(numel: int) -> Tensor:
    """One buffer per thread, of all layers: nothing may hold it beyond the product that it was filled for."""
    held: Tensor | None = getattr(_scratch, "buffer", None)
    if held is None or held.numel() < numel:
        with torch.inference_mode(False):
            held = _scratch.buffer = torch.empty(numel)
    return held[:numel]


class NF4Linear(nn.Module):
    """A frozen linear layer y = x Wᵀ + b whose W (m, n) is stored as NF4 bytes.

    The packed bytes and their block maxima are buffers, so that they follow `.to(device)` and stay out of ZeRO.
    """

    packed: Tensor
    absmax: Tensor

    def __init__(self, weight: NF4Tensor, bias: Tensor | None = None) -> None:
        """Args: weight: NF4 of shape (m, n). bias: (m,) or None."""
        super().__init__()
        expanded = weight.expand_absmax()
        self.out_features, self.in_features = weight.shape
        self._meta = dataclasses.replace(expanded, packed=torch.empty(0), absmax=torch.empty(0))
        self.block_size = expanded.block_size
        self.register_buffer("packed", expanded.packed)
        self.register_buffer("absmax", expanded.absmax)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (m, n) dequantized to `dtype`."""
        return dataclasses.replace(self._meta, packed=self.packed, absmax=self.absmax).dequantize(dtype)

    def panels(self) -> Iterator[tuple[slice, Tensor]]:
        """W some rows at a time in fp32: (rows, W[rows]); the next panel of this thread overwrites the last one."""
        (m, n), block_size = (self.out_features, self.in_features), self.block_size
        whole_blocks = block_size // math.gcd(n, block_size)
        step = max(_PANEL // n // whole_blocks, 1) * whole_blocks
        for start in range(0, m, step):
            stop = min(start + step, m)
            packed, absmax = self.packed[start * n // 2 :], self.absmax[start * n // block_size :]
            out = _panel_buffer((stop - start) * n).view(stop - start, n)
            yield slice(start, stop), kernels.dequantize(packed, absmax, block_size, out)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) = x (..., n) Wᵀ + b."""
        y = self._few_tokens(x)
        if y is None:
            y = _NF4Product.apply(x, self, False)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias

    def _few_tokens(self, x: Tensor) -> Tensor | None:
        """x Wᵀ straight from the codes where no gradient is asked for and the kernel can; else None."""
        if not _by_panels(x) or (x.requires_grad and torch.is_grad_enabled()):
            return None
        flat = x.reshape(-1, x.shape[-1])
        y = kernels.product(flat, self.packed, self.absmax, self.block_size, self.out_features)
        return None if y is None else y.view(*x.shape[:-1], self.out_features)


class DenseLinear(nn.Linear):
    """`nn.Linear` for inference: few tokens on a CPU take a product that reads W once."""

    @classmethod
    def of(cls, layer: nn.Linear) -> DenseLinear:
        """The same layer, with the same tensors."""
        made = cls(layer.in_features, layer.out_features, bias=False, device="meta")
        made.weight, made.bias = layer.weight, layer.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) = x (..., n) Wᵀ + b."""
        return few_tokens_linear(x, self.weight, self.bias)


def few_tokens_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by the compiled product where no gradient is asked for and it fits."""
    y = None
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        y = dense.product(x.reshape(-1, x.shape[-1]), weight)
    if y is None:
        return F.linear(x, weight, bias)
    y = y.view(*x.shape[:-1], len(weight))
    return y if bias is None else y.add_(bias)


def joined(layers: Sequence[nn.Module]) -> DenseLinear | NF4Linear | None:
    """Linear layers of one input as one, for inference: y (..., Σ m), their outputs one after another.

    Their weights become views of its own, so that none is held twice.

    Returns:
        None where they are not all `nn.Linear`, nor all `NF4Linear` of whole blocks of one size.
    """
    if all(isinstance(layer, nn.Linear) for layer in layers):
        return _joined_dense([layer for layer in layers if isinstance(layer, nn.Linear)])
    packed = [layer for layer in layers if isinstance(layer, NF4Linear)]
    sizes = {layer.block_size for layer in packed}
    if len(packed) < len(layers) or len(sizes) > 1:
        return None
    if any(layer.out_features * layer.in_features % layer.block_size for layer in packed):
        return None
    return _joined_packed(packed)


def _joined_dense(layers: list[nn.Linear]) -> DenseLinear:
    weight, views = _one_after_another([layer.weight.detach() for layer in layers])
    for layer, rows in zip(layers, views, strict=True):
        layer.weight = nn.Parameter(rows, requires_grad=False)
    made = DenseLinear(weight.shape[1], len(weight), bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    made.register_parameter("bias", _joined_bias(layers, weight))
    return made


def _joined_packed(layers: list[NF4Linear]) -> NF4Linear:
    packed, codes = _one_after_another([layer.packed.view(-1, 1) for layer in layers])
    absmax, maxima = _one_after_another([layer.absmax.view(-1, 1) for layer in layers])
    for layer, code, most in zip(layers, codes, maxima, strict=True):
        layer.packed, layer.absmax = code, most.view(-1)
    shape = (sum(layer.out_features for layer in layers), layers[0].in_features)
    whole = NF4Tensor(packed, absmax.view(-1), layers[0].block_size, shape, torch.float32)
    return NF4Linear(whole, _joined_bias(layers, absmax))


def _joined_bias(layers: Sequence[nn.Linear | NF4Linear], like: Tensor) -> nn.Parameter | None:
    if all(layer.bias is None for layer in layers):
        return None
    parts = [like.new_zeros(layer.out_features) if layer.bias is None else layer.bias.detach() for layer in layers]
    return nn.Parameter(torch.cat(parts), requires_grad=False)


def _one_after_another(parts: list[Tensor]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Matrices of one width as rows of one, the one that they are views of already or a new one; and its views."""
    first, sizes = parts[0], [len(part) for part in parts]
    left = first.untyped_storage().nbytes() - first.storage_offset() * first.itemsize
    if first.is_contiguous() and left >= sum(sizes) * first.stride(0) * first.itemsize:
        whole = first.as_strided((sum(sizes), first.shape[1]), first.stride())
        views = torch.split(whole, sizes)
        if all(part.data_ptr() == view.data_ptr() for part, view in zip(parts, views, strict=True)):
            return whole, views
    whole = torch.cat(parts)
    return whole, torch.split(whole, sizes)


class ZeroLinear(nn.Module):
    """y = b: the base of a layer whose weight was replaced by its factors, which the adapter holds alone."""

    def __init__(self, shape: tuple[int, int], bias: Tensor | None = None) -> None:
        """Args: shape: (m, n). bias: (m,) or None."""
        super().__init__()
        self.out_features, self.in_features = shape
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Zeros (m, n)."""
        return torch.zeros(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """b for every x (..., n)."""
        y = x.new_zeros(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def dense_weight(base: nn.Module) -> Tensor:
    """The dense weight (m, n) of a frozen base layer."""
    if isinstance(base, NF4Linear | ZeroLinear):
        return base.dense_weight()
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight.detach()
