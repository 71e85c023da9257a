"""Frozen base layers: what an adapter sits on. `nn.Linear` is the dense one; `NF4Linear` keeps packed 4-bit bytes.

An adapter only calls the base layer and asks it for `dense_weight`; it never learns how the weight is stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lowrank.quantization.nf4 import NF4Tensor


class _NF4Product(torch.autograd.Function):
    """x Wᵀ that dequantizes W again in the backward pass instead of keeping it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: NF4Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dense_weight(x.dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.layer.dense_weight(grad.dtype), None


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
        self.register_buffer("packed", expanded.packed)
        self.register_buffer("absmax", expanded.absmax)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dense_weight(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """W (m, n) dequantized to `dtype`."""
        return dataclasses.replace(self._meta, packed=self.packed, absmax=self.absmax).dequantize(dtype)

    def forward(self, x: Tensor) -> Tensor:
        """y (..., m) = x (..., n) Wᵀ + b."""
        y: Tensor = _NF4Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias


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
