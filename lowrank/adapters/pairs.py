"""How a pair A (r, n), B (m, r) starts; s is divided out, so that s·B·A is what the method means for every alpha.

| init | s·B·A at the start | the base must hold |
|---|---|---|
| split | L·R that `quantize` took out (Kaiming A, zero B beyond their rank, and where it fell back) | W − L·R |
| kaiming | 0: A ~ U(±1/√n), B = 0 | W |
| gaussian | 0: A ~ N(0, 1/r²), B = 0 | W |
| orthogonal | not 0: A and B from odd and even rows of one orthogonal matrix | W |
| pissa, milora | U Σ Vᵀ of the r largest, or the r smallest, singular values of W | W − s·B·A |
| olora | the first r columns of Q and rows of R in W = QR | W − s·B·A |
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank.adapters.base import Layer, kaiming
from lowrank.adapters.continued import divided, extended
from lowrank.adapters.settings import rank_of, scaling_for
from lowrank.config import AdapterConfig
from lowrank.errors import AdapterError
from lowrank.factors import LowRankFactors

#: Inits that take s·B·A out of the weight: the frozen base must hold the rest.
RESIDUAL = frozenset({"pissa", "milora", "olora"})


def initial_pair(layer: Layer, config: AdapterConfig) -> tuple[Tensor, Tensor, float]:
    """A (r, n), B (m, r) and s of a layer before training, by `config.init`.

    Raises:
        AdapterError: the rank is larger than min(m, n), smaller than that of the split, or odd for `orthogonal`.

    Source: Kaiming, LoRA (arXiv 2106.09685); orthogonal, as `peft.LoraConfig(init_lora_weights="orthogonal")`; PiSSA,
        arXiv 2404.02948, eq. 2-4; MiLoRA, arXiv 2406.09044, eq. 4; OLoRA, arXiv 2406.01775, section 3.
    """
    (m, n), r = layer.shape, rank_of(layer, config)
    scaling, generator = scaling_for(layer, config, r), layer.generator(config.seed)
    if config.init == "split":
        return (*_from_split(layer, r, scaling, generator), scaling)
    if config.init == "gaussian":
        return torch.randn(r, n, generator=generator) / r, torch.zeros(m, r), scaling
    if config.init == "orthogonal":
        return (*_orthogonal(layer, r, generator), scaling)
    if config.init in RESIDUAL:
        left, right = residual_part(layer.weight().float(), r, config.init)
        return right / scaling**0.5, left / scaling**0.5, scaling
    return kaiming(r, n, generator), torch.zeros(m, r), scaling


def residual_part(weight: Tensor, r: int, init: str) -> tuple[Tensor, Tensor]:
    """L (m, r) and R (r, n) that `init` takes out of W (m, n), with equal Grams for pissa and milora."""
    if init == "olora":
        q, upper = torch.linalg.qr(weight)
        return q[:, :r].contiguous(), upper[:r].contiguous()
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    part = slice(0, r) if init == "pissa" else slice(len(s) - r, None)
    root = s[part].sqrt()
    return (u[:, part] * root).float(), (root[:, None] * vh[part]).float()


def _from_split(layer: Layer, r: int, scaling: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    m, n = layer.shape
    if not isinstance(layer.split, LowRankFactors):
        return kaiming(r, n, generator), torch.zeros(m, r)
    b, a = extended(layer, r, generator, *divided(scaling, layer.split.left, layer.split.right))
    return a, b


def _orthogonal(layer: Layer, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    if r % 2:
        raise AdapterError(f"initialise {layer.what}: orthogonal needs an even rank, got {r}. Set finetune.adapter.r.")
    (m, n), half = layer.shape, r // 2
    q = torch.linalg.qr(torch.randn(r, r, generator=generator))[0]
    a = (torch.randn(n, half, generator=generator) @ q[0::2]).T / 10
    b = torch.randn(m, half, generator=generator) @ q[1::2] / 10
    return a.contiguous(), b
